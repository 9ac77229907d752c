"""Quality by the Frechet distance: to real images, and to what an accurate solver makes of the same noises."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .extractor import NAME, SHA256, digits_features
from .frechet import frechet_distance, influence
from .measure import Features, Measure, Score
from .moments import statistics
from .reference import Reference
from .rows import halves

# What `run` takes: a measure of features, or a function of samples [n, ...]; its `name` or `__name__` names the column.
Quality = Measure | Callable[[Tensor], Score | float]

DIGITS = Features(NAME, digits_features, sha256=SHA256, shape=(1, 8, 8))


def pixels(images: Tensor) -> Tensor:
    """[n, C H W] of images in [-1, 1], float64."""
    return images.detach().to("cpu", torch.float64).flatten(1)


PIXELS = Features("pixels", pixels)


def fd_digits(reference: Tensor | Reference, *, name: str = "fd_digits") -> FrechetTo:
    """The Frechet distance to reference images [N, 1, 8, 8] in the features of the shipped "digits-cnn-1".

    It sees wrong and missing digits, and little of fine detail: use it beside `fd_pixels`. Not an FID, and to be
    compared only between equal references and equal numbers of samples.
    """
    return FrechetTo(name, DIGITS, _reference(reference, DIGITS))


def fd_pixels(reference: Tensor | Reference, *, name: str = "fd_pixels") -> FrechetTo:
    """The Frechet distance to reference images [N, ...] of the pixels themselves, clamped to [-1, 1]; not an FID."""
    return FrechetTo(name, PIXELS, _reference(reference, PIXELS))


@dataclass(frozen=True)
class FrechetTo:
    """The Frechet distance from samples to a reference held fixed: a `Measure`, and callable on samples themselves.

    paired: sample i and row i of the reference come from the same noise, as with `toward`.
    """

    name: str
    features: Features
    reference: Reference
    paired: bool = False

    def __post_init__(self) -> None:
        self.reference.check(self.features)
        if self.paired and self.reference.rows is None:
            raise ValueError("a paired reference needs its rows")

    def __call__(self, samples: Tensor) -> Score:
        return self.score(self.features(samples))

    def score(self, features: Tensor) -> Score:
        """features [n, d], in the order of the samples' indices."""
        rows = self.reference.rows if self.paired else None
        distance = frechet_distance(features, self.reference.statistics if rows is None else rows, paired=self.paired)
        return Score(distance.value, distance.se, distance.debiased, distance.n_a)

    def influence(self, features: Tensor) -> Tensor:
        """[n]: how much each sample moves the distance; its spread over sqrt(n) is the standard error."""
        of_a, of_b = statistics(features), self.reference.statistics
        moved = influence(features, of_a, of_b)
        if self.paired and self.reference.rows is not None:
            moved = moved + influence(self.reference.rows, of_b, of_a)
        return moved

    def floor(self) -> Score | None:
        """Between two halves of the real images: what samples cannot be told from them below. None without rows.

        debiased: what other real images would score against all of these; a half has twice the bias of the whole.
        """
        rows = self.reference.rows
        if rows is None or self.paired or len(rows) < 4:
            return None
        a, b = halves(rows)
        distance, back = frechet_distance(a, b), frechet_distance(b, a)
        debiased = None
        if distance.debiased is not None and back.debiased is not None:
            debiased = distance.debiased - (back.value - back.debiased) / 2
        return Score(distance.value, distance.se, debiased, distance.n_a)

    def toward(self, features: Tensor) -> FrechetTo:
        """The distance to these features [n, d] of the same noises, such as the converged teacher's."""
        made = statistics(features)
        dataset = f"{self.name} of {made.n} samples"
        reference = Reference(self.features, made.mean, made.cov, made.n, dataset, features)
        return replace(self, name=f"{self.name}_converged", reference=reference, paired=True)


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


def _reference(given: Tensor | Reference, features: Features) -> Reference:
    return given if isinstance(given, Reference) else Reference.of(given, features)
