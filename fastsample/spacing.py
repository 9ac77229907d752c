"""Spacings: where a grid places its times.

A spacing is a function `(schedule, steps, start, end) -> times`; it returns `steps` + 1 decreasing times from
start to end, or, where `end` is None (sigma = 0), the `steps` times at which the network is evaluated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from .schedule import VP, Schedule

Spacing = Callable[[Schedule, int, float, float | None], Sequence[float]]

_DDPM = VP.linear()


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

    With the t of DDPM's linear schedule at the same lam: equal steps in (t + 1)^(1 / rho), rho = 1.5 below 6
    steps, 1.75 below 10 and 2 from there. From 3 to 11 steps a run from t_max is `late`.
    """
    rho, zero = (1.5 if steps < 6 else 1.75 if steps < 10 else 2.0), _DDPM.t_zero
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
