"""The report of a run folder: report.csv, report.md, pictures, and one page that needs nothing else, index.html."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastsample.files import folder as writable
from fastsample.files import write_text

from .front import turned, undominated
from .page import Picture, page
from .pictures import DARK, LIGHT, latency_picture, nfe_picture, sample_grid
from .record import Record, read_run, read_samples
from .sprites import sprites
from .table import columns, csv_text, markdown_text, measures, score_column

PARETO, QUALITY, ENDPOINT, SAMPLES = "pareto.png", "quality.png", "endpoint.png", "samples.png"
ENDPOINT_MEASURE = "endpoint_rms"


def report(
    folder: str | Path, *, measure: str | None = None, title: str = "Latency against quality", rows: int = 8
) -> Path:
    """Write the report of a folder that `run` wrote; returns the path of its index.html.

    measure: which quality the pictures show; None: the first of the run. On the page it may be chosen again.
    rows: how many cases of the Pareto front show their samples in samples.png (where those are images).
    Pictures that the caller put into the folder (*.png) stand on the page too, under their names.
    """
    body, records = read_run(folder)
    folder = writable(folder)
    known = measures(records)
    if measure is not None and measure not in known:
        raise ValueError(f"the run has no measure {measure!r}; it has {', '.join(known) or 'none'}")
    measure = measure or next(iter(known), None)
    write_text(folder / "report.csv", csv_text(records))
    write_text(folder / "report.md", markdown_text(records))
    front = _front(records, measure) if measure else []
    kept = _kept(folder, records)
    pictures = _pictures(records, measure, folder) if measure else []
    shown = {record.name: kept[record.quality] for record in _spread([r for r in front if r.quality in kept], rows)}
    if shown:
        sample_grid(shown, folder / SAMPLES)
        pictures.append(Picture(SAMPLES, *((folder / SAMPLES).read_bytes(),) * 2))
    given = sorted(p for p in folder.glob("[!.]*.png") if p.name not in (PARETO, QUALITY, ENDPOINT, SAMPLES))
    for name in {PARETO, QUALITY, ENDPOINT, SAMPLES} - {picture.name for picture in pictures}:  # of an earlier report
        (folder / name).unlink(missing_ok=True)
    pictures += [Picture(path.name, *(path.read_bytes(),) * 2) for path in given]
    text = page(body, records, columns(records), measure=measure, front=front, pictures=pictures,
                strips=sprites(kept), title=title)  # fmt: skip
    write_text(folder / "index.html", text)
    return folder / "index.html"


def _front(records: Sequence[Record], measure: str) -> list[Record]:
    """The Pareto front of the first picture: by time where any case was timed, else by evaluations."""
    column = score_column(measure, records)
    shown = [record for record in records if record.kind == "case" and measure in record.scores]
    timed = [record for record in shown if record.ms_per_image]
    shown = timed or [record for record in shown if record.nfe]
    costs = [record.ms_per_image or (float(record.nfe or 0),) * 3 for record in shown]
    goods = [column.span(record) or (0.0, 0.0, 0.0) for record in shown]
    goods = [turned(good) for good in goods] if column.better == "more" else goods
    return [shown[i] for i in undominated(list(zip(costs, goods)))]


def _kept(folder: Path, records: Sequence[Record]) -> dict[str, Tensor]:
    """Quality key -> its kept samples, where those are images."""
    found: dict[str, Tensor] = {}
    for record in records:
        if record.samples and record.quality not in found:
            found[record.quality] = read_samples(folder, record)
    return {key: stack for key, stack in found.items() if stack.dim() == 4 and stack.shape[1] in (1, 3)}


def _pictures(records: Sequence[Record], measure: str, folder: Path) -> list[Picture]:
    """The pictures of a measure, the headline first: light and dark; the light ones are also written down."""
    scored = [record for record in records if record.kind == "case" and measure in record.scores]
    wanted: list[tuple[str, Callable[..., Any], str]] = []
    if any(record.ms_per_image for record in scored):
        wanted.append((PARETO, latency_picture, measure))
    if any(record.nfe for record in scored):  # of a floor alone there is nothing to draw
        wanted.append((QUALITY, nfe_picture, measure))
    if measure != ENDPOINT_MEASURE and any(ENDPOINT_MEASURE in record.scores for record in records):
        wanted.append((ENDPOINT, nfe_picture, ENDPOINT_MEASURE))
    drawn = []
    for name, draw, what in wanted:
        draw(records, what, folder / name, LIGHT)
        with tempfile.TemporaryDirectory() as place:
            draw(records, what, Path(place) / name, DARK)
            drawn.append(Picture(name, (folder / name).read_bytes(), (Path(place) / name).read_bytes()))
    return drawn


def _spread(records: Sequence[Record], most: int) -> list[Record]:
    """At most so many of them, evenly, the first and the last included."""
    last = min(most, len(records)) - 1
    return [records[round(i * (len(records) - 1) / max(1, last))] for i in range(last + 1)]
