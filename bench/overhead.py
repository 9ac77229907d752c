"""What the loop costs beside the network: `fs.sample` against diffusers' scheduler loop, on one thread of a CPU.

    python bench/overhead.py     # writes bench/results/overhead.md

All run DPM-Solver++(2M) at the same times from the same noise, with a network that returns a tensor made beforehand,
so that what is left is the loop. The bare arithmetic is the least that torch needs for it: the sums alone, in a Python
loop over numbers that lie ready. Their results are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastsample as fs
from fastsample.bench.environment import environment
from fastsample.bench.latency import Times, median_interval
from fastsample.files import write_text

SHAPES = [(1, 1, 8, 8), (4, 4, 64, 64)]
STEPS = 20
Loop = Callable[[], Tensor]


def loops(shape: tuple[int, ...], steps: int = STEPS) -> dict[str, Loop]:
    """Our loop, its sums alone, diffusers' loop as its documentation writes it, and that with its `set_timesteps`."""
    from diffusers import DPMSolverMultistepScheduler

    make: Any = DPMSolverMultistepScheduler
    scheduler = make(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", solver_order=2)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    noise, eps = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    def network(x: Tensor, t: Tensor) -> Tensor:
        return eps

    model = fs.Denoiser(network, fs.VP.scaled_linear())
    plan = fs.trace(dpmpp_2m, fs.grid(model.schedule, steps, spacing=fs.at_times(times)))
    start = noise * plan.start.sigma

    def ours() -> Tensor:
        return fs.sample(model, plan, noise)

    factors = [(*model.prediction.x0(row.node.alpha, row.node.sigma), row.a, row.b) for row in plan.rows]

    @torch.no_grad()
    def bare() -> Tensor:
        x = old = noise * plan.start.sigma
        for u, w, a, b in factors:
            x0 = (x * u).add_(eps, alpha=w)
            x = (x * a).add_(x0, alpha=b[0])
            if len(b) > 1:
                x.add_(old, alpha=b[1])
            old = x0
        return x

    @torch.no_grad()
    def theirs() -> Tensor:
        # The part of set_timesteps without which the second run would go wrong. The rest is not timed here.
        scheduler._step_index, scheduler.lower_order_nums, scheduler.model_outputs = None, 0, [None, None]
        x = start
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x).prev_sample
        return x

    def theirs_in_full() -> Tensor:
        scheduler.set_timesteps(steps)
        return theirs()

    return {
        "fs.sample": ours,
        "bare arithmetic": bare,
        "diffusers": theirs,
        "diffusers with set_timesteps": theirs_in_full,
    }


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


def measure(shape: tuple[int, ...], rounds: int) -> dict[str, Times]:
    candidates = loops(shape)
    ours, bare, theirs, _ = (loop() for loop in candidates.values())
    if not torch.equal(ours, bare):
        raise AssertionError("fs.sample and the bare arithmetic differ; they do the same sums in the same order")
    # The coefficients of diffusers are float32, and eps is divided by alpha = 0.07 at the start.
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    for k in range(-20, rounds):  # the first ones warm up
        for name in [*candidates, *reversed(candidates)]:
            seconds = _cpu_seconds(candidates[name])
            if k >= 0:
                samples[name].append(seconds)
    return {name: Times(tuple(times)) for name, times in samples.items()}


def _cpu_seconds(loop: Loop) -> float:
    """CPU time, unlike `interleaved`: beside other work a loop of 4 ms loses its core, one of 1 ms seldom."""
    begin = time.process_time()
    loop()
    return time.process_time() - begin


def report(measured: dict[tuple[int, ...], dict[str, Times]], rounds: int) -> str:
    found = environment()
    names = list(next(iter(measured.values())))
    lines = [
        "# The loop beside the network",
        "",
        "`fs.sample`, whole and with its checks, against diffusers' `DPMSolverMultistepScheduler` in the loop",
        f"`x = scheduler.step(network(x, t), t, x).prev_sample`: DPM-Solver++(2M), {STEPS} steps, float32, one thread.",
        "The network returns a tensor made beforehand; its call is in every number but the bare arithmetic's, which is",
        "five calls of torch a step: x0 from eps, the sum of three terms. The plan is traced beforehand, and so the",
        "fair ratio to diffusers leaves out `set_timesteps`, which it needs before each run; the last counts it.",
        "",
        f"| CPU time of a step, us | {' | '.join(names)} |",
        f"| --- |{' --- |' * len(names)}",
    ]
    lines += [f"| {list(shape)} | {' | '.join(map(_per_step, times.values()))} |" for shape, times in measured.items()]
    lines += [
        "",
        f"| `fs.sample` divided by | {' | '.join(names[1:])} |",
        f"| --- |{' --- |' * (len(names) - 1)}",
    ]
    for shape, times in measured.items():
        ours, *others = times.values()
        lines.append(f"| {list(shape)} | {' | '.join(_ratio(ours, other) for other in others)} |")
    lines += [
        "",
        f"CPU time. Medians of {2 * rounds} runs each, quartiles in brackets; ratios: medians over {rounds}",
        "palindromic rounds (A B C D D C B A), each taken within its round, with the 95% interval of the median.",
        f"{found['cpu']}, {found['cores']} cores shared with other work; Python {found['python']}, torch",
        f"{found['torch']}, diffusers {version('diffusers')}. Made by `python bench/overhead.py --rounds {rounds}`.",
    ]
    return "\n".join(lines) + "\n"


def _per_step(times: Times) -> str:
    low, median, high = (1e6 / STEPS * second for second in statistics.quantiles(times.samples_s, n=4))
    return f"{median:.1f} ({low:.1f} .. {high:.1f})"


def _ratio(ours: Times, theirs: Times) -> str:
    pairs = [[first + second for first, second in zip(t.samples_s[::2], t.samples_s[1::2])] for t in (ours, theirs)]
    ratios = [a / b for a, b in zip(*pairs)]
    low, high = median_interval(ratios)
    return f"**{statistics.median(ratios):.3f}** ({low:.3f} .. {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Host overhead of fs.sample against diffusers' scheduler loop.")
    parser.add_argument("--rounds", type=int, default=200, help="palindromic rounds; two runs of each loop in one")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "overhead.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    text = report({shape: measure(shape, options.rounds) for shape in SHAPES}, options.rounds)
    write_text(options.out, text)
    print(text)


if __name__ == "__main__":
    main()
