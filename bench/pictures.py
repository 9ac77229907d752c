"""The pictures of a report: quality against latency, quality against network evaluations, grids of samples."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fastsample.files import write

from .record import Record

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
DASHES = (0, (4, 2))
PLACES = (  # of a label, in points from its mark
    ((-7.0, -7.0), "right"), ((7.0, 7.0), "left"), ((-9.0, 0.0), "right"), ((9.0, 0.0), "left"),
    ((7.0, -7.0), "left"), ((0.0, -12.0), "center"), ((0.0, 12.0), "center"), ((-7.0, 7.0), "right"),
)  # fmt: skip
Span = tuple[float, float, float]  # a value and its 95% interval


@dataclass(frozen=True)
class Theme:
    ink: str
    faint: str
    paper: str
    colours: tuple[str, ...]  # of Okabe and Ito, safe for the colour-blind


LIGHT = Theme("#1c2024", "#d5d9de", "#ffffff", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"))
DARK = Theme("#e6e8eb", "#3a4047", "#16191d", ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00"))


def latency_picture(records: Sequence[Record], measure: str, path: str | Path, theme: Theme = LIGHT) -> None:
    """A measure against milliseconds an image, with the Pareto front: no other case is both faster and better."""
    shown = [record for record in records if record.ms_per_image and measure in record.scores]
    spans = [record.ms_per_image or (0.0, 0.0, 0.0) for record in shown]
    _scatter(shown, spans, measure, "latency per image, ms", path, theme)


def nfe_picture(records: Sequence[Record], measure: str, path: str | Path, theme: Theme = LIGHT) -> None:
    """A measure against network evaluations, with the Pareto front."""
    shown = [record for record in records if record.nfe and measure in record.scores]
    spans = [(float(nfe), float(nfe), float(nfe)) for nfe in (record.nfe or 0 for record in shown)]
    _scatter(shown, spans, measure, "network evaluations (NFE)", path, theme)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The indices of the points that no other beats, by the first number; of equal points the first alone.

    Less is better; a point is beaten by one that is as good in both numbers and better in one.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: points[i]):
        if not front or points[i][1] < points[front[-1]][1]:
            front.append(i)
    return front


def sample_grid(images: Mapping[str, Tensor], path: str | Path, *, columns: int = 16, pixels: int = 48) -> None:
    """A PNG of labelled rows of images, the same seeds side by side.

    images: label -> [n, C, H, W] in [-1, 1], C of 1 or 3; the first `columns` are shown, each enlarged without
    smoothing by the whole factor that makes it about `pixels` wide.
    """
    _matplotlib()
    from matplotlib.figure import Figure

    rows = {label: _as_picture(label, stack[:columns], pixels) for label, stack in images.items()}
    if not rows:
        raise ValueError("no images: nothing to show")
    gap, size = 6, 10
    dpi = 144
    margin = 20 + round(0.61 * size * dpi / 72 * max(map(len, rows)))  # a monospace glyph is 0.6 em wide
    width = margin + max(row.shape[1] for row in rows.values()) + gap
    height = gap + sum(row.shape[0] + gap for row in rows.values())
    figure = Figure(figsize=((width + 0.1) / dpi, (height + 0.1) / dpi), dpi=dpi, facecolor=LIGHT.paper)
    top = height - gap
    for label, row in rows.items():
        top -= row.shape[0]
        figure.figimage(row, xo=margin, yo=top, origin="upper", vmin=0, vmax=1)
        figure.text((margin - 10) / width, (top + row.shape[0] / 2) / height, label, ha="right", va="center",
                    size=size, family="monospace", color=LIGHT.ink, parse_math=False)  # fmt: skip
        top -= gap
    write(path, lambda temporary: figure.savefig(temporary, format="png", facecolor=LIGHT.paper))


def _as_picture(label: str, images: Tensor, pixels: int) -> np.ndarray[Any, Any]:
    """[H, W, 3] in [0, 1]: the images in a row, two pixels of white between them."""
    if images.dim() != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f"images of {label!r} must be [n, 1 or 3, H, W], got {list(images.shape)}")
    factor = max(1, round(pixels / images.shape[3]))
    big = ((images.float().cpu().clamp(-1, 1) + 1) / 2).repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    apart = [np.pad(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), ((0, 0), (0, 2), (0, 0)), constant_values=1.0)
             for image in big]  # fmt: skip
    return np.concatenate(apart, axis=1)


def _scatter(
    records: Sequence[Record], spans: Sequence[Span], measure: str, axis: str, path: str | Path, theme: Theme
) -> None:
    _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.2), dpi=150, facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)  # labels are placed by how large they are drawn
    axes = figure.subplots()
    models = _styles((record.model for record in records), theme.colours)
    solvers = _styles((_solver(record) for record in records), MARKERS)
    heights = [_span(record, measure) for record in records]
    points = [(span[0], height[0]) for span, height in zip(spans, heights)]
    front = pareto_front(points)
    _lines(axes, records, points, models)
    for i, (record, x, y) in enumerate(zip(records, spans, heights)):
        colour, first = models[record.model], i in front
        axes.hlines(y[0], x[1], x[2], color=colour, lw=0.8, alpha=0.45)
        axes.vlines(x[0], y[1], y[2], color=colour, lw=0.8, alpha=0.45)
        axes.plot(*points[i], solvers[_solver(record)], color=colour, ms=7 if first else 5.5, mew=0.9,
                  mec=theme.ink if first else colour, alpha=1.0 if first else 0.6, zorder=3 + first)  # fmt: skip
    best = [points[i] for i in front]
    axes.plot([x for x, _ in best], [y for _, y in best], color=theme.ink, lw=1.3, ls=DASHES, zorder=2)
    _axis(axes.set_xscale, axes.set_xlim, axes.xaxis, [x for span in spans for x in span])
    _axis(axes.set_yscale, axes.set_ylim, axes.yaxis, [y for span in heights for y in span])
    axes.set_xlabel(axis)
    axes.set_ylabel(f"{measure} (less is better)", parse_math=False)
    _dress(axes, theme)
    _legend(figure, models, solvers, theme)
    figure.draw_without_rendering()
    _label(figure, axes, best, [f"{records[i].solver}/{records[i].steps}" for i in front], points, theme)
    write(path, lambda temporary: figure.savefig(temporary, format="png", facecolor=theme.paper))


def _lines(
    axes: Any, records: Sequence[Record], points: Sequence[tuple[float, float]], models: Mapping[str, str]
) -> None:
    """Thin lines along the steps of one model and solver."""
    lines: dict[tuple[str, str], list[int]] = {}
    for i, record in enumerate(records):
        lines.setdefault((record.model, _solver(record)), []).append(i)
    for (model, _), line in lines.items():
        line.sort(key=lambda i: records[i].steps)
        axes.plot([points[i][0] for i in line], [points[i][1] for i in line], color=models[model], lw=0.8, alpha=0.35)


def _span(record: Record, measure: str) -> Span:
    score = record.scores[measure]
    reach = 1.96 * (score.se or 0.0)
    low = score.value - reach
    if score.value > 0:  # on a log axis an interval that reaches zero would have no end
        low = max(low, score.value / 10)
    return score.value, low, score.value + reach


def _solver(record: Record) -> str:
    """What tells two solvers of a picture apart, the number of steps left out."""
    options = [f"{name}={value}" for name, value in record.options.items()]
    place = [] if record.spacing == "default" else [record.spacing]
    return ", ".join([record.solver, *place, *options])


def _styles(names: Any, styles: Sequence[str]) -> dict[str, str]:
    return {name: styles[i % len(styles)] for i, name in enumerate(dict.fromkeys(names))}


def _axis(scale: Callable[[str], Any], limit: Callable[[float, float], Any], axis: Any, values: list[float]) -> None:
    """Log where all values allow it, with ticks at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not values or min(values) <= 0:
        return
    scale("log")
    low, high = min(values), max(values)
    decades = math.log10(high / low)
    pad = 10 ** max(0.06 * decades, 0.5 * (0.4 - decades), 0.03)
    limit(low / pad, high * pad)
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if decades < 0.7 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _dress(axes: Any, theme: Theme) -> None:
    axes.set_facecolor(theme.paper)
    axes.grid(color=theme.faint, lw=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", colors=theme.ink)
    axes.tick_params(which="minor", length=0)
    for side, spine in axes.spines.items():
        spine.set_color(theme.ink)
        spine.set_visible(side in ("left", "bottom"))
    axes.xaxis.label.set_color(theme.ink)
    axes.yaxis.label.set_color(theme.ink)


def _legend(figure: Any, models: Mapping[str, str], solvers: Mapping[str, str], theme: Theme) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, lw=4, label=name) for name, colour in models.items()]
    handles += [Line2D([], [], color=theme.ink, marker=mark, ls="", label=name, ms=6) for name, mark in solvers.items()]
    handles.append(Line2D([], [], color=theme.ink, lw=1.3, ls=DASHES, label="Pareto front"))
    legend = figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)
    for text in legend.get_texts():
        text.set(color=theme.ink, parse_math=False)


def _label(
    figure: Any,
    axes: Any,
    points: Sequence[tuple[float, float]],
    texts: Sequence[str],
    marks: Sequence[tuple[float, float]],
    theme: Theme,
) -> None:
    """Write each text beside its point, below it first; where there is no room, it is left to the table."""
    renderer = figure.canvas.get_renderer()
    half = 5 * figure.dpi / 72  # of a mark
    pixels = axes.transData.transform(marks) if marks else []
    covered = [(x - half, y - half, x + half, y + half) for x, y in pixels]
    frame = axes.get_window_extent(renderer).extents
    texts_there: list[Sequence[float]] = []
    ends_first = sorted(range(len(points)), key=lambda i: min(i, len(points) - 1 - i))
    for i in ends_first:
        tries: list[tuple[float, int, tuple[float, float], str, Sequence[float]]] = []
        for place, side in PLACES:
            note = _note(axes, texts[i], points[i], place, side, theme)
            box = note.get_window_extent(renderer).extents
            hidden = sum(_overlap(box, mark) for mark in covered)
            free = not any(_overlap(box, other) for other in texts_there) and not _outside(box, frame)
            if free and hidden < half**2:  # a quarter of a mark
                tries.append((hidden, len(tries), place, side, box))
            note.remove()
        if tries:
            _, _, place, side, box = min(tries, key=lambda one: one[:2])
            _note(axes, texts[i], points[i], place, side, theme)
            texts_there.append(box)


def _note(axes: Any, text: str, point: tuple[float, float], place: tuple[float, float], side: str, theme: Theme) -> Any:
    from matplotlib.patheffects import withStroke

    note = axes.annotate(
        text, point, xytext=place, textcoords="offset points", ha=side, va="center", fontsize=8.5, color=theme.ink,
        zorder=6, parse_math=False,
    )  # fmt: skip
    note.set_path_effects([withStroke(linewidth=2.5, foreground=theme.paper)])
    return note


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return width * height if width > 0 and height > 0 else 0.0


def _outside(box: Sequence[float], frame: Sequence[float]) -> bool:
    return box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]


def _matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'fastsample[bench]'") from error
