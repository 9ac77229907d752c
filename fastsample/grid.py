"""Grids: the nodes that a solver visits, and the spacings that place them.

A spacing is a function `(schedule, steps, start, end) -> times`; it returns `steps` + 1 decreasing times from
start to end, or, where `end` is None (sigma = 0), the `steps` times at which the network is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral
from typing import TYPE_CHECKING, TypeVar, overload

import numpy as np
import torch

from .schedule import VP, Schedule

if TYPE_CHECKING:
    from .gaussian import Gaussian, Warm
    from .tracing import Expr

State = TypeVar("State", torch.Tensor, "Expr")
Spacing = Callable[[Schedule, int, float, float | None], Sequence[float]]


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


_DDPM = VP.linear()


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


def uniform_t(schedule: Schedule, steps: int, start: float, end: float | None) -> list[float]:
    """Equal steps in t."""
    return _between(lambda t: t, lambda t: t, schedule, steps, start, end)


def quadratic_t(schedule: Schedule, steps: int, start: float, end: float | None) -> list[float]:
    """Equal steps in sqrt(t - t_zero): denser near the data. Song et al. 2021, arXiv:2010.02502, App. D.2."""
    zero = schedule.t_zero
    return _between(lambda t: (t - zero) ** 0.5, lambda r: zero + r**2, schedule, steps, start, end)


def power_t(rho: float) -> Spacing:
    """Equal steps in (t - t_zero)^(1 / rho): 1 is `uniform_t`, 2 `quadratic_t`; larger is denser near the data."""
    if not 0 < rho < math.inf:
        raise ValueError(f"rho of power_t must be positive and finite, got {rho!r}")

    def spaced(schedule: Schedule, steps: int, start: float, end: float | None) -> list[float]:
        zero = schedule.t_zero
        return _between(
            lambda t: (t - zero) ** (1 / rho), lambda r: zero + max(r, 0.0) ** rho, schedule, steps, start, end
        )

    spaced.__name__ = f"power_t({rho:g})"
    return spaced


def default_t(schedule: Schedule, steps: int, start: float, end: float | None) -> list[float]:
    """The spacing of `solvers.default`, chosen by measurement (docs/solvers.md); alike in lam on every schedule.

    With the t of DDPM's linear schedule at the same lam: equal steps in (t + 1)^(1 / 1.75) below 12 steps, in
    (t + 1)^(1 / 2) from there. From 3 to 11 steps a run from t_max is `late`.
    """
    rho, zero = (1.75 if steps < 12 else 2.0), _DDPM.t_zero
    last = schedule.t_min if end is None else end
    if 2 < steps < 12 and start == schedule.t_max:
        start = _later(schedule, steps, start, last)
    # Beyond the noise of that schedule, to alpha = 0, it has no time: the first step begins there all the same.
    top, low = (min(float(_DDPM.time(schedule.lam(t))), _DDPM.t_max) for t in (start, last))
    points = np.linspace((top - zero) ** (1 / rho), (low - zero) ** (1 / rho), steps + 1)[1:-1]
    times = [start, *(float(schedule.time(float(_DDPM.lam(zero + point**rho)))) for point in points)]
    return [*times, last] if end is not None else times


def late(spacing: Spacing) -> Spacing:
    """`spacing`, begun at index 999 - 1000 / steps of DDPM's linear schedule, or at its level in other schedules.

    What little of the data is in the noise up there is often not worth a step; `leading` starts there too. A schedule
    that has less noise than that is begun at t_max. A grid with such a spacing takes no `start`.
    """
    name = f"late {getattr(spacing, '__name__', type(spacing).__name__)}"

    def spaced(schedule: Schedule, steps: int, start: float, end: float | None) -> Sequence[float]:
        if start != schedule.t_max:
            raise ValueError(f"{name} chooses its start itself, got start = {start:g}; leave it out")
        return spacing(schedule, steps, _later(schedule, steps, start, schedule.t_min if end is None else end), end)

    spaced.__name__ = name
    return spaced


def _later(schedule: Schedule, steps: int, start: float, last: float) -> float:
    """The lower in noise of start and the level of index 999 - 1000 / steps of DDPM's linear schedule."""
    begin = _DDPM.t_max - (_DDPM.t_max + 1) / steps
    top, low = (float(_DDPM.time(schedule.lam(t))) for t in (start, last))
    return float(schedule.time(float(_DDPM.lam(begin)))) if low < begin < top else start


def uniform_lam(schedule: Schedule, steps: int, start: float, end: float | None) -> list[float]:
    """Equal steps in lam = log(alpha / sigma). Lu et al. 2022, arXiv:2206.00927, Sec. 3.3."""
    _check_lam(schedule, start, end, "uniform_lam")
    return _between(lambda t: float(schedule.lam(t)), lambda v: float(schedule.time(v)), schedule, steps, start, end)


def karras(schedule: Schedule, steps: int, start: float, end: float | None, rho: float = 7.0) -> list[float]:
    """Equal steps in (sigma / alpha)^(1 / rho); for another rho use functools.partial.

    Where the end is sigma = 0 the last evaluation is at `t_min`. Karras et al. 2022, arXiv:2206.00364, Eq. 5.
    """
    _check_lam(schedule, start, end, "karras")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho of karras must be positive and finite, got {rho!r}")
    count = steps + (end is not None)
    last = schedule.t_min if end is None else end
    ends = [math.exp(-float(schedule.lam(t)) / rho) for t in (start, last)]
    times = [float(schedule.time(-rho * math.log(r))) for r in np.linspace(ends[0], ends[1], count)]
    return _pinned(times, start, last)


def exponential(schedule: Schedule, steps: int, start: float, end: float | None) -> list[float]:
    """Equal steps in log(sigma / alpha); where the end is sigma = 0 the last evaluation is at `t_min`, as in `karras`.

    "exponential" of k-diffusion and diffusers, without their rounding to indices; `uniform_lam` with its last
    evaluation one step lower.
    """
    _check_lam(schedule, start, end, "exponential")
    last = schedule.t_min if end is None else end
    ends = [float(schedule.lam(t)) for t in (start, last)]
    times = [float(schedule.time(lam)) for lam in np.linspace(ends[0], ends[1], steps + (end is not None))]
    return _pinned(times, start, last)


def beta(
    schedule: Schedule, steps: int, start: float, end: float | None, a: float = 0.6, b: float = 0.6
) -> list[float]:
    """Quantiles of a Beta(a, b) distribution of t: denser at both ends. Lee et al. 2024, arXiv:2407.12173, Sec. 4.

    For other a and b use functools.partial. Where the end is sigma = 0, that is where the last quantile lies.
    """
    from scipy.special import betaincinv

    if not (0 < a < math.inf and 0 < b < math.inf):
        raise ValueError(f"a and b of a Beta distribution must be positive and finite, got {a!r} and {b!r}")
    last = schedule.t_min if end is None else end
    shares = betaincinv(a, b, np.linspace(1, 0, steps + 1))
    times = _pinned([last + (start - last) * float(share) for share in shares], start, last)
    return times if end is not None else times[:-1]


def snr_table(ratios: Sequence[float], name: str = "snr_table") -> Spacing:
    """A spacing through given noise levels sigma / alpha, from the noisiest down; interpolated in lam for other steps.

    The last level is the end of the last interval: sigma = 0 takes its place, as in `uniform_lam`. Levels beyond the
    start and end of the grid give way to these. Sabour et al. 2024, arXiv:2404.14507 (Align Your Steps), interpolate
    so.
    """
    if len(ratios) < 2 or not all(0 < ratio < math.inf for ratio in ratios) or any(t >= s for s, t in pairwise(ratios)):
        raise ValueError(f"a table of levels needs at least 2 positive, decreasing numbers, got {list(ratios)}")
    table = -np.log(np.asarray(ratios, dtype=float))

    def spaced(schedule: Schedule, steps: int, start: float, end: float | None) -> list[float]:
        _check_lam(schedule, start, end, name)
        last = schedule.t_min if end is None else end
        lams = np.interp(np.linspace(0, len(table) - 1, steps + 1), np.arange(len(table)), table)
        ends = [float(schedule.lam(t)) for t in (start, last)]
        inner = [float(lam) for lam in lams[1:-1]]
        outside = [lam for lam in inner if not ends[0] < lam < ends[1]]
        if outside:
            raise ValueError(
                f"{name} has a level sigma / alpha = {math.exp(-outside[0]):.4g} outside this grid "
                f"({math.exp(-ends[0]):.4g} to {math.exp(-ends[1]):.4g}): the table is for another model or range"
            )
        times = _pinned([start, *(float(schedule.time(lam)) for lam in inner), last], start, last)
        return times if end is not None else times[:-1]

    spaced.__name__ = name
    return spaced


# Sabour et al. 2024, arXiv:2404.14507, the ten-step schedules published with it, as levels sigma / alpha.
ays_sd15 = snr_table((14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029), "ays_sd15")
ays_sdxl = snr_table((14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113, 0.029), "ays_sdxl")
ays_svd = snr_table((700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.002), "ays_svd")


def leading(schedule: Schedule, steps: int, start: float, end: float | None, offset: int = 0) -> list[float]:
    """Indices 0, r, 2r, ... + offset, with r = T // steps: DDIM in diffusers ("leading"), Lin et al. 2023, Tab. 2."""
    count = _table_size(schedule, steps, start, end, "leading")
    return [float(i * (count // steps) + offset) for i in reversed(range(steps))]


def trailing(schedule: Schedule, steps: int, start: float, end: float | None) -> list[float]:
    """Indices T - 1, T - 1 - T / steps, ... rounded: "trailing" of Lin et al. 2023, arXiv:2305.08891, Tab. 2."""
    count = _table_size(schedule, steps, start, end, "trailing")
    return [float(np.round(count - i * count / steps) - 1) for i in range(steps)]


def linspace(schedule: Schedule, steps: int, start: float, end: float | None) -> list[float]:
    """Indices evenly from T - 1 to 0, both evaluated, rounded: "linspace" of Lin et al. 2023, Tab. 2."""
    count = _table_size(schedule, steps, start, end, "linspace")
    points = np.linspace(0, count - 1, max(steps, 2)).round()  # one step starts at the noise, not at 0
    return [float(t) for t in points[::-1][:steps]]


def at_times(times: Sequence[float]) -> Spacing:
    """A spacing of exactly these times, noisiest first: `steps` of them, one more where the grid has an `end`."""

    def given(schedule: Schedule, steps: int, start: float, end: float | None) -> Sequence[float]:
        return times

    given.__name__ = "at_times"
    return given


SPACINGS: dict[str, Spacing] = {
    f.__name__: f
    for f in (
        default_t,
        uniform_lam,
        uniform_t,
        quadratic_t,
        karras,
        exponential,
        beta,
        ays_sd15,
        ays_sdxl,
        ays_svd,
        leading,
        trailing,
        linspace,
    )
}


def _between(
    forward: Callable[[float], float],
    back: Callable[[float], float],
    schedule: Schedule,
    steps: int,
    start: float,
    end: float | None,
) -> list[float]:
    """Equal steps in forward(t) down to `end`; without one down to t_min, whose place sigma = 0 then takes."""
    last = schedule.t_min if end is None else end
    points = np.linspace(forward(start), forward(last), steps + 1)
    times = _pinned([back(float(point)) for point in points], start, last)
    return times if end is not None else times[:-1]


def _pinned(times: list[float], first: float, last: float) -> list[float]:
    return [first, *times[1:-1], last] if len(times) > 1 else [first]  # the round trip may miss by an ulp


def _check_lam(schedule: Schedule, start: float, end: float | None, name: str) -> None:
    if not float(schedule.alpha(start)) > 0:
        raise ValueError(
            f"{name} cannot start at t = {start:g}, where alpha = 0 and lam = -inf; pass start < {start:g} or use "
            f"spacing=fs.uniform_t"
        )
    if end is not None and not float(schedule.sigma(end)) > 0:
        raise ValueError(f"{name} cannot end at t = {end:g}, where sigma = 0 and lam = inf; leave end=None for that")


def _table_size(schedule: Schedule, steps: int, start: float, end: float | None, name: str) -> int:
    if not isinstance(schedule, VP):
        raise ValueError(f"spacing {name} counts trained indices, so it needs a VP schedule, got {schedule!r}")
    if end is not None or start != schedule.t_max:
        raise ValueError(f"spacing {name} has fixed times; for another start or end use fs.uniform_t")
    count = len(schedule.betas)
    if steps > count:
        raise ValueError(f"spacing {name} has only {count} indices for {steps} steps; use fs.uniform_t")
    return count
