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

from .front import Span, pareto_front, turned, undominated
from .record import Record
from .table import score_column, score_span, settings_text, solver_text

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
DASHES, DOTS = (0, (4, 2)), (0, (1, 2))
PLACES = (  # of a label, in points from its mark
    ((-7.0, -7.0), "right"), ((7.0, 7.0), "left"), ((-9.0, 0.0), "right"), ((9.0, 0.0), "left"),
    ((7.0, -7.0), "left"), ((6.0, 12.0), "left"), ((0.0, -12.0), "center"), ((0.0, 12.0), "center"),
    ((-7.0, 7.0), "right"),
)  # fmt: skip


@dataclass(frozen=True)
class Theme:
    ink: str
    faint: str
    paper: str
    colours: tuple[str, ...]  # of Okabe and Ito, safe for the colour-blind


LIGHT = Theme("#1c2024", "#d5d9de", "#ffffff", ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"))
DARK = Theme("#e6e8eb", "#3a4047", "#16191d", ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00"))


def latency_picture(records: Sequence[Record], measure: str, path: str | Path, theme: Theme = LIGHT) -> None:
    """A measure against milliseconds an image, with the Pareto front: what no other case beats beyond its interval."""
    _scatter(records, measure, lambda record: record.ms_per_image, "latency per image, ms", path, theme)


def nfe_picture(records: Sequence[Record], measure: str, path: str | Path, theme: Theme = LIGHT) -> None:
    """A measure against network evaluations, with the Pareto front."""

    def nfe(record: Record) -> Span | None:
        return (float(record.nfe), float(record.nfe), float(record.nfe)) if record.nfe else None

    _scatter(records, measure, nfe, "network evaluations (NFE)", path, theme)


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
    records: Sequence[Record],
    measure: str,
    cost: Callable[[Record], Span | None],
    title: str,
    path: str | Path,
    theme: Theme,
) -> None:
    _matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = [record for record in records if record.kind == "case" and cost(record) and measure in record.scores]
    floors = [floor for record in records if record.kind == "floor" and (floor := score_span(record, measure))]
    more = score_column(measure, records).better == "more"
    spans = [cost(record) or (0.0, 0.0, 0.0) for record in shown]
    heights = [score_span(record, measure) or (0.0, 0.0, 0.0) for record in shown]
    figure = Figure(figsize=(8.5, 5.2), dpi=150, facecolor=theme.paper, layout="constrained")
    FigureCanvasAgg(figure)  # labels are placed by how large they are drawn
    axes = figure.subplots()
    models = _styles((record.model for record in shown), theme.colours)
    solvers = _styles((solver_text(record) for record in shown), MARKERS)
    aims = [turned(height) for height in heights] if more else heights
    front = set(undominated(list(zip(spans, aims))))
    line = pareto_front([(x[0], y[0]) for x, y in zip(spans, aims)])
    xs = _axis(axes.set_xscale, axes.set_xlim, axes.xaxis, spans)
    ys = _axis(axes.set_yscale, axes.set_ylim, axes.yaxis, [*heights, *floors])
    points = [(xs(x[0]), ys(y[0])) for x, y in zip(spans, heights)]
    for floor in floors:
        axes.axhspan(ys(floor[1]), ys(floor[2]), color=theme.ink, alpha=0.08, lw=0)
        axes.axhline(ys(floor[0]), color=theme.ink, lw=1, ls=DOTS, zorder=1)
    _lines(axes, shown, points, models)
    for i, (record, x, y) in enumerate(zip(shown, spans, heights)):
        colour, first, cut = models[record.model], i in front, ys(y[0]) != y[0]
        axes.hlines(points[i][1], xs(x[1]), xs(x[2]), color=colour, lw=1, alpha=0.5)
        axes.vlines(points[i][0], ys(y[1]), ys(y[2]), color=colour, lw=1, alpha=0.5)
        axes.plot(*points[i], solvers[solver_text(record)], color=colour, ms=7 if first else 5.5, mew=0.9,
                  mec=theme.ink if first and not cut else colour, mfc="none" if cut else colour, clip_on=False,
                  alpha=1.0 if first else 0.6, zorder=3 + first)  # fmt: skip
    best = [points[i] for i in line]
    axes.plot([x for x, _ in best], [y for _, y in best], color=theme.ink, lw=1.3, ls=DASHES, zorder=2)
    axes.set_xlabel(title)
    cut_any = any(ys(height[0]) != height[0] for height in heights)
    axes.set_ylabel(f"{measure} ({'more' if more else 'less'} is better)"
                    + (", hollow: 0 or less" if cut_any else ""), parse_math=False)  # fmt: skip
    _dress(axes, theme)
    _legend(figure, models, solvers, theme, floor=bool(floors))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # it is laid out, and need not be again when it is saved
    _label(figure, axes, best, [f"{shown[i].solver}/{shown[i].steps}" for i in line], points, theme)
    write(path, lambda temporary: figure.savefig(temporary, format="png", facecolor=theme.paper))


def _lines(
    axes: Any, records: Sequence[Record], points: Sequence[tuple[float, float]], models: Mapping[str, str]
) -> None:
    """Thin lines along the steps of cases that are otherwise alike."""
    lines: dict[tuple[str, str, str], list[int]] = {}
    for i, record in enumerate(records):
        lines.setdefault((record.model, solver_text(record), settings_text(record, {})), []).append(i)
    for (model, *_), line in lines.items():
        line.sort(key=lambda i: records[i].steps)
        axes.plot([points[i][0] for i in line], [points[i][1] for i in line], color=models[model], lw=0.8, alpha=0.35)


def _styles(names: Any, styles: Sequence[str]) -> dict[str, str]:
    return {name: styles[i % len(styles)] for i, name in enumerate(dict.fromkeys(names))}


def _axis(
    scale: Callable[[str], Any], limit: Callable[[float, float], Any], axis: Any, spans: Sequence[Span]
) -> Callable[[float], float]:
    """Log where most numbers allow it, with ticks at 1, 2 and 5; returns what brings a number into the axis.

    A number near its floor may be 0 or less after the bias is taken away: it is drawn on the edge of a log axis.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    centres = [span[0] for span in spans]
    positive = [centre for centre in centres if centre > 0]
    if not positive or 2 * len(positive) < len(centres):
        return lambda value: value
    scale("log")
    low = min(max(span[1], span[0] / 10) for span in spans if span[0] > 0)  # an interval to 0 would have no end
    high = max(span[2] for span in spans if span[0] > 0)
    decades = math.log10(high / low)
    pad = 10 ** max(0.06 * decades, 0.5 * (0.4 - decades), 0.03)
    limit(low / pad, high * pad)
    subs = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if decades < 0.7 else (1.0, 2.0, 5.0) if decades < 3 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    return lambda value: max(value, low / pad)


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


def _legend(figure: Any, models: Mapping[str, str], solvers: Mapping[str, str], theme: Theme, *, floor: bool) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, lw=4, label=name) for name, colour in models.items()]
    handles += [Line2D([], [], color=theme.ink, marker=mark, ls="", label=name, ms=6) for name, mark in solvers.items()]
    handles.append(Line2D([], [], color=theme.ink, lw=1.3, ls=DASHES, label="Pareto front"))
    if floor:
        handles.append(Line2D([], [], color=theme.ink, lw=1, ls=DOTS, label="floor: real images"))
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
