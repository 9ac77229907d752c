"""The report of a run folder: report.csv, pareto.png, quality.png, and one page that needs nothing else, index.html."""

from __future__ import annotations

import base64
import csv
import io
import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from fastsample.files import folder as writable
from fastsample.files import write_text

from .pictures import DARK, LIGHT, latency_picture, nfe_picture, pareto_front, sample_grid
from .record import Record, read_run, read_samples

PARETO, QUALITY, SAMPLES = "pareto.png", "quality.png", "samples.png"
HEADLINE = "Every case of the sweep with 95% intervals; the dashed line is the Pareto front."
SECTIONS = {
    QUALITY: ("Quality against network evaluations", "The same cases by what they ask of the network."),
    SAMPLES: ("Samples of the Pareto front", "Each column starts from the same noise."),
}

Themed = tuple[bytes, bytes]  # a PNG in its light and its dark version


def report(
    folder: str | Path, *, measure: str | None = None, title: str = "Latency against quality", rows: int = 8
) -> Path:
    """Write the report of a folder that `run` wrote; returns the path of its index.html.

    measure: which quality the pictures show; None: the first of the run.
    rows: how many cases of the Pareto front show their samples (where those are images).
    Pictures that the caller put into the folder (*.png) stand on the page too, under their names.
    """
    body, records = read_run(folder)
    folder = writable(folder)
    measures = list(dict.fromkeys(name for record in records for name in record.scores))
    if measure is not None and measure not in measures:
        raise ValueError(f"the run has no measure {measure!r}; it has {', '.join(measures) or 'none'}")
    measure = measure or next(iter(measures), None)
    front = _front(records, measure) if measure else []
    write_text(folder / "report.csv", _csv(records, measures))
    drawn = _drawn(records, measure, folder) if measure else {}
    shown = [record for record in front if record.samples]
    if shown and _is_image(body["settings"]["shape"]):
        sample_grid({record.name: read_samples(folder, record) for record in _spread(shown, rows)}, folder / SAMPLES)
        drawn[SAMPLES] = ((folder / SAMPLES).read_bytes(),) * 2
    for name in {PARETO, QUALITY, SAMPLES} - drawn.keys():  # of an earlier report
        (folder / name).unlink(missing_ok=True)
    rows_differ = any(record.rows not in (None, record.nfe) for record in records)
    page = Template((Path(__file__).parent / "data" / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        subtitle=escape(_subtitle(body, records)),
        headline=_figure(next(iter(drawn.values())), HEADLINE) if drawn else "",
        legend=escape(_legend(records, measures, rows_differ)),
        head="".join(
            f'<th scope="col"{" class=text" if text else ""}>{escape(name)}</th>'
            for name, text in _columns(measures, rows_differ)
        ),
        rows="\n".join(_row(record, measures, record in front, rows_differ) for record in records),
        pictures="\n".join(_sections(list(drawn.items())[1:], folder)),
        environment="\n".join(
            f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in _environment(body).items()
        ),
    )
    write_text(folder / "index.html", page)
    return folder / "index.html"


def _front(records: Sequence[Record], measure: str) -> list[Record]:
    """The Pareto front of the first picture: by time where any case was timed, else by evaluations."""
    shown = [record for record in records if measure in record.scores]
    timed = [record for record in shown if record.ms_per_image] or shown
    costs = [record.ms_per_image[0] if record.ms_per_image else float(record.nfe or 0) for record in timed]
    return [timed[i] for i in pareto_front([(cost, r.scores[measure].value) for cost, r in zip(costs, timed)])]


def _csv(records: Sequence[Record], measures: Sequence[str]) -> str:
    """One line a case; empty where it was not measured."""
    text = io.StringIO()
    scored = [(name, part) for name in measures for part in ("value", "se", "debiased")]
    parts = [(name, part) for name, part in scored if any(_part(record, name, part) is not None for record in records)]
    writer = csv.writer(text, lineterminator="\n")
    head = ["model", "solver", "steps", "spacing", "options", "nfe", "rows_per_sample", "n"]
    head += [name if part == "value" else f"{name}_{part}" for name, part in parts]
    times = [f"{part}_ms_per_{what}" for what in ("image", "batch") for part in ("median", "low", "high")]
    writer.writerow([*head, *times, "latency_batch", "error"])
    for r in records:
        options = " ".join(f"{name}={value}" for name, value in r.options.items())
        scores = [_part(r, name, part) for name, part in parts]
        latency = [*(r.ms_per_image or (None,) * 3), *(r.ms_per_batch or (None,) * 3), r.latency_batch]
        writer.writerow(
            [r.model, r.solver, r.steps, r.spacing, options, r.nfe, r.rows, r.n, *scores, *latency, r.error]
        )
    return text.getvalue()


def _part(record: Record, name: str, part: str) -> float | None:
    return getattr(record.scores.get(name), part, None)


def _columns(measures: Sequence[str], rows_differ: bool) -> list[tuple[str, bool]]:
    """The heads of the table, and whether the column holds text."""
    numbers = ["steps", "NFE", *(["rows"] if rows_differ else []), *measures, "ms per image", "ms per batch"]
    return [("model", True), ("solver", True), *((name, False) for name in numbers)]


def _row(record: Record, measures: Sequence[str], front: bool, rows_differ: bool) -> str:
    options = [f"{name}={value}" for name, value in record.options.items()]
    place = [] if record.spacing == "default" else [record.spacing]
    cells = [_text(record.model), _text(", ".join([record.solver, *place, *options])), _number(record.steps, "{:d}")]
    cells.append(_number(record.nfe, "{:d}"))
    cells += [_number(record.rows, "{:g}")] if rows_differ else []
    if record.error:
        span = len(measures) + 2
        cells.append(f'<td class="text error" colspan="{span}" data-sort="">{escape(record.error)}</td>')
    else:
        for score in (record.scores.get(name) for name in measures):
            cells.append(_number(score.value if score else None, "{:#.4g}", score.se if score else None))
        cells += [_number(span and span[0], "{:#.3g}") for span in (record.ms_per_image, record.ms_per_batch)]
    return f"<tr{' class=front' if front else ''}>{''.join(cells)}</tr>"


def _text(text: str) -> str:
    return f'<td class="text" data-sort="{escape(text)}">{escape(text)}</td>'


def _number(value: float | None, form: str, se: float | None = None) -> str:
    if value is None:
        return '<td data-sort=""></td>'
    spread = f' <span class="se">&plusmn; {_plain("{:#.2g}", se)}</span>' if se else ""
    return f'<td data-sort="{value!r}">{_plain(form, value)}{spread}</td>'


def _plain(form: str, value: float) -> str:
    return form.format(value).rstrip(".")  # "#" keeps the zeros of 0.50, and the point of 64.


def _subtitle(body: Mapping[str, Any], records: Sequence[Record]) -> str:
    settings, failed = body["settings"], sum(record.error is not None for record in records)
    parts = [f"{len(records)} cases, {settings['n']} samples of each from the same noises"]
    if settings["latency"]:
        how = settings["latency"]
        parts.append(f"latency: medians of {2 * how['rounds']} interleaved batches of {_latency_batch(records)}")
    parts += [f"{failed} failed"] if failed else []
    parts += [] if body["finished"] else ["the run was not finished"]
    return "; ".join(parts) + "."


def _latency_batch(records: Sequence[Record]) -> int | None:
    return next((record.latency_batch for record in records if record.latency_batch), None)


def _legend(records: Sequence[Record], measures: Sequence[str], rows_differ: bool) -> str:
    text = "Less is better in every column. Shaded: the Pareto front of the first picture. NFE: network evaluations \
of one sample, counted while sampling. \u00b1: one standard error."
    if rows_differ:
        text += " Rows: what the network was given for one sample; with guidance up to two an evaluation."
    if any(score.debiased is not None for record in records for score in record.scores.values()):
        text += " Distances hold the bias of a finite number of samples; report.csv has them debiased too."
    if any(name.startswith("fd_") for name in measures):
        text += " Fr\u00e9chet distances (fd_...) are no FID: compare them within this page only."
    if "endpoint_rms" in measures:
        text += " endpoint_rms: root mean square difference from the converged solution of the same noises."
    return text


def _environment(body: Mapping[str, Any]) -> dict[str, str]:
    settings = body["settings"]
    converged = [f"{name}: {case}" for name, case in settings["converged"].items()]
    found = {**body["environment"], "sample shape": " x ".join(map(str, settings["shape"]))}
    found["sampling batch"] = str(settings["batch"])
    if settings["latency"]:
        found["threads while timing"] = str(settings["latency"]["threads"] or found["threads"])
    if converged:
        found["converged solutions"] = "; ".join(converged)
    return found


def _sections(drawn: Sequence[tuple[str, Themed]], folder: Path) -> list[str]:
    """Our own pictures, then those that the caller put into the folder."""
    given = sorted(path for path in folder.glob("[!.]*.png") if path.name not in (PARETO, QUALITY, SAMPLES))
    parts = [f"<h2>{escape(SECTIONS[name][0])}</h2>{_figure(data, SECTIONS[name][1])}" for name, data in drawn]
    for path in given:
        name = path.stem.replace("_", " ")
        parts.append(f"<h2>{escape(name)}</h2>{_figure((path.read_bytes(),) * 2, '', name)}")
    return parts


def _figure(pictures: Themed, caption: str, alt: str = "") -> str:
    """An image inside the page, in its light and its dark version."""
    light, dark = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in pictures)
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">' if pictures[0] != pictures[1] else ""
    note = f'<figcaption class="soft">{escape(caption)}</figcaption>' if caption else ""
    return f'<figure><picture>{source}<img alt="{escape(alt or caption)}" src="{light}"></picture>{note}</figure>'


def _drawn(records: Sequence[Record], measure: str, folder: Path) -> dict[str, Themed]:
    """The pictures of a measure, the headline first: light and dark; the light ones are also written down."""
    drawn: dict[str, Themed] = {}
    for name, draw in ((PARETO, latency_picture), (QUALITY, nfe_picture)):
        if name == PARETO and not any(record.latency for record in records):
            continue
        draw(records, measure, folder / name, LIGHT)
        with tempfile.TemporaryDirectory() as place:
            draw(records, measure, Path(place) / name, DARK)
            drawn[name] = (folder / name).read_bytes(), (Path(place) / name).read_bytes()
    return drawn


def _spread(records: Sequence[Record], most: int) -> list[Record]:
    """At most so many of them, evenly, the first and the last included."""
    last = min(most, len(records)) - 1
    return [records[round(i * (len(records) - 1) / max(1, last))] for i in range(last + 1)]


def _is_image(shape: Sequence[int]) -> bool:
    return len(shape) == 3 and shape[0] in (1, 3)
