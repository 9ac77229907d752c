"""Means and covariances of features that come in parts: in several calls, in shards, on several processes.

Kept apart for 8 blocks of samples, so that a jackknife needs no features again. The block of sample i follows from a
hash of i: by i mod 8, or by ranges, samples whose classes take turns or lie in order would make blocks of few classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample.noise import mix

BLOCKS = 8


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean [d] and covariance [d, d] of n features, float64."""

    mean: Tensor
    cov: Tensor
    n: int

    @cached_property
    def root(self) -> Tensor:
        """R [d, rank] with R R^T = the covariance: its eigenvectors, each times the root of its eigenvalue."""
        values, vectors = eigh(self.cov)
        values = kept(values)
        return vectors[:, values > 0] * values[values > 0].sqrt()

    @cached_property
    def rank(self) -> int:
        """Of the covariance, by Cholesky's method with pivots: a tenth of the time that its eigenvalues take."""
        from scipy.linalg.lapack import dpstrf

        return int(dpstrf(symmetric(self.cov).numpy().T, overwrite_a=True)[2])


def statistics(features: Tensor) -> Statistics:
    """Mean and covariance (of n - 1 degrees of freedom, as in every FID) of features [n, d]."""
    features = checked(features)
    if len(features) < 2:
        raise ValueError(f"features must be [n, d] with n of at least 2, got {list(features.shape)}")
    return Statistics(features.mean(0), torch.atleast_2d(torch.cov(features.T)), len(features))


class Moments:
    """Number, mean and scatter of features in each of 8 blocks, float64: `add` and `merge` in any cuts.

    count [8], mean [8, d], scatter [8, d, d] about that mean: 8 d^2 numbers, 268 MB for 2048 features. seen: which
    indices occurred. Every part is centred on its own mean before it is added (Chan, Golub and LeVeque 1983, The
    American Statistician 37, 242-247), so features far from 0 lose no digits and parts need not agree on a shift.
    """

    def __init__(self, d: int) -> None:
        if d < 1:
            raise ValueError(f"features have at least 1 dimension, got {d}")
        self.count = torch.zeros(BLOCKS, dtype=torch.int64)
        self.mean = torch.zeros(BLOCKS, d, dtype=torch.float64)
        self.scatter = torch.zeros(BLOCKS, d, d, dtype=torch.float64)
        self.seen = torch.zeros(0, dtype=torch.bool)

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Of features [n, d] in the order of the indices 0 .. n - 1."""
        features = checked(features)
        moments = cls(features.shape[1])
        moments.add(features, range(len(features)))
        return moments

    @property
    def d(self) -> int:
        return self.mean.shape[1]

    @property
    def n(self) -> int:
        return int(self.count.sum())

    def add(self, features: Tensor, indices: Sequence[int] | Tensor) -> None:
        """features [m, d] of the samples with these m indices. Raises ValueError for an index that occurred before."""
        features = checked(features)
        if features.shape != (len(indices), self.d):
            raise ValueError(
                f"features of {len(indices)} indices must be {[len(indices), self.d]}, got {list(features.shape)}"
            )
        numbers = indices.tolist() if isinstance(indices, Tensor) else list(indices)
        self._see(torch.tensor(numbers, dtype=torch.int64))
        blocks = torch.tensor([mix(number) % BLOCKS for number in numbers])
        for k in range(BLOCKS):
            part = features[blocks == k]
            if not len(part):
                continue
            mean = part.mean(0)
            shift, weight = self._move(k, mean, len(part))
            rows = torch.cat([part - mean, weight**0.5 * shift[None]])  # the shift's term as one more row
            self.scatter[k].addmm_(rows.T, rows)

    def merge(self, other: Moments) -> None:
        """Add what another one holds. Raises ValueError for an index that both have seen."""
        if other.d != self.d:
            raise ValueError(f"moments of {self.d} and of {other.d} dimensions cannot be merged")
        self._see(other.seen.nonzero()[:, 0])
        self._merge(other.count, other.mean, other.scatter)

    @classmethod
    def sum(cls, parts: Iterable[Moments]) -> Moments:
        """Of several shards, added in the order of their least index: the same bits in whatever order they come."""
        ordered = sorted(parts, key=lambda part: part.first)
        if not ordered:
            raise ValueError("no moments to sum")
        total = cls(ordered[0].d)
        for part in ordered:
            total.merge(part)
        return total

    @property
    def first(self) -> int:
        """The least index seen."""
        if not self.n:
            raise ValueError("moments of no features have no first index")
        return int(self.seen.int().argmax())

    def check(self, n: int) -> None:
        """Raises ValueError unless each of 0 .. n - 1 occurred, and nothing else."""
        occurred = torch.zeros(max(n, len(self.seen)), dtype=torch.int64)
        occurred[: len(self.seen)] = self.seen
        _once(occurred[:n], int(occurred[n:].sum()))

    def statistics(self) -> Statistics:
        """Mean and covariance of all that was added."""
        return self._without(None)

    def without(self, k: int) -> Statistics:
        """Mean and covariance of all but block k."""
        return self._without(k)

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """All of it as plain arrays, for a file; `from_state` goes on from there with the same bits."""
        return {name: getattr(self, name).numpy().copy() for name in ("count", "mean", "scatter", "seen")}

    @classmethod
    def from_state(cls, state: Mapping[str, np.ndarray[Any, Any]]) -> Moments:
        """Raises ValueError where the arrays are not those of `state`."""
        parts = {name: torch.from_numpy(np.array(state[name])) for name in ("count", "mean", "scatter", "seen")}
        d = parts["mean"].shape[-1]
        moments = cls(d)
        for name, want in vars(moments).items():
            found = parts[name]
            if found.dtype != want.dtype or (name != "seen" and found.shape != want.shape):
                raise ValueError(
                    f"a state of moments has {name} of {want.dtype} {list(want.shape)}, "
                    f"not {found.dtype} {list(found.shape)}"
                )
            setattr(moments, name, found)
        if moments.n != int(moments.seen.sum()):
            raise ValueError(f"a state of moments counts {moments.n} features of {int(moments.seen.sum())} indices")
        return moments

    def _see(self, indices: Tensor) -> None:
        if not len(indices):
            return
        if int(indices.min()) < 0:
            raise ValueError(f"indices are at least 0, got {int(indices.min())}")
        seen = torch.zeros(max(len(self.seen), int(indices.max()) + 1), dtype=torch.bool)
        seen[: len(self.seen)] = self.seen
        again = indices[seen[indices]]
        if not len(again):
            values, times = indices.unique(return_counts=True)
            again = values[times > 1]
        if len(again):
            raise ValueError(
                f"the sample of index {int(again[0])} occurs twice ({len(again)} such indices): each counts once"
            )
        seen[indices] = True
        self.seen = seen

    def _move(self, k: int, mean: Tensor, m: int) -> tuple[Tensor, float]:
        """Let m features of this mean into the mean of block k; how far apart the two were, and its weight."""
        n = int(self.count[k])
        shift = mean - self.mean[k]
        self.count[k] += m
        self.mean[k] += shift * (m / (n + m))
        return shift, n * m / (n + m)

    def _merge(self, count: Tensor, mean: Tensor, scatter: Tensor) -> None:
        for k in range(BLOCKS):
            if int(count[k]):
                shift, weight = self._move(k, mean[k], int(count[k]))
                self.scatter[k].add_(scatter[k]).addr_(shift, shift, alpha=weight)

    def _without(self, left_out: int | None) -> Statistics:
        blocks = [k for k in range(BLOCKS) if k != left_out and int(self.count[k])]
        n = int(self.count[blocks].sum())
        if n < 2:
            raise ValueError(f"a covariance needs at least 2 features, got {n}")
        weights = self.count[blocks].double() / n
        mean = weights @ self.mean[blocks]
        apart = (self.mean[blocks] - mean) * self.count[blocks].double().sqrt()[:, None]
        scatter = apart.T @ apart
        for k in blocks:
            scatter += self.scatter[k]
        return Statistics(mean, scatter / (n - 1), n)


def gather(parts: Iterable[Moments], n: int) -> Moments:
    """The sum of the shards of all processes of torch.distributed, the same bits on each as `Moments.sum` in one.

    parts: this rank's shards, one or more `Moments` each; may be none. Which rank had which shard changes nothing; how
    the indices were cut into shards changes the last digits. n: each of the indices 0 .. n - 1 must have occurred once
    over all ranks; else ValueError, on every rank. Without torch.distributed these parts are all there is.
    """
    import torch.distributed as dist

    mine = sorted((part for part in parts if part.n), key=lambda part: part.first)
    occurred = torch.zeros(n + 1, dtype=torch.int64)  # the last: of indices beyond n
    owner = torch.full((n,), -1, dtype=torch.int64)
    together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    rank = dist.get_rank() if together else 0
    for part in mine:
        occurred[:n][: len(part.seen)] += part.seen[:n]
        occurred[n] += part.seen[n:].sum()
        if part.first < n:
            owner[part.first] = rank
    widths = {part.d for part in mine}
    span = torch.tensor([n, -n, max(widths, default=0), -min(widths, default=2**31)])
    if together:
        group = None if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")  # the moments are on the CPU
        dist.all_reduce(span, dist.ReduceOp.MAX, group=group)
        if int(span[0]) == -int(span[1]):  # else the next would wait for ever
            dist.all_reduce(occurred, group=group)
            dist.all_reduce(owner, dist.ReduceOp.MAX, group=group)
    most, least, wide, narrow = (int(number) for number in span * torch.tensor([1, -1, 1, -1]))
    if most != least:
        raise ValueError(
            f"the processes gather different numbers of samples, from {least} to {most}: give all the same n"
        )
    _once(occurred[:n], int(occurred[n]))
    if wide != narrow:
        raise ValueError(f"the shards have features of {narrow} and of {wide} dimensions; use one extractor")
    total = Moments(wide)
    for first in (owner >= 0).nonzero()[:, 0].tolist():
        held = int(owner[first]) == rank
        part = mine.pop(0) if held else Moments(wide)
        if together:
            for tensor in (part.count, part.mean, part.scatter):
                dist.broadcast(tensor, int(owner[first]), group=group)
        total._merge(part.count, part.mean, part.scatter)
    total.seen = torch.ones(n, dtype=torch.bool)
    return total


def _once(occurred: Tensor, beyond: int) -> None:
    n = len(occurred)
    missing, again = (occurred == 0).nonzero()[:, 0], (occurred > 1).nonzero()[:, 0]
    found = [f"{len(missing)} are missing (the first is {int(missing[0])})"] if len(missing) else []
    found += [f"{len(again)} occurred more than once (the first is {int(again[0])})"] if len(again) else []
    found += [f"{beyond} lie beyond"] if beyond else []
    if found:
        raise ValueError(
            f"of the samples 0 .. {n - 1}, {', '.join(found)}; give each index to one process, without padding"
        )


def checked(features: Tensor) -> Tensor:
    """Features [n, d], float64, on the CPU. Raises ValueError for another shape and for NaN."""
    if features.dim() != 2:
        raise ValueError(f"features must be [n, d], got {list(features.shape)}")
    features = features.detach().to("cpu", torch.float64)  # float32 loses all digits of a small distance
    if not bool(features.isfinite().all()):
        raise ValueError("features hold NaN or infinity")
    return features


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, by numpy: its LAPACK takes two thirds of the time of torch's on some processors."""
    values, vectors = np.linalg.eigh(symmetric(matrix).numpy())
    return torch.from_numpy(values), torch.from_numpy(vectors)


def symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.T) / 2


def kept(values: Tensor, scale: float = 0.0) -> Tensor:
    """Eigenvalues with those below d eps times the greatest (or `scale`, where that is more) set to 0."""
    greatest = float(values.max()) if len(values) else 0.0
    limit = len(values) * torch.finfo(values.dtype).eps * max(greatest, scale)
    return torch.where(values > limit, values, 0.0)
