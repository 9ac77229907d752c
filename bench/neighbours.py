"""Precision, recall, density and coverage: do samples lie where the reference does, and do they reach all of it.

A ball around each feature reaches to its k-th nearest neighbour in its own set. Of the samples and the reference:
precision   share of samples in some ball of the reference          Kynkaanniemi et al. 2019, arXiv:1904.06991, Eq. 2
recall      share of the reference in some ball of the samples
density     balls of the reference around a sample, over k          Naeem et al. 2020, arXiv:2002.09797, Eq. 3 and 4
coverage    share of the reference whose own ball holds a sample
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .measure import Score
from .rows import ToRows

LIMIT = 2**23  # distances at once: 64 MiB
ROUNDING = 1e-12  # of the largest square: what a squared distance may be off by in float64


@dataclass(frozen=True)
class Neighbours(ToRows):
    """All four against the rows of a reference: a `Measure`. More is better; none says how good a single sample looks.

    It has no `toward`: with the teacher's samples of the same noises each sample would have its twin in the reference.

    near: the k of precision and recall. wide: that of density and coverage; the defaults are the papers' own.
    """

    near: int = 3
    wide: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        for k in (self.near, self.wide):
            _check(k, len(self.rows))

    def score(self, features: Tensor) -> dict[str, Score]:
        return _scores(self._shares(features))

    def between(self, features: Tensor, rows: Tensor) -> dict[str, Score]:
        return _scores(neighbours(features, rows, near=self.near, wide=self.wide))

    def influence(self, features: Tensor) -> dict[str, Tensor]:
        """[n] of each of the four: how much each sample moves it."""
        return {name: share.influence for name, share in self._shares(features).items()}

    def _shares(self, features: Tensor) -> dict[str, Share]:
        return neighbours(features, self.rows, near=self.near, wide=self.wide, balls=self._balls)

    @cached_property
    def _balls(self) -> Balls:
        return balls_of(self.rows, max(self.near, self.wide))


@dataclass(frozen=True)
class Share:
    """A mean over samples or over the reference, and how much each sample moves it, [n]."""

    value: float
    influence: Tensor = field(repr=False, compare=False)

    @property
    def se(self) -> float:
        """From the drawing of the samples, with the reference held fixed: its own drawing is not in it."""
        return float(self.influence.std()) / math.sqrt(len(self.influence))


@dataclass(frozen=True)
class Balls:
    """Of n features: squared distances to the k nearest others, rising; which those are, [n, k]; a slack for ties."""

    squares: Tensor
    neighbours: Tensor
    slack: float


def neighbours(
    samples: Tensor, reference: Tensor, *, near: int = 3, wide: int = 5, balls: Balls | None = None
) -> dict[str, Share]:
    """Precision, recall, density and coverage of features [n, d] and [N, d], in float64.

    near, wide: see `Neighbours`. balls: `balls_of(reference, max(near, wide))`, where it is kept from an earlier call.
    Time goes as (n + N)^2 d.

    Balls of precision and recall are closed, as in the paper; those of density and coverage open, as in its authors'
    code: that tells where points coincide, and nowhere else. Where both sides are alike density is 1 on average, and
    coverage 1 - (N - 1) ... (N - wide) / ((n + N - 1) ... (n + N - wide)), about 1 - 2^-wide for n = N. All four depend
    on n and N: compare at equal numbers.

    Errors: of precision, the binomial one; of density, that of a mean of independent numbers. Recall and coverage take
    the jackknife's, from what goes with each sample, and are then too large: on Gaussians by a factor of 1.5 to 2 for
    recall, of 1.1 to 1.5 for coverage.
    """
    _alike(samples, reference)
    fewest = min(len(samples), len(reference))
    for k in (near, wide):
        _check(k, fewest)
    samples, reference = (side.detach().to("cpu", torch.float64) for side in (samples, reference))
    centre = reference.mean(0)
    balls = balls or balls_of(reference, max(near, wide))
    samples, reference = samples - centre, reference - centre
    own = balls_of(samples, near + 1)
    n, size = len(samples), len(reference)
    slack = max(own.slack, balls.slack)
    reach = balls.squares[:, near - 1] + slack, balls.squares[:, wide - 1] - slack

    precise, crowd = torch.zeros(n, dtype=torch.bool), samples.new_zeros(n)
    lonely, recall_lost = samples.new_zeros(n), samples.new_zeros(n)
    covered = found = first = 0
    for rows in _pieces(reference, samples):
        squares = _squares(rows, samples)
        here = slice(first, first + len(rows))
        precise |= (squares <= reach[0][here, None]).any(0)
        inside = squares <= reach[1][here, None]
        crowd += inside.sum(0)
        held, lost = _alone(inside)
        covered, lonely = covered + held, lonely + lost
        held, lost = _recalled(squares, own, near, slack)
        found, recall_lost = found + held, recall_lost + lost
        first += len(rows)
    return {
        "precision": _mean(precise.double()),
        "recall": Share(found / size, _jackknife(recall_lost / size)),
        "density": _mean(crowd / wide),
        "coverage": Share(covered / size, _jackknife(lonely / size)),
    }


def balls_of(points: Tensor, k: int) -> Balls:
    """The k nearest neighbours of each of the points [n, d] among the others."""
    points = points.detach().to("cpu", torch.float64)
    points = points - points.mean(0)
    found, first = [], 0
    for rows in _pieces(points, points):
        squares = _squares(rows, points)
        squares[torch.arange(len(rows)), torch.arange(first, first + len(rows))] = torch.inf  # not one's own
        found.append(squares.topk(k, largest=False))
        first += len(rows)
    slack = ROUNDING * float(points.square().sum(1).max())
    return Balls(torch.cat([f.values for f in found]), torch.cat([f.indices for f in found]), slack)


def _alone(inside: Tensor) -> tuple[int, Tensor]:
    """How many rows of inside [rows, n] hold a sample, and how many would not without each of the samples, [n]."""
    holders = inside.sum(1)
    only = inside.byte().argmax(1)
    return int((holders > 0).sum()), torch.bincount(only[holders == 1], minlength=inside.shape[1])


def _recalled(squares: Tensor, own: Balls, k: int, slack: float) -> tuple[int, Tensor]:
    """How many points lie in a sample's ball, and how many fewer would without each of the samples, [n].

    Without sample j what its ball alone held is lost, unless a sample that has j among its k nearest gains it: its ball
    then reaches to its (k + 1)-th neighbour. In that way a point that no ball held can be gained, too.
    """
    inside = squares <= own.squares[:, k - 1] + slack
    found, lost = _alone(inside)
    holders, only = inside.sum(1), inside.byte().argmax(1)
    near = (squares <= own.squares[:, k] + slack).logical_and_(inside.logical_not_())
    point, ball = near.logical_and_((holders <= 1)[:, None]).nonzero(as_tuple=True)
    # pairs (point, j): the point is held where j is gone
    pairs = torch.unique(torch.stack([point.repeat_interleave(k), own.neighbours[ball, :k].flatten()]), dim=1)
    point, gone = pairs
    matters = (holders[point] == 0) | (only[point] == gone)
    return found, lost - torch.bincount(gone[matters], minlength=squares.shape[1])


def _scores(found: dict[str, Share]) -> dict[str, Score]:
    return {name: Score(share.value, share.se, n=len(share.influence), better="more") for name, share in found.items()}


def _mean(values: Tensor) -> Share:
    return Share(float(values.mean()), values - values.mean())


def _jackknife(lost: Tensor) -> Tensor:
    """The influence of each sample from what goes with it; too large on average: Efron and Stein 1981, Ann. Stat. 9."""
    return (len(lost) - 1) * (lost - lost.mean())


def _squares(a: Tensor, b: Tensor) -> Tensor:
    """|a - b|^2, [len(a), len(b)]; in float64 and around a common mean the products lose no digit that counts."""
    return torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2)


def _pieces(rows: Tensor, others: Tensor) -> tuple[Tensor, ...]:
    pieces: tuple[Tensor, ...] = rows.split(max(1, LIMIT // len(others)))
    return pieces


def _alike(samples: Tensor, reference: Tensor) -> None:
    if samples.dim() != 2 or reference.dim() != 2 or samples.shape[1] != reference.shape[1]:
        raise ValueError(
            f"features must be [n, d] and [N, d] of one d, got {list(samples.shape)} and {list(reference.shape)}"
        )
    if not bool(samples.isfinite().all() and reference.isfinite().all()):
        raise ValueError("features hold NaN or infinity")


def _check(k: int, n: int) -> None:
    if not 1 <= k < n - 1:
        raise ValueError(f"k must be at least 1 and below n - 1, got k = {k} for n = {n} features; take more of them")
