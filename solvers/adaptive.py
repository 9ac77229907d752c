"""Solvers that choose their own steps, for `fs.solve` alone: they look at norms of states, so none is a plan.

All follow the probability-flow ODE from the first node of the grid to its last; the nodes between have no part. One
step serves the whole batch: it must satisfy every sample's tolerance, so a sample's result depends on its companions,
within that tolerance. To sigma = 0 they go to a small level `floor` = sigma / alpha, then take x0 as it is there, whose
error is about floor^2 / (2 w) for data whose finest detail has the width w.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.integrate import DOP853, RK45
from torch import Tensor

from fastsample.grid import Grid, Node, node

from .exponential import means
from .forms import EPS, eps_of, level_step
from .types import Predictor


@dataclass(frozen=True)
class Effort:
    """What an adaptive run took: evaluations (NFE), and steps that were accepted."""

    evaluations: int
    steps: int


Report = Callable[[Effort], object]


def exact(
    model: Predictor,
    x: Tensor,
    grid: Grid,
    *,
    tolerance: float = 1e-8,
    floor: float = 1e-6,
    limit: int = 100_000,
    report: Report | None = None,
) -> Tensor:
    """The solution of the probability-flow ODE: the reference that other solvers are measured against.

    Dormand-Prince 8(5,3) with dense control (Hairer et al. 1993; scipy's DOP853), in float64 on the CPU, over the angle
    atan(sigma / alpha), in which x / sqrt(alpha^2 + sigma^2) is smooth from alpha = 0 to sigma = 0. A few hundred to a
    few thousand evaluations.

    tolerance: of the error of each step, as the RMS over a sample, in units of x / sqrt(alpha^2 + sigma^2), relative
        above 1. The error at the end is of the same size where the flow does not spread. A network in float32 rounds at
        1e-7: below that, steps shrink and gain nothing (five times the evaluations at 1e-9).
    floor: the last level before sigma = 0, below that of networks' training; give the level of `t_min` for a network
        that says nothing sensible there.
    limit: evaluations after which to give up, with RuntimeError. report: called with the `Effort` at the end, such as
        `efforts.append`.
    """
    return _integrated(DOP853, model, x, grid, tolerance, tolerance, floor, limit, report, "exact")


def rk45(
    model: Predictor,
    x: Tensor,
    grid: Grid,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    floor: float | None = None,
    limit: int = 10_000,
    report: Report | None = None,
) -> Tensor:
    """Dormand-Prince 5(4), as Song et al. 2021, arXiv:2011.13456, App. D.4, but over the angle of `exact`.

    rtol, atol: of each step, as the RMS over a sample, in units of x / sqrt(alpha^2 + sigma^2).
    floor: the last level before sigma = 0; None is that of `schedule.t_min`. limit, report: as for `exact`.
    """
    return _integrated(RK45, model, x, grid, rtol, atol, floor, limit, report, "rk45")


def dpm_solver_12(
    model: Predictor,
    x: Tensor,
    grid: Grid,
    *,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h: float = 0.05,
    safety: float = 0.9,
    floor: float | None = None,
    limit: int = 10_000,
    report: Report | None = None,
) -> Tensor:
    """DPM-Solver-12: order 2 in eps, its error that of order 1. Lu et al. 2022, arXiv:2206.00927, App. C.

    Two evaluations a step, one more for each that is repeated.
    rtol, atol: of each step, relative to the larger of its start and end and absolute, as the RMS over a sample; the
        paper's for images in [-1, 1], in units of x / sqrt(alpha^2 + sigma^2), which is its x for VP: in x itself, one
        step from sigma = 80 to 0 would be allowed an error of 4.
    h: the first step in lam. safety: the share of the step that the error allows.
    floor: the last level before sigma = 0; None is that of `schedule.t_min`. limit, report: as for `exact`.
    Raises ValueError where the grid starts at alpha = 0.
    """
    return _dpm_solver(_pair_12, 2, model, x, grid, rtol, atol, h, safety, floor, limit, report, "dpm_solver_12")


def dpm_solver_23(
    model: Predictor,
    x: Tensor,
    grid: Grid,
    *,
    rtol: float = 0.05,
    atol: float = 0.0078,
    h: float = 0.05,
    safety: float = 0.9,
    floor: float | None = None,
    limit: int = 10_000,
    report: Report | None = None,
) -> Tensor:
    """DPM-Solver-23: order 3 in eps, its error that of order 2. Lu et al. 2022, arXiv:2206.00927, App. C.

    Three evaluations a step, two more for each that is repeated. Options and errors as for `dpm_solver_12`.
    """
    return _dpm_solver(_pair_23, 3, model, x, grid, rtol, atol, h, safety, floor, limit, report, "dpm_solver_23")


class _Counted:
    """The model, with the evaluations counted, limited, and looked at: on NaN a step would shrink for ever."""

    def __init__(self, model: Predictor, limit: int, name: str):
        self.model, self.limit, self.name, self.evaluations = model, limit, name, 0

    def predict(self, x: Tensor, node: Node) -> Tensor:
        if self.evaluations >= self.limit:
            raise RuntimeError(
                f"{self.name} took {self.limit} evaluations and is at t = {node.t:g}; allow more with limit=, or a "
                f"larger tolerance: below the rounding error of the network no step is small enough"
            )
        self.evaluations += 1
        x0 = self.model.predict(x, node)
        if not bool(x0.isfinite().all()):
            raise FloatingPointError(
                f"{self.name} met NaN or infinity at t = {node.t:g}, sigma = {node.sigma:.4g}; check the network's "
                f"weights, its dtype and its range of times"
            )
        return x0

    def noise(self) -> Tensor:
        return self.model.noise()


def _integrated(
    method: type[DOP853] | type[RK45],
    model: Predictor,
    x: Tensor,
    grid: Grid,
    rtol: float,
    atol: float,
    floor: float | None,
    limit: int,
    report: Report | None,
    name: str,
) -> Tensor:
    _check(x, rtol, atol, name)
    start, stop = grid.nodes[0], _stop(grid, floor, name)
    model = _Counted(model, limit, name)
    first, last = (math.atan2(end.sigma, end.alpha) for end in (start, stop))

    def node_at(angle: float) -> Node:
        if angle == first:
            return start
        return stop if angle == last else grid.node(-math.log(math.tan(angle)))

    def state(rotated: object, here: Node) -> Tensor:
        return torch.as_tensor(rotated).view(x.shape).to(x.device) * math.hypot(here.alpha, here.sigma)

    def slope(angle: float, rotated: object) -> object:
        here = node_at(angle)
        y, length = state(rotated, here), math.hypot(here.alpha, here.sigma)
        x0 = model.predict(y, here).double()
        return ((y * (here.alpha / length**2) - x0) * (length / here.sigma)).flatten().cpu().numpy()

    rotated = (x.double() / math.hypot(start.alpha, start.sigma)).flatten().cpu().numpy()
    share = max(len(x), 1) ** -0.5  # the method's RMS is over the batch: this bounds that over each sample
    run = method(slope, first, rotated, last, rtol=rtol * share, atol=atol * share)
    steps = 0
    while run.status == "running":
        message = run.step()
        steps += 1
        if run.status == "failed":
            raise RuntimeError(f"{name} stopped at t = {node_at(run.t).t:g}: {message}; take a larger tolerance")
    end = state(run.y, stop)
    return _finished(model, end, grid, stop, steps, report).to(x.dtype)


Pair = Callable[[Predictor, Tensor, Tensor, Node, Node, Grid], tuple[Tensor, Tensor]]


def _dpm_solver(
    pair: Pair,
    order: int,
    model: Predictor,
    x: Tensor,
    grid: Grid,
    rtol: float,
    atol: float,
    h: float,
    safety: float,
    floor: float | None,
    limit: int,
    report: Report | None,
    name: str,
) -> Tensor:
    _check(x, rtol, atol, name)
    s, stop = grid.nodes[0], _stop(grid, floor, name)
    if not (h > 0 and 0 < safety < 1):
        raise ValueError(f"h must be positive and safety in (0, 1), got {h:g} and {safety:g}")
    if s.alpha == 0:
        raise ValueError(
            f"{name} divides by alpha, and the grid starts at alpha = 0 (t = {s.t:g}); start it at t < {s.t:g}, or use "
            f"rk45"
        )
    model = _Counted(model, limit, name)
    steps, before, eps = 0, x.abs() / math.hypot(s.alpha, s.sigma), _eps(model, x, s)
    while s is not stop:
        t = stop if s.lam + h >= stop.lam else grid.node(s.lam + h)
        if not t.lam > s.lam:
            raise RuntimeError(f"{name} stopped at t = {s.t:g}: its step is zero; take a larger tolerance")
        lower, higher = pair(model, x, eps, s, t, grid)
        size = math.hypot(t.alpha, t.sigma)
        bound = torch.maximum(lower.abs() / size, before).mul(rtol).clamp(min=atol)
        error = ((higher - lower) / (size * bound)).unsqueeze(-1).flatten(1).square().mean(1).sqrt()
        worst = float(error.max())
        if worst <= 1:
            x, before, s, steps = higher, lower.abs() / size, t, steps + 1
            if s is not stop:
                eps = _eps(model, x, s)
        h = safety * (t.lam - s.lam if worst > 1 else h) * max(worst, 1e-12) ** (-1 / order)
    return _finished(model, x, grid, stop, steps, report)


def _pair_12(model: Predictor, x: Tensor, eps: Tensor, s: Node, t: Node, grid: Grid) -> tuple[Tensor, Tensor]:
    """DPM-Solver-1 and DPM-Solver-2 with r = 1/2, by one more evaluation. Lu et al. 2022, arXiv:2206.00927, Alg. 1."""
    middle = grid.node(s.lam + 0.5 * (t.lam - s.lam))
    there = _eps(model, level_step(x, eps, s, middle), middle)
    return level_step(x, eps, s, t), level_step(x, there, s, t)


def _pair_23(model: Predictor, x: Tensor, eps: Tensor, s: Node, t: Node, grid: Grid) -> tuple[Tensor, Tensor]:
    """DPM-Solver-2 with r = 1/3 and DPM-Solver-3, by two more evaluations. Lu et al. 2022, Alg. 2 and App. C."""
    h = t.lam - s.lam
    third, two_thirds = (grid.node(s.lam + r * h) for r in (1 / 3, 2 / 3))
    change = _eps(model, level_step(x, eps, s, third), third) - eps
    second = level_step(x, eps + means(EPS, 2 / 3 * h, 1)[0] * 2 * change, s, two_thirds)
    bend = _eps(model, second, two_thirds) - eps
    return level_step(x, eps + 1.5 * change, s, t), level_step(x, eps + means(EPS, h, 1)[0] * 1.5 * bend, s, t)


def _eps(model: Predictor, x: Tensor, node: Node) -> Tensor:
    return eps_of(x, model.predict(x, node), node)


def _finished(model: _Counted, x: Tensor, grid: Grid, stop: Node, steps: int, report: Report | None) -> Tensor:
    end = grid.nodes[-1]
    if end.sigma == 0:
        x = end.alpha * model.predict(x, stop)
    if report is not None:
        report(Effort(model.evaluations, steps))
    return x


def _stop(grid: Grid, floor: float | None, name: str) -> Node:
    """The last node that is evaluated: the grid's end, or the floor above sigma = 0."""
    start, end = grid.nodes[0], grid.nodes[-1]
    if end.sigma > 0:
        return end
    least = (
        node(grid.schedule, grid.schedule.t_min) if floor is None else grid.node(-math.log(floor)) if floor > 0 else end
    )
    if not (least.sigma > 0 and least.lam > start.lam):
        raise ValueError(
            f"floor of {name} must be a level sigma / alpha above 0 and below the grid's start "
            f"{math.exp(-start.lam):.4g}, got {floor}"
        )
    return least


def _check(x: Tensor, rtol: float, atol: float, name: str) -> None:
    if not isinstance(x, Tensor):  # the symbols of `trace`
        raise ValueError(
            f"{name} chooses its steps by the size of its error, which no table of numbers can; run it with fs.solve"
        )
    if not (1e-13 <= rtol < math.inf and 0 <= atol < math.inf):
        raise ValueError(
            f"{name} needs a finite relative tolerance of at least 1e-13, the rounding of float64, and an absolute one "
            f"of at least 0, got {rtol:g} and {atol:g}"
        )
