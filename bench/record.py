"""Records: what was measured of a case, and the run folder that holds them.

out/run.json                        the cases, the configuration and its hash, the environments it ran in
out/cells/<key>.json                one record
out/samples/<quality key>/          of cases that sample the same: they differ in batch or latency settings alone
    shard-<first index>.npz         features (and samples, while they are needed) of a range of indices
    scores.json                     what they gave
    samples.npz                     the first samples, for pictures, and their seeds
    influence.npz                   measure -> [n], how much each sample moves it, for comparing two runs in pairs
out/latency/round-<number>.json     raw times of one interleaved round of all cases
out/latency/started.json, needs.json    the calls before the rounds; memory and energy, measured after them
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from fastsample.files import write, write_text

from .latency import Ratio, Times, Timing
from .measure import Score
from .reference import DAMAGED

VERSION = 2

T = TypeVar("T")


@dataclass(frozen=True)
class Record:
    """One case and what it gave; where `error` is set, what is missing was not measured.

    kind: "case", or "floor" for real images against real ones, which has scores alone (steps 0, no nfe).
    options: the solver's keywords. settings: what else tells the case from others, such as guidance, dtype, compile,
    batch, device. nfe, calls, rows: as in `Cost`. scores: by the name of the measure. quality: the quality key, by
    which cases share their samples. samples: how many were kept for pictures. traceback: of the error.
    """

    key: str
    name: str
    model: str
    solver: str
    steps: int
    spacing: str
    options: dict[str, str]
    n: int
    kind: Literal["case", "floor"] = "case"
    settings: dict[str, str] = field(default_factory=dict)
    nfe: int | None = None
    calls: int | None = None
    rows: float | None = None
    stochastic: bool | None = None
    quality: str = ""
    scores: dict[str, Score] = field(default_factory=dict)
    timing: Timing | None = None
    samples: int = 0
    error: str | None = None
    traceback: str | None = None

    @property
    def ms_per_batch(self) -> tuple[float, float, float] | None:
        """Milliseconds for a batch: the median and its 95% interval."""
        if self.timing is None:
            return None
        low, high = self.timing.steady.interval_s
        return self.timing.steady.median_s * 1e3, low * 1e3, high * 1e3

    @property
    def ms_per_image(self) -> tuple[float, float, float] | None:
        """The same for one image of that batch."""
        if self.ms_per_batch is None or self.timing is None:
            return None
        median, low, high = (ms / self.timing.batch for ms in self.ms_per_batch)
        return median, low, high


def clear(folder: Path) -> None:
    """Remove an earlier run, run.json first: where that is missing, nobody takes the old cells for a run."""
    (folder / "run.json").unlink(missing_ok=True)
    for pattern in ("cells/*", "latency/*", "samples/*/*"):  # names with a dot are left by a run that was killed
        for path in folder.glob(pattern):
            if re.fullmatch(
                r"\.?([0-9a-f]{16}|floor|round-\d+|started|needs|shard-\d+|scores|samples|influence)\..*", path.name
            ):
                path.unlink()
    for path in folder.glob("samples/*"):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def tidy(folder: Path) -> None:
    """Remove what a run that was killed left half-written: no reader takes it for good, but it fills the disk."""
    for pattern in (".run.json.*", "cells/.*.json.*", "latency/.*.json.*", "samples/*/.*.npz.*", "samples/*/.*.json.*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def write_run(folder: Path, body: dict[str, Any]) -> None:
    _write(folder / "run.json", "run", body)


def write_record(folder: Path, record: Record) -> None:
    _write(folder / "cells" / f"{record.key}.json", "record", asdict(record))


def write_samples(folder: Path, quality: str, samples: Tensor) -> None:
    """samples [k, ...], of the indices 0 .. k - 1."""
    write_arrays(
        folder / "samples" / quality / "samples.npz",
        {"samples": samples.float().numpy(), "seeds": np.arange(len(samples))},
    )


def read_samples(folder: str | Path, record: Record) -> Tensor:
    """The kept samples [k, ...] of a record."""
    return torch.from_numpy(read_arrays(Path(folder) / "samples" / record.quality / "samples.npz")["samples"])


def write_influence(folder: Path, quality: str, influence: Mapping[str, Tensor]) -> None:
    path = folder / "samples" / quality / "influence.npz"
    write_arrays(path, {name: values.double().numpy() for name, values in influence.items()})


def read_influence(folder: str | Path, record: Record) -> dict[str, Tensor]:
    """Measure -> [n]: how much each sample of a record moves its score; empty where none was kept."""
    path = Path(folder) / "samples" / record.quality / "influence.npz"
    return {name: torch.from_numpy(values) for name, values in read_arrays(path).items()} if path.exists() else {}


def read_run(folder: str | Path) -> tuple[dict[str, Any], list[Record]]:
    """The body of run.json and the records that are there, in the order of the cases, a floor first.

    body: `cases` (their keys), `configuration` (what the run was asked for: shape, n, batch, shard, quality: measure ->
    its extractor and reference, latency, converged, keep), `hash` of it, `environments` (the last is the newest),
    `finished`.
    """
    folder, body = Path(folder), read_body(folder)
    paths = [folder / "cells" / f"{key}.json" for key in body["cases"]]
    return body, [read_record(path) for path in paths if path.exists()]


def read_body(folder: str | Path) -> dict[str, Any]:
    """The body of run.json alone."""
    path = Path(folder) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no run.json; give the folder that bench.run wrote (its `out`)")
    return _read(path, "run", _run)


def read_record(path: Path) -> Record:
    """Raises ValueError, naming the file, where it is damaged."""
    return _read(path, "record", _record)


def write_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    write(path, lambda temporary: np.savez(temporary, **arrays))


def read_arrays(path: str | Path, names: Sequence[str] | None = None) -> dict[str, Any]:
    """The arrays of an .npz. Raises ValueError, naming the file, where it is damaged or holds pickles.

    names: those that are read, and so checked; None: all.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in (file.files if names is None else names)}
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged or no .npz of plain arrays ({error}); remove it and run again") from error


def _run(body: dict[str, Any]) -> dict[str, Any]:
    return {key: body[key] for key in ("cases", "configuration", "hash", "environments", "finished")}


def _record(body: dict[str, Any]) -> Record:
    scores = {name: Score(**score) for name, score in body["scores"].items()}
    timing = _timing(body["timing"]) if body["timing"] else None
    return Record(**{**body, "scores": scores, "timing": timing})


def _timing(body: dict[str, Any]) -> Timing:
    steady = Times(tuple(body["steady"]["samples_s"]))
    ratio = Ratio(**{**body["ratio"], "ratios": tuple(body["ratio"]["ratios"])}) if body["ratio"] else None
    return Timing(**{**body, "steady": steady, "warmup_s": tuple(body["warmup_s"]), "ratio": ratio})


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
