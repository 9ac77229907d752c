"""`fastsample demo`: the whole path on real digits. Like cli.py it joins the wings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich import box
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

import fastsample as fs
from fastsample import bench, distill, solvers, zoo
from fastsample.files import folder
from fastsample.zoo.data import digits

SHAPE = (1, 8, 8)


@dataclass(frozen=True)
class Size:
    """How much the demo does: what `--quick` makes smaller."""

    student: str  # the student's folder; one size does not go on from the other's checkpoints
    updates: float  # the share of the recipe's updates
    samples: int
    rounds: int


FULL = Size("student", updates=1.0, samples=2000, rounds=5)
QUICK = Size("student-quick", updates=0.1, samples=500, rounds=3)


def run(out: str | Path, *, quick: bool = False) -> Path:
    """Sample, distil and benchmark the built-in network; returns the path of the page to open."""
    out, teacher = folder(out), zoo.digits()
    with _threads_that_help(teacher):
        return _run(out, teacher, QUICK if quick else FULL, Console())


def _run(out: Path, teacher: fs.Denoiser, size: Size, console: Console) -> Path:
    begin = time.monotonic()
    console.rule("1. fewer steps for an existing model")
    for steps in (4, 8):
        console.print(str(_plan(teacher, "dpmpp_2m", steps)), highlight=False, soft_wrap=True)
    pictures = _pictures(teacher, ROWS)

    console.rule("2. distil a student")
    student = distill.distill_digits(teacher, out / size.student, updates=size.updates, progress=True)
    pictures |= _pictures(student, [("ddim", steps) for steps in (4, 2, 1)], prefix="student: ")
    bench.sample_grid(pictures, out / "side_by_side.png", columns=20)

    console.rule("3. latency against quality")
    images, _ = digits("all")
    records = bench.run(
        _cases(teacher, student),
        shape=SHAPE,
        n=size.samples,
        quality=[bench.fd_digits(images), bench.fd_pixels(images)],
        latency=bench.latency(rounds=size.rounds, batch=50),
        converged=dict.fromkeys(("teacher", "student"), _converged(teacher)),
        condition=_labels,
        out=out,
        resume=False,  # a demo that is run again shows how long it takes, and the student may be another
        progress=True,
    )
    page = bench.report(out, title="Digits: latency against quality")
    Console(width=max(80, console.width)).print(_table(records))  # a narrow terminal wraps its lines, not its cells
    console.print(f"Done in {time.monotonic() - begin:.0f} s. Samples side by side: {out / 'side_by_side.png'}")
    console.print(f"Open {page.resolve()}", soft_wrap=True)
    return page


@contextmanager
def _threads_that_help(model: fs.Denoiser) -> Iterator[None]:
    """All threads or one, whichever samples faster just now.

    A network this small gains a third from a second core, and loses tenfold where another program wants that core.
    """
    all_threads, plan = torch.get_num_threads(), _plan(model, "ddim", 2)

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            fs.sample(model, plan, fs.noise(SHAPE, range(200)), condition=_labels(torch.arange(200)))
            times.append(time.perf_counter() - begin)
        return median(times)

    torch.set_num_threads(min((1, all_threads), key=seconds))
    try:
        yield
    finally:
        torch.set_num_threads(all_threads)


ROWS = [("ddim", 50), *((name, 8) for name in solvers.SOLVERS if name != "consistency")]  # that one is for students


def _pictures(model: fs.Denoiser, rows: list[tuple[str, int]], prefix: str = "") -> dict[str, Tensor]:
    """Label -> images, of the same 20 seeds and classes for every row."""
    pictures = {}
    for name, steps in rows:
        plan = _plan(model, name, steps)
        noise = fs.noise(SHAPE, seeds=range(20))
        label = f"{prefix}{name}, {steps} step{'s' * (steps > 1)} (NFE {plan.nfe})"
        pictures[label] = fs.sample(model, plan, noise, condition=_labels(torch.arange(20)))
    return pictures


def _plan(model: fs.Denoiser, solver: str, steps: int) -> fs.Plan:
    spacing = fs.uniform_t if solver in ("ddim", "consistency") else fs.uniform_lam
    return fs.trace(solvers.get(solver), fs.grid(model.schedule, steps, spacing))


def _labels(indices: Tensor) -> dict[str, Tensor]:
    return {"class_labels": indices % 10}


def _cases(teacher: fs.Denoiser, student: fs.Denoiser) -> list[bench.Case]:
    product = bench.Case.product
    return [
        *product(model={"teacher": teacher}, solver=solvers.ddim, steps=[1, 2, 4, 8, 50], spacing=fs.uniform_t),
        *product(model={"teacher": teacher}, solver=[solvers.dpmpp_2m, solvers.unipc_3], steps=[4, 6, 8, 12]),
        *product(model={"teacher": teacher}, solver=solvers.heun, steps=[3, 6]),
        *product(
            model={"student": student},
            solver=[solvers.ddim, solvers.consistency],
            steps=[1, 2, 4],
            spacing=fs.uniform_t,
        ),
    ]


def _converged(teacher: fs.Denoiser) -> bench.Case:
    return bench.Case("teacher", teacher, "dpmpp_2m", solvers.dpmpp_2m, steps=50)


def _table(records: list[bench.Record]) -> Table:
    """The records for a terminal. NFE: of one sample; FD: 95% intervals; RMS: to the teacher's converged solution."""
    names = ("steps", "NFE", "ms/image", "fd_digits", "fd_pixels", "RMS")
    columns = (Column(name, justify="right", no_wrap=True) for name in names)
    table = Table("case", *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for record in records:
        if record.kind == "floor":
            table.add_row(record.name, "-", "-", "-", *_scores(record), "-")
            continue
        cells = [f"{record.model} {record.solver}", str(record.steps), str(record.nfe)]
        if record.error or record.ms_per_image is None:
            table.add_row(*cells, record.error or "not timed")
            continue
        rms = record.scores.get("endpoint_rms")
        table.add_row(*cells, f"{record.ms_per_image[0]:.2f}", *_scores(record), f"{rms.value:.3f}" if rms else "")
    return table


def _scores(record: bench.Record) -> list[str]:
    fd, pixels = record.scores.get("fd_digits"), record.scores.get("fd_pixels")
    spread = f" ± {1.96 * fd.se:.2f}" if fd and fd.se else ""
    return [f"{fd.centre:.2f}{spread}" if fd else "", f"{pixels.centre:.2f}" if pixels else ""]
