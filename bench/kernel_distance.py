"""The kernel distance (KID where the features are Inception's): unbiased at any n, from all samples at once.

k(x, y) = (x.y / d + 1)^3
MMD^2 = E k(x, x') + E k(y, y') - 2 E k(x, y)        x, x' samples, y, y' of the reference, all independent

Binkowski et al. 2018, arXiv:1801.01401, Sec. 4. There, and in other tools, it is the mean over random subsets of 1000.
All pairs have the same expectation and a smaller variance, which is known in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from .measure import Score
from .rows import ToRows, converged

BLOCK = 2048  # rows of a block of kernel values: 32 MiB


@dataclass(frozen=True)
class KernelDistance(ToRows):
    """MMD^2 from samples to a reference held fixed: a `Measure`. Call it KID where the features are Inception's alone.

    paired: sample i and row i of the reference come from the same noise, as with `toward`.
    """

    paired: bool = False

    def score(self, features: Tensor) -> Score:
        found = self._distance(features)
        return Score(found.value, found.se, n=found.n_a)

    def between(self, features: Tensor, rows: Tensor) -> Score:
        found = kernel_distance(features, rows)
        return Score(found.value, found.se_both, n=found.n_a)  # the rows are drawn as well

    def influence(self, features: Tensor) -> Tensor:
        """[n]: how much each sample moves the distance."""
        return self._distance(features).influence

    def toward(self, features: Tensor) -> KernelDistance:
        """The distance to these features [n, d] of the same noises, such as the converged teacher's."""
        reference = converged(self.name, self.features, features)
        return replace(self, name=f"{self.name}_converged", reference=reference, paired=True)

    def _distance(self, features: Tensor) -> Discrepancy:
        if self.paired:
            return kernel_distance(features, self.rows, paired=True)
        return kernel_distance(features, self.rows, within_b=self._within)

    @cached_property
    def _within(self) -> Within:
        return within(self.rows)


@dataclass(frozen=True)
class Discrepancy:
    """MMD^2 between n_a samples and n_b of the reference; unbiased, so below 0 about half of the time for equal sides.

    se: the standard error from the drawing of the samples, with the reference held fixed. se_both: from both drawings.
    influence: [n_a], how much each sample moves the value. Of pairs, all three are those of drawing both at once.
    """

    value: float
    se: float
    se_both: float
    n_a: int
    n_b: int
    influence: Tensor = field(repr=False, compare=False)


@dataclass(frozen=True)
class Within:
    """Of the kernel between each two of n features, less `shift`: what each row sums to, and all squares together."""

    rows: Tensor
    squares: float
    shift: float


def kernel_distance(a: Tensor, b: Tensor, *, within_b: Within | None = None, paired: bool = False) -> Discrepancy:
    """The distance of features a [n_a, d] from those of the reference b [n_b, d], at least 4 of each, in float64.

    within_b: `within(b)`, where it is kept from an earlier call. Time goes as (n_a + n_b)^2 d; memory is a few blocks.
    paired: feature i of a and of b belong together (two solvers, the same noise); k(a_i, b_i) is then left out, as it
    is not of independent ones.
    Gretton et al. 2012, JMLR 13, Eq. 3 and, for pairs, Eq. 4; for the variance see `_variance`.
    """
    a, b = _checked(a, "samples"), _checked(b, "the reference")
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of {a.shape[1]} and {b.shape[1]} dimensions have no distance")
    m, n = len(a), len(b)
    if paired:
        return _paired(a, b)
    within_b = within_b or within(b)
    within_a = within(a, shift=within_b.shift)
    rows, columns, squares = _between(a, b, within_b.shift)
    mean = float(rows.sum()) / (m * n)
    value = float(within_a.rows.sum()) / (m * (m - 1)) + float(within_b.rows.sum()) / (n * (n - 1)) - 2 * mean
    influence, variance_a = _variance(within_a, rows / n)
    _, variance_b = _variance(within_b, columns / m)
    # each of the two holds the part that takes both drawings, known from an analysis of variance of k(x, y)
    both = squares - float(rows.square().sum()) / n - float(columns.square().sum()) / m + m * n * mean**2
    shared = 4 / (m * n) * both / ((m - 1) * (n - 1))
    variance = max(variance_a, variance_b, variance_a + variance_b - shared)
    return Discrepancy(value, math.sqrt(variance_a), math.sqrt(variance), m, n, influence)


def within(features: Tensor, *, shift: float | None = None) -> Within:
    """The kernel between each two of the features [n, d].

    shift: taken from every value, which no distance notices and the digits of small ones need; None: about their mean.
    """
    if shift is None:
        shift = (float(features.mean(0).square().mean()) + 1) ** 3
    return _pairs(len(features), lambda i, j: _kernel(features[i], features[j], shift), shift)


def _paired(a: Tensor, b: Tensor) -> Discrepancy:
    if len(a) != len(b):
        raise ValueError(f"paired features are of equal number, got {len(a)} and {len(b)}")

    def difference(i: slice, j: slice) -> Tensor:
        values = _kernel(a[i], a[j], 0.0).add_(_kernel(b[i], b[j], 0.0))
        return values.sub_(_kernel(a[i], b[j], 0.0)).sub_(_kernel(b[i], a[j], 0.0))

    pairs, n = _pairs(len(a), difference, 0.0), len(a)
    influence, variance = _variance(pairs, torch.zeros_like(pairs.rows))
    se = math.sqrt(variance)
    return Discrepancy(float(pairs.rows.sum()) / (n * (n - 1)), se, se, n, n, influence)


def _pairs(n: int, values_of: Callable[[slice, slice], Tensor], shift: float) -> Within:
    """Sums over i != j of a symmetric matrix that is made block by block, its lower half alone."""
    rows, squares = torch.zeros(n, dtype=torch.float64), 0.0
    blocks = _blocks(n)
    for i in blocks:
        for j in blocks[: blocks.index(i) + 1]:
            values = values_of(i, j)
            if i == j:
                values.fill_diagonal_(0)
            else:
                rows[j] += values.sum(0)
            rows[i] += values.sum(1)
            squares += (1 if i == j else 2) * float(values.square_().sum())
    return Within(rows, squares, shift)


def _between(a: Tensor, b: Tensor, shift: float) -> tuple[Tensor, Tensor, float]:
    rows, columns, squares = a.new_zeros(len(a)), a.new_zeros(len(b)), 0.0
    for i in _blocks(len(a)):
        for j in _blocks(len(b)):
            values = _kernel(a[i], b[j], shift)
            rows[i] += values.sum(1)
            columns[j] += values.sum(0)
            squares += float(values.square_().sum())
    return rows, columns, squares


def _blocks(n: int) -> list[slice]:
    return [slice(start, start + BLOCK) for start in range(0, n, BLOCK)]


def _kernel(a: Tensor, b: Tensor, shift: float) -> Tensor:
    inner = torch.addmm(a.new_ones(1), a, b.T, alpha=1 / a.shape[1])
    return inner.square().mul_(inner).sub_(shift)


def _variance(within: Within, toward: Tensor) -> tuple[Tensor, float]:
    """The influence of each sample, [m], and the variance of MMD^2 from drawing these m, the other side held fixed.

    toward: [m], the mean kernel to the other side. With h(x, x') = k(x, x') - toward(x) - toward(x') the value is the
    mean of h over all pairs and a constant: a U-statistic, with the variance (Hoeffding 1948, Eq. 5.13)
        4 (m - 2) / (m (m - 1)) Var E[h | x] + 2 / (m (m - 1)) Var h,
    each estimated without bias from pairs of pairs that share one, two or no sample. The same steps as in Bounliphone
    et al. 2016, arXiv:1511.04581, App. A, and Sutherland et al. 2017, arXiv:1611.04488, Eq. 5, who draw both sides and
    take them equally large. Where a variance comes out below 0, as it may where it is about 0, it counts as 0.
    """
    m = len(toward)
    pairs, triples = m * (m - 1), m * (m - 1) * (m - 2)
    rows = within.rows - (m - 2) * toward - toward.sum()
    mean = float(rows.sum()) / pairs
    rows = rows - (m - 1) * mean
    # the sum over i != j of (k_ij - t_i - t_j)^2, where t holds half of the mean, so that h has mean 0
    t = toward + mean / 2
    squares = within.squares - 4 * float(t @ within.rows) + 2 * (m - 2) * float(t @ t) + 2 * float(t.sum()) ** 2
    shared = float(rows @ rows)
    squared_mean = (2 * squares - 4 * shared) / (triples * (m - 3))
    of_one = (shared - squares) / triples - squared_mean
    of_two = squares / pairs - squared_mean
    return 2 / (m - 1) * rows, 4 * (m - 2) / pairs * max(0.0, of_one) + 2 / pairs * max(0.0, of_two)


def _checked(features: Tensor, what: str) -> Tensor:
    if features.dim() != 2 or len(features) < 4:
        raise ValueError(
            f"features of {what} must be [n, d] with n of at least 4 (the variance takes pairs of pairs), "
            f"got {list(features.shape)}"
        )
    if not bool(features.isfinite().all()):
        raise ValueError(f"features of {what} hold NaN or infinity")
    return features.detach().to("cpu", torch.float64)
