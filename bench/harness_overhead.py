"""What the harness adds to the latency of a case: its timed calls against a bare loop of `fs.sample`.

    python bench/harness_overhead.py     # writes bench/results/harness_overhead.md; some minutes of one core

Both sample the same case on one thread in the order A B B A: one round of the harness, which is two calls there and
back, beside two calls in a loop that does nothing else. What is added does not depend on the network, so it is measured
with one that returns a tensor made beforehand, where microseconds can be told; the network of the built-in digits says
what they are a share of, and is measured both ways too.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import fastsample as fs
from fastsample.bench import Case, Latency, environment, median_interval
from fastsample.bench.latency import one_round, start
from fastsample.bench.overhead import dpmpp_2m
from fastsample.bench.sampler import Sampler
from fastsample.files import write_text
from fastsample.zoo import digits

SHAPE = (1, 8, 8)
STEPS = (2, 8, 32)
LIMIT = 0.02


@dataclass
class Side:
    """Of every pair: CPU seconds a call with all around it, and seconds a call by the clock, as they are reported."""

    cpu_s: list[float] = field(default_factory=list)
    clock_s: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Pairs:
    """The harness and the bare loop, side by side."""

    ours: Side
    theirs: Side

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours.cpu_s, self.theirs.cpu_s)]

    @property
    def reported(self) -> list[float]:
        return [a / b for a, b in zip(self.ours.clock_s, self.theirs.clock_s)]

    @property
    def added_us(self) -> list[float]:
        return [1e6 * (a - b) for a, b in zip(self.ours.cpu_s, self.theirs.cpu_s)]


def free(digits: fs.Denoiser) -> fs.Denoiser:
    """A model like the digits' own whose network costs nothing."""
    eps = torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(1))
    return fs.Denoiser(lambda x, t, **condition: eps, digits.schedule)


def measure(case: Case, pairs: int) -> Pairs:
    """One image a call, where the harness weighs most."""
    device, how = torch.device("cpu"), Latency(rounds=1, warmup=5)
    indices = torch.arange(1)
    call: Callable[[], Tensor] = Sampler(SHAPE, 1, device, labels).call(case, indices, drawn=True)
    noise, condition = fs.noise(SHAPE, indices.tolist()).draw(0), labels(indices)

    def bare() -> Tensor:
        return fs.sample(case.model, case.plan, noise, condition=condition, progress=False)

    if not torch.equal(bare(), call()):
        raise AssertionError(f"{case.name}: the harness and the bare loop sample something else")

    def with_harness(side: Side) -> None:
        begin = time.process_time()
        one = one_round({case.name: call}, 0, how, device=device)
        side.cpu_s.append((time.process_time() - begin) / 2)
        side.clock_s.append(statistics.mean(one.seconds[case.name]))

    def without(side: Side) -> None:
        begin, clock = time.process_time(), time.perf_counter()
        bare()
        bare()
        end = time.perf_counter()
        side.cpu_s.append((time.process_time() - begin) / 2)
        side.clock_s.append((end - clock) / 2)

    start(call, how, device=device)
    start(bare, how, device=device)
    found = Pairs(Side(), Side())
    for k in range(pairs):
        if k % 2 == 0:
            with_harness(found.ours)
            without(found.theirs)
        else:
            without(found.theirs)
            with_harness(found.ours)
    return found


def labels(indices: Tensor) -> dict[str, Tensor]:
    return {"class_labels": indices % 10}


def report(measured: dict[int, tuple[Pairs, Pairs]], pairs: int) -> str:
    """measured: NFE -> with the free network, with that of the digits."""
    machine = environment()
    lines = [
        "# What the harness adds to a case's latency",
        "",
        "Timed calls of `bench.run` beside a bare loop of `fs.sample` with the same noise: DPM-Solver++(2M), one",
        "image a call, float32, one thread. What is added is measured with a network that costs nothing; its share is",
        "that of a call with the network of the built-in digits, 160 thousand parameters, and must stay below",
        f"{LIMIT:.0%}. Ratios are measured with that network directly: of CPU time, with all that a round does around",
        "its calls, and of the times that are reported.",
        "",
        "| NFE | a bare call, ms of CPU | added, us of CPU | share | ratio of CPU time | ratio by the clock |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for nfe, (light, real) in measured.items():
        bare_s = statistics.median(real.theirs.cpu_s)
        share = statistics.median(light.added_us) * 1e-6 / bare_s
        ratios = f"{_median(real.ratios, 3)} | {_median(real.reported, 3)}"
        lines.append(f"| {nfe} | {1e3 * bare_s:.2f} | {_median(light.added_us, 1)} | **{share:.3%}** | {ratios} |")
    lines += [
        "",
        f"Medians of {pairs} pairs with the network that costs nothing and of {pairs} / NFE with that of the digits,",
        "in the order A B B A, with the 95% interval of the median.",
        f"{machine['cpu']}, {machine['cores']} cores shared with other work (load average {machine['load average']});",
        f"Python {machine['python']}, torch {machine['torch']}. Made by",
        f"`python bench/harness_overhead.py --pairs {pairs}`.",
    ]
    return "\n".join(lines) + "\n"


def _median(values: Sequence[float], digits: int) -> str:
    low, high = median_interval(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} .. {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="The timed calls of the harness beside a bare loop of fs.sample.")
    parser.add_argument("--pairs", type=int, default=1600)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "harness_overhead.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    real = digits()
    measured = {}
    for steps in STEPS:
        light, heavy = Case.product(model={"free": free(real), "digits": real}, solver=dpmpp_2m, steps=steps)
        measured[light.plan.nfe] = measure(light, options.pairs), measure(heavy, max(1, options.pairs // steps))
        print(f"NFE {light.plan.nfe}: {_median(measured[light.plan.nfe][0].added_us, 1)} us a call", flush=True)
    text = report(measured, options.pairs)
    write_text(options.out, text)
    print(text)


if __name__ == "__main__":
    main()
