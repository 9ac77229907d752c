"""The page of a report: one HTML file with its table, pictures, style, script and data inside, nothing from outside.

Without JavaScript the table and the pictures are all there; with it the pictures become charts that can be asked. Its
content security policy lets in no address but data:, and of styles and scripts the two written here, by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from .pictures import DARK, LIGHT, Theme
from .record import Record
from .sprites import Sprites, economical
from .table import Column, apart, settings_text, shared_settings, solver_text

SECTIONS = {  # picture -> heading, caption
    "pareto.png": (
        "",
        "Every case with 95% intervals. Dashed: the Pareto front of the middle values; outlined: what no other case "
        "beats beyond the intervals.",
    ),
    "quality.png": ("Quality against network evaluations", "The same cases by what they ask of the network."),
    "endpoint.png": (
        "Distance from the converged solution",
        "Root mean square difference from an accurate solution of the same noises: how well the solver solves, "
        "whatever the network has learned.",
    ),
    "samples.png": ("Samples of the Pareto front", "Each column starts from the same noise."),
}


@dataclass(frozen=True)
class Picture:
    """A PNG in its light and its dark version."""

    name: str
    light: bytes
    dark: bytes


def page(
    body: Mapping[str, Any],
    records: Sequence[Record],
    columns: Sequence[Column],
    *,
    measure: str | None,
    front: Sequence[Record],
    pictures: Sequence[Picture],
    strips: Sprites,
    title: str,
) -> str:
    """The whole page. pictures: ours first, which the charts replace, then those that the caller gave.

    front: the cases that are shaded before the reader chooses. strips: by the quality key.
    """
    shared = shared_settings(records)
    style = _colours() + _file("report.css")
    script = _file("report.js")
    return Template(_file("report.html")).substitute(
        policy=f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'",
        style=style,
        script=script,
        title=escape(title),
        subtitle=escape(_subtitle(body, records)),
        notes="".join(f'<p class="note">{note}</p>' for note in _notes(body, records)),
        headline="".join(map(_section, pictures[:1])),
        legend="".join(f"<li>{escape(line)}</li>" for line in _legend(records, columns, shared)),
        table=_table(records, columns, front, shared),
        pictures="\n".join(_section(picture) for picture in pictures[1:]),
        failed=_failed(records),
        environment=_listed(_environments(body["environments"])),
        configuration=_listed(_flat({**shared, **_asked(body), "configuration hash": body["hash"]})),
        data=_data(records, columns, measure, pictures, strips, shared),
    )


def _data(
    records: Sequence[Record],
    columns: Sequence[Column],
    measure: str | None,
    pictures: Sequence[Picture],
    strips: Sprites,
    shared: Mapping[str, str],
) -> str:
    """What the script reads, as JSON that cannot end the element it stands in."""
    keys = [column.key for column in columns]
    charts = {
        picture.name: {"x": keys.index(x), "y": keys.index(f"score:{y}")}
        for picture, x, y in (
            (picture, "ms_per_image" if picture.name == "pareto.png" else "nfe",
             "endpoint_rms" if picture.name == "endpoint.png" else measure)
            for picture in pictures if picture.name in ("pareto.png", "quality.png", "endpoint.png")
        )
    }  # fmt: skip
    cases = [
        {
            "name": record.name, "model": record.model, "solver": solver_text(record), "steps": record.steps,
            "label": f"{record.solver}/{record.steps}", "settings": apart(record, shared),
            "floor": record.kind == "floor", "failed": record.error is not None, "strip": record.quality,
            "spans": [column.span(record) for column in columns], "texts": [column.text(record) for column in columns],
        }
        for record in records
    ]  # fmt: skip
    heads = [{"title": c.title, "better": c.better, "score": c.key.startswith("score:")} for c in columns]
    data = {"columns": heads, "cases": cases, "charts": charts, "strips": strips.data, "count": strips.count,
            "size": strips.size, "reduced": strips.reduced}  # fmt: skip
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _table(
    records: Sequence[Record], columns: Sequence[Column], front: Sequence[Record], shared: Mapping[str, str]
) -> str:
    settings = any(settings_text(record, shared) for record in records)
    words = ["model", "solver", *(["settings"] if settings else [])]
    heads = [f'<th scope="col" class="text">{word}</th>' for word in words]
    heads += [f'<th scope="col" data-better="{column.better or ""}">{escape(column.title)}</th>' for column in columns]
    lines: dict[str, list[str]] = {"floor": [], "case": []}
    for index, record in enumerate(records):
        texts = [record.model or record.name, solver_text(record)]
        texts += [settings_text(record, shared)] if settings else []
        cells = [f'<td class="text" data-sort="{escape(text)}">{escape(text)}</td>' for text in texts]
        if record.kind == "floor":
            texts = ["real images against real ones", ""]
            cells[:2] = [f'<td class="text" colspan="2">floor: {texts[0]}</td>']
        numbers = [_number(column, record) for column in columns]
        if record.error and not (record.scores or record.timing):
            known = [k for k, column in enumerate(columns) if column.key in ("steps", "nfe")]
            rest = max(1, len(columns) - len(known))
            numbers = [numbers[k] for k in known]
            numbers.append(f'<td class="text error" colspan="{rest}" data-sort="">{escape(_error(record))}</td>')
        elif record.error:
            cells[0] = cells[0].replace("</td>", ' <a class="error" href="#failed">failed</a></td>')
        mark = ' class="front"' if record in front else ' class="failed"' if record.error else ""
        lines[record.kind].append(f'<tr data-case="{index}"{mark}>{"".join(cells + numbers)}</tr>')
    floors = "<tbody>{}</tbody>\n".format("\n".join(lines["floor"])) if lines["floor"] else ""
    cases = "\n".join(lines["case"])
    return f'<thead><tr>{"".join(heads)}</tr></thead>\n{floors}<tbody id="rows">\n{cases}\n</tbody>'  # fmt: skip


def _error(record: Record) -> str:
    """Less the name of the case, where that stands beside it."""
    return (record.error or "").removeprefix(f"{record.name}: ")


def _number(column: Column, record: Record) -> str:
    span = column.span(record)
    if span is None:
        return '<td data-sort=""></td>'
    value, plus, se = column.text(record).partition(" \u00b1 ")
    spread = f' <span class="se">{plus.strip()} {se}</span>' if se else ""
    return f'<td data-sort="{span[0]!r}">{value}{spread}</td>'


def _subtitle(body: Mapping[str, Any], records: Sequence[Record]) -> str:
    cases = [record for record in records if record.kind == "case"]
    failed = sum(record.error is not None for record in cases)
    parts = [f"{len(cases)} cases"]
    if "n" in body["configuration"]:
        parts[0] += f", {body['configuration']['n']} samples of each from the same noises"
    timings = [record.timing for record in cases if record.timing]
    if timings:
        least, most = (f(len(timing.steady.samples_s) for timing in timings) for f in (min, max))
        batches = sorted({timing.batch for timing in timings})
        times = str(least) if least == most else f"{least} to {most}"
        parts.append(f"latency: medians of {times} interleaved batches of {', '.join(map(str, batches))}")
    parts += [f"{failed} failed"] if failed else []
    parts += [] if body["finished"] else ["the run was not finished"]
    return "; ".join(parts) + "."


def _notes(body: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
    """What a reader must know before a number is believed."""
    notes = []
    missing = len(body["cases"]) - len(records)
    if missing > 0:
        notes.append(f"{missing} {'case is' if missing == 1 else 'cases are'} not measured yet.")
    failed = sum(record.error is not None for record in records)
    if failed:
        notes.append(f'<a href="#failed">{failed} {"case" if failed == 1 else "cases"} failed</a>; the others stand.')
    machines = {(place.get("cpu"), place.get("gpu"), place.get("threads")) for place in body["environments"]}
    if len(machines) > 1 and any(record.timing for record in records):
        notes.append("This run was resumed on another machine: its latencies cannot be compared with each other.")
    return notes


def _legend(records: Sequence[Record], columns: Sequence[Column], shared: Mapping[str, str]) -> list[str]:
    more = [column.title for column in columns if column.better == "more"]
    scores = [score for record in records for score in record.scores.values()]
    lines = ["Less is better" + (f", but for {', '.join(more)}, where more is." if more else " in every column.")]
    lines.append(
        "Shaded: the Pareto front of the first chart. A case leaves it only where another is as good in both \
numbers and better in one of them beyond both 95% intervals."
    )
    lines.append("NFE: network evaluations of one sample, counted while sampling.")
    keys = {column.key for column in columns}
    if "rows" in keys:
        lines.append("Rows: what the network was given for one sample; with guidance up to two an evaluation.")
    if any(score.se is not None for score in scores):
        lines.append("\u00b1: one standard error of the drawing of the samples.")
    if any(score.debiased is not None for score in scores):
        lines.append("Distances are shown less the bias of a finite number of samples; report.csv has them plain too.")
    if any(column.key.startswith("score:fd_") for column in columns):
        lines.append("Fr\u00e9chet distances (fd_...) are no FID: compare them within this page only.")
    if "score:endpoint_rms" in keys:
        lines.append("endpoint_rms: root mean square difference from the converged solution of the same noises.")
    if "p50_ms" in keys:
        lines.append("p50, p90: of the time of a whole batch.")
    if "memory_mib" in keys:
        lines.append("Memory: the peak; allocated on a GPU, resident of the process on a CPU.")
    if shared:
        alike = ", ".join(f"{name}={value}" for name, value in shared.items())
        lines.append(f"The same for all cases: {alike}.")
    return lines


def _failed(records: Sequence[Record]) -> str:
    parts = []
    for record in records:
        if record.error is None:
            continue
        trace = f"<pre>{escape(record.traceback)}</pre>" if record.traceback else "<p>No traceback was kept.</p>"
        parts.append(f"<details><summary><b>{escape(record.name)}</b> <span class=error>{escape(_error(record))}</span>"
                     f"</summary>{trace}</details>")  # fmt: skip
    return f'<section id="failed"><h2>Cases that failed</h2>{"".join(parts)}</section>' if parts else ""


def _environments(places: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Every environment of a run that was resumed; what they share is said once."""
    found = {}
    for name in dict.fromkeys(name for place in places for name in place):
        values = [str(place.get(name, "not recorded")) for place in places]
        alike = len(set(values)) == 1
        found[name] = values[0] if alike else "\n".join(f"{k}: {value}" for k, value in enumerate(values, 1))
    return found


def _asked(body: Mapping[str, Any]) -> dict[str, Any]:
    """Less the plans of the single cases, which the table has one by one."""
    return {name: value for name, value in body["configuration"].items() if name != "cases"}


def _flat(tree: Mapping[str, Any], above: str = "") -> dict[str, str]:
    """Nested settings as lines: latency.rounds -> 10."""
    found: dict[str, str] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{above}{name}: ")
        elif isinstance(value, (list, tuple)):
            between = " x " if name == "shape" else ", "
            found[f"{above}{name}"] = between.join(map(str, value))
        elif value not in (None, ""):
            found[f"{above}{name}"] = str(value)
    return found


def _listed(facts: Mapping[str, str]) -> str:
    return "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())


def _section(picture: Picture) -> str:
    """A picture with its heading; ours have a name by which the script finds them."""
    heading, caption = SECTIONS.get(picture.name, (Path(picture.name).stem.replace("_", " "), ""))
    ours = picture.name in SECTIONS
    both = (economical(data) if ours else data for data in (picture.light, picture.dark))
    light, dark = (f"data:image/png;base64,{base64.b64encode(data).decode()}" for data in both)
    source = f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">' if light != dark else ""
    note = f'<figcaption class="soft">{escape(caption)}</figcaption>' if caption else ""
    name = f' data-chart="{picture.name}"' if ours else ""
    alt = escape(caption or heading)
    return (
        f"<section{name}>{f'<h2>{escape(heading)}</h2>' if heading else ''}"
        f'<figure><picture>{source}<img alt="{alt}" src="{light}"></picture>{note}</figure></section>'
    )


def _colours() -> str:
    """The series' colours, the same as in the pictures."""

    def block(theme: Theme) -> str:
        return "".join(f"--series-{k}:{colour};" for k, colour in enumerate(theme.colours))

    return f":root{{{block(LIGHT)}}}\n@media (prefers-color-scheme: dark){{:root{{{block(DARK)}}}}}\n"


def _file(name: str) -> str:
    return (Path(__file__).parent / "data" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
