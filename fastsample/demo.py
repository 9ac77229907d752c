"""`fastsample demo`: the whole path on real digits. Like cli.py it joins the wings."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
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

    samples: int
    updates: float  # the share of the recipe's updates
    rounds: int


FULL, QUICK = Size(samples=2000, updates=1.0, rounds=10), Size(samples=500, updates=0.1, rounds=3)


def run(out: str | Path, *, quick: bool = False) -> Path:
    """Sample, distil and benchmark the built-in network; returns the path of the page to open."""
    out, size, begin, console = folder(out), QUICK if quick else FULL, time.monotonic(), Console()
    teacher = zoo.digits()

    console.rule("1. fewer steps for an existing model")
    console.print(str(_plan(teacher, "dpmpp_2m", 8)), highlight=False, soft_wrap=True)
    pictures = _pictures(teacher, ROWS)

    console.rule("2. distil a student")
    student = distill.distill_digits(teacher, out / "student", updates=size.updates, progress=True)
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
        progress=True,
    )
    page = bench.report(out, title="Digits: latency against quality")
    console.print(_table(records))
    console.print(f"{time.monotonic() - begin:.0f} s. Open {page.resolve()}", soft_wrap=True)
    return page


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
        *product(model={"teacher": teacher}, solver=solvers.ddim, steps=[1, 2, 4, 8, 16, 50], spacing=fs.uniform_t),
        *product(model={"teacher": teacher}, solver=[solvers.dpmpp_2m, solvers.unipc_3], steps=[4, 8, 16]),
        *product(model={"teacher": teacher}, solver=solvers.heun, steps=[4, 8]),
        *product(
            model={"student": student},
            solver=[solvers.ddim, solvers.consistency],
            steps=[1, 2, 4],
            spacing=fs.uniform_t,
        ),
    ]


def _converged(teacher: fs.Denoiser) -> bench.Case:
    return bench.Case("teacher", teacher, "dpmpp_2m", solvers.dpmpp_2m, 100)


def _table(records: list[bench.Record]) -> Table:
    table = Table("model", "solver", *(Column(name, justify="right") for name in COLUMNS))
    for record in records:
        if record.error or record.ms_per_image is None:
            table.add_row(record.model, record.solver, str(record.steps), record.error or "not timed")
            continue
        fd, pixels = record.scores["fd_digits"], record.scores["fd_pixels"]
        rms = record.scores.get("endpoint_rms")
        table.add_row(
            record.model,
            record.solver,
            str(record.steps),
            str(record.nfe),
            f"{record.ms_per_image[0]:.2f}",
            f"{fd.value:.2f} ± {1.96 * fd.se:.2f}" if fd.se is not None else f"{fd.value:.2f}",
            f"{pixels.value:.2f}",
            f"{rms.value:.3f}" if rms else "",
        )
    return table


COLUMNS = ("steps", "NFE", "ms/image", "fd_digits", "fd_pixels", "endpoint RMS")
