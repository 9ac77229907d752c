"""Whether the numbers of two runs may stand beside each other at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .record import Record, read_run

REMEDIES = {
    "extractor": "distances of two extractors have nothing to do with each other: measure both with the same one",
    "sha256": "the weights of the extractor differ: measure both with the same file",
    "resize": "ways to resize differ by more than most models do: measure both with the same one",
    "dataset": "distances to two references have nothing to do with each other: measure both against the same one",
    "n_reference": "a reference of another size has another bias: measure both against the same one",
}
MACHINE = ("cpu", "gpu", "cores", "threads")  # of an environment: where these differ, so does the clock
PASSING = ("date", "load average")  # of an environment: what no two runs share


@dataclass(frozen=True)
class Side:
    """One run: its folder, the body of its run.json, its cases by name, and how many records there are with a floor."""

    folder: str
    body: dict[str, Any]
    records: dict[str, Record]
    measured: int

    @classmethod
    def read(cls, folder: str | Path) -> Side:
        body, found = read_run(folder)
        cases = [record for record in found if record.kind == "case"]
        records = {record.name: record for record in cases}
        if len(records) < len(cases):
            raise ValueError(f"two cells of {folder} share a name; give their models or settings different names")
        return cls(str(folder), body, records, len(found))

    @property
    def configuration(self) -> dict[str, Any]:
        return dict(self.body["configuration"])

    @property
    def quality(self) -> dict[str, Any]:
        """Measure -> its extractor and reference."""
        return dict(self.configuration.get("quality") or {})

    @property
    def machines(self) -> list[dict[str, Any]]:
        """Of every environment that the run was in; a resumed run may have been in several."""
        found = [{part: place.get(part) for part in MACHINE} for place in self.body["environments"]]
        return [place for i, place in enumerate(found) if place not in found[:i]]


def refuse(a: Side, b: Side, scores: Sequence[str], chosen: bool) -> list[str]:
    """What is to be known of the measures. Raises ValueError where the scores cannot be compared.

    scores: their names. chosen: by the user; then only the measures that they come from need to agree.
    """
    for part, what, remedy in (
        ("n", "samples of each case", "the bias of a distance follows their number: run both with the same n"),
        ("shape", "shape of a sample", "these are other images: run both with the same shape"),
        ("condition", "condition", "sample i is of another kind there: run both with the same conditions or labels"),
    ):
        _same(a, b, what, a.configuration.get(part), b.configuration.get(part), remedy)
    if any(score == "endpoint_rms" or score.endswith("_converged") for score in scores):
        of_a, of_b = (side.configuration.get("converged") for side in (a, b))
        _same(a, b, "converged solutions", of_a, of_b, "errors to two solutions differ: give both the same one")
    notes = []
    for name in _sources(a.quality, scores) if chosen else a.quality:
        if name not in b.quality:
            continue
        told_a, told_b = a.quality[name] or {}, b.quality[name] or {}
        for part, remedy in REMEDIES.items():
            _same(a, b, f"{part} of {name}", told_a.get(part), told_b.get(part), remedy)
        if told_a.get("extractor") is None:
            notes.append(f"{name} says nothing of its extractor and reference: that both are the same is not checked")
    return notes


def machines_differ(a: Side, b: Side) -> str:
    """Why the times of two runs cannot be compared, or ""."""
    for side in (a, b):
        if len(side.machines) != 1:
            return (
                f"{side.folder} was measured on {len(side.machines)} machines" if side.machines else "unknown machine"
            )
        if not side.machines[0]["cpu"]:
            return f"{side.folder} does not say on which machine it was measured"
    here, there = a.machines[0], b.machines[0]
    differ = [f"{part} {here[part]} against {there[part]}" for part in MACHINE if here[part] != there[part]]
    threads = [(side.configuration.get("latency") or {}).get("threads") for side in (a, b)]
    if threads[0] != threads[1]:
        differ.append(f"timed with threads = {threads[0]} against {threads[1]}")
    return "; ".join(differ)


def busy(a: Side, b: Side) -> str:
    """Which machine had more to do than it has cores when its run began, or "": its times are then those of a queue."""
    for side in (a, b):
        for place in side.body["environments"]:
            load, cores = str(place.get("load average", "")).split(" ")[0], str(place.get("cores", ""))
            if _is_number(load) and _is_number(cores) and float(load) > float(cores):
                return f"the machine of {side.folder} was busy (load average {load} on {cores} cores)"
    return ""


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def environments(a: Side, b: Side) -> list[str]:
    """How the newest environments of two runs differ: versions, settings, revisions."""
    if not a.body["environments"] or not b.body["environments"]:
        return []
    here, there = a.body["environments"][-1], b.body["environments"][-1]
    names = [name for name in {**here, **there} if name not in PASSING and here.get(name) != there.get(name)]
    differ = "; ".join(f"{name} {here.get(name)} -> {there.get(name)}" for name in names)
    return [f"what else differs: {differ}"] if differ else []


def unfinished(*sides: Side) -> list[str]:
    """The runs that were not finished, and how much of them there is."""
    return [
        f"{side.folder} is not finished: {side.measured} of its {len(side.body['cases'])} cells are there; resume it"
        for side in sides
        if not side.body["finished"]
    ]


def alone(a: Side, b: Side) -> list[str]:
    """The cells and the measures that only one side has."""
    notes = []
    for side, other in ((a, b), (b, a)):
        cells = [name for name in side.records if name not in other.records]
        measures = [name for name in _all(side) if name not in _all(other)]
        notes += [f"cells of {side.folder} alone, not compared: {', '.join(cells)}"] if cells else []
        notes += [f"measured in {side.folder} alone, not compared: {', '.join(measures)}"] if measures else []
    return notes


def measured(records: Iterable[Record]) -> list[str]:
    """The names of their scores, in the order met."""
    return list(dict.fromkeys(name for record in records for name in record.scores))


def _all(side: Side) -> list[str]:
    timed = any(record.timing for record in side.records.values())
    return [*measured(side.records.values()), *(["latency"] if timed else [])]


def _sources(quality: Mapping[str, Any], scores: Sequence[str]) -> list[str]:
    """The measures that these scores come from: all, where the name of one does not tell."""
    found = {name for name in quality for score in scores if score == name or score.startswith(f"{name}_")}
    told = all(
        score == "endpoint_rms" or any(score == name or score.startswith(f"{name}_") for name in quality)
        for score in scores
    )
    return [name for name in quality if name in found or not told]


def _same(a: Side, b: Side, what: str, before: Any, after: Any, remedy: str) -> None:
    if before != after:
        raise ValueError(f"{what}: {before!r} in {a.folder}, {after!r} in {b.folder}; {remedy}")
