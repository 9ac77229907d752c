"""Where training data come from: a folder of images, an .npz, a data set of the datasets library, a teacher.

Each gives a loader for `train`: batches {"x0", "class_labels"} of which the last that is not full is left out. What is
random, the order and the flips, is drawn by torch's generator.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastsample.denoiser import Model
from fastsample.noise import noise
from fastsample.plan import Plan
from fastsample.sampling import check_fit, sample

from .data import Batches, Drawn, flipped
from .method import Batch, device_of, evaluating
from .pictures import Files, Loader, Pictures, Rows, check_sizes, loader

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
KEYS = ("x0", "images", "samples", "arr_0")


def image_folder(
    folder: str | Path,
    *,
    resolution: int | None = None,
    classes: bool = False,
    size: int = 128,
    flip: bool = False,
    channels: Literal[1, 3] = 3,
    workers: int = 0,
    label: str = "class_labels",
) -> Loader:
    """The images of a folder and of the folders in it, [B, C, H, W] in [-1, 1], decoded as they are wanted.

    They are turned upright as their EXIF data says; of an animation the first picture counts.

    resolution: images are scaled until their shorter side is this long (Pillow's bicubic, which averages where it
        shrinks) and cut to the square in their middle; None takes them as they are, all of one size.
    classes: the folders in `folder` are the classes 0, 1, ... in the order of their names, and `label` the condition.
    size: of a batch. flip: mirror each image, left and right, with a chance of one half.
    workers: processes that decode.
    channels: 3 makes gray images RGB, 1 makes RGB gray.

    Raises ValueError, naming the file, where images have several sizes and no `resolution` is given, and, as they are
    decoded, for what is no image, for transparency, and for gray of 16 bits.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}; give one that holds images ({', '.join(ENDINGS)})")
    found = [Path(place) / name for place, _, names in os.walk(folder, followlinks=True) for name in names]
    paths = sorted(path for path in found if path.suffix.lower() in ENDINGS)
    if not paths:
        raise ValueError(f"{folder} holds no images ({', '.join(ENDINGS)})")
    labels = None
    if classes:
        loose = next((path for path in paths if path.parent == folder), None)
        if loose:
            raise ValueError(f"{loose} lies in no folder of a class; move it into one, or pass classes=False")
        names = sorted({path.relative_to(folder).parts[0] for path in paths})
        labels = [names.index(path.relative_to(folder).parts[0]) for path in paths]
    if resolution is None:
        check_sizes(paths)
    pictures = Pictures(Files(tuple(paths)), labels, resolution, flip, channels, label)
    return loader(pictures, size, workers)


def hub_dataset(
    source: Any,
    *,
    image: str = "image",
    label: str | None = None,
    split: str = "train",
    resolution: int | None = None,
    size: int = 128,
    flip: bool = False,
    channels: Literal[1, 3] = 3,
    workers: int = 0,
    condition: str = "class_labels",
) -> Loader:
    """The images of a `datasets.Dataset`, or of a folder that its `save_to_disk` wrote. Nothing is downloaded.

    image, label: the columns; label None takes none. split: which, of a folder that holds several.
    condition: what the network calls the label. The other options are those of `image_folder`.

    Raises KeyError for columns and splits that are not there, TypeError for another kind of data set, ValueError for
    labels that are no whole numbers from 0.
    """
    table = _table(source, split)
    for column in filter(None, (image, label)):
        if column not in table.column_names:
            raise KeyError(f"the data set has no column {column!r}; it has {', '.join(table.column_names)}")
    if not len(table):
        raise ValueError("the data set is empty; give one that holds images")
    labels = None
    if label is not None:
        labels = _labels(np.asarray(table.with_format(None)[label][:]), f"column {label!r}", len(table), None).tolist()
    rows = Rows(table.select_columns([image]).with_format(None), image)
    return loader(Pictures(rows, labels, resolution, flip, channels, condition), size, workers)


def npz_images(
    file: str | Path,
    *,
    images: str | None = None,
    labels: str | None = None,
    classes: int | None = None,
    layout: Literal["NCHW", "NHWC"] | None = None,
    size: int = 128,
    flip: bool = False,
    bounded: bool = True,
    label: str = "class_labels",
) -> Batches:
    """The images of an .npz, held in memory as they are stored: uint8 [N, H, W, C], or floats [N, C, H, W] in [-1, 1].

    images: their key; None: the first that is there of x0, images, samples, arr_0. labels: the key of the labels, whole
        numbers [N]; None: none. classes: how many there are, so that no label lies beyond.
    layout: where the channels are, if not as above; it must be said where 1 or 3 numbers are in the other place.
        [N, H, W] are images of one channel.
    label: what the network calls it. size, flip, bounded: as for `Batches`.

    Raises KeyError, naming the keys of the file, ValueError where it is damaged, holds pickles, or numbers that are
    not of images or labels.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; give an .npz of images")
    arrays = _arrays(path, images, labels)
    x0 = torch.from_numpy(_pixels(path, arrays[0], layout, bounded))
    known = (
        {} if labels is None else {label: torch.from_numpy(_labels(arrays[1], f"{path}: {labels}", len(x0), classes))}
    )
    return Batches(x0, known, size=size, flip=flip, bounded=bounded)


@dataclass(frozen=True)
class TeacherSamples(Drawn):
    """What a teacher makes of noise by a plan, sampled as it is wanted: for those who have no data.

    It costs the plan's evaluations for every batch; where samples are used often, `make_pairs` and `Pairs` store them.
    A batch is a function of the seed of its draw, so a run that goes on makes none of the earlier ones again.

    shape: of one sample. classes: labels are drawn evenly from 0 to classes - 1, as condition `label`; None: none.
    size: of a batch. count: batches of an epoch. clip: samples are clipped to [-clip, clip]; math.inf leaves them.
    """

    teacher: Model
    plan: Plan
    shape: Sequence[int]
    classes: int | None = field(default=None, kw_only=True)
    label: str = field(default="class_labels", kw_only=True)
    size: int = field(default=128, kw_only=True)
    count: int = field(default=1000, kw_only=True)
    flip: bool = field(default=False, kw_only=True)
    clip: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("size", "count", "classes"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if not self.clip > 0:
            raise ValueError(f"clip must be above 0, got {self.clip:g}; math.inf leaves the samples as they are")
        if self.flip and len(self.shape) < 3:
            raise ValueError(f"flip mirrors the columns of images [C, H, W], got samples of {list(self.shape)}")
        check_fit(self.teacher, self.plan)

    @property
    def bounded(self) -> bool:  # type: ignore[override]
        return self.clip <= 1

    def __len__(self) -> int:
        return self.count

    def chosen(self) -> Iterator[Batch]:
        for _ in range(self.count):
            drawn = {"seeds": torch.randint(2**32, (self.size,))}
            if self.classes is not None:
                drawn[self.label] = torch.randint(self.classes, (self.size,))
            yield {**drawn, "flip": torch.rand(self.size) < 0.5} if self.flip else drawn

    def made(self, chosen: Batch) -> Batch:
        device = device_of(self.teacher)
        labels = {} if self.classes is None else {self.label: chosen[self.label].to(device)}
        z = noise(self.shape, chosen["seeds"].tolist(), device=device)
        with evaluating(self.teacher):
            x0 = sample(self.teacher, self.plan, z, condition=labels, progress=False).clamp(-self.clip, self.clip)
        return {"x0": flipped(x0, chosen["flip"]) if self.flip else x0, **labels}


def _table(source: Any, split: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("hub_dataset needs the datasets library: pip install datasets") from error
    if isinstance(source, str | Path):
        if not Path(source).is_dir():
            raise FileNotFoundError(
                f"there is no folder {source}, and nothing is downloaded here; load it by datasets.load_dataset, "
                f"and pass what that returns or a folder that its save_to_disk wrote"
            )
        source = datasets.load_from_disk(str(source))
    if isinstance(source, datasets.DatasetDict):
        if split not in source:
            raise KeyError(f"the data set has no split {split!r}; it has {', '.join(source)}")
        source = source[split]
    if not isinstance(source, datasets.Dataset):
        raise TypeError(
            f"a datasets.Dataset or a folder that its save_to_disk wrote is needed, got {type(source).__name__}; one "
            f"that streams has no order to go back to"
        )
    return source


def _arrays(path: Path, images: str | None, labels: str | None) -> list[np.ndarray[Any, Any]]:
    """The images, and the labels where a key is given."""
    try:
        opened = np.load(path, allow_pickle=False)
        if not isinstance(opened, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array; save it by np.savez(file, images=array)")
        with opened as file:
            held = ", ".join(file.files)
            found = images or next((key for key in KEYS if key in file.files), None)
            if found is None:
                raise KeyError(f"{path} has none of the keys {', '.join(KEYS)}; it has {held}: name one by images=")
            missing = [key for key in (found, labels) if key is not None and key not in file.files]
            if missing:
                raise KeyError(f"{path} has no key {missing[0]!r}; it has {held}")
            return [file[key] for key in (found, labels) if key is not None]
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as an .npz of plain arrays: {error}") from error


def _pixels(path: Path, array: np.ndarray[Any, Any], layout: str | None, bounded: bool) -> np.ndarray[Any, Any]:
    """[N, C, H, W], uint8 or float32."""
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"{path}: images are uint8 or floats, got {array.dtype}")
    if layout not in (None, "NCHW", "NHWC"):
        raise ValueError(f"layout must be 'NCHW', 'NHWC' or None, got {layout!r}")
    if array.ndim not in (3, 4) or not array.size:
        raise ValueError(f"{path}: images are [N, H, W, C], [N, C, H, W] or [N, H, W], got {list(array.shape)}")
    if array.ndim == 3:
        array = array[:, None]
    elif (layout or ("NHWC" if array.dtype == np.uint8 else "NCHW")) == "NHWC":
        if layout is None and array.shape[3] not in (1, 3):
            raise ValueError(
                f"{path}: {list(array.shape)} bytes are not [N, H, W, C]; say layout='NCHW' if they are that"
            )
        array = array.transpose(0, 3, 1, 2)
    elif layout is None and array.shape[3] in (1, 3) and array.shape[1] not in (1, 3):
        raise ValueError(
            f"{path}: {list(array.shape)} floats look like [N, H, W, C]; say layout='NHWC', or 'NCHW' if they are not"
        )
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    array = np.ascontiguousarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: the images hold NaN or infinity")
    low, high = float(array.min()), float(array.max())
    if bounded and not (low >= -1.001 and high <= 1.001):
        raise ValueError(
            f"{path}: images must lie in [-1, 1], these lie in [{low:g}, {high:g}]; scale them, or pass bounded=False "
            f"where they are latents"
        )
    return array


def _labels(array: np.ndarray[Any, Any], name: str, count: int, classes: int | None) -> np.ndarray[Any, Any]:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(
            f"{name}: labels are whole numbers [N], got {array.dtype} {list(array.shape)}; of one-hot rows take "
            f"argmax(1)"
        )
    if len(array) != count:
        raise ValueError(f"{name}: {len(array)} labels for {count} images")
    low, high = int(array.min(initial=0)), int(array.max(initial=0))
    if low < 0 or (classes is not None and high >= classes):
        beyond = "" if classes is None else f" to {classes - 1}"
        raise ValueError(f"{name}: labels must be from 0{beyond}, got {low if low < 0 else high}")
    return array.astype(np.int64)
