"""Quality cells: the samples of one case, made shard by shard, and the scores that they give.

A shard is a range of indices. Its file holds the features of its samples, so that a killed run loses one shard at most,
processes share the work, and memory holds features, never all samples (but for measures that ask for those).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample.files import write_text

from .case import Case, Cost
from .measure import Features, Measure, Score
from .quality import Quality, endpoint_rms
from .ranks import Ranks
from .record import read_arrays, write_arrays, write_influence, write_samples
from .sampler import Sampler
from .writing import writing


@dataclass(frozen=True)
class Layout:
    """What every cell of a sweep goes by. n: samples of each. shard: of each file. keep: for pictures."""

    out: Path
    n: int
    shard: int
    keep: int
    measures: Mapping[str, Quality]

    @property
    def shards(self) -> list[range]:
        return [range(k, min(k + self.shard, self.n)) for k in range(0, self.n, self.shard)]

    @property
    def extractors(self) -> dict[str, Features]:
        """Each kind of features once, by the name of its arrays. Raises ValueError where two kinds share a name."""
        found: dict[str, Features] = {}
        for measure in self.measures.values():
            if isinstance(measure, Measure):
                same = found.setdefault(_array(measure.features), measure.features)
                if not same.sha256 and same.extract != measure.features.extract:
                    raise ValueError(
                        f"two extractors are called {same.name}; give them different names, or the sha256 of their "
                        f"weights"
                    )
        return found

    @property
    def needs_samples(self) -> bool:
        return any(not isinstance(measure, Measure) for measure in self.measures.values())


@dataclass(frozen=True)
class Result:
    """What a cell gave: its scores, what a sample cost, and how many samples were kept."""

    scores: dict[str, Score]
    cost: Cost
    samples: int


@dataclass(frozen=True)
class Cell:
    """The samples of one case. truth: of the same noises, to be compared with. whole: its shards keep the samples."""

    case: Case
    layout: Layout
    truth: Cell | None = None
    whole: bool = False

    @property
    def folder(self) -> Path:
        return self.layout.out / "samples" / self.key

    @property
    def key(self) -> str:
        """A converged case has a cell of its own, even where it is also measured as a case."""
        return f"converged-{self.case.quality_key}" if self.whole else self.case.quality_key

    def make(self, sampler: Sampler, ranks: Ranks) -> None:
        """Make the shards that are missing. Raises in every process what sampling raised in one of them."""
        mine = [indices for number, indices in enumerate(self.layout.shards) if ranks.mine(number)]
        ranks.together(lambda: self._ensure(sampler, mine))
        ranks.once(self.layout.n, mine)

    def _ensure(self, sampler: Sampler, shards: Sequence[range]) -> None:
        for indices in shards:
            if self._read(indices) is None:
                self._write(indices, self._shard(sampler, indices))

    def _shard(self, sampler: Sampler, indices: range) -> dict[str, Any]:
        samples, paid = sampler.samples(self.case, torch.arange(indices.start, indices.stop))
        arrays: dict[str, Any] = {"indices": np.arange(indices.start, indices.stop)}
        arrays["cost"] = np.array([np.nan if number is None else number for number in (paid.calls, paid.rows)])
        for name, extractor in self.layout.extractors.items():
            arrays[name] = _compact(extractor(samples))
        kept = max(0, min(len(samples), self.layout.keep - indices.start))
        if self.whole or self.layout.needs_samples:
            arrays["samples"] = samples.numpy()
        elif kept:
            arrays["samples"] = samples[:kept].numpy()
        if self.truth is not None and not self.case.plan.stochastic:
            true = self.truth.samples(indices)
            arrays["squares"] = (samples.double() - true.double()).square().flatten(1).mean(1).numpy()
        return arrays

    def samples(self, indices: range) -> Tensor:
        found = self._read(indices, ["indices", "samples"])
        if found is None:
            raise FileNotFoundError(
                f"{self._path(indices)} is missing: every process must see the same run folder; put it on a disk that "
                f"all of them share"
            )
        return torch.from_numpy(found["samples"])

    def array(self, name: str) -> Tensor:
        """One array of all shards, in the order of the indices; features in float64."""
        joined: Tensor | None = None
        for indices in self.layout.shards:
            found = self._read(indices, ["indices", name])
            if found is None:
                raise FileNotFoundError(f"{self._path(indices)} is missing or damaged; run again to make it anew")
            part = torch.from_numpy(found[name])
            if joined is None:  # filled in place: 50,000 features of 2048 numbers are 800 MB
                dtype = torch.float64 if name.startswith("features") else part.dtype
                joined = torch.empty((self.layout.n, *part.shape[1:]), dtype=dtype)
            joined[indices.start : indices.stop] = part
        return torch.empty(0) if joined is None else joined

    def result(self) -> Result | None:
        """Of an earlier run; None where there is none, or no whole one."""
        try:
            body = json.loads((self.folder / "scores.json").read_text(encoding="utf-8"))
            scores = {name: Score(**score) for name, score in body["scores"].items()}
            found = Result(scores, Cost(**body["cost"]), body["samples"])
            kept = read_arrays(self.folder / "samples.npz")["samples"] if found.samples else []
            influence = read_arrays(self.folder / "influence.npz") if body["influence"] else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        whole = len(kept) == found.samples and sorted(influence) == sorted(body["influence"])
        return found if whole else None

    def finish(self) -> Result:
        """Score the shards and write what they gave."""
        scores, influence = self._scores()
        kept = min(self.layout.keep, self.layout.n)
        result = Result(scores, self._cost(), kept)
        samples = _first(self, kept) if kept else None
        with writing(self.case.name):
            if samples is not None:
                write_samples(self.layout.out, self.key, samples)
            if influence:
                write_influence(self.layout.out, self.key, influence)
            told = {name: asdict(score) for name, score in scores.items()}
            body = {"scores": told, "cost": asdict(result.cost), "samples": kept, "influence": list(influence)}
            write_text(self.folder / "scores.json", json.dumps(body, indent=1, allow_nan=False) + "\n")
        return result

    def _scores(self) -> tuple[dict[str, Score], dict[str, Tensor]]:
        """What each measure says, and how much each sample moves it. Features of one kind are in memory at a time."""
        scores: dict[str, dict[str, Score]] = {}
        influence: dict[str, Tensor] = {}
        for array in self.layout.extractors:
            mine, truth = self.array(array), None
            for name, measure in self.layout.measures.items():
                if not isinstance(measure, Measure) or _array(measure.features) != array:
                    continue
                scores[name] = _scored(name, measure, mine, influence)
                toward = getattr(measure, "toward", None)
                if self.truth is not None and toward is not None:
                    truth = self.truth.array(array) if truth is None else truth
                    scores[name] |= _scored(f"{name}_converged", toward(truth), mine, influence)
        samples = self.array("samples") if self.layout.needs_samples else torch.empty(0)
        for name, measure in self.layout.measures.items():
            if not isinstance(measure, Measure):
                scores[name] = _named(name, measure(samples), self.layout.n)
        found = {part: score for name in self.layout.measures for part, score in scores[name].items()}
        if self.truth is not None and not self.case.plan.stochastic:
            found["endpoint_rms"] = _root(self.array("squares"))
        return found, influence

    def _cost(self) -> Cost:
        first = self._read(self.layout.shards[0], ["indices", "cost"]) or {"cost": np.full(2, np.nan)}
        calls, rows = (None if np.isnan(number) else float(number) for number in first["cost"])
        return Cost(self.case.plan.nfe, None if calls is None else int(calls), rows)

    def clear(self) -> None:
        """Remove the shards, which the scores no longer need."""
        for path in self.folder.glob("*shard-*"):
            path.unlink(missing_ok=True)
        if self.whole and self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, indices: range) -> Path:
        return self.folder / f"shard-{indices.start:08d}.npz"

    def _write(self, indices: range, arrays: Mapping[str, Any]) -> None:
        with writing(self.case.name):
            write_arrays(self._path(indices), arrays)

    def _read(self, indices: range, names: Sequence[str] | None = None) -> dict[str, Any] | None:
        """These arrays of a shard, or all; None where it is absent or damaged, and so is to be made."""
        try:
            found = read_arrays(self._path(indices), names)
        except (FileNotFoundError, ValueError):
            return None
        return found if found.get("indices", np.empty(0)).tolist() == list(indices) else None


def _array(extractor: Features) -> str:
    return f"features {extractor.name} {extractor.sha256[:8]} {extractor.resize}".replace("/", "_")


def _compact(features: Tensor) -> Any:
    """In float32 where that loses nothing, as with networks that compute in it."""
    short = features.float()
    return (short if bool((short.double() == features).all()) else features).numpy()


def _scored(name: str, measure: Any, features: Tensor, influence: dict[str, Tensor]) -> dict[str, Score]:
    found = _named(name, measure.score(features), len(features))
    moved = getattr(measure, "influence", None)
    if moved is not None:
        influence |= _parts(name, moved(features))
    return found


def _named(name: str, found: Any, n: int | None) -> dict[str, Score]:
    """name -> score, or name_part -> score of a measure that gives several. Raises ValueError for what is no number."""
    return {part: _number(part, one, n) for part, one in _parts(name, found).items()}


def _parts(name: str, found: Any) -> dict[str, Any]:
    return {f"{name}_{part}": one for part, one in found.items()} if isinstance(found, Mapping) else {name: found}


def _number(name: str, found: Any, n: int | None) -> Score:
    """The score in Python's own numbers, whatever they came in."""
    score = found if isinstance(found, Score) else Score(found, n=n)
    numbers = {part: getattr(score, part) for part in ("value", "se", "debiased")}
    numbers = {part: None if number is None else float(number) for part, number in numbers.items()}
    for part, number in numbers.items():
        if number is not None and not np.isfinite(number):
            what = name if part == "value" else f"{part} of {name}"
            raise ValueError(f"{what} of the samples is {number}: a measure must give finite numbers")
    return replace(score, **numbers, n=None if score.n is None else int(score.n))


def _root(squares: Tensor) -> Score:
    """The endpoint error from the mean square of each sample."""
    return endpoint_rms(squares.sqrt()[:, None], torch.zeros_like(squares)[:, None])


def _first(cell: Cell, kept: int) -> Tensor:
    parts: list[Tensor] = []
    for indices in cell.layout.shards:
        have = sum(map(len, parts))
        if have >= kept:
            break
        parts.append(cell.samples(indices)[: kept - have])
    return torch.cat(parts)


def floors(measures: Mapping[str, Quality]) -> dict[str, Score]:
    """What real images score against real ones, for the measures that can say."""
    found: dict[str, Score] = {}
    for name, measure in measures.items():
        floor = getattr(measure, "floor", None)
        try:
            score = floor() if floor is not None else None
            found |= {} if score is None else _named(name, score, None)
        except Exception as error:
            raise RuntimeError(f"the floor of {name}: {type(error).__name__}: {error}") from error
    return found
