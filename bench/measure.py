"""What a quality measure is: numbers from features of samples, so that a sweep extracts each kind of feature once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class Score:
    """One measured number.

    se: its standard error from the drawing of the samples. debiased: the number less the bias of a finite n, which is
    then what the interval stands around. n: of how many samples. better: which direction is.
    """

    value: float
    se: float | None = None
    debiased: float | None = None
    n: int | None = None
    better: Literal["less", "more"] = "less"

    @property
    def centre(self) -> float:
        """What cases are compared by: the debiased number where there is one."""
        return self.value if self.debiased is None else self.debiased

    @property
    def interval(self) -> tuple[float, float] | None:
        """centre -+ 1.96 se."""
        return None if self.se is None else (self.centre - 1.96 * self.se, self.centre + 1.96 * self.se)


Scores = Score | Mapping[str, Score]


@dataclass(frozen=True)
class Features:
    """A feature extractor. Distances of two extractors, or of two ways to resize, have nothing to do with each other.

    extract: images [n, C, H, W] in [-1, 1], float32 -> [n, d]; on whichever device it likes.
    sha256: of its weights, or "" where it has none. resize: how images are brought to its size.
    shape: of one image, None for what is free; None: any.
    """

    name: str
    extract: Callable[[Tensor], Tensor]
    sha256: str = ""
    resize: str = "none"
    shape: tuple[int | None, ...] | None = None

    @property
    def id(self) -> dict[str, str]:
        """What two sides must share to be compared."""
        return {"extractor": self.name, "sha256": self.sha256, "resize": self.resize}

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises ValueError where samples of this shape cannot go in: asked before anything is sampled."""
        if self.shape is None:
            return
        if len(shape) != len(self.shape) or any(want not in (None, size) for want, size in zip(self.shape, shape)):
            wanted = " x ".join("any" if size is None else str(size) for size in self.shape)
            raise ValueError(
                f"the extractor {self.name} takes images of {wanted}, not {' x '.join(map(str, shape))}; give samples "
                f"of that shape (a gray image becomes RGB by images.expand(-1, 3, -1, -1)), or another extractor"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """[n, d], float64, on the CPU. Raises ValueError for NaN and for what is not in [-1, 1]."""
        self.check(tuple(images.shape[1:]))
        in_range(images)
        found = self.extract(images.clamp(-1, 1))
        if found.dim() != 2 or len(found) != len(images):
            raise ValueError(
                f"the extractor {self.name} made {list(found.shape)} of {len(images)} images; it must make [n, d]"
            )
        found = found.detach().to("cpu", torch.float64)
        if not bool(found.isfinite().all()):
            raise ValueError(f"the extractor {self.name} made NaN or infinity")
        return found


def in_range(images: Tensor, what: str = "images") -> None:
    """Raises ValueError for NaN, for a range of 0 to 255 and for other values far outside [-1, 1].

    What samplers overshoot is clamped where features are taken; where half of all values lie beyond -+1.5, it is
    another range. Values that are all >= 0 mean [0, 1] only in a set of pictures, of which `Reference` thinks.
    """
    if not bool(images.isfinite().all()):
        raise ValueError(f"{what} hold NaN or infinity")
    far = float((images.abs() > 1.5).double().mean())
    if far > 0.5:
        raise ValueError(
            f"{what} reach from {float(images.min()):.3g} to {float(images.max()):.3g}; they must lie in [-1, 1]: "
            f"bytes become x / 127.5 - 1"
        )


@runtime_checkable
class Measure(Protocol):
    """Scores from features. `run` makes the features, [n, d], float64, in the order of the sample's indices.

    It may also have:
    influence(features) -> [n]: how much each sample moves the score; kept, so that two runs can be compared in pairs.
    floor() -> Scores: of real images against real ones, for the floor row.
    toward(features) -> Measure: the same with these features as its reference, such as the converged teacher's.
    """

    @property
    def name(self) -> str: ...

    @property
    def features(self) -> Features: ...

    def score(self, features: Tensor) -> Scores: ...
