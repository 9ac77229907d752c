"""The Frechet distance of two sets of features, with its standard error and without its bias.

FD = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_b^1/2 S_a S_b^1/2)^1/2)
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .moments import BLOCKS, Moments, Statistics, checked, eigh, kept, statistics, symmetric

LEAST = 10 * BLOCKS  # features, for a jackknife


@dataclass(frozen=True)
class Frechet:
    """A Frechet distance: value = mean_term + cov_term, between n_a and n_b features.

    se: the standard error from the drawing of a, with b held fixed (of both, where they are pairs); None where the
    features of a are not known. debiased: by the jackknife, may be negative; None for statistics alone and for less
    than 80 features. rank_a, rank_b: of the covariances.
    """

    value: float
    se: float | None
    debiased: float | None
    mean_term: float
    cov_term: float
    n_a: int
    n_b: int
    rank_a: int
    rank_b: int


def frechet_distance(
    a: Tensor | Moments | Statistics, b: Tensor | Moments | Statistics, *, paired: bool = False
) -> Frechet:
    """The Frechet distance of two sets of features [n, d], or of their moments or statistics.

    In float64, by eigenvalues; those that are rounding residue (below d eps times the greatest) are dropped, so it
    holds for covariances of any rank. Heusel et al. 2017, arXiv:1706.08500, Eq. 6; Dowson and Landau 1982.
    paired: feature i of a and of b belong together (two solvers, the same noise): the standard error and the jackknife
    are then those of both drawn at once. Of the features in two near solutions most of the error is the same, and
    leaving out samples on one side alone would take it for a distance.
    Warns where n <= d: the covariance has no full rank there and the bias is large.
    """
    moments = _moments(a)
    of_a, of_b = moments.statistics() if moments else _statistics(a), _statistics(b)
    if of_a.mean.shape != of_b.mean.shape:
        raise ValueError(f"features of {len(of_a.mean)} and {len(of_b.mean)} dimensions have no distance")
    if paired and (not isinstance(a, Tensor) or not isinstance(b, Tensor) or of_a.n != of_b.n):
        raise ValueError(f"paired features are two tensors of equal length, got {of_a.n} and {of_b.n} features")
    _warn(of_a, of_b)
    mean_term, cov_term = _terms(of_a, of_b)
    value = mean_term + cov_term
    se = debiased = None
    if isinstance(a, Tensor):
        moved = influence(a, of_a, of_b)
        if paired and isinstance(b, Tensor):
            moved = moved + influence(b, of_b, of_a)
        se = float(moved.std()) / math.sqrt(of_a.n)
    if moments:
        others = _moments(b) if paired else None
        debiased = _jackknife(moments, others.without if others else lambda k: of_b, value)
    return Frechet(value, se, debiased, mean_term, cov_term, of_a.n, of_b.n, of_a.rank, of_b.rank)


def frechet_by_svd(a: Tensor | Statistics, b: Tensor | Statistics) -> float:
    """The same distance from the singular values of R_a^T R_b, where S = R R^T: a cross-check.

    Their sum, the nuclear norm, is tr (S_b^1/2 S_a S_b^1/2)^1/2. It takes twice the time.
    """
    of_a, of_b = _statistics(a), _statistics(b)
    nuclear = torch.linalg.svdvals(of_a.root.T @ of_b.root)
    limit = len(nuclear) * torch.finfo(nuclear.dtype).eps * math.sqrt(_scale(of_a.cov, of_b.cov))
    shared = nuclear[nuclear > limit].sum()
    value = (of_a.mean - of_b.mean).square().sum() + of_a.cov.trace() + of_b.cov.trace() - 2 * shared
    return max(0.0, float(value))


def influence(features: Tensor, a: Statistics, b: Statistics) -> Tensor:
    """How much each of the features [n, d] of a moves the distance, [n]: the derivative along a point mass at it.

    d FD / d S_a = I - T, T = S_b^1/2 (S_b^1/2 S_a S_b^1/2)^-1/2 S_b^1/2, which maps S_a to S_b (optimal transport).
    Directions in which S_a or S_b vanish have no part in T.
    """
    values, vectors = eigh(b.root.T @ a.cov @ b.root)
    values = kept(values, _scale(a.cov, b.cov))
    inverse = torch.where(values > 0, values, torch.inf).rsqrt()
    half = b.root @ vectors
    slope = torch.eye(len(a.mean), dtype=torch.float64) - half * inverse @ half.T
    centred = checked(features) - a.mean
    return 2 * centred @ (a.mean - b.mean) + (centred @ slope * centred).sum(1) - (slope * a.cov).sum()


def _jackknife(moments: Moments, other: Callable[[int], Statistics], value: float) -> float:
    """Less the bias of order 1/n, from what is left without each block. Busing et al. 1999, Stat. Comput. 9, Eq. 3."""
    debiased = BLOCKS * value
    for k in range(BLOCKS):
        rest = moments.without(k)
        debiased -= rest.n / moments.n * sum(_terms(rest, other(k)))
    return debiased


def _terms(a: Statistics, b: Statistics) -> tuple[float, float]:
    values = kept(torch.linalg.eigvalsh(symmetric(b.root.T @ a.cov @ b.root)), _scale(a.cov, b.cov))
    cov_term = a.cov.trace() + b.cov.trace() - 2 * values.sqrt().sum()
    return float((a.mean - b.mean).square().sum()), max(0.0, float(cov_term))


def _scale(a: Tensor, b: Tensor) -> float:
    """What the eigenvalues of S_b^1/2 S_a S_b^1/2 reach where a and b overlap; where they do not, all are residue."""
    return float(a.diagonal().max() * b.diagonal().max())


def _statistics(side: Tensor | Moments | Statistics) -> Statistics:
    if isinstance(side, Statistics):
        return side
    return side.statistics() if isinstance(side, Moments) else statistics(side)


def _moments(side: Tensor | Moments | Statistics) -> Moments | None:
    """Those that a jackknife needs; None where they are unknown or each block would be of a few features."""
    if isinstance(side, Statistics) or (len(side) if isinstance(side, Tensor) else side.n) < LEAST:
        return None
    return side if isinstance(side, Moments) else Moments.of(side)


def _warn(*sides: Statistics) -> None:
    for side in sides:
        d = len(side.mean)
        if side.n <= d:
            warnings.warn(
                f"a Frechet distance of {side.n} samples in {d} dimensions is mostly bias: use more than {d}, "
                f"better {50 * d}",
                stacklevel=3,
            )
