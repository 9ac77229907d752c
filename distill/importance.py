"""Importance sampling of times: those with large losses are drawn more often, and count less for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from fastsample.schedule import VP, Schedule

from . import draws


@dataclass(frozen=True)
class Importance:
    """p ~ sqrt(E[L^2]) over bins of equal shares of the times, and each loss divided by p: its mean stays as it was,
    and its noise is least. Nichol and Dhariwal 2021, arXiv:2102.09672, Eq. 18.

    bins: of the times; None: the indices of VP, as in the paper, else 100.
    history: E[L^2] is over the last losses of each bin, this many; until all are there, p is uniform.
    uniform: the share of p that is uniform, so that no bin is forgotten; that of the authors' code.
    """

    bins: int | None = None
    history: int = 10
    uniform: float = 1e-3

    def __post_init__(self) -> None:
        if (self.bins is not None and self.bins < 2) or self.history < 1 or not 0 < self.uniform <= 1:
            raise ValueError(
                f"need at least 2 bins, a history of at least 1 and a uniform share above 0 and at most 1, got bins = "
                f"{self.bins}, history = {self.history}, uniform = {self.uniform:g}"
            )

    def memory(self, schedule: Schedule) -> LossMemory:
        default = len(schedule.betas) if isinstance(schedule, VP) else 100
        return LossMemory(self.bins or default, self.history, self.uniform)


class LossMemory(nn.Module):
    """The last losses of each bin, and where the bins lie among uniform numbers for it."""

    def __init__(self, bins: int, history: int, uniform: float):
        super().__init__()
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(bins, history, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(bins, dtype=torch.int64))
        self.register_buffer("edges", torch.linspace(0, 1, bins + 1, dtype=torch.float64))
        self.losses: Tensor
        self.seen: Tensor
        self.edges: Tensor
        self._heard: list[tuple[int, Tensor, Tensor]] = []  # of the step in progress, a part at a time
        self._step, self._total = -1, 0

    @property
    def chances(self) -> Tensor:
        """p of each bin, [N]."""
        return self.edges.diff()

    def warp(self, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Uniform numbers [B] moved to where the losses are large; what a loss there counts, 1 / (p N); the bins."""
        count = len(self.seen)
        bins = torch.searchsorted(self.edges[1:-1], share, right=True)
        chance = self.chances[bins]
        within = ((share - self.edges[bins]) / chance).clamp(1e-6, 1 - 1e-6)  # rounding must not leave the bin
        return (bins + within) / count, 1 / (chance * count), bins

    def hear(self, step: int, bins: Tensor, losses: Tensor) -> None:
        """The losses of some samples of a step, [B], as yet without their 1 / (p N)."""
        first, total = draws.place(len(bins))
        if step != self._step:  # what a step that failed left behind is forgotten
            self._heard, self._step = [], step
        self._total = total
        self._heard.append((first, bins, losses.detach().double()))

    @torch.no_grad()
    def learn(self, step: int) -> None:
        """Remember all that was heard of this step, by every process, in the order of the whole batch."""
        if step != self._step or not self._heard:
            return
        bins, losses = self._gathered()
        known = losses.isfinite()
        self._remember(bins[known].cpu(), losses[known].cpu())
        self._heard = []

    def _gathered(self) -> tuple[Tensor, Tensor]:
        device = self._heard[0][1].device
        table = torch.zeros(2, self._total, dtype=torch.float64, device=device)
        for first, bins, losses in self._heard:
            table[0, first : first + len(bins)] = bins.double()
            table[1, first : first + len(bins)] = losses
        own = sum(len(bins) for _, bins, _ in self._heard)
        if own < self._total and distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(table)  # each place is that of one process, and zero for the others
        return table[0].long(), table[1]

    def _remember(self, bins: Tensor, losses: Tensor) -> None:
        """On the CPU, where the sums are the same every time."""
        kept, seen = self.losses.cpu(), self.seen.cpu()
        length = kept.shape[1]
        for which, loss in zip(bins.tolist(), losses.tolist()):
            kept[which, seen[which] % length] = loss
            seen[which] += 1
        self.losses.copy_(kept)
        self.seen.copy_(seen)
        if int(seen.min()) >= length:
            size = kept.square().mean(1).sqrt()
            total = float(size.sum())
            chance = size / total if total > 0 else torch.full_like(size, 1 / len(size))
            chance = (1 - self.uniform) * chance + self.uniform / len(size)
            self.edges[1:-1] = chance.cumsum(0)[:-1].to(self.edges)
