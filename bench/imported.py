"""Times that pytest-benchmark took, as a run folder that `compare` and `report` read like one of our own."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .latency import Times, Timing
from .record import Record, write_record, write_run

MODEL = "pytest-benchmark"
REMEDY = (
    "write the file with `pytest tests/benchmarks --benchmark-enable --benchmark-json=FILE`; for files that "
    "--benchmark-save or --benchmark-autosave keep, add --benchmark-save-data"
)


def import_benchmarks(path: str | Path, out: str | Path) -> list[Record]:
    """One record for each benchmark of a JSON file of pytest-benchmark, written as the run folder `out`.

    The raw times become `timing.steady`; nothing is taken from its means, medians and minima. The name of the machine
    and of its owner, which such a file holds, are left out. One without times keeps that as its error.
    Raises ValueError, before anything is written, where the file is something else or lacks the raw times.
    """
    path, out = Path(path), Path(out)
    if (out / "run.json").exists():
        raise ValueError(f"{out} holds a run already; import into another folder")
    text = _read(path)
    records = [_record(path, benchmark) for benchmark in text["benchmarks"]]
    if not records:
        raise ValueError(f"{path} holds no benchmarks: were they disabled? {REMEDY}")
    keys = [record.key for record in records]
    for key, record in zip(keys, records):
        if keys.count(key) > 1:
            raise ValueError(f"{path} holds the benchmark {record.name} twice")
    names = sorted(record.name for record in records)
    configuration = {
        "shape": [],
        "n": 0,
        "batch": 1,
        "shard": 0,
        "quality": {},
        "latency": {"from": MODEL},
        "converged": {},
        "keep": 0,
    }
    body = {
        "cases": keys,
        "configuration": configuration,
        "hash": hashlib.sha256(json.dumps([configuration, names]).encode()).hexdigest()[:16],
        "environments": [_environment(text)],
        "finished": False,
    }
    write_run(out, body)
    for record in records:
        write_record(out, record)
    write_run(out, {**body, "finished": True})
    return records


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; {REMEDY}")
    try:
        text: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, or half of one ({error}); {REMEDY}") from error
    found: dict[str, Any] = text if isinstance(text, dict) else {}
    benchmarks = found.get("benchmarks")
    if not isinstance(benchmarks, list) or not all(isinstance(one, dict) and "fullname" in one for one in benchmarks):
        raise ValueError(f"{path} is not a file of pytest-benchmark; {REMEDY}")
    return found


def _record(path: Path, benchmark: Mapping[str, Any]) -> Record:
    """fullname tells benchmarks apart, since two files may each have a test_speed."""
    name = str(benchmark["fullname"])
    settings = {"group": benchmark.get("group"), **(benchmark.get("params") or {})}
    timing, error = None, None
    if not benchmark.get("stats"):
        error = f"{name} has no times: it failed, or measured nothing"
    elif not benchmark["stats"].get("data"):
        raise ValueError(f"{path}: the raw times (stats.data) of {name} are not there; {REMEDY}")
    else:
        timing = Timing(batch=1, steady=Times(_seconds(path, name, benchmark["stats"]["data"])))
    return Record(
        key=hashlib.sha256(name.encode()).hexdigest()[:16],
        name=name,
        model=MODEL,
        solver=str(benchmark.get("name", name)),
        steps=0,
        spacing="",
        options={},
        n=0,
        settings={key: str(value) for key, value in settings.items() if value is not None},
        timing=timing,
        error=error,
    )


def _seconds(path: Path, name: str, data: Any) -> tuple[float, ...]:
    try:
        seconds = tuple(float(value) for value in data)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: stats.data of {name} holds something else than seconds ({error})") from error
    if not all(math.isfinite(value) and value >= 0 for value in seconds):
        raise ValueError(f"{path}: stats.data of {name} holds something else than seconds: {min(seconds)}")
    return seconds


def _environment(text: Mapping[str, Any]) -> dict[str, str]:
    """Ours, where tests/benchmarks/conftest.py has put it there; else what pytest-benchmark says, without the owner."""
    machine, commit = text.get("machine_info") or {}, text.get("commit_info") or {}
    ours = machine.get("fastsample")
    if isinstance(ours, dict):
        return {str(name): str(value) for name, value in ours.items()}
    cpu = machine.get("cpu") or {}
    revision = commit.get("id")
    if revision == "unversioned":
        revision = None
    elif revision and commit.get("dirty"):
        revision = f"{revision} with changes"
    found = {
        "date": text.get("datetime"),
        "python": machine.get("python_version"),
        "system": " ".join(str(machine[key]) for key in ("system", "release", "machine") if machine.get(key)),
        "cpu": cpu.get("brand_raw") or machine.get("processor"),
        "cores": cpu.get("count"),
        "device": "unknown",
        "git revision of the working folder": revision,
    }
    return {name: str(value) for name, value in found.items() if value}
