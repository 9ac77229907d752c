"""The sweep: every case sampled from the same noises, scored, timed, and written down."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsample.files import folder
from fastsample.noise import Noise, noise
from fastsample.progress import track
from fastsample.sampling import sample

from .case import Case, Cost, cost, counting
from .environment import environment
from .latency import Call, Latency, interleaved
from .quality import Quality, Score, endpoint_rms
from .record import Record, clear, write_record, write_run, write_samples

Condition = Callable[[Tensor], Mapping[str, Any]]


def run(
    cases: Sequence[Case],
    *,
    shape: Sequence[int],
    n: int,
    out: str | Path,
    batch: int = 250,
    quality: Quality | Sequence[Quality] | Mapping[str, Quality] = (),
    latency: Latency | None = None,
    converged: Mapping[str, Case] | None = None,
    condition: Condition | None = None,
    device: str | torch.device = "cpu",
    keep: int = 64,
    progress: bool | None = None,
) -> list[Record]:
    """Measure every case, and write the folder `out` that `report` reads; an earlier run in it is replaced.

    shape: of one sample. n: samples of each case, of the seeds 0 .. n - 1, in batches of `batch`.
    quality: functions from samples [n, ...] (float32, on the CPU) to a `Score` or a float.
    latency: None measures none. The starting noise is drawn beforehand; what a stochastic solver draws is counted.
    converged: model name -> an accurate case (say 200 steps of a second-order solver), whose samples of the same
        noises are the truth for the `endpoint_rms` of that model's deterministic cases. For a student that follows
        its teacher's trajectories this may be a case of the teacher.
    condition: indices [b], int64 on `device` -> the network's keyword conditions, such as
        `lambda i: {"class_labels": i % 10}`.
    keep: how many samples of each case are written down, for pictures.
    A case that fails (NaN, a count of evaluations unlike its plan's, ...) keeps its reason in `record.error`, and the
    others go on; a warning at the end names those that failed.
    """
    sampler = Sampler(tuple(shape), n, batch, torch.device(device), condition)
    measures = _measures(quality)
    _check(cases, converged or {}, n, batch, keep)
    out = Path(out)
    folder(out / "cells")
    body = {
        "cases": [case.key for case in cases],
        "settings": {
            "shape": list(shape),
            "n": n,
            "batch": batch,
            "quality": list(measures),
            "latency": asdict(latency) if latency else None,
            "converged": {name: case.name for name, case in (converged or {}).items()},
            "keep": keep,
        },
        "environment": environment(device),
        "finished": False,
    }
    clear(out)
    write_run(out, body)
    truths = _truths(converged or {}, sampler)
    records = []
    for case in track(cases, "bench", progress):
        record, samples = _measure(case, sampler, measures, truths)
        if samples is not None and keep:
            record = replace(record, samples=min(keep, n))
            write_samples(out, record, samples[:keep])
        write_record(out, record)
        records.append(record)
    if latency:
        records = _timed(cases, records, sampler, latency)
        for record in records:
            write_record(out, record)
    write_run(out, {**body, "finished": True})
    failed = [record.error for record in records if record.error]
    if failed:
        warnings.warn(f"{len(failed)} of {len(records)} cases failed:\n  " + "\n  ".join(failed), stacklevel=2)
    return records


@dataclass(frozen=True)
class Sampler:
    """What all cases of a sweep share: the noises and the conditions of sample i."""

    shape: tuple[int, ...]
    n: int
    batch: int
    device: torch.device
    condition: Condition | None

    def all(self, case: Case) -> tuple[Tensor, Cost]:
        """Samples [n, ...] on the CPU, and what the first batch of them cost."""
        first, *rest = torch.arange(self.n).split(self.batch)
        with counting(case.model) as counted:
            parts = [self.call(case, first, counted)()]
        paid = cost(case, counted, len(first))
        parts += [self.call(case, indices)() for indices in rest]
        return torch.cat([part.to("cpu", torch.float32) for part in parts]), paid

    def call(self, case: Case, indices: Tensor, model: Any = None, *, drawn: bool = False) -> Callable[[], Tensor]:
        """A function that samples these indices. drawn: the starting noise is drawn in the first call alone."""
        seeds = noise(self.shape, indices.tolist(), device=self.device)
        start = _Drawn(**vars(seeds)) if drawn else seeds
        condition = self.condition(indices.to(self.device)) if self.condition else None
        return lambda: sample(model or case.model, case.plan, start, condition=condition, progress=False)


class _Drawn(Noise):
    """Noise that is started with more than once, and drawn for that but once."""

    @cached_property
    def _start(self) -> Tensor:
        return super().draw(0)

    def draw(self, k: int) -> Tensor:
        return super().draw(k) if k else self._start


def _measure(
    case: Case, sampler: Sampler, measures: Mapping[str, Quality], truths: Mapping[str, Tensor]
) -> tuple[Record, Tensor | None]:
    given = {"start": case.start, "end": case.end, **case.options}
    record = Record(
        key=case.key,
        name=case.name,
        model=case.model_name,
        solver=case.solver_name,
        steps=case.steps,
        spacing=case.spacing_name,
        options={name: repr(value) for name, value in given.items() if value is not None},
        n=sampler.n,
    )
    try:
        record = replace(record, nfe=case.plan.nfe, stochastic=case.plan.stochastic)
        samples, paid = sampler.all(case)
        scores = {name: _score(name, measure(samples), sampler.n) for name, measure in measures.items()}
        if case.model_name in truths and not case.plan.stochastic:
            scores["endpoint_rms"] = endpoint_rms(samples, truths[case.model_name])
        return replace(record, calls=paid.calls, rows=paid.rows, scores=scores), samples
    except Exception as error:
        return replace(record, error=_reason(case, error)), None


def _score(name: str, value: Score | float, n: int) -> Score:
    score = value if isinstance(value, Score) else Score(value, n=n)
    score = replace(score, value=float(score.value), se=_float(score.se), debiased=_float(score.debiased))
    for part, number in (("", score.value), ("se of ", score.se), ("debiased ", score.debiased)):
        if number is not None and not math.isfinite(number):
            raise FloatingPointError(f"{part}{name} of the samples is {number}")
    return score


def _float(number: float | None) -> float | None:
    return None if number is None else float(number)  # of numpy and torch too, which JSON does not know


def _timed(cases: Sequence[Case], records: Sequence[Record], sampler: Sampler, latency: Latency) -> list[Record]:
    """The records with their latencies, all cases interleaved; one that fails is left out of the rounds."""
    batch = latency.batch or sampler.batch
    calls: dict[str, Call] = {}
    failed: dict[str, str] = {}
    for case, record in zip(cases, records):
        if record.error:
            continue
        try:
            calls[case.key] = sampler.call(case, torch.arange(batch) % sampler.n, drawn=True)
            calls[case.key]()
        except Exception as error:
            calls.pop(case.key, None)
            failed[case.key] = _reason(case, error)
    times = interleaved(calls, latency, device=sampler.device)
    return [
        replace(
            record,
            latency=times.get(record.key),
            latency_batch=batch if record.key in times else None,
            error=record.error or failed.get(record.key),
        )
        for record in records
    ]


def _truths(converged: Mapping[str, Case], sampler: Sampler) -> dict[str, Tensor]:
    """The samples of the accurate cases, each of them computed once."""
    made = {id(case): case for case in converged.values()}
    samples = {}
    for key, case in made.items():
        try:
            samples[key], _ = sampler.all(case)
        except Exception as error:
            raise RuntimeError(f"the converged case failed: {_reason(case, error)}") from error
    return {name: samples[id(case)] for name, case in converged.items()}


def _check(cases: Sequence[Case], converged: Mapping[str, Case], n: int, batch: int, keep: int) -> None:
    for name, number, least in (("n", n, 1), ("batch", batch, 1), ("keep", keep, 0)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")
    if not cases:
        raise ValueError("no cases: nothing to measure")
    seen: set[str] = set()
    for case in cases:
        if case.key in seen:
            raise ValueError(f"two cases are named {case.name}; give their models or solvers different names")
        seen.add(case.key)
    for name, case in converged.items():
        if name not in {case.model_name for case in cases}:
            raise ValueError(f"converged names the model {name!r}, which no case has")
        if case.plan.stochastic:
            raise ValueError(f"converged case {case.name} adds noise, so it has no one solution; use an ODE solver")


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
