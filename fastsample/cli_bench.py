"""`fastsample bench`: sweeps from a file, their reports, comparisons of two. Like cli.py it joins the wings."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import torch
import typer

import fastsample as fs
from fastsample import solvers
from fastsample.cli_common import class_count, load, need, said_shortly, sample_shape, say
from fastsample.process import first_process, using_threads

if TYPE_CHECKING:
    from fastsample.bench import Record
    from fastsample.bench.sweep import ModelAsked, Sweep

app = typer.Typer(
    help="Measure latency against quality: run a sweep, report it, compare two runs.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

FAILED = r"\d+ of \d+ cases failed"  # they are named at the end
Run = Annotated[Path, typer.Argument(help="A folder that `bench run` wrote.")]
AllowDownload = Annotated[
    bool, typer.Option("--allow-download", help="Fetch the Inception weights (96 MB) if they are not there.")
]
InceptionPath = Annotated[
    Path | None,
    typer.Option("--inception", help="The Inception weights; else $FASTSAMPLE_INCEPTION, else the cache folder."),
]


@app.command("run")
def run_sweep(
    sweep: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="The TOML file; docs/bench.md has its keys.")
    ],
    out: Annotated[
        Path | None, typer.Option(file_okay=False, help="The run folder; without it, the file's own `out`.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--replace", help="Go on with what is in the folder, or begin anew.")
    ] = True,
    listed: Annotated[bool, typer.Option("--list", help="Print the cases and measure nothing.")] = False,
    device: Annotated[
        str | None, typer.Option(help="Such as cuda; without it, the file's own `device`, else cpu.")
    ] = None,
    allow_download: AllowDownload = False,
    inception: InceptionPath = None,
    report: Annotated[bool, typer.Option(help="Write the report at the end.")] = True,
    progress: Annotated[
        bool | None, typer.Option(help="Bars; without it, on a terminal alone.", show_default=False)
    ] = None,
) -> None:
    """Run a sweep; a killed one goes on when it is run again.

    Exit status: 0 all measured, 1 a case failed (the others were measured), 2 the file is wrong.
    """
    need("diffusers", *(["matplotlib"] if report and not listed else []))
    from fastsample import bench
    from fastsample.bench.sweep_quality import Inception, measures

    asked = _read(sweep)
    place = out or (Path(asked.out) if asked.out else None)
    if place is None and not listed:
        _wrong(f'{sweep} says not where the run goes; add out = "runs/NAME" at its top, or give --out')
    device = _device(device or asked.device)
    begin = time.monotonic()
    with using_threads(asked.threads), said_shortly(but=FAILED):
        models, load_s = _models(asked, device, distil=not listed)
        try:
            made = asked.cases(models)
            truths = asked.truths(made, models)
        except ValueError as error:
            _wrong(f"{sweep}: {error}")
        if listed:
            for case in made:
                say(f"{case.name}  NFE {case.plan.nfe}")
            return
        assert place is not None
        shape, condition = _inputs(asked, models)
        quality = measures(asked.quality, Inception(inception, allow_download, device))
        records = bench.run(
            made,
            shape=shape,
            n=asked.n,
            out=place,
            batch=asked.batch,
            shard=asked.shard,
            quality=quality,
            latency=asked.latency,
            converged=truths,
            condition=condition,
            device=device,
            keep=asked.keep,
            floor=asked.floor,
            resume=resume,
            load_s=load_s,
            progress=progress,
        )
        if not first_process():
            return
        page = bench.report(place, **_given(measure=asked.measure, title=asked.title)) if report else None
    say(_table(records))
    failed = [record for record in records if record.error]
    for record in failed:
        typer.echo(f"failed: {record.error}", err=True)
    cases = sum(record.kind == "case" for record in records)
    say(f"{cases} cases, {len(failed)} failed, in {time.monotonic() - begin:.0f} s")
    say(f"Open {page.resolve()}" if page else f"Report it with: fastsample bench report {place}")
    if failed:
        raise typer.Exit(1)


@app.command("report")
def write_report(
    run: Run,
    measure: Annotated[str | None, typer.Option(help="Which quality the pictures show; without it, the first.")] = None,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="How many cases show their samples in samples.png.")] = 8,
) -> None:
    """Write report.csv, report.md, pictures and one page, index.html, into a run folder."""
    need("matplotlib")
    from fastsample import bench

    page = bench.report(run, **_given(measure=measure, title=title, rows=rows))
    say(f"Open {page.resolve()}")


@app.command("compare")
def compare_runs(
    before: Run,
    after: Run,
    gate: Annotated[
        bool, typer.Option("--gate", help="Exit with 1 for a regression beyond interval and tolerance.")
    ] = False,
    measure: Annotated[
        list[str] | None, typer.Option(help="A score to compare; may be repeated. Default: all.")
    ] = None,
    tolerance: Annotated[
        list[str] | None,
        typer.Option(help="A share of the value before, such as 0.01, or of one measure, latency=0.05; repeatable."),
    ] = None,
    window: Annotated[
        list[str] | None,
        typer.Option(help="Bounds for the value after: fid=23.01:23.95, or of one cell, fid@CELL=23.01:23.95."),
    ] = None,
    latency: Annotated[bool, typer.Option(help="Compare times too.")] = True,
    level: Annotated[float, typer.Option(help="The chance of even one false verdict, at most.")] = 0.05,
    drift: Annotated[float, typer.Option(help="By how much two processes may differ in time by themselves.")] = 0.1,
    as_json: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, help="Also write the comparison as JSON.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Compare a run with an earlier one: what improved, what regressed, and by how much.

    Exit status: 0, or 1 where the runs cannot be compared, or with --gate where something regressed.
    """
    from fastsample import bench
    from fastsample.files import write_text

    chosen = {} if tolerance is None else {"tolerance": _tolerance(tolerance)}
    windows = dict(_window(word) for word in window or [])
    if len(windows) < len(window or []):
        raise typer.BadParameter("--window has the same name twice")
    found = bench.compare(
        before, after, measures=measure or None, windows=windows, latency=latency, level=level, drift=drift, **chosen
    )
    if as_json:
        write_text(as_json, json.dumps(found.as_dict(), indent=1) + "\n")
    say(found.markdown() if markdown else found.table(), nl=False)
    if gate and found.failed:
        raise typer.Exit(1)


@app.command("stats")
def write_stats(
    images: Annotated[Path, typer.Argument(exists=True, help="A folder of images, or an .npz of them.")],
    extractor: Annotated[str, typer.Option(help="One of digits, pixels, inception.")],
    out: Annotated[Path, typer.Option(dir_okay=False, help="The .npz to write.")] = Path("stats.npz"),
    channels: Annotated[
        int | None, typer.Option(help="3 makes gray images RGB, 1 makes RGB gray; without it, as they are.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="NCHW or NHWC, of an .npz whose shape could be either.")] = None,
    rows: Annotated[
        bool,
        typer.Option("--rows/--no-rows", help="Keep every image's features, which all but Frechet distances need."),
    ] = True,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 250,
    device: Annotated[str, typer.Option(help="Of the Inception network.")] = "cpu",
    allow_download: AllowDownload = False,
    inception: InceptionPath = None,
) -> None:
    """Make the statistics file of real images, the reference of distances."""
    from fastsample.bench.images import stats
    from fastsample.bench.sweep_quality import EXTRACTORS, Inception
    from fastsample.bench.sweep_quality import extractor as features_of

    if extractor not in EXTRACTORS:
        raise typer.BadParameter(f"unknown extractor {extractor!r}; choose one of {', '.join(EXTRACTORS)}")
    if out.suffix != ".npz":
        raise typer.BadParameter(f"{out} is no name for statistics; end it in .npz")
    features = features_of(extractor, Inception(inception, allow_download, _device(device)))
    how: Any = {"batch": batch, "channels": channels, "layout": layout, "rows": rows}
    found = stats(images, features, out, **how)
    say(f"{found.n} images, {len(found.mean)} features of {features.name}: {out}")


@app.command("import")
def import_json(
    benchmarks: Annotated[
        Path, typer.Argument(exists=True, dir_okay=False, help="What pytest --benchmark-json wrote.")
    ],
    out: Annotated[Path, typer.Option(file_okay=False, help="The run folder to write.")],
) -> None:
    """Make a run folder of pytest-benchmark's JSON, for `compare` and `report`."""
    from fastsample.bench.imported import import_benchmarks

    found = import_benchmarks(benchmarks, out)
    say(f"{len(found)} benchmarks: {out}")


def inception() -> str:
    """Where the weights of the FID's network are, or how to get them, for `doctor`."""
    from fastsample.bench.fid import INCEPTION

    try:
        return f"{INCEPTION.what}: whole, {INCEPTION.find()}"
    except (OSError, ValueError) as error:
        return str(error)


def _read(path: Path) -> Sweep:
    from fastsample.bench.sweep import read_sweep

    try:
        return read_sweep(path, solvers=solvers.SOLVERS)
    except (ValueError, OSError) as error:
        _wrong(str(error))


def _wrong(what: str) -> NoReturn:
    """End with 2; every process of a launcher finds the same fault, and one says it."""
    if not first_process():
        raise typer.Exit(2)
    raise typer.BadParameter(what)


def _models(asked: Sweep, device: str, *, distil: bool) -> tuple[dict[str, fs.Model], dict[str, float]]:
    """The models that cases need, on their device, and the seconds that loading each took."""
    models: dict[str, fs.Model] = {}
    load_s = {}
    for name in asked.used:
        one = asked.models[name]
        source = one.source
        if one.teacher is not None:
            source, teacher = str(Path(one.source, "model")), asked.models[one.teacher].source
            if distil:
                _distil(one, load(teacher))
            elif not _distilled(one):
                source = teacher  # whose schedule and classes its student will have, which is all that a list shows
        begin = time.perf_counter()
        loaded = load(source)
        _network(loaded).to(device)
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
        load_s[name] = time.perf_counter() - begin
        models[name] = _guided(name, one, loaded, asked)
    return models, load_s


def _distilled(student: ModelAsked) -> bool:
    return Path(student.source, "model", "fastsample.json").is_file()


def _distil(student: ModelAsked, teacher: fs.Denoiser) -> None:
    """Make the student of the digits network, where it is not there; a killed distillation goes on."""
    from fastsample import distill

    folder = Path(student.source)
    if _distilled(student):
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(f"the student in {folder} is not distilled yet; run the sweep once in one process")
    need("accelerate", "scikit-learn")
    say(f"distilling the student into {folder}, once")
    distill.distill_digits(teacher, folder, updates=student.updates)


def _guided(name: str, asked: ModelAsked, model: fs.Denoiser, sweep: Sweep) -> fs.Model:
    if asked.guidance is None and name not in sweep.guided:
        return model
    null = getattr(model.network, "null", None) if asked.null is None else asked.null
    count = class_count(model)
    if count is None:
        raise ValueError(f"guidance of {name} needs a network with class labels, and this one has none")
    if null is None:
        raise ValueError(
            f"guidance of {name} needs the label that means no class, which its folder does not say; add null"
        )
    if null >= count:
        raise ValueError(f"null of {name} must be one of its {count} labels, counted from 0, got {null}")
    return fs.Guided(
        model,
        uncond={"class_labels": null},
        scale=1.0 if asked.guidance is None else asked.guidance,
        interval=asked.interval,
        rescale=asked.rescale,
    )


def _inputs(asked: Sweep, models: Mapping[str, fs.Model]) -> tuple[tuple[int, ...], Callable[..., Any] | None]:
    """The shape of one sample, and its condition: class labels in turn. All models must share them."""
    found = {}
    for name, model in models.items():
        network: Any = model.model if isinstance(model, fs.Guided) else model
        null = getattr(network.network, "null", None) if asked.models[name].null is None else asked.models[name].null
        count = class_count(network)
        classes = None if count is None else tuple(k for k in range(count) if k != null)
        found[name] = (asked.shape or sample_shape(network), classes)
    (first, (shape, classes)), *others = found.items()
    for name, inputs in others:
        if inputs != (shape, classes):
            raise ValueError(
                f"{first} makes samples of {_inputs_text(shape, classes)}, {name} of {_inputs_text(*inputs)}: "
                f"they cannot share noises; give each a sweep of its own"
            )
    if asked.labels is not None:
        unknown = [label for label in asked.labels if label not in (classes or ())]
        if unknown:
            raise ValueError(f"labels has {unknown[0]}, which the model does not know: {_inputs_text(shape, classes)}")
        classes = asked.labels
    if classes is None:
        return shape, None
    table = torch.tensor(classes)
    return shape, lambda indices: {"class_labels": table.to(indices.device)[indices % len(table)]}


def _inputs_text(shape: Sequence[int], classes: Sequence[int] | None) -> str:
    return f"{' x '.join(map(str, shape))} with {f'{len(classes)} classes' if classes else 'no classes'}"


def _network(model: fs.Denoiser) -> torch.nn.Module:
    network: torch.nn.Module = model.network  # type: ignore[assignment]  # what `load` loads is one
    return network


def _device(name: str) -> str:
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise typer.BadParameter(f"torch knows no device {name!r}; such as cpu, cuda or cuda:1") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name}: torch finds no CUDA device here; use cpu, or a torch that has CUDA")
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # the name stays: all processes have one configuration
    return name


def _tolerance(words: Sequence[str]) -> float | dict[str, float]:
    pairs = [word.rpartition("=") for word in words]
    try:
        found = {name: float(value) for name, _, value in pairs}
    except ValueError as error:
        raise typer.BadParameter(f"--tolerance is a number, or NAME=NUMBER, got {' '.join(words)!r}") from error
    if len(found) < len(words) or ("" in found and len(found) > 1):
        raise typer.BadParameter("--tolerance is one number for all, or NAME=NUMBER for each of several")
    return found.get("", found)


def _window(word: str) -> tuple[str | tuple[str, str], tuple[float, float]]:
    name, _, bounds = word.rpartition("=")
    low, colon, high = bounds.partition(":")
    measure, at, cell = name.partition("@")
    try:
        window = float(low), float(high)
    except ValueError:
        measure = ""
        window = (0.0, 0.0)
    if not (measure and colon and bool(at) == bool(cell)):
        raise typer.BadParameter(f"--window is MEASURE=LOW:HIGH, such as fid=23.01:23.95, got {word!r}")
    return ((cell, measure) if cell else measure), window


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _table(records: Sequence[Record]) -> str:
    """For a terminal; report.md has more."""
    from fastsample.bench.table import columns

    wanted = [c for c in columns(records) if c.key in ("nfe", "rows", "ms_per_image") or c.key.startswith("score:")]
    lines = [["case", *(column.title for column in wanted)]]
    lines += [[record.name, *(column.text(record) for column in wanted)] for record in records]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = [
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(line[1:], widths[1:]))]
        ).rstrip()
        for line in lines
    ]
    return "\n".join(text)
