"""Quality measures: functions from samples to a number, with its standard error where one is known.

FD = |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_b^1/2 S_a S_b^1/2)^1/2)        of features a and b
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastsample.noise import mix

from .extractor import digits_features

BLOCKS = 8  # of the jackknife


@dataclass(frozen=True)
class Score:
    """One measured number. se: its standard error; debiased: less the bias of a finite n; n: of how many samples."""

    value: float
    se: float | None = None
    debiased: float | None = None
    n: int | None = None


# What `run` takes: any function of samples [n, ...]; its `name` or `__name__` becomes the name of the column.
Quality = Callable[[Tensor], Score | float]


def fd_digits(reference: Tensor, *, name: str = "fd_digits") -> FrechetTo:
    """The Frechet distance to reference images [N, 1, 8, 8] in the features of the shipped "digits-cnn-1".

    It sees wrong and missing digits, and little of fine detail: use it beside `fd_pixels`. Not an FID, and to be
    compared only between equal references and equal numbers of samples.
    """
    return FrechetTo(name, digits_features, statistics(digits_features(reference)))


def fd_pixels(reference: Tensor, *, name: str = "fd_pixels") -> FrechetTo:
    """The Frechet distance to reference images [N, ...] of the pixels themselves, clamped to [-1, 1]; not an FID."""
    return FrechetTo(name, _pixels, statistics(_pixels(reference)))


@dataclass(frozen=True)
class FrechetTo:
    """The Frechet distance from samples to a reference held fixed. features: samples -> [n, d]."""

    name: str
    features: Callable[[Tensor], Tensor]
    reference: Statistics

    def __call__(self, samples: Tensor) -> Score:
        distance = frechet_distance(self.features(samples), self.reference)
        return Score(distance.value, distance.se, distance.debiased, distance.n_a)


def endpoint_rms(samples: Tensor, converged: Tensor) -> Score:
    """Root mean square, over samples and pixels, of samples - converged: the error of the solver alone.

    converged: what an accurate solution makes of the same noises, [n, ...] like samples.
    """
    if samples.shape != converged.shape:
        raise ValueError(f"samples have shape {list(samples.shape)}, the converged {list(converged.shape)}")
    squares = (samples.double() - converged.double()).square().flatten(1).mean(1)
    n, rms = len(squares), float(squares.mean().sqrt())
    se = float(squares.std()) / (2 * rms * math.sqrt(n)) if n > 1 and rms > 0 else None
    return Score(rms, se, n=n)


@dataclass(frozen=True)
class Statistics:
    """Mean [d] and covariance [d, d] of n features, float64."""

    mean: Tensor
    cov: Tensor
    n: int

    @cached_property
    def root(self) -> Tensor:
        """The symmetric square root of the covariance."""
        values, vectors = _eigh(self.cov)
        return vectors * values.sqrt() @ vectors.T


@dataclass(frozen=True)
class Frechet:
    """A Frechet distance: value = mean_term + cov_term, between n_a and n_b features.

    se: the standard error from the drawing of a, with b held fixed. debiased: by the jackknife; may be negative.
    Both are None where only the statistics of a are known.
    """

    value: float
    se: float | None
    debiased: float | None
    mean_term: float
    cov_term: float
    n_a: int
    n_b: int


def statistics(features: Tensor) -> Statistics:
    """Mean and covariance (of n - 1 degrees of freedom, as in every FID) of features [n, d]."""
    if features.dim() != 2 or len(features) < 2:
        raise ValueError(f"features must be [n, d] with n of at least 2, got {list(features.shape)}")
    if not bool(features.isfinite().all()):
        raise ValueError("features hold NaN or infinity")
    features = features.detach().to("cpu", torch.float64)  # float32 loses all digits of a small distance
    return Statistics(features.mean(0), torch.atleast_2d(torch.cov(features.T)), len(features))


def frechet_distance(a: Tensor | Statistics, b: Tensor | Statistics) -> Frechet:
    """The Frechet distance of two sets of features [n, d], or of their statistics.

    In float64, by eigenvalues; those that are rounding residue (below d eps times the greatest) are dropped, so it
    holds for covariances of any rank. Heusel et al. 2017, arXiv:1706.08500, Eq. 6; Dowson and Landau 1982.
    Warns where n <= d: the covariance has no full rank there and the bias is large.
    """
    of_a = a if isinstance(a, Statistics) else statistics(a)
    of_b = b if isinstance(b, Statistics) else statistics(b)
    if of_a.mean.shape != of_b.mean.shape:
        raise ValueError(f"features of {len(of_a.mean)} and {len(of_b.mean)} dimensions have no distance")
    d = len(of_a.mean)
    for side in (of_a, of_b):
        if side.n <= d:
            warnings.warn(
                f"a Frechet distance of {side.n} samples in {d} dimensions is mostly bias: use more than {d}, "
                f"better {50 * d}",
                stacklevel=2,
            )
    mean_term, cov_term = _terms(of_a.mean, of_a.cov, of_b)
    value = mean_term + cov_term
    se = debiased = None
    if isinstance(a, Tensor):
        features = a.detach().to("cpu", torch.float64)
        se = float(_influence(features, of_a, of_b).std()) / math.sqrt(of_a.n)
        debiased = _jackknife(features, of_a, of_b, value) if of_a.n >= 10 * BLOCKS else None
    return Frechet(value, se, debiased, mean_term, cov_term, of_a.n, of_b.n)


def _terms(mean: Tensor, cov: Tensor, b: Statistics) -> tuple[float, float]:
    values = _kept(torch.linalg.eigvalsh(_symmetric(b.root @ cov @ b.root)), _scale(cov, b.cov))
    cov_term = cov.trace() + b.cov.trace() - 2 * values.sqrt().sum()
    return float((mean - b.mean).square().sum()), max(0.0, float(cov_term))


def _influence(features: Tensor, a: Statistics, b: Statistics) -> Tensor:
    """How much each sample of a moves the distance, [n]: the derivative along a point mass at it.

    d FD / d S_a = I - T, T = S_b^1/2 (S_b^1/2 S_a S_b^1/2)^-1/2 S_b^1/2, which maps S_a to S_b (optimal transport).
    """
    values, vectors = _eigh(b.root @ a.cov @ b.root, _scale(a.cov, b.cov))
    inverse = torch.where(values > 0, values, torch.inf).rsqrt()
    half = b.root @ vectors
    slope = torch.eye(len(a.mean), dtype=torch.float64) - half * inverse @ half.T
    centred = features - a.mean
    return 2 * centred @ (a.mean - b.mean) + (centred @ slope * centred).sum(1) - (slope * a.cov).sum()


def _jackknife(features: Tensor, a: Statistics, b: Statistics, value: float) -> float:
    """Less the bias of order 1/n: Busing et al. 1999, Statistics and Computing 9, Eq. 3, without one block at a time.

    The block of sample i follows from a hash of i: by i mod 8, or by ranges, samples whose classes take turns or lie
    in order would make blocks of a few classes each, and the result nonsense.
    """
    centred = features - a.mean
    scatter = a.cov * (a.n - 1)
    blocks = torch.tensor([mix(i) % BLOCKS for i in range(a.n)])
    debiased = BLOCKS * value
    for k in range(BLOCKS):
        block = centred[blocks == k]
        n = a.n - len(block)
        shift = -block.sum(0) / n
        cov = (scatter - block.T @ block - n * shift.outer(shift)) / (n - 1)
        debiased -= n / a.n * sum(_terms(a.mean + shift, cov, b))
    return debiased


def _eigh(matrix: Tensor, scale: float = 0.0) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(_symmetric(matrix))
    return _kept(values, scale), vectors


def _kept(values: Tensor, scale: float = 0.0) -> Tensor:
    limit = len(values) * torch.finfo(values.dtype).eps * max(float(values.max()), scale)
    return torch.where(values > limit, values, 0.0)


def _scale(a: Tensor, b: Tensor) -> float:
    """What the eigenvalues of S_b^1/2 S_a S_b^1/2 reach where a and b overlap; where they do not, all are residue."""
    return float(a.diagonal().max() * b.diagonal().max())


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def _pixels(images: Tensor) -> Tensor:
    return images.detach().to("cpu", torch.float64).clamp(-1, 1).flatten(1)
