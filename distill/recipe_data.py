"""The data that a recipe may name: each a function whose arguments are its keys.

`teacher`, `out` and `solvers` are not keys: the run gives them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastsample.denoiser import Model
from fastsample.grid import grid
from fastsample.plan import Plan
from fastsample.process import first_process
from fastsample.sampling import check_fit
from fastsample.spacing import Spacing, uniform_t
from fastsample.tracing import Solver, trace
from fastsample.zoo.data import digits as built_in_digits

from .data import Batches
from .method import Batch
from .pairs import Pairs, make_pairs
from .sources import TeacherSamples, hub_dataset, image_folder, npz_images

Loader = Iterable[Batch]


def digits(*, size: int = 128, flip: bool = False) -> Loader:
    """The built-in images for training, with their classes."""
    images, labels = built_in_digits("train")
    return Batches(images, {"class_labels": labels}, size=size, flip=flip)


def arrays(file: str, *, size: int = 128, bounded: bool = True) -> Loader:
    """The arrays of an .npz as they are: x0 [N, ...] and, by the network's keywords, its conditions [N, ...].

    bounded: false where x0 are latents, as `fs.encode` makes them, which do not lie in [-1, 1].
    """
    found = tensors(file)
    if "x0" not in found:
        raise ValueError(f"{file} holds {', '.join(found) or 'nothing'}, but no x0, the images or latents [N, ...]")
    return Batches(found.pop("x0"), found, size=size, bounded=bounded)


def teacher_samples(
    *,
    teacher: Model,
    solvers: Mapping[str, Solver],
    shape: list[int],
    classes: int | None = None,
    solver: str = "ddim",
    steps: int = 50,
    spacing: Spacing = uniform_t,
    size: int = 128,
    count: int = 100,
    clip: float = 1.0,
) -> Loader:
    """What the teacher makes, sampled as it is wanted."""
    plan = _plan(teacher, solvers, solver, steps, spacing)
    return TeacherSamples(teacher, plan, tuple(shape), classes=classes, size=size, count=count, clip=clip)


def pairs(
    *,
    teacher: Model,
    solvers: Mapping[str, Solver],
    out: Path | None,
    count: int,
    shape: list[int],
    classes: int | None = None,
    solver: str = "ddim",
    steps: int = 50,
    spacing: Spacing = uniform_t,
    size: int = 128,
    clip: float = 1.0,
) -> Loader:
    """Noises and what the teacher makes of them, made once into the folder pairs of the run: for reflow.

    out: None makes none; one batch of zeros has their shapes.
    """
    plan = _plan(teacher, solvers, solver, steps, spacing)
    if plan.stochastic:
        raise ValueError(f"{plan.solver} in [data] adds noise, and pairs need a plan that does not, such as ddim")
    condition = {} if classes is None else {"class_labels": torch.arange(count) % classes}
    if out is None:
        check_fit(teacher, plan)
        zeros = torch.zeros(min(size, count), *shape)
        return [{"x0": zeros, "noise": zeros, **{key: value[: len(zeros)] for key, value in condition.items()}}]
    folder = out / "pairs"
    if first_process():
        make_pairs(teacher, plan, folder, shape=shape, count=count, condition=condition, clip=clip)
        return Pairs(folder, size=size)
    while True:  # not by a barrier: making them takes longer than processes wait for each other there
        with suppress(FileNotFoundError, ValueError):  # not begun, or not finished; where it fails the launcher ends us
            return Pairs(folder, size=size)
        time.sleep(1)


SOURCES: dict[str, Callable[..., Loader]] = {
    "arrays": arrays,
    "datasets": hub_dataset,
    "digits": digits,
    "image_folder": image_folder,
    "npz": npz_images,
    "pairs": pairs,
    "teacher_samples": teacher_samples,
}


def tensors(file: str | Path) -> dict[str, torch.Tensor]:
    """All arrays of an .npz. Raises FileNotFoundError, or ValueError for what is none."""
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file {file}; give an .npz")
    try:
        with np.load(file, allow_pickle=False) as found:
            return {key: torch.from_numpy(_float(found[key])) for key in found.files}
    except (ValueError, EOFError, OSError, AttributeError) as error:
        raise ValueError(f"{file} is no .npz of numbers, or it is damaged: {error}") from error


def _float(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return array.astype(np.float32) if array.dtype in (np.float16, np.float64) else array


def _plan(teacher: Model, solvers: Mapping[str, Solver], solver: str, steps: int, spacing: Spacing) -> Plan:
    if solver not in solvers:
        raise ValueError(f"unknown solver in [data]: {solver!r}; known: {', '.join(solvers)}")
    return trace(solvers[solver], grid(teacher.schedule, steps, spacing))
