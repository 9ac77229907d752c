"""The latency of a sweep's cases: interleaved rounds, each written down as it is done."""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from fastsample.files import write_text
from fastsample.progress import track

from .case import Case
from .energy import energy_j
from .latency import Call, CallFailed, Latency, Round, Started, one_round, start, timing
from .memory import peak_memory
from .record import Record
from .sampler import Sampler
from .writing import writing


def clocked(
    cases: Sequence[Case],
    records: Sequence[Record],
    sampler: Sampler,
    how: Latency,
    out: Path,
    load_s: Mapping[str, float],
    progress: bool | None,
) -> list[Record]:
    """The records with their timing; a case whose call fails says so and is left out of the rounds.

    A run that goes on keeps the rounds of the processes before it; a case that failed in them makes up for those that
    it lacks, beside the baseline where there is one. What has all its rounds is not called again.
    """
    whole = {record.name: record.n for record in records if record.kind == "case" and record.error is None}
    bench = _Bench([case for case in cases if case.name in whole], whole, sampler, how, out / "latency")
    bench.start()
    bench.rounds(progress)
    bench.needs()
    return [bench.told(record, load_s.get(record.model)) for record in records]


@dataclass
class _Bench:
    """Cases on the clock. n: how many samples each has; a greater batch takes them again.

    calls: of those that still have something to do. failed: what a call raised, by its case.
    """

    cases: list[Case]
    n: Mapping[str, int]
    sampler: Sampler
    how: Latency
    place: Path
    calls: dict[str, Call] = field(default_factory=dict)
    failed: dict[str, BaseException] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.done = _rounds(self.place)
        self.needed: dict[str, Any] = _read(self.place / "needs.json")
        self.started: dict[str, Any] = _read(self.place / "started.json")
        self.batches = {case.name: case.batch or self.how.batch or self.sampler.batch for case in self.cases}
        self.devices = {case.name: torch.device(case.device or self.sampler.device) for case in self.cases}

    def lacks(self, name: str) -> int:
        """How many rounds a case has still to take part in, beside the baseline while that works."""
        base = self.how.baseline
        paired = base != name and base in self.batches and base not in self.failed
        return max(0, self.how.rounds - sum(name in one.beside if paired else bool(one.of(name)) for one in self.done))

    def start(self) -> None:
        """The first call and the warm-up of every case that has something to do, and of the baseline beside it."""
        late = [case for case in self.cases if self.lacks(case.name) or case.name not in self.needed]
        if any(case.compiled for case in late):
            torch.compiler.reset()  # what the samples compiled is made anew, so that the first call shows what it costs
        for case in self.cases:
            if case in late or (late and case.name == self.how.baseline):
                try:
                    indices = torch.arange(self.batches[case.name]) % self.n[case.name]
                    call = self.sampler.call(case, indices, drawn=True)
                    begun = start(call, self.how, device=self.devices[case.name])
                except Exception as error:
                    self.failed[case.name] = error
                    continue
                self.calls[case.name] = call
                self.started.setdefault(case.name, asdict(begun))  # later processes find warm caches on the disk
        if self.calls:
            self._write("started", self.started)

    def rounds(self, progress: bool | None) -> None:
        missing = max((self.lacks(name) for name in self.calls), default=0)
        for number in track(range(len(self.done), len(self.done) + missing), "latency", progress):
            one = self._round(number)
            if one is not None:
                self._write(f"round-{number:03d}", asdict(one))
                self.done.append(one)

    def _round(self, number: int) -> Round | None:
        """Of all that lack one, and the baseline; without those that fail in it. None where none is left."""
        while late := {name for name in self.calls if self.lacks(name)}:
            baseline = self.how.baseline if self.how.baseline in self.calls else None
            now = {name: call for name, call in self.calls.items() if name in late or name == baseline}
            how = replace(self.how, baseline=baseline)
            try:
                return one_round(now, number, how, device={name: self.devices[name] for name in now})
            except CallFailed as error:
                self._drop(error.name, error.__cause__ or error)
        return None

    def needs(self) -> None:
        """Memory and energy, after all rounds, of which the measuring would disturb the next one."""
        late = [name for name in self.calls if name not in self.needed]
        for name in late:
            device = self.devices[name]
            try:
                memory = peak_memory(self.calls[name], device=device)
                self.needed[name] = {"memory": memory, "energy_j": energy_j(self.calls[name], device=device)}
            except Exception as error:
                self._drop(name, error)
        if late:
            self._write("needs", self.needed)

    def told(self, record: Record, load_s: float | None) -> Record:
        name = record.name
        if name in self.failed:
            error = self.failed[name]
            trace = "".join(traceback.format_exception(error))
            return replace(record, error=f"{name}: {type(error).__name__}: {error}", traceback=trace)
        if name not in self.batches:
            return record
        begun, needs = self.started.get(name), self.needed[name]
        found = timing(
            self.done,
            name,
            batch=self.batches[name],
            started=Started(begun["first_s"], tuple(begun["warmup_s"])) if begun else None,
            load_s=load_s,
            memory=needs["memory"],
            energy_j=needs["energy_j"],
            baseline_batch=self.batches.get(self.how.baseline or name),
        )
        return replace(record, timing=found)

    def _drop(self, name: str, error: BaseException) -> None:
        self.failed[name] = error
        del self.calls[name]

    def _write(self, name: str, body: Any) -> None:
        with writing("the latency"):
            write_text(self.place / f"{name}.json", json.dumps(body) + "\n")


def _rounds(place: Path) -> list[Round]:
    """Those of earlier processes, up to the first that is missing or damaged."""
    found: list[Round] = []
    while True:
        try:
            found.append(Round.read(_read(place / f"round-{len(found):03d}.json")))
        except (KeyError, TypeError, AttributeError):
            return found


def _read(path: Path) -> dict[str, Any]:
    """Empty where there is none, or no whole one."""
    try:
        body = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return body if isinstance(body, dict) else {}
