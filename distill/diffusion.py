"""Diffusion: the ordinary training of a denoiser, from which every teacher comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from fastsample.denoiser import Denoiser
from fastsample.grid import Nodes, nodes, per_sample

from . import draws
from .importance import Importance, LossMemory
from .method import Batch, Method, check_drop, conditions, dropped
from .times import Times, distribution, noisy, random_nodes
from .weights import Weight, check_weight, of_output, weight_of


@dataclass(frozen=True)
class Diffusion(Method):
    """Squared error of what the network predicts, at random times. Ho et al. 2020, arXiv:2006.11239, Eq. 14.

    Of an eps network that is the paper's loss; x0, v and flow networks are trained on their own quantity.

    weight: of the squared error of x0, whatever the network predicts: "min_snr", "truncated_snr", "snr+1", "p2", "edm",
        one with numbers of its own, such as distill.MinSNR(gamma=1), or a function Nodes -> [B]. None weighs the error
        of the network's own quantity equally at all times.
    times: how the times are drawn: "uniform", "lognormal", "logit_normal", "cosmap", or one with numbers of its own,
        such as distill.LogNormalTimes(-0.8, 1.6) or distill.UniformTimes(stratified=True). None: lognormal for EDM,
        else uniform.
    importance: draw times with large losses more often, each loss weighed so that its mean does not change; True, or an
        `Importance` with numbers of its own.
    drop: share of the samples whose conditions are replaced by `null`, so that the network can be guided.
        Ho and Salimans 2022, arXiv:2207.12598.
    null: the value that means "none" for each condition, such as {"class_labels": 10}.

    Raises ValueError for a weight or times that do not fit the network and its schedule.
    """

    model: Denoiser
    weight: str | Weight | None = field(default=None, kw_only=True)
    times: str | Times | None = field(default=None, kw_only=True)
    importance: bool | Importance = field(default=False, kw_only=True)
    drop: float = field(default=0.0, kw_only=True)
    null: Mapping[str, float | Tensor] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        check_drop(self.drop, self.null)
        distribution(self.times, self.model.schedule)
        if self.weight is not None:
            check_weight(weight_of(self.weight), self.model)

    @property
    def roles(self) -> dict[str, Denoiser]:
        return {"model": self.model}

    @property
    def kept(self) -> dict[str, nn.Module]:
        return {"losses": self.memory} if self.memory else {}

    @cached_property
    def memory(self) -> LossMemory | None:
        """What importance sampling remembers of the losses."""
        if not self.importance:
            return None
        chosen = self.importance if isinstance(self.importance, Importance) else Importance()
        return chosen.memory(self.model.schedule)

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        x0 = batch["x0"]
        at, factor, bins = self._drawn(len(x0), x0.device)
        eps = draws.randn_like(x0)
        p, q = self.model.prediction.output(at.alpha, at.sigma)
        # p x + q x0 with x written out in float64: in float32 the two halves cancel where sigma is small
        target: Tensor = per_sample(p * at.alpha + q, x0) * x0 + per_sample(p * at.sigma, x0) * eps
        condition = dropped(conditions(batch), self.null, self.drop)
        squares = (self.model.output(noisy(x0, eps, at), at, **condition) - target).square()
        if self.weight is None and self.memory is None:
            return squares.mean()
        losses = squares.flatten(1).mean(1)
        if self.weight is not None:
            losses = losses * of_output(weight_of(self.weight), self.model.prediction, at).to(losses)
        if self.memory is not None:
            if torch.is_grad_enabled():
                self.memory.hear(step, bins, losses)
            losses = losses * factor.to(losses)
        return losses.mean()

    def after(self, step: int) -> None:
        if self.memory is not None:
            self.memory.learn(step)

    def _drawn(self, size: int, device: torch.device) -> tuple[Nodes, Tensor, Tensor]:
        """The times of a batch; of importance sampling what each loss counts, and its bin."""
        schedule = self.model.schedule
        nothing = torch.empty(0)
        if self.times is None and self.memory is None:
            return random_nodes(schedule, size, device), nothing, nothing
        times = distribution(self.times, schedule)
        share, factor, bins = times.shares(size, device), nothing, nothing
        if self.memory is not None:
            share, factor, bins = self.memory.warp(share)
        return nodes(schedule, times.quantile(schedule, share)), factor, bins
