"""What a difference is worth: its standard error, p-value and interval, and Holm's correction for asking many times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist

from scipy.special import stdtr, stdtrit
from torch import Tensor

FEWEST = 6  # values, below which even the least and the greatest do not enclose the median in 95% of cases


@dataclass(frozen=True)
class Estimate:
    """A difference, 0 where nothing changed.

    se: its standard error, itself known to df degrees of freedom (None: to many).
    margin: how far it may lie from 0 for reasons that se does not see; the interval is wider by so much on both sides.
    """

    effect: float
    se: float
    df: float | None = None
    margin: float = 0.0

    @property
    def p(self) -> float:
        """The two-sided p-value of: the true difference is no greater than the margin."""
        beyond = abs(self.effect) - self.margin
        if beyond <= 0:
            return 1.0
        if self.se == 0:
            return 0.0
        z = beyond / self.se
        return math.erfc(z / math.sqrt(2)) if self.df is None else float(2 * stdtr(self.df, -z))

    def interval(self, level: float) -> tuple[float, float]:
        """Its interval of confidence 1 - level; 0 lies outside exactly where p < level."""
        z = -(NormalDist().inv_cdf(level / 2) if self.df is None else float(stdtrit(self.df, level / 2)))
        reach = self.margin + z * self.se
        return self.effect - reach, self.effect + reach


@dataclass(frozen=True)
class Decision:
    """What Holm's procedure says of one test: its adjusted p-value, the level it was held to, the outcome."""

    p: float
    level: float
    rejected: bool


def holm(p_values: Sequence[float], level: float) -> list[Decision]:
    """So that the chance of even one false rejection among all tests is at most `level`, whatever their dependence.

    The k-th smallest p-value is held to level / (m - k + 1), until one fails; those after it fail with it and share
    its level, so that an interval of 1 - that level leaves out 0 exactly where the test is rejected.
    Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    decided: dict[int, Decision] = {}
    m, adjusted, held, going = len(p_values), 0.0, level, True
    for k, i in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        if going:
            held = level / (m - k)
            going = p_values[i] < held
        adjusted = max(adjusted, min(1.0, (m - k) * p_values[i]))
        decided[i] = Decision(adjusted, held, going)
    return [decided[i] for i in range(m)]


def paired(effect: float, before: Tensor, after: Tensor) -> Estimate:
    """Of two scores of samples that share their seeds; before, after: how much each sample moves them, [n].

    What both have in common with the noise of sample i cancels in the difference of the influences.
    """
    n = len(before)
    return Estimate(effect, float((after - before).std()) / math.sqrt(n), n - 1)


def unpaired(effect: float, before: float, after: float, n: int | None) -> Estimate:
    """Of two scores with their standard errors, as if they had nothing in common. n: of how many samples each."""
    return Estimate(effect, math.hypot(before, after), n - 1 if n and n > 1 else None)


def ratio(before: Sequence[float], after: Sequence[float], *, drift: float = 0.0) -> Estimate:
    """The logarithm of the ratio of two medians, of at least 6 values each, all > 0, in the order measured.

    drift: how far the ratio may be from 1 though nothing changed, such as 0.1 between two processes.
    """
    (log_a, se_a, df_a), (log_b, se_b, df_b) = _log_median(before), _log_median(after)
    squares = se_a**2, se_b**2
    spread = squares[0] ** 2 / df_a + squares[1] ** 2 / df_b
    df = sum(squares) ** 2 / spread if spread > 0 else None  # Welch and Satterthwaite
    return Estimate(log_b - log_a, math.sqrt(sum(squares)), df, math.log1p(drift))


def _log_median(values: Sequence[float]) -> tuple[float, float, float]:
    """The log of the median, its standard error and the degrees of freedom of that.

    The standard error is the greater of two. For independent values it is 1 / (2 f sqrt(n)), with the density f from
    the 2 sqrt(n) values about the median; from so few gaps it has about sqrt(n) degrees of freedom. And that of the
    medians of consecutive blocks sees a machine that was slower for a while.
    """
    n, root = len(values), math.sqrt(len(values))
    k = max(1, round(n / 2 - root))
    ordered = sorted(values)
    independent = math.log(ordered[n - k] / ordered[k - 1]) * root / (2 * (n - 2 * k + 1))
    blocks = max(3, min(8, round(root)))
    cuts = [round(i * n / blocks) for i in range(blocks + 1)]
    medians = [math.log(statistics.median(values[i:j])) for i, j in pairwise(cuts)]
    return math.log(statistics.median(values)), max(independent, statistics.stdev(medians) / math.sqrt(blocks)), root
