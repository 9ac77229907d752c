"""Consistency distillation: a student that jumps from any noise level straight to the end of the teacher's path."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastsample.denoiser import Count, Denoiser, Model
from fastsample.grid import Grid, Node, Nodes, per_sample
from fastsample.spacing import Spacing, uniform_t
from fastsample.tracing import Solver

from . import draws
from .boundary import boundary_of
from .checking import check_pair, check_start, check_starts, warn_of_eps
from .curriculum import Curriculum, Rate, Sampling, check_times, intervals, rate
from .distances import Distance, distance, measured, pseudo_huber
from .method import Batch, Method, asked, check_drop, conditions, dropped, plain, unwrapped
from .path import Path, counts_of, path, path_grid
from .teacher_step import ddim, solver_name
from .times import noisy
from .weights import Weight, snr, snr_plus_one, truncated_snr

__all__ = [
    "ConsistencyDistillation",
    "check_pair",
    "check_start",
    "check_starts",
    "pseudo_huber",
    "same_dropout",
    "warn_of_eps",
]

WEIGHTS: dict[str, Callable[[Nodes, Nodes], Tensor]] = {  # at the start s and the end t of each interval
    "uniform": lambda s, t: torch.ones_like(s.sigma),
    "snr": lambda s, t: snr(s),
    "snr+1": lambda s, t: snr_plus_one(s),
    "truncated_snr": lambda s, t: truncated_snr(s),
    "interval": lambda s, t: 1 / (s.sigma / s.alpha - t.sigma / t.alpha),
}


@dataclass(frozen=True)
class Consistency(Method):
    """What consistency distillation and training share: d(f(x_s, s), f_target(x_t, t)), the target without gradient.

    Both passes meet the same dropout masks. At sigma = 0 f is the state itself.
    """

    student: Denoiser
    distance: str | Distance = field(default="pseudo_huber", kw_only=True)
    target: str | float | Rate = field(default="student", kw_only=True)
    drop: float = field(default=0.0, kw_only=True)
    null: Mapping[str, float | Tensor] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        check_drop(self.drop, self.null)
        distance(self.distance)
        check_target(self.target)

    @property
    def roles(self) -> dict[str, Denoiser]:
        return {"student": self.student}

    @property
    def kept(self) -> dict[str, nn.Module]:
        return {} if self._average is None else {"target": cast(nn.Module, self._average.network)}

    @cached_property
    def _average(self) -> Denoiser | None:
        """The moving average of the student, from its weights when training begins; None: the student is the target."""
        if self.target == "student":
            return None
        model = copy.copy(self.student)
        network = copy.deepcopy(unwrapped(self.student.network)).requires_grad_(False).eval()
        if model.dtype in (torch.float16, torch.bfloat16):  # where an average would stand still
            network, model.dtype = network.float(), torch.float32
        model.network, model.count = network, Count()
        return model

    @torch.no_grad()
    def after(self, step: int) -> None:
        if self._average is None:
            return
        assert not isinstance(self.target, str)
        share = 1 - rate(self.target, step)
        average, student = (cast(nn.Module, m.network) for m in (self._average, plain(self.student)))
        for old, new in zip(average.parameters(), student.parameters(), strict=True):
            old.lerp_(new.to(old), share)
        for held, now in zip(average.buffers(), student.buffers(), strict=True):
            held.copy_(now)

    def settings(self) -> dict[str, Any]:
        found = super().settings()
        for name in found:
            value = getattr(self, name)
            if isinstance(value, partial):
                found[name] = solver_name(value)
        boundary = boundary_of(self.student)
        return found | ({} if boundary is None else {"boundary": boundary.settings()})

    def _distances(self, x_s: Tensor, s: Nodes, x_t: Tensor, t: Nodes, condition: Batch) -> Tensor:
        """d(f(x_s, s), f_target(x_t, t)) of each sample, [B]."""
        last = per_sample(t.sigma == 0, x_t) > 0
        with torch.no_grad(), same_dropout(x_s.device):
            # at the end, sigma = 0, f is the state itself, and the network cannot be asked
            target = (self._average or self.student).predict(x_t, _asked(s, t), **condition)
            target = torch.where(last, x_t, target)
        return measured(distance(self.distance), self.student.predict(x_s, s, **condition), target)


@dataclass(frozen=True)
class ConsistencyDistillation(Consistency):
    """f(x_s, s) is to equal f(x_t, t), x_t being one step of the teacher from s to t, the next of `times`.

    Song et al. 2023, arXiv:2303.01469, Alg. 2. By default with these departures: the teacher's step is DDIM; f is the
    student's x0, so f(x, sigma = 0) = x without skip factors, and the last interval's target is the teacher's own step
    to sigma = 0; the target is the student itself without gradient (Song and Dhariwal 2023, arXiv:2310.14189, Sec. 3.2)
    and the distance their pseudo-Huber (Sec. 3.3); the weight is max(SNR, 1) (Salimans and Ho 2022, arXiv:2202.00512,
    Sec. 4). The paper's own setting for EDM networks is
    `ConsistencyDistillation(distill.bounded(student, "edm"), teacher, times=17, spacing=fs.karras, solver=solvers.heun,
    distance=lpips, weight="uniform")`.

    student: predicts v, x0 or flow; start it from the teacher's weights, see `student_of` and `Conversion`. One with a
        boundary (`bounded`) is trained down to where that begins.
    teacher: a denoiser, or one in guidance that answers at any time.
    distance: "pseudo_huber", "l2", "l1", a `PseudoHuber(c)`, or a function (a, b) -> [B].
    target: "student", or the rate mu of a moving average of its weights in [0, 1), a number or a function of the step:
        target = mu target + (1 - mu) student after every update.
    times, spacing: how many intervals the path is cut into (N - 1 of the paper), a number or a function of the step,
        and where. Sample on a grid of the same spacing.
    sampling: how often each interval is trained at: "uniform", "lognormal", a `Lognormal(mean, std)` or a function of
        the grid.
    solver: the teacher's step: any solver without noise, such as solvers.heun, on one interval at a time; options of it
        by functools.partial. One that looks back over several intervals begins anew in each.
    weight: "truncated_snr", "snr", "snr+1", "uniform", "interval" (1 / (level_s - level_t) of sigma / alpha) or a
        function of the nodes s -> [B].
    drop, null: as for `Diffusion`, so that the student knows "no condition" too.

    Raises ValueError where the times cannot be placed, or start at alpha = 0 with a network that predicts eps, or where
    the solver cannot walk a single interval.
    """

    teacher: Model
    times: int | Curriculum = field(default=16, kw_only=True)
    spacing: Spacing = field(default=uniform_t, kw_only=True)
    sampling: str | Sampling = field(default="uniform", kw_only=True)
    solver: Solver = field(default=ddim, kw_only=True)
    weight: str | Weight = field(default="truncated_snr", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pair(self.student, self.teacher)
        check_weight(self.weight)
        check_times(self.times)
        for count in counts_of(self.times):
            self._path(count)
        check_starts(self.student, self.teacher, self.grid.nodes[0])
        check_heard(self.weight, self.grid.nodes[0])

    @property
    def frozen(self) -> list[Denoiser]:
        return asked(self.teacher)

    @property
    def grid(self) -> Grid:
        """The grid of the first step; without a curriculum, of all."""
        return self.grid_at(0)

    def grid_at(self, step: int) -> Grid:
        return self._path(intervals(self.times, step)).grid

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        data = batch["x0"]
        way = self._path(intervals(self.times, step))
        i = way.random(len(data), data.device)
        s, t = way.at(i)
        condition = dropped(conditions(batch), self.null, self.drop)
        x_s = noisy(data, draws.randn_like(data), s)
        assert way.steps is not None
        with torch.no_grad():
            x_t = way.steps.walk(self.teacher, x_s, i, condition)
        found = self._distances(x_s, s, x_t, t, condition)
        return (weighed(self.weight, s, t).to(found) * found).mean()

    def _path(self, count: int) -> Path:
        if count not in self._paths:
            self._paths[count] = path(path_grid(self.student, count, self.spacing), self.sampling, self.solver)
        return self._paths[count]

    @cached_property
    def _paths(self) -> dict[int, Path]:
        return {}


def weighed(weight: str | Weight, s: Nodes, t: Nodes) -> Tensor:
    """The weight of each sample, [B], float64."""
    return WEIGHTS[weight](s, t) if isinstance(weight, str) else weight(s)


def check_weight(weight: str | Weight) -> None:
    if not callable(weight) and weight not in WEIGHTS:
        raise ValueError(f"unknown weight {weight!r}; choose one of {', '.join(WEIGHTS)} or pass a function of Nodes")


def check_heard(weight: str | Weight, first: Node) -> None:
    """A weight that is 0 at alpha = 0 would leave the first interval, where one step begins, as it was."""
    if first.alpha == 0 and weight in ("snr", "interval"):
        raise ValueError(
            f"weight {weight!r} is 0 at alpha = 0, where the times start (t = {first.t:g}), so nothing would be "
            f"learned there; take weight='truncated_snr' or 'uniform', or a spacing that starts below"
        )


def check_target(target: str | float | Rate) -> None:
    if isinstance(target, str):
        if target != "student":
            raise ValueError(
                f"unknown target {target!r}; choose 'student', or the rate of a moving average, a number in [0, 1) or "
                f"a function of the step"
            )
        return
    rate(target, 0)


def _asked(s: Nodes, t: Nodes) -> Nodes:
    """t, but s where sigma is 0."""
    ends = t.sigma == 0
    return Nodes(*(torch.where(ends, a, b) for a, b in ((s.t, t.t), (s.alpha, t.alpha), (s.sigma, t.sigma))))


@contextmanager
def same_dropout(device: torch.device) -> Iterator[None]:
    """The generators stay as they are, so what follows meets the dropout masks of what runs inside.

    Song and Dhariwal 2023, arXiv:2310.14189, Sec. 3.1.
    """
    own = device.type in ("cuda", "xpu")
    before = torch.mps.get_rng_state() if device.type == "mps" else None
    with torch.random.fork_rng(devices=[device] if own else [], device_type=device.type if own else "cuda"):
        yield
    if before is not None:
        torch.mps.set_rng_state(before)
