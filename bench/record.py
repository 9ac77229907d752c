"""Records: what was measured of a case, as one JSON file each, and the run folder that holds them.

out/run.json           which cases, the settings, the environment
out/cells/<key>.json   one record
out/cells/<key>.npz    its first samples and their seeds
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastsample.files import write, write_text

from .latency import Times
from .quality import Score

VERSION = 1

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One case and what it gave; where `error` is set, what is missing was not measured.

    nfe, calls, rows: as in `Cost`. scores: by the name of the measure. latency: seconds for `latency_batch` images.
    samples: how many were kept in the .npz.
    """

    key: str
    name: str
    model: str
    solver: str
    steps: int
    spacing: str
    options: dict[str, str]
    n: int
    nfe: int | None = None
    calls: int | None = None
    rows: float | None = None
    stochastic: bool | None = None
    scores: dict[str, Score] = field(default_factory=dict)
    latency: Times | None = None
    latency_batch: int | None = None
    samples: int = 0
    error: str | None = None

    @property
    def ms_per_batch(self) -> tuple[float, float, float] | None:
        """Milliseconds for a batch: the median and its 95% interval."""
        if self.latency is None:
            return None
        low, high = self.latency.interval_s
        return self.latency.median_s * 1e3, low * 1e3, high * 1e3

    @property
    def ms_per_image(self) -> tuple[float, float, float] | None:
        """The same for one image of that batch."""
        if self.ms_per_batch is None or self.latency_batch is None:
            return None
        median, low, high = (ms / self.latency_batch for ms in self.ms_per_batch)
        return median, low, high


def clear(folder: Path) -> None:
    """Remove an earlier run, run.json first: where that is missing, nobody takes the old cells for a run."""
    (folder / "run.json").unlink(missing_ok=True)
    for path in (folder / "cells").glob("*"):
        if re.match(r"\.?[0-9a-f]{16}\.(json|npz)", path.name):  # with a dot: left by a run that was killed
            path.unlink()


def write_run(folder: Path, body: dict[str, Any]) -> None:
    _write(folder / "run.json", "run", body)


def write_record(folder: Path, record: Record) -> None:
    _write(folder / "cells" / f"{record.key}.json", "record", asdict(record))


def write_samples(folder: Path, record: Record, samples: Tensor) -> None:
    """samples [k, ...], of the seeds 0 .. k - 1."""
    images, seeds = samples.float().numpy(), np.arange(len(samples))
    path = folder / "cells" / f"{record.key}.npz"
    write(path, lambda temporary: np.savez_compressed(temporary, samples=images, seeds=seeds))


def read_samples(folder: Path, record: Record) -> Tensor:
    with np.load(folder / "cells" / f"{record.key}.npz", allow_pickle=False) as file:
        return torch.from_numpy(file["samples"])


def read_run(folder: str | Path) -> tuple[dict[str, Any], list[Record]]:
    """The body of run.json and the records that are there, in the order of the cases."""
    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise FileNotFoundError(f"{folder} holds no run.json; give the folder that bench.run wrote (its `out`)")
    body = _read(folder / "run.json", "run", _run)
    paths = [folder / "cells" / f"{key}.json" for key in body["cases"]]
    return body, [_read(path, "record", _record) for path in paths if path.exists()]


def _run(body: dict[str, Any]) -> dict[str, Any]:
    return {key: body[key] for key in ("cases", "settings", "environment", "finished")}


def _record(body: dict[str, Any]) -> Record:
    scores = {name: Score(**score) for name, score in body["scores"].items()}
    latency = Times(tuple(body["latency"]["samples_s"])) if body["latency"] else None
    return Record(**{**body, "scores": scores, "latency": latency})


def _write(path: Path, kind: str, body: dict[str, Any]) -> None:
    text = {"format": f"fastsample.bench.{kind}", "version": VERSION, kind: body}
    write_text(path, json.dumps(text, indent=1, allow_nan=False) + "\n")


def _read(path: Path, kind: str, made: Callable[[dict[str, Any]], T]) -> T:
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        if text["format"] == f"fastsample.bench.{kind}" and text["version"] == VERSION:
            return made(text[kind])
        found = f"{text['format']} of version {text['version']}"
    except (KeyError, TypeError, ValueError) as error:
        found = f"damaged ({error!r})"
    raise ValueError(f"{path} is not a bench {kind} of version {VERSION}: {found}; run the sweep again")
