"""The data as one Gaussian: what is known of it at no network evaluation, and the exact move that follows from it."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .grid import Node


@dataclass(frozen=True, eq=False)
class Gaussian:
    """Mean and covariance of the data; `Gaussian.of(samples)` measures them.

    mean: of the shape of a sample, or a number. variance: of every coordinate, of the same shape or a number.
    covariance: [D, D] over the flattened sample, in place of `variance`; mean then has D numbers.
    All are kept in float64.
    """

    mean: Tensor
    variance: Tensor | None = None
    covariance: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("mean", "variance", "covariance"):
            value = getattr(self, name)
            if value is not None:
                value = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
                if not bool(value.isfinite().all()):
                    raise ValueError(f"{name} of a Gaussian must be finite")
                object.__setattr__(self, name, value)
        if (self.variance is None) == (self.covariance is None):
            raise ValueError("a Gaussian has either a variance or a covariance; give one of them")
        if self.variance is not None and not bool((self.variance >= 0).all()):
            raise ValueError(f"variance must not be negative, got {float(self.variance.min()):g}")
        if self.covariance is not None:
            shape, size = tuple(self.covariance.shape), self.mean.numel()
            if shape != (size, size):
                raise ValueError(f"covariance must be [{size}, {size}] for a mean of {size} numbers, got {list(shape)}")
            uneven = float((self.covariance - self.covariance.T).abs().max())
            if uneven > 1e-6 * float(self.covariance.abs().max()):  # float32's rounding is far below
                raise ValueError(f"covariance must be symmetric, its two halves differ by {uneven:g}")
            lowest = float(self._basis[0].min())
            if lowest < -1e-8 * max(1.0, float(self._basis[0].max())):
                raise ValueError(f"covariance has the negative eigenvalue {lowest:g}; give a positive one")

    @classmethod
    def of(cls, samples: Tensor, *, full: bool = False, scalar: bool = False) -> Gaussian:
        """The Gaussian of samples [N, ...], with a variance for each coordinate.

        full: with a covariance instead. scalar: with one variance for all coordinates.
        """
        if samples.dim() < 2 or len(samples) < 2:
            raise ValueError(f"samples must be [N, ...] with N of at least 2, got shape {list(samples.shape)}")
        samples = samples.detach().double()
        mean = samples.mean(0)
        if full:
            return cls(mean, covariance=torch.cov(samples.flatten(1).T).reshape(mean.numel(), mean.numel()))
        variance = samples.var(0)
        return cls(mean, variance.mean() if scalar else variance)

    @cached_property
    def _basis(self) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(self.covariance)
        return values, vectors

    def move(self, x: Tensor, s: Node, t: Node) -> Tensor:
        """Where the probability-flow ODE takes x from node s to node t if the data is this Gaussian: the exact map.

        x: [B, ...]. Finite at alpha = 0 and at sigma = 0. Each coordinate (of the principal axes, with a covariance)
        keeps its distance to the mean in standard deviations of its marginal, sqrt(alpha^2 v + sigma^2).
        """
        self.check(tuple(x.shape[1:]))
        mean = self.mean.to(x)
        if self.covariance is None:
            assert self.variance is not None
            return t.alpha * mean + _ratio(self.variance, s, t).to(x) * (x - s.alpha * mean)
        values, vectors = self._basis
        away = (x - s.alpha * mean.view(x.shape[1:])).flatten(1)
        matrix = (vectors * _ratio(values.clamp(min=0), s, t)) @ vectors.T
        return t.alpha * mean.view(x.shape[1:]) + (away @ matrix.to(x)).view_as(x)

    def check(self, shape: tuple[int, ...]) -> None:
        """Raise ValueError where these are not the statistics of samples of this shape."""
        size = math.prod(shape)
        if self.covariance is not None:
            fits = self.mean.numel() == size
        else:
            assert self.variance is not None
            fits = all(
                tuple(value.shape) in ((), shape) or _broadcasts(value, shape) for value in (self.mean, self.variance)
            )
        if not fits:
            raise ValueError(
                f"the warm start holds statistics of samples of shape {list(self.mean.shape)}, these have {list(shape)}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain data for a file: shapes, and the float64 numbers in base64."""
        found = {name: getattr(self, name) for name in ("mean", "variance", "covariance")}
        return {name: _encode(value) for name, value in found.items() if value is not None}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Gaussian:
        return cls(**{name: _decode(value) for name, value in data.items()})


@dataclass(frozen=True)
class Warm:
    """A warm start: noise at node `start` is moved as if the data were `gaussian`, to where the solver begins."""

    gaussian: Gaussian
    start: Node

    def begin(self, noise: Tensor, first: Node) -> Tensor:
        """The state at node `first`, from unit noise [B, ...]."""
        return self.gaussian.move(self.start.sigma * noise, self.start, first)


def _ratio(variance: Tensor, s: Node, t: Node) -> Tensor:
    return ((t.alpha**2 * variance + t.sigma**2) / (s.alpha**2 * variance + s.sigma**2)).sqrt()


def _broadcasts(value: Tensor, shape: tuple[int, ...]) -> bool:
    try:
        return tuple(torch.broadcast_shapes(tuple(value.shape), shape)) == shape
    except RuntimeError:
        return False


def _encode(value: Tensor) -> dict[str, Any]:
    numbers = value.contiguous().numpy().astype("<f8").tobytes()
    return {"shape": list(value.shape), "float64": base64.b64encode(numbers).decode()}


def _decode(data: dict[str, Any]) -> Tensor:
    numbers = torch.frombuffer(bytearray(base64.b64decode(data["float64"], validate=True)), dtype=torch.float64)
    return numbers.reshape(data["shape"])
