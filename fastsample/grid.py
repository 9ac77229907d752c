"""Grids: the nodes that a solver visits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, TypeVar, overload

import torch

from .schedule import VP, Schedule
from .spacing import SPACINGS, Spacing, uniform_lam

if TYPE_CHECKING:
    from .gaussian import Gaussian, Warm
    from .tracing import Expr

State = TypeVar("State", torch.Tensor, "Expr")


@dataclass(frozen=True)
class Node:
    """One time: t in the schedule's own units, alpha and sigma there, lam = log(alpha / sigma)."""

    t: float
    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        if self.sigma == 0:
            return math.inf
        return math.log(self.alpha / self.sigma) if self.alpha > 0 else -math.inf


@dataclass(frozen=True)
class Nodes:
    """Many times, one for each sample of a batch: t, alpha, sigma and lam are [B], float64. What training asks at."""

    t: torch.Tensor
    alpha: torch.Tensor
    sigma: torch.Tensor

    @property
    def lam(self) -> torch.Tensor:
        return self.alpha.log() - self.sigma.log()


@dataclass(frozen=True)
class Grid:
    """Nodes from noise to data; `steps()` gives the intervals (s, t) that a solver walks.

    lower_order_final: the order of a multistep solver falls to 1 over the last steps, see `order`.
    warm: a closed-form move to the first node, before the solver begins.
    """

    schedule: Schedule
    nodes: tuple[Node, ...]
    spacing: str = "given times"
    lower_order_final: bool = False
    warm: Warm | None = None

    def steps(self) -> Iterator[tuple[Node, Node]]:
        return pairwise(self.nodes)

    def node(self, lam: float) -> Node:
        """The node at log(alpha / sigma) = lam, for solvers that evaluate between the nodes of the grid."""
        return node(self.schedule, float(self.schedule.time(lam)))

    def order(self, k: int, order: int) -> int:
        """The order that a multistep solver of this order may use in interval k = 0, 1, ..., as far as the grid says.

        With `lower_order_final` it is at most the number of intervals left, this one included, as in the official code
        of DPM-Solver and UniPC.
        """
        return min(order, len(self) - k) if self.lower_order_final else order

    def __len__(self) -> int:
        return len(self.nodes) - 1


def node(schedule: Schedule, t: float) -> Node:
    """The node of a schedule at time t."""
    return Node(float(t), float(schedule.alpha(t)), float(schedule.sigma(t)))


def nodes(schedule: Schedule, t: torch.Tensor) -> Nodes:
    """The nodes of a schedule at times t, [B]: a model asked at them gives each sample its own time."""
    if not isinstance(t, torch.Tensor) or t.dim() != 1:
        got = f"shape {tuple(t.shape)}" if isinstance(t, torch.Tensor) else type(t).__name__
        raise ValueError(f"times must be a tensor [B], one for each sample, got {got}; for one time use fs.node")
    return Nodes(t.double(), schedule.alpha(t), schedule.sigma(t))


@overload
def per_sample(number: torch.Tensor, x: torch.Tensor) -> torch.Tensor: ...


@overload
def per_sample(number: float, x: torch.Tensor) -> float: ...


def per_sample(number: float | torch.Tensor, x: torch.Tensor) -> float | torch.Tensor:
    """A number of a `Node` as it is; one for each sample, [B], in a shape and dtype that multiply x [B, ...]."""
    return number.to(x).view(-1, *[1] * (x.dim() - 1)) if isinstance(number, torch.Tensor) else number


def grid(
    schedule: Schedule,
    steps: int,
    spacing: Spacing | None = None,
    start: float | None = None,
    end: float | None = None,
    *,
    round_to_index: bool = False,
    lower_order_final: bool = False,
    strength: float = 1.0,
    warm: Gaussian | None = None,
) -> Grid:
    """A grid of `steps` intervals.

    spacing: one of the functions below or your own; uniform_lam if None.
    start, end: times in the schedule's units; start=None is `schedule.t_max`, end=None is sigma = 0, where the
        last interval returns x0 itself.
        `end=schedule.t_min` stops at the least noise trained at ("sigma_min" of diffusers' `final_sigmas_type`).
    round_to_index: round each time to the nearest index the network was trained at (VP tables only).
    lower_order_final: let the order of multistep solvers fall to 1 over the last steps. Better where those are long in
        lam (quadratic_t) and few; with many steps it leaves the whole at order 2.
    strength: keep the last int(steps * strength) intervals alone, to start from an image: `fs.sample(..., init=image)`.
        Meng et al. 2022, arXiv:2108.01073 (SDEdit), counted as in diffusers.
    warm: the data's mean and covariance. The noise starts at `t_max`, as without, and is taken to `start` as if the
        data were this Gaussian, which costs no evaluation: choose a `start` below t_max.
    """
    if not isinstance(steps, Integral) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")
    spacing = spacing or uniform_lam
    if not callable(spacing):
        raise ValueError(f"spacing must be a function such as fs.uniform_lam ({', '.join(SPACINGS)}), got {spacing!r}")
    kept = int(steps * strength + 1e-9) if 0 < strength <= 1 else 0
    if kept < 1:
        raise ValueError(
            f"strength is a share of the {steps} steps, above 0 and at most 1, and must leave one, got {strength:g}"
        )
    first = schedule.t_max if start is None else float(start)
    last = schedule.t_zero if end is None else float(end)
    if not schedule.t_zero <= last < first <= schedule.t_max:
        raise ValueError(
            f"a grid runs down from start to end within t = {schedule.t_max:g} .. {schedule.t_zero:g} (sigma = 0), got "
            f"start = {first:g}, end = {last:g}"
        )
    times = [float(t) for t in spacing(schedule, int(steps), first, end)]
    name = getattr(spacing, "__name__", type(spacing).__name__)
    wanted = int(steps) + (end is not None)
    if len(times) != wanted:
        raise ValueError(f"spacing {name} gave {len(times)} times for {steps} steps, expected {wanted}")
    for asked, given in ((start, times[0]), (end, times[-1])):
        if asked is not None and not math.isclose(asked, given, abs_tol=1e-9):
            raise ValueError(f"spacing {name} gave {times[0]:g} .. {times[-1]:g}, but the grid was asked for {asked:g}")
    if round_to_index:
        if not isinstance(schedule, VP):
            raise ValueError(f"round_to_index needs a schedule with a table of betas (VP), got {schedule!r}")
        times = [float(round(t)) for t in times]
    if end is None:
        times.append(schedule.t_zero)
    _check(times, schedule, name)
    made = tuple(node(schedule, t) for t in times)[-kept - 1 :]
    shown = ", ".join([name, *(["lower_order_final"] if lower_order_final else [])])
    return Grid(schedule, made, shown, lower_order_final, _warm(schedule, made[0], warm, strength))


def _warm(schedule: Schedule, first: Node, gaussian: Gaussian | None, strength: float) -> Warm | None:
    if gaussian is None:
        return None
    from .gaussian import Gaussian, Warm

    if not isinstance(gaussian, Gaussian):
        raise TypeError(f"warm must be an fs.Gaussian of the data, got {type(gaussian).__name__}")
    if strength != 1 or not first.t < schedule.t_max:
        raise ValueError(
            f"a warm start moves pure noise from t = {schedule.t_max:g} to a start below it, got start = {first.t:g} "
            f"and strength {strength:g}"
        )
    return Warm(gaussian, node(schedule, schedule.t_max))


def _check(times: list[float], schedule: Schedule, name: str) -> None:
    if not all(math.isfinite(t) for t in times):
        raise ValueError(f"spacing {name} gave a time that is not finite: {times}")
    low, high = schedule.t_zero - 1e-9, schedule.t_max + 1e-9
    outside = [t for t in times if not low <= t <= high]
    if outside:
        raise ValueError(f"time {outside[0]:g} lies outside {schedule!r}: [{schedule.t_zero:g}, {schedule.t_max:g}]")
    for s, t in pairwise(times):
        if not t < s:
            raise ValueError(
                f"spacing {name} gave times that do not decrease ({s:g} then {t:g}); use fewer steps, another "
                f"spacing, or no rounding"
            )


def exponential_step(x: State, x0: State, s: Node, t: Node) -> State:
    """Move x from node s to node t with x0 held constant (the DDIM step).

    x, x0: [B, ...], float32. Finite also at alpha_s = 0 and at sigma_t = 0.
    Song et al. 2021, arXiv:2010.02502, Eq. 12; Lu et al. 2022, arXiv:2211.01095, Sec. 4.
    """
    return x * (t.sigma / s.sigma) + x0 * (t.alpha * -math.expm1(s.lam - t.lam))
