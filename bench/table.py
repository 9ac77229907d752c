"""The columns of a report, and the tables for other programs and for texts: report.csv, report.md."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .front import Span
from .record import Record


@dataclass(frozen=True)
class Column:
    """A number that cases have. span: of a record, None where it was not measured. se: its standard error.

    digits: that are shown where there is no error to tell; 0 for whole numbers.
    """

    key: str
    title: str
    digits: int
    span: Callable[[Record], Span | None]
    se: Callable[[Record], float | None] = lambda record: None
    better: Literal["less", "more"] | None = None

    def text(self, record: Record) -> str:
        """For people: 1.879, or 1.879 ± 0.021 to the two digits of the error; empty where it was not measured."""
        span, se = self.span(record), self.se(record)
        if span is None:
            return ""
        if not se:
            return rounded(span[0], self.digits)
        decimals = max(0, 1 - math.floor(math.log10(se)))
        return f"{span[0]:.{decimals}f} \u00b1 {se:.{decimals}f}"


def rounded(value: float, digits: int) -> str:
    """With so many digits that count, zeros at the end included, and an exponent only where there is no other way."""
    if not digits or (float(value).is_integer() and abs(value) < 1e6):
        return f"{value:.0f}"
    power = math.floor(math.log10(abs(value)))
    return f"{value:.{max(0, digits - 1 - power)}f}" if -5 <= power < 6 else f"{value:.{digits - 1}e}"


def columns(records: Sequence[Record]) -> list[Column]:
    """Those that some record has: what a case costs the network, its scores, its times."""
    rows_differ = any(record.rows not in (None, record.nfe) and record.nfe for record in records)
    batches = {record.timing.batch for record in records if record.timing}
    baseline = next((r.timing.baseline for r in records if r.timing and r.timing.ratio), None)
    found = [
        Column("steps", "steps", 0, lambda record: _exact(record.steps or None)),
        Column("nfe", "NFE", 0, lambda record: _exact(record.nfe)),
        *([Column("rows", "rows", 4, lambda record: _exact(record.rows))] if rows_differ else []),
        *(score_column(name, records) for name in measures(records)),
        *([Column("batch", "batch", 0, _batch)] if len(batches) > 1 else []),
        Column("ms_per_image", "ms per image", 3, lambda record: record.ms_per_image, better="less"),
        Column("p50_ms", "p50, ms", 3, lambda record: record.ms_per_batch, better="less"),
        Column("p90_ms", "p90, ms", 3, _p90, better="less"),
        Column("images_per_s", "images/s", 3, images_per_s, better="more"),
        Column("memory_mib", "memory, MiB", 3, _memory, better="less"),
        Column("ratio", f"time / {baseline}", 3, _ratio, better="less"),
    ]
    return [column for column in found if any(column.span(record) is not None for record in records)]


def measures(records: Sequence[Record]) -> list[str]:
    """The names of the scores, in the order of the run."""
    cases_first = sorted(records, key=lambda record: record.kind == "floor")
    return list(dict.fromkeys(name for record in cases_first for name in record.scores))


def score_column(measure: str, records: Sequence[Record]) -> Column:
    return Column(
        f"score:{measure}",  # a measure may be called nfe
        measure,
        4,
        lambda record: score_span(record, measure),
        lambda record: record.scores[measure].se if measure in record.scores else None,
        next((record.scores[measure].better for record in records if measure in record.scores), "less"),
    )


def score_span(record: Record, measure: str) -> Span | None:
    """The centre of a score and its 95% interval."""
    score = record.scores.get(measure)
    if score is None:
        return None
    low, high = score.interval or (score.centre, score.centre)
    return score.centre, low, high


def solver_text(record: Record) -> str:
    """What tells two solvers apart, the number of steps left out."""
    options = [f"{name}={value}" for name, value in record.options.items()]
    place = [] if record.spacing in ("", "default") else [record.spacing]
    return ", ".join([record.solver, *place, *options])


def shared_settings(records: Sequence[Record]) -> dict[str, str]:
    """The settings that all cases have in common, which need no column."""
    cases = [record.settings for record in records if record.kind == "case"]
    first = cases[0] if cases else {}
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in cases)}


def apart(record: Record, shared: Mapping[str, str]) -> dict[str, str]:
    """The settings that are not shared."""
    return {name: value for name, value in record.settings.items() if name not in shared}


def settings_text(record: Record, shared: Mapping[str, str]) -> str:
    return ", ".join(f"{name}={value}" for name, value in apart(record, shared).items())


def images_per_s(record: Record) -> Span | None:
    span = record.ms_per_image
    return None if span is None else (1e3 / span[0], 1e3 / span[2], 1e3 / span[1])


def csv_text(records: Sequence[Record]) -> str:
    """One line a record with every number, unrounded; empty where it was not measured, no column that is empty."""
    places = list(dict.fromkeys(place for record in records if record.timing for place in record.timing.memory))
    lines = [_raw(record, measures(records), places) for record in records]
    heads = [
        name for name in (lines[0] if lines else ()) if name in KEPT or any(line[name] is not None for line in lines)
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    writer.writerows([line[name] for name in heads] for line in lines)
    return text.getvalue()


def markdown_text(records: Sequence[Record]) -> str:
    """A table for a text: rounded, with standard errors."""
    shared, shown = shared_settings(records), columns(records)
    settings = any(settings_text(record, shared) for record in records)
    heads = ["model", "solver", *(["settings"] if settings else []), *(column.title for column in shown)]
    lines = [heads, ["---"] * (len(heads) - len(shown)) + ["---:"] * len(shown)]
    for record in records:
        words = [record.model or record.name, solver_text(record)]
        words += [settings_text(record, shared)] if settings else []
        cells = [column.text(record) for column in shown]
        if record.error and not any(cells[2:]):
            cells[-1] = f"failed: {record.error}"
        lines.append([*words, *cells])
    return "".join(f"| {' | '.join(map(_in_markdown, line))} |\n" for line in lines)


KEPT = ("name", "model", "solver", "steps", "error")


def _raw(record: Record, names: Sequence[str], places: Sequence[str]) -> dict[str, Any]:
    timing = record.timing
    line: dict[str, Any] = {
        "key": record.key, "kind": record.kind, "name": record.name, "model": record.model, "solver": record.solver,
        "steps": record.steps, "spacing": record.spacing, "options": _pairs(record.options),
        "settings": _pairs(record.settings), "nfe": record.nfe, "calls": record.calls,
        "rows_per_sample": record.rows, "stochastic": record.stochastic, "n": record.n,
    }  # fmt: skip
    for name in names:
        score = record.scores.get(name)
        head = f"score {name}" if name in line else name  # a measure may be called steps
        for part in ("value", "se", "debiased", "n"):
            line[head if part == "value" else f"{head}_{part}"] = getattr(score, part, None)
        line[f"{head}_better"] = score.better if score and score.better != "less" else None
    for what, span in (("image", record.ms_per_image), ("batch", record.ms_per_batch)):
        line |= {f"{part}_ms_per_{what}": span and span[i] for i, part in enumerate(("median", "low", "high"))}
    line["p90_ms_per_batch"] = timing.steady.p90_s * 1e3 if timing else None
    line["p99_ms_per_batch"] = timing.steady.p99_s * 1e3 if timing and timing.steady.p99_s else None
    line["timings"] = len(timing.steady.samples_s) if timing else None
    line["images_per_s"] = timing.images_per_s if timing else None
    line["latency_batch"] = timing.batch if timing else None
    line |= {part: getattr(timing, part, None) for part in ("load_s", "first_s", "energy_j")}
    line["warmup_s"] = " ".join(map(repr, timing.warmup_s)) or None if timing else None
    line |= {f"memory_{place}_bytes": timing.memory.get(place) if timing else None for place in places}
    ratio = timing.ratio if timing else None
    line |= {"ratio" if part == "median" else f"ratio_{part}": getattr(ratio, part, None)
             for part in ("median", "low", "high")}  # fmt: skip
    return line | {"baseline": timing.baseline if timing else None, "error": record.error}


def _exact(value: float | None) -> Span | None:
    return None if value is None else (float(value), float(value), float(value))


def _batch(record: Record) -> Span | None:
    return _exact(record.timing.batch) if record.timing else None


def _p90(record: Record) -> Span | None:
    return _exact(record.timing.steady.p90_s * 1e3) if record.timing else None


def _memory(record: Record) -> Span | None:
    """What was allocated on a GPU, else the resident memory of the process."""
    memory = record.timing.memory if record.timing else {}
    found = next((memory[place] for place in ("allocated", "rss", "rss_ever") if place in memory), None)
    return None if found is None else _exact(found / 2**20)


def _ratio(record: Record) -> Span | None:
    ratio = record.timing.ratio if record.timing else None
    return None if ratio is None else (ratio.median, ratio.low, ratio.high)


def _pairs(options: Mapping[str, str]) -> str | None:
    return " ".join(f"{name}={value}" for name, value in options.items()) or None


def _in_markdown(text: str) -> str:
    """On one line, with nothing in it that ends a cell or begins a tag."""
    for sign in "\\`*_[]<>|&$":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
