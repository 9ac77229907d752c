"""Images of files and of data sets as training wants them: decoded by Pillow, upright, cut to a square, in [-1, 1].

What a picture does not hold, colour where it is transparent or 8 bits where it has more, is refused with its name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from .method import Batch

ORIENTATION = 0x0112  # EXIF: how the camera was held; from 5 on by a quarter turn
Loader = DataLoader[Batch]


@dataclass(frozen=True)
class Pictures(Dataset[dict[str, Any]]):
    """Pillow's images as training wants them. images: gives (name, opened image) by index."""

    images: Any
    labels: Sequence[int] | None
    resolution: int | None
    flip: bool
    channels: Literal[1, 3]
    label: str

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, image = self.images[index]
        with named(name):
            pixels = _decoded(image, self.channels, self.resolution)
        x0 = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
        if self.flip and torch.rand(()) < 0.5:
            x0 = x0.flip(-1)
        return {"x0": x0} if self.labels is None else {"x0": x0, self.label: self.labels[index]}


@dataclass(frozen=True)
class Files:
    """The images of files, opened when they are decoded."""

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        return str(self.paths[index]), self.paths[index]


@dataclass(frozen=True)
class Rows:
    """The images of a column: decoded by `datasets`, or arrays or lists of bytes."""

    table: Any
    column: str

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> tuple[str, Any]:
        name = f"row {index} of column {self.column!r}"
        with named(name):
            return name, self.table[int(index)][self.column]


def loader(pictures: Pictures, size: int, workers: int) -> Loader:
    """Shuffled batches of them. Raises ValueError for wrong numbers, ImportError where Pillow is missing."""
    _pillow()
    if size < 1:
        raise ValueError(f"size of a batch must be at least 1, got {size}")
    if pictures.resolution is not None and pictures.resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {pictures.resolution}")
    if pictures.channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {pictures.channels}")
    return DataLoader(
        pictures,
        batch_size=min(size, len(pictures)),
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=_stacked,
    )


def _stacked(rows: list[dict[str, Any]]) -> Batch:
    sizes = sorted({(row["x0"].shape[2], row["x0"].shape[1]) for row in rows})
    if len(sizes) > 1:
        raise ValueError(
            f"the images have several sizes, {' and '.join(f'{width}x{height}' for width, height in sizes[:2])}; pass "
            f"resolution={min(sizes[0])} to scale and cut all of them"
        )
    batch: Batch = default_collate(rows)
    return batch


@contextmanager
def named(name: object) -> Iterator[None]:
    """What goes wrong inside says which image it was."""
    try:
        yield
    except Exception as error:  # Pillow has errors of many kinds for what is damaged
        raise ValueError(f"{name} cannot be used as an image ({error}); mend or remove it") from error


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install pillow") from error
    return Image


def check_sizes(paths: Sequence[Path]) -> None:
    """Raises ValueError where they differ: from the first bytes of each file, before work starts."""
    first: tuple[int, int] | None = None
    library = _pillow()
    for path in paths:
        with named(path), library.open(path) as image:
            found = _upright_size(image)
        first = first or found
        if found != first:
            raise ValueError(
                f"{paths[0]} is {first[0]}x{first[1]} and {path} is {found[0]}x{found[1]}; pass "
                f"resolution={min(first)} to scale and cut all of them"
            )


def _upright_size(image: Any) -> tuple[int, int]:
    width, height = image.size
    # of a PNG, EXIF may follow the pixels: all of them would have to be read
    turned = image.format != "PNG" and image.getexif().get(ORIENTATION, 1) >= 5
    return (height, width) if turned else (width, height)


def _decoded(source: Any, channels: int, resolution: int | None) -> np.ndarray[Any, Any]:
    """[H, W, C], uint8, of a path, an opened image or an array."""
    library = _pillow()
    if isinstance(source, Path):
        with library.open(source) as image:
            return _pixels_of(image, channels, resolution)
    if not hasattr(source, "convert"):
        pixels = np.asarray(source)
        if pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        if pixels.dtype.kind not in "iu" or pixels.min(initial=0) < 0 or pixels.max(initial=0) > 255:
            raise ValueError(f"it is no image, but {pixels.dtype} numbers of shape {list(pixels.shape)}, not bytes")
        if pixels.ndim not in (2, 3) or pixels.shape[2:] not in ((), (3,), (4,)):
            raise ValueError(f"an image is [H, W] or [H, W, C], its shape is {list(pixels.shape)}")
        source = library.fromarray(pixels.astype(np.uint8))
    return _pixels_of(source, channels, resolution)


def _pixels_of(image: Any, channels: int, resolution: int | None) -> np.ndarray[Any, Any]:
    from PIL import ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"it has more than 8 bits a channel ({image.mode})")
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema() != (255, 255):
        raise ValueError("it is transparent in places, where it has no colour")
    image = image.convert("RGB" if channels == 3 else "L")
    if resolution is not None:
        image = _squared(image, resolution)
    pixels = np.array(image)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _squared(image: Any, resolution: int) -> Any:
    """Scaled until the shorter side is `resolution`, and the middle of that."""
    scale = resolution / min(image.size)
    width, height = (max(resolution, round(side * scale)) for side in image.size)
    if image.size != (width, height):
        image = image.resize((width, height), _pillow().Resampling.BICUBIC)
    left, top = (width - resolution) // 2, (height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))
