"""Real images from a folder or an .npz, as float32 [b, C, H, W] in [-1, 1], and their statistics."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .measure import Features
from .reference import DAMAGED, Reference, npz

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KEYS = ("images", "samples", "arr_0")
CHANNELS = (1, 3)


def quantise(images: Tensor) -> Tensor:
    """Bytes of images in [-1, 1]: rounded to the nearest level and clamped, so that 1.01 is white and does not wrap."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_bytes(images: Tensor) -> Tensor:
    """Float32 in [-1, 1] of bytes; `quantise` brings back the same bytes."""
    return images.float() / 127.5 - 1


def stats(
    source: str | Path,
    features: Features,
    out: str | Path,
    *,
    batch: int = 250,
    channels: Literal[1, 3] | None = None,
    layout: Literal["NCHW", "NHWC"] | None = None,
    rows: bool = True,
) -> Reference:
    """Write the statistics file `out` of the images in a folder or an .npz; `Reference.load` reads it.

    Arguments as in `read_images`; rows: keep the features too, which other measures than the Frechet distance need.
    """
    npz(out)
    images = read_images(source, batch=batch, channels=channels, layout=layout)
    found = Reference.of(images, features, rows=rows)
    found.save(out)
    return found


def holds_images(path: Path) -> bool:
    """Whether it is a folder or an .npz of images, and no statistics, which ADM's files have beside their images."""
    if path.is_dir() or not zipfile.is_zipfile(path):
        return path.is_dir()
    with zipfile.ZipFile(path) as file:
        names = set(file.namelist())
    return not names & {"mu.npy", "ref_mu.npy"} and bool(names & {f"{key}.npy" for key in KEYS})


def read_reference(path: Path, features: Features, n: int | None = None) -> Reference:
    """Of a folder or an .npz of images, or of a statistics file of n images."""
    if holds_images(path):
        return Reference.of(read_images(path), features)
    return Reference.load(path, features, n=n)


def read_images(
    source: str | Path,
    *,
    batch: int = 250,
    channels: Literal[1, 3] | None = None,
    layout: Literal["NCHW", "NHWC"] | None = None,
) -> Iterator[Tensor]:
    """Batches [b, C, H, W], float32 in [-1, 1], of a folder's images, sorted by path, subfolders too, or of an .npz.

    channels: 3 makes gray images RGB, 1 makes RGB gray (ITU-R 601); None leaves them, and mixed ones are refused.
    layout: of an .npz, for shapes that could be either. It holds `images`, `samples` or `arr_0`: uint8, or floats in
    [-1, 1]. Raises ValueError, naming the files, for images of several sizes, for transparency, for 16 bits.
    """
    source = Path(source)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if channels not in (None, *CHANNELS):
        raise ValueError(f"channels must be 1, 3 or None, got {channels}")
    if layout not in (None, "NCHW", "NHWC"):
        raise ValueError(f"layout must be 'NCHW', 'NHWC' or None, got {layout!r}")
    if source.is_dir():
        if layout:
            raise ValueError("layout is of an .npz; files of images say theirs")
        return _of_folder(source, batch, channels)
    if source.suffix == ".npz" and source.is_file():
        return _of_array(source, batch, channels, layout)
    if source.exists():
        raise ValueError(f"{source} is neither a folder of images nor an .npz")
    raise FileNotFoundError(f"there is no {source}; give a folder of images or an .npz of them")


def _of_folder(folder: Path, batch: int, channels: int | None) -> Iterator[Tensor]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS and path.is_file())
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(ENDINGS)})")
    return _opened(paths, batch, channels)


def _opened(paths: list[Path], batch: int, channels: int | None) -> Iterator[Tensor]:
    shape: tuple[int, ...] | None = None
    for start in range(0, len(paths), batch):
        images = []
        for path in paths[start : start + batch]:
            image = _open(path, channels)
            shape = shape or image.shape
            if image.shape != shape:
                raise ValueError(
                    f"{paths[0]} is {_size(shape)} and {path} is {_size(image.shape)}: a distance needs one size; "
                    f"bring them to it first (channels=3 makes gray images RGB)"
                )
            images.append(torch.from_numpy(image.transpose(2, 0, 1).copy()))
        yield from_bytes(torch.stack(images))


def _open(path: Path, channels: int | None) -> np.ndarray[Any, Any]:
    """[H, W, C], uint8."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("reading images needs Pillow: pip install pillow") from error
    try:
        with Image.open(path) as image:
            mode = image.mode
            if mode in ("P", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode in ("RGBA", "LA"):
                if image.getchannel("A").getextrema() != (255, 255):
                    raise ValueError(f"{path} is transparent in places, where it has no colour; flatten it first")
                image = image.convert("RGB" if image.mode == "RGBA" else "L")
            if mode.startswith(("I", "F")):
                raise ValueError(f"{path} has more than 8 bits a channel ({mode}); convert it first")
            wanted = {1: "L", 3: "RGB", None: "L" if image.mode in ("1", "L") else "RGB"}[channels]
            pixels = np.asarray(image.convert(wanted))
    except OSError as error:  # Pillow's UnidentifiedImageError and truncated files are OSErrors too
        raise ValueError(f"{path} cannot be read as an image ({error}); mend or remove it") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _of_array(path: Path, batch: int, channels: int | None, layout: str | None) -> Iterator[Tensor]:
    array = _array(path)
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim != 4:
        raise ValueError(f"{path}: images must be [n, H, W], [n, C, H, W] or [n, H, W, C], got {list(array.shape)}")
    elif (layout or _layout(path, array.shape)) == "NHWC":
        array = array.transpose(0, 3, 1, 2)
    if array.shape[1] not in CHANNELS or not array.size:
        raise ValueError(
            f"{path}: images have 1 or 3 channels and some pixels, got {list(array.shape)} as [n, C, H, W]"
        )
    if array.dtype != np.uint8:
        _in_range(path, array)
    return _cut(array, batch, channels)


def _cut(array: np.ndarray[Any, Any], batch: int, channels: int | None) -> Iterator[Tensor]:
    for start in range(0, len(array), batch):
        known = np.uint8 if array.dtype == np.uint8 else np.float32  # torch has no others' byte order, nor long doubles
        part = torch.from_numpy(np.ascontiguousarray(array[start : start + batch], dtype=known))
        images = from_bytes(part) if part.dtype == torch.uint8 else part
        if channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        elif channels == 1 and images.shape[1] == 3:
            images = (images * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
            images = from_bytes(quantise(images)) if part.dtype == torch.uint8 else images
        yield images


def _array(path: Path) -> np.ndarray[Any, Any]:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = [key for key in KEYS if key in file.files]
            if not names:
                raise KeyError(f"it has the keys {', '.join(file.files)}, none of {', '.join(KEYS)}")
            found = file[names[0]]
    except DAMAGED as error:
        raise ValueError(f"{path} holds no images that can be read: {error}") from error
    if found.dtype != np.uint8 and found.dtype.kind != "f":
        raise ValueError(f"{path}: images are uint8 or floats, got {found.dtype}")
    return found  # type: ignore[no-any-return]


def _layout(path: Path, shape: tuple[int, ...]) -> str:
    first, last = shape[1] in CHANNELS, shape[3] in CHANNELS
    if first == last:
        found = (
            "two axes that could be the channels; say layout='NCHW' or 'NHWC'"
            if first
            else "no axis of 1 or 3 channels"
        )
        raise ValueError(f"{path}: images of {list(shape)} have {found}")
    return "NCHW" if first else "NHWC"


def _in_range(path: Path, array: np.ndarray[Any, Any]) -> None:
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: the images hold NaN or infinity")
    low, high = float(array.min()), float(array.max())
    if low >= 0 or low < -1.001 or high > 1.001:  # rounding of half precision; real images do not overshoot
        known = "[0, 1]: make 2 x - 1 of them" if low >= 0 and high <= 1.001 else "another range: of bytes make uint8"
        raise ValueError(f"{path}: floats must lie in [-1, 1]; these reach from {low:.4g} to {high:.4g}, {known}")


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]} with {shape[2]} channel{'s' if shape[2] > 1 else ''}"
