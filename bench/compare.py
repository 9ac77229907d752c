"""Two runs against each other, cell by cell: improved, regressed, inconclusive or unchanged, and by how much."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from .comparable import Side, alone, busy, environments, machines_differ, measured, refuse, unfinished
from .comparison import Comparison, Row, Verdict
from .latency import Timing
from .record import read_influence
from .significance import FEWEST, Decision, Estimate, holm, paired, ratio, unpaired

Window = tuple[float, float]
ROUNDING = 1e-6  # of the greatest score of a measure: what float32 may make of any, and no sample's influence sees


@dataclass(frozen=True)
class Tolerance:
    """A difference counts beyond relative |before| and beyond absolute (in the measure's unit; seconds for latency)."""

    relative: float = 0.0
    absolute: float = 0.0

    def __post_init__(self) -> None:
        for name in ("relative", "absolute"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"the {name} tolerance must be at least 0 and finite, got {getattr(self, name)}")

    def of(self, before: float) -> float:
        return max(self.relative * abs(before), self.absolute)


def compare(
    a: str | Path,
    b: str | Path,
    *,
    measures: Sequence[str] | None = None,
    tolerance: float | Tolerance | Mapping[str, float | Tolerance] = 0.01,
    windows: Mapping[str | tuple[str, str], Window] | None = None,
    latency: bool = True,
    level: float = 0.05,
    drift: float = 0.1,
) -> Comparison:
    """The run folder b (after) against a (before), in the cells whose names are equal.

    measures: names of scores; None: all. latency: compare times too.
    tolerance: a regression counts beyond its interval and beyond this. A number is relative to the value before; a
        mapping has one for each measure ("latency" is one of them), and leaves 0.01 to those it does not name.
    windows: measure -> (low, high), or (cell, measure) -> (low, high), for the value after, as it is reported (not
        debiased). Outside on either side fails: a sudden improvement is suspect too.
    level: the chance of even one false verdict among all tests at most; Holm's correction sees to that.
    drift: two processes on one machine may differ by so much in time though nothing changed; the interval of a latency
        is wider by it on both sides. Where both runs timed a baseline beside the case, the ratios to that are compared
        instead, from which the drift of the machine has gone.

    Both runs have the same seeds, so qualities are compared in pairs of samples where both runs kept the influence of
    each; else by the two standard errors, which finds less; without those there is no verdict. A difference below a
    millionth of the measure's greatest score is rounding: a case at no distance from the converged one may be at 1e-9.
    Raises ValueError where the extractor, the reference, the number of samples or their shape differ, where no cell has
    the same name, and for measures, tolerances and windows of what no cell has.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if not 0 <= drift < math.inf:
        raise ValueError(f"drift must be at least 0 and finite, got {drift}")
    before, after = Side.read(a), Side.read(b)
    names = [name for name in before.records if name in after.records]
    if not names:
        raise ValueError(
            f"no cell of {a} ({_some(before.records)}) is in {b} ({_some(after.records)}); cells are matched by name, "
            f"so give both runs the same names of models and solvers"
        )
    cells = [Cell(name, before, after) for name in names]
    scores = _scores(cells, measures)
    allowed = _tolerances(tolerance, [*scores, "latency"])
    bounds = _bounds(windows or {}, cells)
    notes = [*unfinished(before, after), *alone(before, after), *environments(before, after)]
    notes += refuse(before, after, scores, chosen=measures is not None) if scores else []
    timed = latency and any(cell.before.timing and cell.after.timing for cell in cells)
    apart = machines_differ(before, after) if timed else ""
    notes += [f"latencies are not comparable: {apart}"] if apart else []
    loaded = busy(before, after) if timed and not apart else ""
    notes += [f"latencies without a baseline are not comparable: {loaded}"] if loaded else []
    rounding = {score: ROUNDING * _greatest(cells, score) for score in scores}
    drafts: list[Draft] = []
    for cell in cells:
        drafts += [Draft(row) for row in (*_failures(cell), *_costs(cell))]
        drafts += [_quality(cell, score, allowed[score], rounding[score]) for score in scores if cell.has(score)]
        if latency and cell.before.timing and cell.after.timing:
            times = cell.before.timing, cell.after.timing
            drafts.append(_latency(cell.name, *times, allowed["latency"], drift, bool(apart), bool(loaded)))
        drafts += [_window(cell, measure, window) for measure, window in bounds[cell.name].items()]
    estimates = [draft.estimate for draft in drafts if draft.estimate]
    decisions = iter(holm([estimate.p for estimate in estimates], level))
    rows = [draft.decided(draft.estimate, next(decisions)) if draft.estimate else draft.row for draft in drafts]
    return Comparison(str(a), str(b), tuple(rows), tuple(notes), len(estimates), level)


class Cell:
    """One cell on both sides."""

    def __init__(self, name: str, before: Side, after: Side):
        self.name, self.before, self.after = name, before.records[name], after.records[name]
        self._sides = (before.folder, self.before), (after.folder, self.after)
        self._influences: list[dict[str, Tensor]] | None = None

    def has(self, score: str) -> bool:
        """On either side; of one that failed there is nothing more to say than that."""
        held = [score in record.scores for _, record in self._sides]
        return all(held) if self.before.error or self.after.error else any(held)

    def influence(self, score: str) -> tuple[Tensor, Tensor] | None:
        """Of each sample, [n] and [n]; None where one side kept none. Raises ValueError where they are no n numbers."""
        if self._influences is None:
            self._influences = [read_influence(folder, record) for folder, record in self._sides]
        if any(score not in kept for kept in self._influences):
            return None
        a, b = (kept[score] for kept in self._influences)
        for values, (folder, record) in ((a, self._sides[0]), (b, self._sides[1])):
            if values.shape != (record.n,) or not bool(values.isfinite().all()):
                raise ValueError(
                    f"{folder} keeps an influence of shape {list(values.shape)} for {score} of {self.name}, where "
                    f"{record.n} finite numbers should be; run this cell again"
                )
        return a, b


@dataclass(frozen=True)
class Draft:
    """A row before its verdict; with an estimate, it is a test.

    better: which direction is. log: the estimate is of the logarithm of the effect.
    """

    row: Row
    estimate: Estimate | None = None
    better: Literal["less", "more"] = "less"
    log: bool = False

    def decided(self, estimate: Estimate, decision: Decision) -> Row:
        low, high = estimate.interval(decision.level)
        if self.row.kind == "window":
            value, reach = self.row.after or 0.0, high - estimate.effect
            verdict: Verdict = "broken" if decision.rejected else "inconclusive" if estimate.effect else "inside"
            return replace(self.row, verdict=verdict, interval=(value - reach, value + reach), p=decision.p)
        tolerance = self.row.tolerance or 0.0
        allowed = math.log1p(tolerance) if self.log else tolerance
        row = replace(self.row, p=decision.p, interval=(math.exp(low), math.exp(high)) if self.log else (low, high))
        if decision.rejected and abs(estimate.effect) > allowed:
            return replace(row, verdict="regressed" if (estimate.effect > 0) == (self.better == "less") else "improved")
        if -allowed <= low and high <= allowed:
            return replace(row, verdict="unchanged", how=f"{row.how}; within the tolerance")
        return row


def _quality(cell: Cell, name: str, tolerance: Tolerance, rounding: float) -> Draft:
    a, b = cell.before.scores.get(name), cell.after.scores.get(name)
    if a is None or b is None:
        found, side = (a.centre if a else None, b.centre if b else None), "after" if a is None else "before"
        return Draft(Row(cell.name, name, "quality", "inconclusive", *found, how=f"only {side} has it"))
    if a.better != b.better:
        raise ValueError(f"{name} is better when {a.better} before, when {b.better} after: these are two measures")
    effect = b.centre - a.centre
    row = Row(cell.name, name, "quality", "inconclusive", a.centre, b.centre, effect, tolerance=tolerance.of(a.centre))
    influence = cell.influence(name)
    if a == b and (influence is None or torch.equal(*influence)):
        return Draft(replace(row, verdict="unchanged", how="identical to the last bit"))
    if influence and len(influence[0]) > 1:
        return Draft(
            replace(row, how="in pairs of samples"), replace(paired(effect, *influence), margin=rounding), a.better
        )
    if a.se is not None and b.se is not None:
        how = "by two standard errors: no influence of each sample was kept"
        estimate = unpaired(effect, a.se, b.se, cell.before.n)
        return Draft(replace(row, how=how), replace(estimate, margin=rounding), a.better)
    return Draft(replace(row, how="no standard error, so no verdict"))


def _latency(cell: str, a: Timing, b: Timing, tolerance: Tolerance, drift: float, apart: bool, loaded: bool) -> Draft:
    row = Row(cell, "latency", "latency", "not comparable", a.steady.median_s * 1e3, b.steady.median_s * 1e3)
    if apart:
        return Draft(replace(row, how="ms; not on one machine"))
    if a.batch != b.batch:
        return Draft(replace(row, how=f"ms; batches of {a.batch} and {b.batch}"))
    row = replace(row, verdict="inconclusive", tolerance=tolerance.relative)
    if a.steady.median_s > 0:
        row = replace(row, tolerance=tolerance.of(a.steady.median_s) / a.steady.median_s)
    if a.steady == b.steady:
        return Draft(replace(row, verdict="unchanged", effect=1.0, how="ms; the same times"))
    times, how = (a.steady.samples_s, b.steady.samples_s), f"ms; two processes, which may drift by {drift:.0%}"
    if a.ratio and b.ratio and a.baseline == b.baseline != cell:
        row = replace(row, before=a.ratio.median, after=b.ratio.median)
        times, how, drift = (a.ratio.ratios, b.ratio.ratios), f"times that of {a.baseline}, timed beside it", 0.0
    elif loaded:
        return Draft(replace(row, verdict="not comparable", how="ms; on a busy machine, without a baseline"))
    if min(map(len, times)) < FEWEST:
        return Draft(replace(row, how=f"{how}; {min(map(len, times))} times, {FEWEST} at least make an interval"))
    if min(map(min, times)) <= 0:
        return Draft(replace(row, how=f"{how}; a time of 0, so the clock is too coarse for calls this short"))
    estimate = ratio(*times, drift=drift)
    return Draft(replace(row, effect=math.exp(estimate.effect), how=how), estimate, log=True)


def _window(cell: Cell, measure: str, window: Window) -> Draft:
    low, high = window
    score = cell.after.scores.get(measure)
    row = Row(cell.name, measure, "window", "broken", how=f"must lie in {low:g} to {high:g}")
    if score is None:
        return Draft(replace(row, how=f"{row.how}, but was not measured"))
    outside = min(score.value - low, 0.0) + max(score.value - high, 0.0)
    row = replace(row, after=score.value, effect=outside)
    if score.se is None:
        return Draft(replace(row, verdict="broken" if outside else "inside", how=f"{row.how}; no standard error"))
    return Draft(row, unpaired(outside, score.se, 0.0, score.n))


def _failures(cell: Cell) -> list[Row]:
    before, after = cell.before.error, cell.after.error
    if not before and not after:
        return []
    verdict: Verdict = "inconclusive" if before and after else "regressed" if after else "improved"
    side = "on both sides" if before and after else "after" if after else "before"
    return [Row(cell.name, "failed", "failure", verdict, how=f"failed {side}: {after or before}")]


def _costs(cell: Cell) -> list[Row]:
    """Changes of what a sample costs, which are counted and so have no interval."""
    rows = []
    for name in ("nfe", "rows", "calls"):
        a, b = getattr(cell.before, name), getattr(cell.after, name)
        if a is not None and b is not None and a != b:
            rows.append(Row(cell.name, name, "cost", "changed", a, b, b - a, how="counted"))
    return rows


def _scores(cells: Sequence[Cell], measures: Sequence[str] | None) -> list[str]:
    """The names of the scores to compare: what any cell has on both sides, or those that were asked for."""
    before, after = (measured(side) for side in ([cell.before for cell in cells], [cell.after for cell in cells]))
    if measures is None:
        return [name for name in before if name in after]
    known = list(dict.fromkeys([*before, *after]))
    unknown = [name for name in measures if name not in known]
    if unknown:
        raise ValueError(f"no cell has the measure {unknown[0]!r}; there is {', '.join(known) or 'none'}")
    return list(dict.fromkeys(measures))


def _greatest(cells: Sequence[Cell], score: str) -> float:
    found = [one.scores.get(score) for cell in cells for one in (cell.before, cell.after)]
    return max((abs(one.centre) for one in found if one), default=0.0)


def _tolerances(
    given: float | Tolerance | Mapping[str, float | Tolerance], names: Sequence[str]
) -> dict[str, Tolerance]:
    chosen = given if isinstance(given, Mapping) else dict.fromkeys(names, given)
    unknown = [name for name in chosen if name not in names]
    if unknown:
        raise ValueError(f"a tolerance for {unknown[0]!r}, which is not compared; that is {', '.join(names)}")
    one = {name: chosen.get(name, 0.01) for name in names}
    return {name: value if isinstance(value, Tolerance) else Tolerance(value) for name, value in one.items()}


def _bounds(windows: Mapping[str | tuple[str, str], Window], cells: Sequence[Cell]) -> dict[str, dict[str, Window]]:
    """Cell -> measure -> window; one for this very cell goes before one for all cells."""
    found: dict[str, dict[str, Window]] = {cell.name: {} for cell in cells}
    known = measured(record for cell in cells for record in (cell.before, cell.after))
    for key, window in sorted(windows.items(), key=lambda item: isinstance(item[0], tuple)):
        place, measure = key if isinstance(key, tuple) else (None, key)
        low, high = window
        if not low <= high:
            raise ValueError(f"the window of {measure} reaches from {low} to {high}; give the lower bound first")
        if measure not in known:
            raise ValueError(f"a window for {measure!r}, which no cell has; there is {', '.join(known) or 'none'}")
        if place is not None and place not in found:
            raise ValueError(f"a window for the cell {place!r}, which is not on both sides; there is {_some(found)}")
        for cell in cells:
            if cell.name == place or (place is None and (measure in cell.after.scores or cell.after.error)):
                found[cell.name][measure] = window
    return found


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:5]) + (f" and {len(listed) - 5} more" if len(listed) > 5 else "") or "none"
