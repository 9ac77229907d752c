"""Consistency training: as distillation, but data with less of the same noise stands for a teacher's step."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fastsample.denoiser import Denoiser
from fastsample.grid import Grid, Nodes, node, nodes
from fastsample.spacing import Spacing, karras

from . import draws
from .boundary import boundary_of
from .checking import check_start, warn_of_eps
from .consistency import Consistency, check_heard, check_weight, weighed
from .curriculum import Curriculum, Doubling, Matched, Sampling, SquareRoot, check_times, intervals
from .distances import Distance
from .method import Batch, conditions, dropped
from .path import Path, counts_of, path, path_grid
from .times import noisy
from .weights import Weight


@dataclass(frozen=True)
class ConsistencyTraining(Consistency):
    """f(alpha_s x0 + sigma_s z, s) is to equal f(alpha_t x0 + sigma_t z, t), with one z for both; no teacher is asked.

    Improved consistency training, Song and Dhariwal 2023, arXiv:2310.14189: stop-gradient target, the same dropout
    masks on both sides, pseudo-Huber, weight 1 / (level_s - level_t), lognormal intervals, doubling curriculum; levels
    are sigma / alpha, so that VP schedules are trained as EDM ones. The first method, Song et al. 2023,
    arXiv:2303.01469, Alg. 3, is `ConsistencyTraining.original`.

    student: may start from a diffusion model. Without a boundary f is its x0 and the path ends in sigma = 0, where f is
        x0 itself; with one (`bounded`, as in the papers) it ends there.
    times: intervals (N - 1 of the papers), a number or a function of the step. Give `Doubling` the steps of your run.
    distance, target, spacing, sampling, weight, drop, null: as for `ConsistencyDistillation`.

    Raises ValueError where the times cannot be placed, or start at alpha = 0 with a network that predicts eps.
    """

    times: int | Curriculum = field(default=Doubling(10, 1280, over=400_000), kw_only=True)
    spacing: Spacing = field(default=karras, kw_only=True)
    sampling: str | Sampling = field(default="lognormal", kw_only=True)
    weight: str | Weight = field(default="interval", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weight(self.weight)
        check_times(self.times)
        for count in counts_of(self.times):
            self._path(count)
        check_start("student", self.student, self.grid_at(0).nodes[0])
        check_heard(self.weight, self.grid_at(0).nodes[0])
        warn_of_eps(self.student, self.grid_at(0).nodes[0])

    @classmethod
    def original(
        cls,
        student: Denoiser,
        *,
        over: int,
        s0: int = 2,
        s1: int = 150,
        mu0: float = 0.9,
        distance: str | Distance = "l2",
    ) -> ConsistencyTraining:
        """Song et al. 2023, arXiv:2303.01469, Alg. 3 and App. C: N(k) by a square root, a moving average as target with
        the rate mu(k) that goes with it, all intervals alike. over: the steps of the training. distance: theirs was
        LPIPS.
        """
        times = SquareRoot(s0, s1, over=over)
        target = Matched(times, mu0, s0)
        return cls(student, times=times, target=target, distance=distance, sampling="uniform", weight="uniform")

    def grid_at(self, step: int) -> Grid:
        return self._path(intervals(self.times, step)).grid

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        data = batch["x0"]
        way = self._path(intervals(self.times, step))
        s, t = way.at(way.random(len(data), data.device))
        condition = dropped(conditions(batch), self.null, self.drop)
        eps = draws.randn_like(data)
        found = self._distances(noisy(data, eps, s), s, noisy(data, eps, t), t, condition)
        return (weighed(self.weight, s, t).to(found) * found).mean()

    def _path(self, count: int) -> Path:
        if count not in self._paths:
            self._paths[count] = path(path_grid(self.student, count, self.spacing), self.sampling)
        return self._paths[count]

    @cached_property
    def _paths(self) -> dict[int, Path]:
        return {}


@dataclass(frozen=True)
class EasyConsistencyTuning(Consistency):
    """Consistency training at continuous times, from a diffusion model: r, the smaller level, begins near the data, so
    that the loss is almost that of diffusion, and comes nearer to t, the larger, in stages.

        r = max(0, t (1 - n(t) / q^(stage + 1))),   n(t) = 1 + k sigmoid(-b t),   ln t normal,   weight 1 / (t - r)
    with levels sigma / alpha. Geng et al. 2024, arXiv:2406.14548; at r = 0 f is the data itself.

    student: a diffusion model. With a boundary, r is at least the level where that begins.
    every, stages: steps of a stage, and how many there are before the last one stays.
    q: 2 halves 1 - r / t with each stage; the papers' short run has one stage with q = 256.
    k, b: of n(t), at most q - 1 and positive: how much larger 1 - r / t is where there is little noise.
    mean, std: of ln t, before it is cut off at the ends of the schedule.
    distance, target, drop, null: as for `ConsistencyDistillation`. The papers' adaptive weight
        1 / sqrt(|a - b|^2 + c^2) times a squared distance has twice the gradient of the pseudo-Huber distance.
    """

    every: int = field(kw_only=True)
    stages: int = field(default=8, kw_only=True)
    q: float = field(default=2.0, kw_only=True)
    k: float = field(default=8.0, kw_only=True)
    b: float = field(default=1.0, kw_only=True)
    mean: float = field(default=-1.1, kw_only=True)
    std: float = field(default=2.0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("every", "stages"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)!r}")
        if not (1 < self.q < math.inf and 0 <= self.k < math.inf and self.b > 0 and 0 < self.std < math.inf):
            raise ValueError(
                f"need q > 1, k >= 0, b > 0 and std > 0, got q = {self.q:g}, k = {self.k:g}, b = {self.b:g} and "
                f"std = {self.std:g}"
            )
        schedule = self.student.schedule
        first = node(schedule, schedule.t_max)
        check_start("student", self.student, first)
        warn_of_eps(self.student, first)

    def stage(self, step: int) -> int:
        """0, 1, 2, ...: which stage a step belongs to."""
        return min(step // self.every, self.stages - 1)

    def smaller(self, level: Tensor, step: int) -> Tensor:
        """The level r that goes with t, both sigma / alpha, [B], float64."""
        n = 1 + self.k * torch.sigmoid(-self.b * level)
        return (level * (1 - n / self.q ** (self.stage(step) + 1))).clamp(min=0)

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        data = batch["x0"]
        z = draws.randn(len(data), device=data.device, dtype=torch.float64)
        s, t = self.pair((self.mean + self.std * z).exp(), step)
        condition = dropped(conditions(batch), self.null, self.drop)
        eps = draws.randn_like(data)
        found = self._distances(noisy(data, eps, s), s, noisy(data, eps, t), t, condition)
        weight = torch.where(s.t > t.t, weighed("interval", s, t), 0)  # both at a boundary: nothing to learn there
        return (weight.to(found) * found).mean()

    def pair(self, level: Tensor, step: int) -> tuple[Nodes, Nodes]:
        """The nodes of t and r, as every method calls them s and t, from random levels [B]."""
        schedule, boundary = self.student.schedule, boundary_of(self.student)
        least = schedule.t_min if boundary is None else max(schedule.t_min, boundary.end(schedule))
        level = level.clamp(*(math.exp(-float(schedule.lam(t))) for t in (least, schedule.t_max)))
        s = nodes(schedule, schedule.time(-level.log()))
        r = self.smaller(level, step)
        end = schedule.t_zero if boundary is None else boundary.end(schedule)
        time = schedule.time(-r.log().clamp(min=-700)).clamp(min=end)  # e^-700: level 0 has no logarithm
        t = nodes(schedule, torch.where(r > 0, time, end))
        return s, t
