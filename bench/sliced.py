"""Sliced Wasserstein distances: how far one-dimensional shadows of two sets lie apart, over fixed directions.

SW_p^p = mean over directions u of  int_0^1 |Q_a(s) - Q_b(s)|^p ds,   Q the quantiles of u.a and of u.b
Bonneel et al. 2015, Journal of Mathematical Imaging and Vision 51, Eq. 9.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .measure import Score
from .rows import ToRows, converged

LIMIT = 2**22  # numbers of projected features at once: 32 MiB


@dataclass(frozen=True)
class SlicedWasserstein(ToRows):
    """The distance from samples to a reference held fixed: a `Measure`, of pixels or of any features.

    It sees every direction alike, and so, of pixels, mostly the coarse ones. Above 0 also between equal distributions,
    the more the fewer samples: compare at equal n, and with the floor.

    p: 1 or 2. directions, seed: of the directions, which are the same in every run.
    paired: sample i and row i of the reference come from the same noise, as with `toward`.
    """

    p: int = 2
    directions: int = 256
    seed: int = 0
    paired: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.p, self.directions)

    def between(self, features: Tensor, rows: Tensor) -> Score:
        found = self._distance(features, rows)
        return Score(found.value, found.se, n=found.n_a)

    def influence(self, features: Tensor) -> Tensor:
        """[n]: how much each sample moves the distance."""
        return self._distance(features, self.rows).influence

    def toward(self, features: Tensor) -> SlicedWasserstein:
        """The distance to these features [n, d] of the same noises, such as the converged teacher's."""
        reference = converged(self.name, self.features, features)
        return replace(self, name=f"{self.name}_converged", reference=reference, paired=True)

    def _distance(self, features: Tensor, rows: Tensor) -> Sliced:
        return sliced_wasserstein(
            features, rows, p=self.p, directions=self.directions, seed=self.seed, paired=self.paired
        )


@dataclass(frozen=True)
class Sliced:
    """SW_p of n_a samples and n_b of the reference.

    se: the standard error from the drawing of the samples, with the reference and the directions held fixed (of pairs,
    from both drawings at once); to first order, which says too little of distances about as small as between two halves
    of one set. None at distance 0. influence: [n_a].
    """

    value: float
    se: float | None
    n_a: int
    n_b: int
    influence: Tensor = field(repr=False, compare=False)


def sliced_wasserstein(
    a: Tensor, b: Tensor, *, p: int = 2, directions: int = 256, seed: int = 0, paired: bool = False
) -> Sliced:
    """Between features a [n_a, d] and b [n_b, d], in float64; of unequal numbers by their quantiles, exactly.

    paired: feature i of a and of b belong together (two solvers, the same noise), which only the error takes note of.
    """
    _check(p, directions)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features must be [n, d] of one d, with n of at least 2, got {list(a.shape)} and {list(b.shape)}"
        )
    if paired and len(a) != len(b):
        raise ValueError(f"paired features are of equal number, got {len(a)} and {len(b)}")
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise ValueError("features hold NaN or infinity")
    a, b = (side.detach().to("cpu", torch.float64) for side in (a, b))
    m, n = len(a), len(b)
    total, influence = 0.0, a.new_zeros(m)
    merged = _merged(m, n)
    for units in _directions(a.shape[1], directions, seed).split(max(1, LIMIT // max(m, n))):
        (low, order), (high, places) = ((units @ side.T).sort(dim=1) for side in (a, b))
        total += float(_powers(low, high, merged, p).sum())
        moved = torch.zeros_like(low).scatter_(1, order, _potential(low, high, p))
        if paired:
            moved += torch.zeros_like(high).scatter_(1, places, _potential(high, low, p))
        influence += moved.sum(0)
    power, influence = total / directions, influence / directions
    value = power ** (1 / p)
    if value == 0:
        return Sliced(0.0, None, m, n, influence)
    influence = influence / (p * value ** (p - 1))
    return Sliced(value, float(influence.std()) / math.sqrt(m), m, n, influence)


def _directions(d: int, count: int, seed: int) -> Tensor:
    """[count, d], uniform on the sphere, float64."""
    drawn = torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    length: Tensor = drawn.norm(dim=1, keepdim=True)
    return drawn / length


def _merged(m: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pieces of [0, 1] on which both quantile functions are constant: which of m, which of n, and their widths."""
    ends = torch.unique(torch.cat([torch.arange(1, m + 1) * n, torch.arange(1, n + 1) * m]))  # in units of 1 / (m n)
    widths = torch.diff(ends, prepend=ends.new_zeros(1))
    return (ends - 1) // n, (ends - 1) // m, widths.double() / (m * n)


def _powers(low: Tensor, high: Tensor, merged: tuple[Tensor, Tensor, Tensor], p: int) -> Tensor:
    """W_p^p of each direction, from sorted projections [directions, m] and [directions, n]."""
    of_low, of_high, widths = merged
    return (low[:, of_low] - high[:, of_high]).abs().pow(p) @ widths


def _potential(low: Tensor, high: Tensor, p: int) -> Tensor:
    """How much each of m sorted projections moves W_p^p: the Kantorovich potential, less its mean. [directions, m].

    It is the derivative of W_p^p in the distribution (Santambrogio 2015, Optimal Transport for Applied Mathematicians,
    Prop. 7.17). Between neighbours i and i + 1 it changes by what it costs to carry mass, on its way from one to the
    other, to the quantile (i + 1) / m of the other side; where that jumps, to both of its ends on average, which makes
    the potentials of two equal sets 0 and those of pairs add up to |x_i - y_i|^p.
    """
    m, n = low.shape[1], high.shape[1]
    levels = torch.arange(1, m) * n
    steps = torch.zeros_like(low[:, 1:])
    for met in (high[:, (levels - 1) // m], high[:, levels // m]):
        steps += 0.5 * ((low[:, 1:] - met).abs().pow(p) - (low[:, :-1] - met).abs().pow(p))
    potential = torch.cat([steps.new_zeros(len(low), 1), steps.cumsum(1)], dim=1)
    return potential - potential.mean(1, keepdim=True)


def _check(p: int, directions: int) -> None:
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p}")
    if directions < 1:
        raise ValueError(f"directions must be at least 1, got {directions}")
