"""What guidance costs and what saving costs: rows of the network beside quality, on the built-in digits.

    python bench/guidance_cost.py     # writes bench/results/guidance.md; four minutes of one core

Every form of guidance at the same scale draws the same digits from the same noises. The weak network of autoguidance
is trained here: the shape and the start of the built-in one, a fraction of its updates.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsample as fs
from fastsample.bench.environment import environment
from fastsample.bench.extractor import extractor
from fastsample.bench.measure import Score
from fastsample.bench.quality import endpoint_rms, fd_digits
from fastsample.files import write_text
from fastsample.zoo import digits, digits_network
from fastsample.zoo.data import digits as images
from fastsample.zoo.digits import NULL

SCALE = 3.0
WEAK_UPDATES = 300  # of the 8000 of the built-in network
CONVERGED_STEPS = 60
CONVERGED_SAMPLES = 500
CHUNK = 500  # samples at once
MIDDLE = (-1.5, 1.5)  # of lam
Solver = Callable[..., Any]
Build = Callable[[fs.Denoiser, fs.Denoiser, fs.Grid], fs.Model]


@dataclass(frozen=True)
class Form:
    """A form of guidance: how it is written, and its model of (network, weak network, grid)."""

    name: str
    build: Build
    solver: Solver


@dataclass(frozen=True)
class Result:
    """One form at one number of steps. rows: for one sample; obeyed: the share read as the digit asked for."""

    form: Form
    steps: int
    rows: int
    obeyed: float
    fd: Score
    rms: float


def dpmpp_2m(model: Any, x: Tensor, grid: fs.Grid) -> Tensor:
    """DPM-Solver++(2M), as in `fastsample.solvers`. Lu et al. 2022, arXiv:2211.01095, Alg. 2."""
    old: tuple[Tensor, fs.Node] | None = None
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        slope = 0.0 * x0
        if old and t.sigma > 0:
            slope = (x0 - old[0]) * ((t.lam - s.lam) / (s.lam - old[1].lam))
        x = fs.exponential_step(x, x0 + 0.5 * slope, s, t)
        old = x0, s
    return x


def ddim(model: Any, x: Tensor, grid: fs.Grid) -> Tensor:
    for s, t in grid.steps():
        x = fs.exponential_step(x, model.predict(x, s), s, t)
    return x


def plain(name: str, *, solver: Solver = dpmpp_2m, scale: float = SCALE, **options: Any) -> Form:
    return Form(name, lambda model, weak, grid: fs.Guided(model, uncond=NONE, scale=scale, **options), solver)


def forms(everything: bool) -> Iterator[Form]:
    def projected(name: str, **options: Any) -> Form:
        return Form(
            name, lambda model, weak, grid: fs.ProjectedGuided(model, uncond=NONE, scale=SCALE, **options), dpmpp_2m
        )

    def plus_plus(scale: float, solver: Solver) -> Form:
        return Form(
            f"CFG++ at {scale:g}",
            lambda model, weak, grid: fs.Guided(model, uncond=NONE, scale=fs.cfg_plus_plus(grid, scale)),
            solver,
        )

    def autoguided(scale: float) -> Form:
        return Form(
            f"autoguidance at {scale:g}",
            lambda model, weak, grid: fs.Autoguided(model, weak, scale=scale),
            dpmpp_2m,
        )

    yield plain("CFG")
    yield plain(f"interval={MIDDLE}", interval=MIDDLE)
    yield plain(f"interval={MIDDLE}, reuse=2", interval=MIDDLE, reuse=2)
    for k in (2, 3, 4):
        yield plain(f"reuse={k}", reuse=k)
    yield plus_plus(1.0, dpmpp_2m)
    if not everything:
        return
    yield plain("rescale=0.7", rescale=0.7)
    yield projected("APG")
    yield projected("APG, momentum=-0.5", momentum=-0.5)
    yield autoguided(2.0)
    yield plain("none", scale=1.0)
    yield plain("CFG", solver=ddim)
    yield plus_plus(0.6, ddim)
    yield plus_plus(1.0, ddim)


NONE = {"class_labels": NULL}


def weak_network(updates: int) -> fs.Denoiser:
    """The network of the zoo as it is early in training: the same shape, start, data and loss."""
    model = digits_network(seed=0)
    x0, labels = images("train")
    parameters = list(model.network.parameters())  # type: ignore[attr-defined]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(updates):
        at = torch.randint(len(x0), (128,), generator=generator)
        t = torch.randint(1000, (128,), generator=generator).double()
        eps = torch.randn((128, 1, 8, 8), generator=generator)
        dropped = torch.rand(128, generator=generator) < 0.15
        node = fs.nodes(model.schedule, t)
        x = fs.per_sample(node.alpha, eps) * x0[at] + fs.per_sample(node.sigma, eps) * eps
        said = model.output(x, node, class_labels=torch.where(dropped, NULL, labels[at]))
        optimizer.zero_grad()
        (said - eps).square().mean().backward()
        optimizer.step()
    model.network.eval().requires_grad_(False)  # type: ignore[attr-defined]
    model.count = type(model.count)()
    return model


def drawn(model: fs.Model, plan: fs.Plan, count: int) -> Tensor:
    """`count` samples, of the digits 0 to 9 in turn."""
    chunks = []
    for first in range(0, count, CHUNK):
        seeds = range(first, min(first + CHUNK, count))
        labels = torch.tensor([seed % 10 for seed in seeds])
        noise = fs.noise((1, 8, 8), seeds=seeds)
        chunks.append(fs.sample(model, plan, noise, condition={"class_labels": labels}, progress=False))
    return torch.cat(chunks)


def plan_of(solver: Solver, schedule: fs.Schedule, steps: int) -> tuple[fs.Plan, fs.Grid]:
    grid = fs.grid(schedule, steps, spacing=fs.quadratic_t)
    return fs.trace(solver, grid), grid


def measure(steps: list[int], beside: list[int], count: int) -> list[Result]:
    network, weak = digits(), weak_network(WEAK_UPDATES)
    fd = fd_digits(images("all")[0])
    labels = torch.arange(count) % 10
    plan, _ = plan_of(dpmpp_2m, network.schedule, CONVERGED_STEPS)
    converged = drawn(fs.Guided(network, uncond=NONE, scale=SCALE), plan, min(count, CONVERGED_SAMPLES))
    results = []
    for n in [*steps, *beside]:
        for form in forms(everything=n == min(steps)) if n in steps else [plain(f"CFG, {n} steps")]:
            plan, grid = plan_of(form.solver, network.schedule, n)
            model = form.build(network, weak, grid)
            before = network.count.rows + weak.count.rows
            samples = drawn(model, plan, count)
            rows, counted = fs.rows(model, plan), network.count.rows + weak.count.rows - before
            if counted != rows * count:
                raise AssertionError(f"{form.name}: {rows} rows were forecast, {counted / count:g} counted")
            obeyed = (extractor()(samples.clamp(-1, 1)).argmax(1) == labels).float().mean()
            rms = endpoint_rms(samples[: len(converged)], converged)
            results.append(Result(form, n, rows, float(obeyed), fd(samples), rms.value))
            print(line(results[-1], count), flush=True)
    return results


def line(result: Result, count: int) -> str:
    se = math.sqrt(result.obeyed * (1 - result.obeyed) / count)
    fd_se = result.fd.se or math.nan
    return (
        f"| {result.form.name} | {result.form.solver.__name__} | {result.rows} | {100 * result.obeyed:.1f} "
        f"± {100 * se:.1f} | {result.fd.value:.2f} ± {fd_se:.2f} | {result.rms:.3f} |"
    )


def report(results: list[Result], steps: list[int], beside: list[int], count: int, seconds: float) -> str:
    found = environment()
    lines = [
        "# What guidance costs, and what saving costs",
        "",
        f"The built-in digits, guidance scale {SCALE:g}, `fs.quadratic_t`, {count} samples of the digits 0 to 9",
        "in turn, the same noises everywhere. Rows: what the network is given for one sample, counted. Obeyed: samples",
        "that the classifier behind `fd_digits` reads as the digit asked for. FD: `fd_digits` to all real digits;",
        "guidance gives up variety, so it is least without. RMS: endpoint distance to CFG itself, converged",
        f"(2M, {CONVERGED_STEPS} steps), over {min(count, CONVERGED_SAMPLES)} samples: an error for CFG and for reuse,",
        "while the other forms aim elsewhere.",
        "± is one standard error.",
    ]
    titles = {n: f"{n} steps" for n in steps} | dict.fromkeys(beside, "CFG with fewer steps, for the same rows")
    for title in dict.fromkeys(titles.values()):
        lines += ["", f"## {title}", "", "| guidance | solver | rows | obeyed, % | FD | RMS |"]
        lines += ["| --- | --- | --- | --- | --- | --- |"]
        lines += [line(result, count) for result in results if titles[result.steps] == title]
    lines += [
        "",
        "The weak network of autoguidance has the shape, start, data and loss of the built-in one, and",
        f"{WEAK_UPDATES} updates instead of 8000. CFG++ at 1 takes all of cond for x0; its scale is not that of CFG.",
        f"{found['cpu']}, one thread; Python {found['python']}, torch {found['torch']};",
        f"{seconds / 60:.1f} minutes of CPU.",
        "Made by `python bench/guidance_cost.py`.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Rows and quality of each form of guidance on the built-in digits.")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--steps", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--beside", type=int, nargs="+", default=[6, 10, 12], help="steps of CFG alone")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "guidance.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    results = measure(options.steps, options.beside, options.samples)
    seconds = time.process_time() - begin
    write_text(options.out, report(results, options.steps, options.beside, options.samples, seconds))


if __name__ == "__main__":
    main()
