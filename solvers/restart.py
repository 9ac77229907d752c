"""Restart: from a low noise level back up to a high one, and down again, as often as wanted. Xu et al. 2023."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral

from torch import Tensor

from fastsample.grid import Grid, Node
from fastsample.grid import grid as spaced
from fastsample.spacing import Spacing, karras
from fastsample.tracing import Solver

from .ddim import noised
from .forms import check_number
from .heun import heun
from .types import Predictor


@dataclass(frozen=True)
class Interval:
    """Restarts from the level sigma / alpha = low up to high, `repeats` of them, each down again in `steps` steps."""

    low: float
    high: float
    repeats: int = 1
    steps: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.low < self.high < math.inf:
            raise ValueError(
                f"an interval goes up from low to high, two levels sigma / alpha, got {self.low:g} to {self.high:g}"
            )
        counts = self.repeats, self.steps
        if not all(isinstance(count, Integral) and count >= 1 for count in counts):
            raise ValueError(
                f"repeats and steps must be whole numbers of at least 1, got {self.repeats!r} and {self.steps!r}"
            )


def restart(
    model: Predictor,
    x: Tensor,
    grid: Grid,
    *,
    intervals: Sequence[Interval] | None = None,
    base: Solver = heun,
    spacing: Spacing = karras,
    s_noise: float = 1.0,
) -> Tensor:
    """Restart sampling: the base solver, and forward noise in between. Xu et al. 2023, arXiv:2306.14878, Alg. 1 and 2.

    What noise corrects in an SDE, without its error of every step. An interval costs repeats * steps more intervals of
    the base solver; the plan's `nfe` is the honest count.

    intervals: `Interval`s. Each starts at the inner node of the grid whose level is nearest to its low, in lam. None is
        one restart from the node nearest to 0.1 up to 20 times its level, as in Stable Diffusion's web UI, or to the
        grid's start if that is lower, in as many steps as the grid has there; none on a grid of one step.
    base: the solver that walks the grid's parts and the restarts, with its history fresh in each. It must end without
        noise, so that there is one noise for each evaluation: `heun` (the paper's), `dpmpp_2m`, `unipc_3` ...
    spacing: of the steps of a restart. s_noise: the standard deviation of the forward noise.
    """
    check_number("s_noise", s_noise)
    if not callable(base):
        raise ValueError(f"base of restart must be a solver such as solvers.heun, got {base!r}")
    places = _places(grid, _usual(grid) if intervals is None else _given(grid, intervals))
    done = 0
    for k, interval in places:
        x = base(model, x, replace(grid, nodes=grid.nodes[done : k + 1]))
        low, high = grid.nodes[k], _up_to(grid, interval.high)
        again = spaced(grid.schedule, interval.steps, spacing, high.t, low.t, lower_order_final=grid.lower_order_final)
        for _ in range(interval.repeats):
            x = base(model, noised(model, x, low, high, s_noise), again)
        done = k
    return base(model, x, replace(grid, nodes=grid.nodes[done:]))


def _given(grid: Grid, intervals: Sequence[Interval]) -> Sequence[Interval]:
    if isinstance(intervals, Interval) or not all(isinstance(interval, Interval) for interval in intervals):
        raise ValueError(f"intervals of restart must be a list of solvers.Interval(low, high), got {intervals!r:.80}")
    if not intervals or len(grid) < 2:
        raise ValueError(
            f"restart needs at least one interval and a grid of at least 2 steps, got {len(intervals)} and {len(grid)}"
        )
    return intervals


def _usual(grid: Grid) -> list[Interval]:
    """What `intervals=None` stands for."""
    levels = [math.exp(-node.lam) for node in grid.nodes]
    if len(grid) == 1:
        return []
    low = min(levels[1:-1], key=lambda level: abs(math.log(level / 0.1)))
    high = min(20 * low, levels[0])
    return [Interval(low, high, steps=max(1, sum(low < level <= high for level in levels)))]


def _up_to(grid: Grid, level: float) -> Node:
    node = grid.node(-math.log(level))
    return grid.nodes[0] if node.t > grid.nodes[0].t else node  # rounding may pass the start, where the schedule ends


def _places(grid: Grid, intervals: Sequence[Interval]) -> list[tuple[int, Interval]]:
    """The intervals in the order of the run, each with the index of the node it starts at."""
    inner: list[tuple[int, Node]] = list(enumerate(grid.nodes))[1:-1]
    places = []
    for interval in intervals:
        k = min(inner, key=lambda place: abs(place[1].lam + math.log(interval.low)))[0]
        low, top = math.exp(-grid.nodes[k].lam), math.exp(-grid.nodes[0].lam)
        if not low < interval.high <= top:
            raise ValueError(
                f"the restart from {interval.low:g} to {interval.high:g} begins at the grid's nearest level {low:.4g}, "
                f"below which or above whose start {top:.4g} it cannot go; choose another high, or more steps"
            )
        places.append((k, interval))
    places.sort(key=lambda place: place[0])
    if len({k for k, _ in places}) < len(places):
        raise ValueError("two intervals begin at the same node of the grid; use more steps, or repeats of one interval")
    return places
