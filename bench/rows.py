"""What measures share that look at every row of a reference, its features themselves, and not only at their mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsample.noise import mix

from .measure import Features, Scores
from .moments import statistics
from .reference import Reference


@dataclass(frozen=True)
class ToRows:
    """A measure between samples and the rows of a reference; raises ValueError where that keeps none."""

    name: str
    features: Features
    reference: Reference

    def __post_init__(self) -> None:
        self.reference.check(self.features)
        if self.reference.rows is None:
            raise ValueError(
                f"{self.name} needs the features of every image, and the reference {self.reference.dataset} holds "
                f"their mean and covariance alone; make one of the images: Reference.of(images, features)"
            )

    @property
    def rows(self) -> Tensor:
        assert self.reference.rows is not None
        return self.reference.rows

    def score(self, features: Tensor) -> Scores:
        """features [n, d], in the order of the samples' indices."""
        return self.between(features, self.rows)

    def between(self, features: Tensor, rows: Tensor) -> Scores:
        """Of features [n, d] against these rows [N, d] in place of the reference's own."""
        raise NotImplementedError

    def floor(self) -> Scores | None:
        """Between two halves of the real images; None for less than 20, where halves say nothing."""
        return self.between(*halves(self.rows)) if len(self.rows) >= 20 else None


def halves(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves by a hash of the index, so that images sorted by class have every class in both."""
    shuffled = rows[torch.tensor([mix(i) for i in range(len(rows))]).argsort()]
    return shuffled[: len(rows) // 2], shuffled[len(rows) // 2 :]


def converged(name: str, extractor: Features, features: Tensor) -> Reference:
    """Features [n, d] of samples, such as the converged teacher's, as a reference."""
    made = statistics(features)
    return Reference(extractor, made.mean, made.cov, made.n, f"{name} of {made.n} samples", features)
