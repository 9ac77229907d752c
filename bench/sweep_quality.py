"""The measures that a sweep asks for by name, made of an extractor and a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from .fid import inception_features, inception_logits
from .images import holds_images, read_reference
from .inception_score import InceptionScore
from .kernel_distance import KernelDistance
from .measure import Features, Measure
from .neighbours import Neighbours
from .quality import DIGITS, PIXELS, FrechetTo
from .reference import Reference
from .sliced import SlicedWasserstein

EXTRACTORS = ("digits", "pixels", "inception")


@dataclass(frozen=True)
class Key:
    """What a key of a measure holds. least: of a whole number."""

    kind: Literal["word", "whole"]
    least: int = 0


KEYS = {
    "reference": Key("word"),
    "features": Key("word"),
    "n_reference": Key("whole", 2),
    "splits": Key("whole", 2),
    "near": Key("whole", 1),
    "wide": Key("whole", 1),
    "p": Key("whole", 1),
    "directions": Key("whole", 1),
    "seed": Key("whole"),
}


@dataclass(frozen=True)
class Kind:
    """A measure's keys, those that it needs, and its features where they are not a key."""

    keys: Sequence[str]
    needs: Sequence[str]
    features: str | None
    make: Callable[..., Measure]


MEASURES = {
    "fd_digits": Kind(("reference",), ("reference",), "digits", FrechetTo),
    "fd_pixels": Kind(("reference",), ("reference",), "pixels", FrechetTo),
    "fid": Kind(("reference", "n_reference"), ("reference",), "inception", FrechetTo),
    "kid": Kind(("reference",), ("reference",), "inception", KernelDistance),
    "inception_score": Kind(("splits",), (), "logits", InceptionScore),
    "frechet_distance": Kind(("reference", "features", "n_reference"), ("reference", "features"), None, FrechetTo),
    "kernel_distance": Kind(("reference", "features"), ("reference", "features"), None, KernelDistance),
    "prdc": Kind(("reference", "features", "near", "wide"), ("reference", "features"), None, Neighbours),
    "sliced_wasserstein": Kind(
        ("reference", "features", "p", "directions", "seed"), ("reference", "features"), None, SlicedWasserstein
    ),
}


@dataclass(frozen=True)
class Asked:
    """A [quality.NAME]: the name of its column, which measure, and its keys."""

    name: str
    measure: str
    keys: Mapping[str, Any]


@dataclass(frozen=True)
class Inception:
    """Where its weights are looked for, and where it runs; each part is loaded once, when first asked for."""

    path: str | Path | None = None
    allow_download: bool = False
    device: str = "cpu"

    @cached_property
    def features(self) -> Features:
        return inception_features(self.path, allow_download=self.allow_download, device=self.device)

    @cached_property
    def logits(self) -> Features:
        return inception_logits(self.path, allow_download=self.allow_download, device=self.device)


def measures(asked: Mapping[str, Asked], inception: Inception) -> dict[str, Measure]:
    """The measures, by the names of their columns; a reference that two share is read once.

    Raises FileNotFoundError where a reference or the weights of Inception are missing, ValueError for a reference that
    does not fit: before anything is sampled.
    """
    references: dict[Any, Reference] = {}
    found = {}
    for name, one in asked.items():
        kind, keys = MEASURES[one.measure], dict(one.keys)
        try:
            features = extractor(kind.features or keys.pop("features"), inception)
            if "reference" in keys:
                place = keys.pop("reference"), features.name, keys.pop("n_reference", None)
                if place not in references:
                    references[place] = reference(place[0], features, n=place[2])
                keys["reference"] = references[place]
            found[name] = kind.make(name, features, **keys)
        except ValueError as error:
            raise ValueError(f"[quality.{name}]: {error}") from error
    return found


def extractor(name: str, inception: Inception) -> Features:
    """digits, pixels, inception or its logits. Raises ValueError for others."""
    if name in ("inception", "logits"):
        return inception.features if name == "inception" else inception.logits
    if name not in EXTRACTORS:
        raise ValueError(f"unknown features {name!r}; choose one of {', '.join(EXTRACTORS)}")
    return DIGITS if name == "digits" else PIXELS


def reference(source: str | Path, features: Features, *, n: int | None = None) -> Reference:
    """Of "digits" (the built-in images), of a folder or an .npz of images, or of a statistics file.

    n: of how many images a statistics file is that does not say so itself.
    """
    if str(source) == "digits":
        from fastsample.zoo.data import digits

        return Reference.of(digits("all")[0], features)
    path = Path(source)
    if n is not None and holds_images(path):
        raise ValueError(f"n_reference is of statistics files; {path} holds images, which are counted")
    if not path.exists():
        raise FileNotFoundError(
            f"there is no reference {path}; give digits (built in), a folder or an .npz of images, or statistics that "
            f"`fastsample bench stats` made"
        )
    return read_reference(path, features, n)
