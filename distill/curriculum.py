"""Curricula: numbers that change as training goes on, as functions of the step alone, so that a run can be resumed.

They count intervals, as grids do: N(k) of the papers counts the times, one more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fastsample.grid import Grid

Curriculum = Callable[[int], int]
Rate = Callable[[int], float]


@dataclass(frozen=True)
class Doubling:
    """first, 2 first, 4 first, ... last intervals, each for an equal part of `over` steps; then `last`.

    N(k) - 1 = min(first 2^floor(k / K'), last), K' = floor(over / (log2 floor(last / first) + 1)).
    Song and Dhariwal 2023, arXiv:2310.14189, Sec. 3.4 and Table 1.
    """

    first: int = 10
    last: int = 1280
    over: int = field(kw_only=True)

    def __post_init__(self) -> None:
        _check_counts(self.first, self.last, self.over)

    @property
    def stages(self) -> int:
        """How many numbers of intervals there are before the number stays at `last`."""
        return math.ceil(math.log2(self.last / self.first)) + 1

    def __call__(self, step: int) -> int:
        each = math.floor(self.over / (math.log2(self.last // self.first) + 1)) or 1
        return int(min(self.first * 2 ** min(step // each, 64), self.last))

    def counts(self) -> list[int]:
        return sorted({min(self.first * 2**stage, self.last) for stage in range(self.stages)})


@dataclass(frozen=True)
class SquareRoot:
    """N(k) - 1 = ceil(sqrt(k / over ((s1 + 1)^2 - s0^2) + s0^2) - 1), from s0 - 1 intervals (at least 1) to s1.

    Song et al. 2023, arXiv:2303.01469, App. C; the papers' s0 = 2, s1 = 150.
    """

    s0: int = 2
    s1: int = 150
    over: int = field(kw_only=True)

    def __post_init__(self) -> None:
        _check_counts(self.s0, self.s1, self.over)

    def __call__(self, step: int) -> int:
        done = min(step / self.over, 1.0)
        # s0 - 1 exactly at the start, where the root of s0^2 is s0
        return max(1, math.ceil(math.sqrt(done * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2) - 1))

    def counts(self) -> list[int]:
        return [max(1, self.s0 - 1), self.s1]


@dataclass(frozen=True)
class Matched:
    """mu(k) = exp(s0 ln(mu0) / N(k)): the rate of a moving average that goes with a curriculum.

    At N = s0 it is mu0. Song et al. 2023, arXiv:2303.01469, App. C.
    """

    times: Curriculum
    mu0: float = 0.9
    s0: int = 2

    def __post_init__(self) -> None:
        if not 0 < self.mu0 < 1:
            raise ValueError(f"mu0 must lie between 0 and 1, got {self.mu0:g}")

    def __call__(self, step: int) -> float:
        return math.exp(self.s0 * math.log(self.mu0) / (self.times(step) + 1))


@dataclass(frozen=True)
class Lognormal:
    """Interval i with a probability of erf(z(level_i+1)) - erf(z(level_i)), z = (ln level - mean) / (sqrt(2) std).

    level = sigma / alpha, so that the same holds for every schedule; at the ends, 0 and infinity, erf is -1 and 1.
    Song and Dhariwal 2023, arXiv:2310.14189, Sec. 3.5.
    """

    mean: float = -1.1
    std: float = 2.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise ValueError(f"need a finite mean and a positive std, got mean = {self.mean:g}, std = {self.std:g}")

    def __call__(self, grid: Grid) -> list[float]:
        """The probability of each interval of the grid, from noise to data."""
        heights = [math.erf((-node.lam - self.mean) / (math.sqrt(2) * self.std)) for node in grid.nodes]
        masses = -np.diff(heights)
        if not masses.sum() > 0:
            raise ValueError(
                f"{self!r} has no probability between sigma / alpha = {math.exp(-grid.nodes[0].lam):.3g} and "
                f"{math.exp(-grid.nodes[-1].lam):.3g}; choose a mean between their logarithms"
            )
        return [float(mass) for mass in masses / masses.sum()]


def uniform(grid: Grid) -> list[float]:
    """Every interval as often as any other. Song et al. 2023, arXiv:2303.01469, Alg. 2 and 3."""
    return [1 / len(grid)] * len(grid)


Sampling = Callable[[Grid], Sequence[float]]
SAMPLINGS: dict[str, Sampling] = {"uniform": uniform, "lognormal": Lognormal()}


def sampling(given: str | Sampling) -> Sampling:
    """How often each interval is trained at: by name, or a function Grid -> probabilities."""
    if callable(given):
        return given
    if given not in SAMPLINGS:
        raise ValueError(f"unknown sampling {given!r}; choose one of {', '.join(SAMPLINGS)} or a function of the grid")
    return SAMPLINGS[given]


def intervals(times: int | Curriculum, step: int) -> int:
    """The number of intervals at a step. Raises ValueError where it is not a whole number of at least 1."""
    count = times if isinstance(times, int) else times(step)
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"times gave {count!r} intervals at step {step}; it must give whole numbers of at least 1")
    return count


def check_times(times: int | Curriculum) -> None:
    """Raise before training where the first steps of a curriculum already fail."""
    if not isinstance(times, int) and not callable(times):
        raise ValueError(f"times must be a number of intervals or a function of the step, got {times!r}")
    if isinstance(times, bool) or (isinstance(times, int) and times < 1):
        raise ValueError(f"times counts the intervals, at least 1 (N = 2 times), got {times!r}")
    intervals(times, 0)


def rate(mu: float | Rate, step: int) -> float:
    """The rate of a moving average at a step. Raises ValueError outside [0, 1)."""
    now = mu(step) if callable(mu) else mu
    if not 0 <= now < 1:
        raise ValueError(f"the rate of the target's moving average must be at least 0 and below 1, got {now:g}")
    return now


def _check_counts(first: int, last: int, over: int) -> None:
    if not 1 <= first <= last:
        raise ValueError(f"a curriculum grows from at least 1 to no less, got {first} to {last}")
    if over < 1:
        raise ValueError(f"a curriculum lasts at least 1 step, got over = {over}; give the steps of the training")
