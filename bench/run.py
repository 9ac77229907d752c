"""The sweep: every case sampled from the same noises, scored, timed, and written down so that a killed run goes on."""

from __future__ import annotations

import hashlib
import json
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fastsample.files import folder
from fastsample.progress import track

from .case import Case, shown
from .cells import Cell, Layout, Result, floors
from .clock import clocked
from .environment import environment
from .fingerprint import fingerprint
from .latency import Latency
from .measure import Measure
from .quality import Quality
from .ranks import Lost, Ranks, ranks
from .record import Record, clear, read_body, read_record, tidy, write_record, write_run
from .reference import Reference
from .sampler import Condition, Sampler
from .writing import Unwritable, writing


def run(
    cases: Sequence[Case],
    *,
    shape: Sequence[int],
    n: int,
    out: str | Path,
    batch: int = 250,
    shard: int = 1000,
    quality: Quality | Sequence[Quality] | Mapping[str, Quality] = (),
    latency: Latency | None = None,
    converged: Mapping[str, Case] | None = None,
    condition: Condition | None = None,
    device: str | torch.device = "cpu",
    keep: int = 64,
    floor: bool = True,
    resume: bool = True,
    load_s: Mapping[str, float] | None = None,
    progress: bool | None = None,
) -> list[Record]:
    """Measure every case, and write the folder `out` that `report` and `compare` read.

    shape: of one sample. n: samples of each case, of the seeds 0 .. n - 1, in batches of `batch`.
    shard: samples a file; what a killed run loses at the most.
    quality: measures of features, such as `fd_digits(images)`, or functions from samples [n, ...] (float32, on the CPU)
        to a `Score` or a float, for which all samples are held in memory.
    latency: None measures none. The starting noise is drawn beforehand; what a stochastic solver draws is counted.
    converged: model name -> an accurate case (say 200 steps of a second-order solver), whose samples of the same
        noises are the truth for that model's cases: `endpoint_rms` of the deterministic ones, and
        `<measure>_converged`, the distance to its samples. For a student that follows its teacher's trajectories
        this may be a case of the teacher.
    condition: indices [b], int64 on the device -> the network's keyword conditions, such as
        `lambda i: {"class_labels": i % 10}`.
    keep: how many samples of each case are written down, for pictures.
    floor: a first record with what real images score against real ones, where a measure's reference can say.
    resume: go on where a killed run of the same configuration stopped, cases that failed included; False replaces
        whatever is there. A folder with a run of another configuration is refused.
    load_s: model name -> seconds that loading it took, for the report.
    Under `accelerate launch` or `torchrun` the processes share the work; only the first returns records.
    A case that fails (NaN, a count of evaluations unlike its plan's, ...) keeps its reason in `record.error`, and the
    others go on; a warning at the end names those that failed. Raises OSError where `out` cannot be written.
    """
    out, measures, truths = Path(out), _measures(quality), dict(converged or {})
    sampler = Sampler(tuple(shape), batch, torch.device(device), condition)
    layout = Layout(out, n, shard, keep, measures)
    _check(cases, truths, sampler, layout, latency)
    configuration = _configuration(cases, truths, sampler, layout, latency)
    with ranks() as processes:
        body, found = _begin(cases, configuration, layout, floor, resume, processes, device)
        records = found + _sampled(cases, truths, sampler, layout, processes, progress)

        def finish() -> list[Record]:
            done = clocked(cases, records, sampler, latency, out, load_s or {}, progress) if latency else records
            for record in done:
                _write(out, record)
            for cell in _truths(truths, layout).values():
                cell.clear()
            with writing("the run"):
                write_run(out, {**body, "finished": True})
            return done

        records = processes.together(lambda: finish() if processes.first else [])
    failed = [record.error for record in records if record.error]
    if failed:
        warnings.warn(f"{len(failed)} of {len(cases)} cases failed:\n  " + "\n  ".join(failed), stacklevel=2)
    return records


def _sampled(
    cases: Sequence[Case],
    converged: Mapping[str, Case],
    sampler: Sampler,
    layout: Layout,
    processes: Ranks,
    progress: bool | None,
) -> list[Record]:
    """The records of all cases without their latency, in the first process; cases that sample the same share a cell."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.quality_key, []).append(case)
    truths = _truths(converged, layout)
    missing = [group[0].model_name for group in groups.values() if Cell(group[0], layout).result() is None]
    missing = processes.all(missing)[0]  # by the first one's eyes, so that all do the same
    for cell in {cell.key: cell for name, cell in truths.items() if name in missing}.values():
        try:
            cell.make(sampler, processes)
        except (Unwritable, Lost):
            raise
        except Exception as error:
            raise RuntimeError(f"the converged case failed: {_reason(cell.case, error)}") from error
        finally:
            sampler.forget(cell.case)
    records: dict[str, Record] = {}
    for group in track(list(groups.values()), "bench", progress if processes.first else False):
        cell = Cell(group[0], layout, truths.get(group[0].model_name))
        made = _result(cell, sampler, processes)
        records |= processes.together(partial(_told, group, cell, made) if processes.first else dict[str, Record])
    return [records[case.key] for case in cases if case.key in records]


def _result(cell: Cell, sampler: Sampler, processes: Ranks) -> Result | Exception | None:
    """None in the processes that do not score."""
    done = processes.all(cell.result() if processes.first else None)[0]
    if done is not None:
        return done
    try:
        cell.make(sampler, processes)
        return processes.together(cell.finish if processes.first else _nothing)
    except (Unwritable, Lost):
        raise
    except Exception as error:
        return error
    finally:
        sampler.forget(cell.case)


def _nothing() -> None:
    pass


def _told(group: Sequence[Case], cell: Cell, found: Result | Exception | None) -> dict[str, Record]:
    """Case -> its record, written down; the shards of a cell that was scored are removed."""
    records = {case.key: _record(case, cell.layout.n, cell.key, found) for case in group}
    for record in records.values():
        _write(cell.layout.out, record)
    if isinstance(found, Result):
        cell.clear()
    return records


def _write(out: Path, record: Record) -> None:
    with writing(record.name):
        write_record(out, record)


def _record(case: Case, n: int, quality: str, found: Result | Exception | None) -> Record:
    given = {"start": case.start, "end": case.end, **case.options}
    record = Record(
        key=case.key,
        name=case.name,
        model=case.model_name,
        solver=case.solver_name,
        steps=case.steps,
        spacing=case.spacing_name,
        options={name: shown(value) for name, value in given.items() if value is not None},
        n=n,
        settings=case.settings,
        quality=quality,
    )
    try:
        record = replace(record, nfe=case.plan.nfe, stochastic=case.plan.stochastic)
    except Exception as error:
        found = error
    if isinstance(found, Exception):
        trace = "".join(traceback.format_exception(found))
        return replace(record, error=_reason(case, found), traceback=trace)
    if found is None:
        return record
    paid = found.cost
    return replace(record, calls=paid.calls, rows=paid.rows, scores=found.scores, samples=found.samples)


def _truths(converged: Mapping[str, Case], layout: Layout) -> dict[str, Cell]:
    """Model name -> the cell of its converged case, one for all models that share it."""
    cells: dict[str, Cell] = {}
    return {
        name: cells.setdefault(case.quality_key, Cell(case, layout, whole=True)) for name, case in converged.items()
    }


def _begin(
    cases: Sequence[Case],
    configuration: dict[str, Any],
    layout: Layout,
    floor: bool,
    resume: bool,
    processes: Ranks,
    device: str | torch.device,
) -> tuple[dict[str, Any], list[Record]]:
    """The body of run.json, and the floor's record if there is one, once it is clear that this run may go in here."""
    text = json.dumps(configuration, sort_keys=True, separators=(",", ":"))
    digest, out = hashlib.sha256(text.encode()).hexdigest(), layout.out
    if len(set(processes.all(digest))) > 1:
        raise RuntimeError("the processes do not agree on what to run; give all of them the same cases and settings")

    def begin() -> tuple[dict[str, Any], list[Record]]:
        folder(out / "cells")
        environments = _earlier(out, configuration, digest, resume) or [environment(device)]
        real = _floor(layout) if floor else []
        body: dict[str, Any] = {"cases": [*(record.key for record in real), *(case.key for case in cases)]}
        body |= {"configuration": configuration, "hash": digest, "environments": environments, "finished": False}
        with writing("the run"):
            tidy(out)
            write_run(out, body)
        for record in real:
            _write(out, record)
        return body, real

    begun = processes.together(lambda: begin() if processes.first else ({}, []))
    seen = processes.all((out / "run.json").is_file())
    if not all(seen):
        raise RuntimeError(
            f"process {seen.index(False)} does not see {out / 'run.json'}: every process must see the same run folder; "
            f"put it on a disk that all of them share"
        )
    return begun


def _earlier(out: Path, configuration: dict[str, Any], digest: str, resume: bool) -> list[Any]:
    """The environments of the run that is gone on with, this one's too; none of a new run.

    Raises ValueError where another run is in the way.
    """
    if not resume or not (out / "run.json").exists():
        clear(out)
        return []
    try:
        body = read_body(out)
    except ValueError as error:
        raise ValueError(f"{error}, with resume=False, which replaces it, or choose another out") from error
    if body["hash"] == digest:
        done = body["finished"] and not any(_failed(out / "cells" / f"{key}.json") for key in body["cases"])
        return [*body["environments"], *([] if done else [environment(configuration["device"])])]
    there = body["configuration"]
    differ = [key for key in {**there, **configuration} if there.get(key) != configuration.get(key)]
    raise ValueError(
        f"{out} holds another run (its {', '.join(differ)} differ): choose another out, or pass resume=False to "
        f"replace it"
    )


def _failed(path: Path) -> bool:
    """Whether there is something left to do for this record."""
    try:
        return read_record(path).error is not None
    except (OSError, ValueError):
        return True


def _floor(layout: Layout) -> list[Record]:
    try:
        return [read_record(layout.out / "cells" / "floor.json")]
    except (OSError, ValueError):  # none of an earlier process, or no whole one
        scores = floors(layout.measures)
    n = max((score.n or 0 for score in scores.values()), default=0)
    name = "real images"
    return [Record("floor", name, name, "", 0, "", {}, n, kind="floor", scores=scores)] if scores else []


def _configuration(
    cases: Sequence[Case],
    converged: Mapping[str, Case],
    sampler: Sampler,
    layout: Layout,
    latency: Latency | None,
) -> dict[str, Any]:
    """All that the numbers follow from, but for the machine."""
    models = {id(case.model): case for case in [*cases, *converged.values()]}
    weights: dict[str, list[str]] = {}
    for case in models.values():
        weights.setdefault(case.model_name, []).append(fingerprint(case.model))
    told = {
        "shape": list(sampler.shape),
        "n": layout.n,
        "batch": sampler.batch,
        "shard": layout.shard,
        "keep": layout.keep,
        "condition": _conditions(sampler, layout.n),
        "device": sampler.device.type,  # each process may have a number of its own
        "quality": {name: _described(measure) for name, measure in layout.measures.items()},
        "latency": asdict(latency) if latency else None,
        "converged": {name: f"{case.name} {_plan(case)}" for name, case in converged.items()},
        "cases": {case.name: _plan(case) for case in cases},
        "weights": {name: " ".join(found) for name, found in weights.items()},
        "versions": {"fastsample": version("fastsample"), "torch": torch.__version__},
    }
    return dict(json.loads(json.dumps(told)))  # as it will be read: tuples as lists


def _conditions(sampler: Sampler, n: int) -> str:
    """A hash of what the first samples are conditioned on; "" without conditions."""
    if sampler.condition is None:
        return ""
    return fingerprint(sampler.condition(torch.arange(min(n, sampler.batch), device=sampler.device)))


def _described(measure: Quality) -> dict[str, Any]:
    """The extractor, the reference and the numbers of a measure; of a function only its name is known."""
    if not isinstance(measure, Measure):
        return {"function": str(getattr(measure, "__qualname__", type(measure).__qualname__))}
    reference = getattr(measure, "reference", None)
    size = {"n_reference": reference.n, "dataset": reference.dataset} if isinstance(reference, Reference) else {}
    own: dict[str, Any] = {f.name: getattr(measure, f.name) for f in fields(measure)} if is_dataclass(measure) else {}
    numbers = {name: value for name, value in own.items() if isinstance(value, int | float)}
    return {"measure": type(measure).__name__, **numbers, **measure.features.id, **size}


def _plan(case: Case) -> str:
    """A hash of the plan; "" where there is none, which the case's record will say."""
    try:
        return hashlib.sha256(case.plan.to_json().encode()).hexdigest()[:16]
    except Exception:
        return ""


def _check(
    cases: Sequence[Case], converged: Mapping[str, Case], sampler: Sampler, layout: Layout, latency: Latency | None
) -> None:
    shape, n = sampler.shape, layout.n
    least = 2 if layout.extractors else 1
    if n == 1 < least:
        raise ValueError("n = 1: of one sample there is no spread, which measures of features need; give at least 2")
    for name, number, least in (("n", n, 1), ("batch", sampler.batch, 1), ("shard", layout.shard, 1)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if layout.keep < 0:
        raise ValueError(f"keep must be at least 0, got {layout.keep}")
    if not cases:
        raise ValueError("no cases: nothing to measure")
    seen: dict[str, Case] = {}
    for case in cases:
        if case.name in seen:
            raise ValueError(f"two cases are named {case.name}; give their models or solvers different names")
        seen[case.name] = case
    for name, case in converged.items():
        if name not in {case.model_name for case in cases}:
            raise ValueError(f"converged names the model {name!r}, which no case has")
        try:
            noisy = case.plan.stochastic
        except Exception as error:
            raise ValueError(f"the converged case has no plan: {_reason(case, error)}") from error
        if noisy:
            raise ValueError(f"converged case {case.name} adds noise, so it has no one solution; use an ODE solver")
    for name, measure in layout.measures.items():
        if isinstance(measure, Measure):
            try:
                measure.features.check(shape)
            except ValueError as error:
                raise ValueError(f"{name} cannot measure these samples: {error}") from error
            _check_reference(name, measure, shape)
    if latency and latency.baseline is not None and latency.baseline not in seen:
        raise ValueError(f"the baseline {latency.baseline!r} of the latency is none of the cases: {', '.join(seen)}")


def _check_reference(name: str, measure: Measure, shape: tuple[int, ...]) -> None:
    """Raises ValueError where samples of this shape have other features than the reference, such as other pixels."""
    reference = getattr(measure, "reference", None)
    if not isinstance(reference, Reference):
        return
    try:
        made = measure.features(torch.rand(2, *shape) * 2 - 1).shape[1]
    except Exception:  # of an extractor that noise does not suit: the cases show what samples do
        return
    if made != len(reference.mean):
        raise ValueError(
            f"{name} cannot measure these samples: the extractor {measure.features.name} makes {made} features of "
            f"{' x '.join(map(str, shape))}, and its reference has {len(reference.mean)}; give real images of "
            f"that shape"
        )


def _measures(quality: Quality | Sequence[Quality] | Mapping[str, Quality]) -> dict[str, Quality]:
    if isinstance(quality, Mapping):
        return dict(quality)
    listed = list(quality) if isinstance(quality, Sequence) else [quality]
    named = {str(getattr(one, "name", None) or getattr(one, "__name__", type(one).__name__)): one for one in listed}
    if len(named) < len(listed):
        raise ValueError(f"two quality measures share a name ({', '.join(named)}); pass a dict of name -> measure")
    return named


def _reason(case: Case, error: Exception) -> str:
    return f"{case.name}: {type(error).__name__}: {error}"
