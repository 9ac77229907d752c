"""How long the Frechet distance takes: ours against scipy's `sqrtm` and the eigenvalues of S_a S_b, on one thread.

    python bench/frechet_speed.py     # writes bench/results/frechet.md

The distance is from statistics to statistics, as pytorch-fid (sqrtm) and torch-fidelity (eigenvalues) compute it from
theirs. All run in one process, in rounds A B C C B A, and their values are compared. Nothing of ours is kept from call
to call: the root of the reference, which a sweep computes once, is computed anew.
"""

from __future__ import annotations

import argparse
import statistics as numbers
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from fastsample.bench.environment import environment
from fastsample.bench.frechet import frechet_distance
from fastsample.bench.latency import median_interval
from fastsample.bench.moments import Moments, Statistics, statistics
from fastsample.files import write_text

Timed = dict[str, list[float]]


def distances(d: int) -> dict[str, Callable[[], float]]:
    """The same distance of d features in three ways, of covariances of full rank whose eigenvalues fall as 1/k."""
    source = torch.Generator().manual_seed(0)
    falling = torch.arange(1, d + 1, dtype=torch.float64).rsqrt()
    sides = []
    for shift in (0.0, 0.1):
        turn = torch.linalg.qr(torch.randn(d, d, generator=source, dtype=torch.float64))[0]
        root = turn * falling
        sides.append((torch.full((d,), shift, dtype=torch.float64), root @ root.T))
    (mean_a, cov_a), (mean_b, cov_b) = sides
    arrays = cov_a.numpy(), cov_b.numpy()
    rest = float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace())

    def ours() -> float:
        return frechet_distance(Statistics(mean_a, cov_a, 50_000), Statistics(mean_b, cov_b, 50_000)).value

    def by_sqrtm() -> float:
        return rest - 2 * float(np.trace(sqrtm(arrays[0] @ arrays[1])).real)

    def by_eigenvalues() -> float:
        return rest - 2 * float(np.sqrt(np.linalg.eigvals(arrays[0] @ arrays[1]).astype(complex)).real.sum())

    return {"fastsample": ours, "sqrtm (scipy)": by_sqrtm, "eigvals (numpy)": by_eigenvalues}


def compared(candidates: dict[str, Callable[[], float]], rounds: int) -> tuple[Timed, dict[str, float]]:
    """Seconds of each in rounds A B C C B A, and the values."""
    timed: Timed = {name: [] for name in candidates}
    values = {name: call() for name, call in candidates.items()}  # warms up
    first = next(iter(values.values()))
    for name, value in values.items():
        if abs(value / first - 1) > 1e-8:
            raise AssertionError(f"{name} gives {value!r}, not {first!r}: times of different results say nothing")
    for _ in range(rounds):
        for name in [*candidates, *reversed(candidates)]:
            timed[name].append(_seconds(candidates[name]))
    return timed, values


def streams(n: int = 50_000, d: int = 64) -> dict[str, Callable[[], object]]:
    """What is done with features [n, d]: the plain statistics; the moments in 8 blocks, in parts of 1000; all of it."""
    features = torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reference = statistics(1.1 * features[: n // 2])

    def moments() -> Moments:
        made = Moments(d)
        for start in range(0, n, 1000):
            made.add(features[start : start + 1000], range(start, min(start + 1000, n)))
        return made

    def distance() -> Tensor:
        return torch.tensor(frechet_distance(features, reference).value)

    return {
        "mean and covariance": lambda: statistics(features),
        "moments in 8 blocks, streamed": moments,
        "distance with standard error and jackknife": distance,
    }


def _seconds(call: Callable[[], object]) -> float:
    """CPU time of one thread: beside other work the wall clock measures the others."""
    begin = time.process_time()
    call()
    return time.process_time() - begin


def report(found: dict[int, tuple[Timed, dict[str, float]]], streamed: Timed, rounds: int) -> str:
    about = environment()
    spread = "its 95% interval" if rounds > 5 else "the least and the greatest"
    names = list(next(iter(found.values()))[0])
    lines = [
        "# The Frechet distance",
        "",
        "From statistics to statistics, float64, one thread, CPU seconds: the median of all runs, and, as ratios, the",
        f"median over {rounds} rounds A B C C B A with {spread}.",
        "",
        "| dimensions | "
        + " | ".join([f"{name}, s" for name in names] + [f"{names[0]} / {name}" for name in names[1:]])
        + " |",
        f"| --- |{' --- |' * (2 * len(names) - 1)}",
    ]
    for d, (timed, _) in found.items():
        seconds = " | ".join(f"{numbers.median(timed[name]):.3g}" for name in names)
        lines.append(f"| {d} | {seconds} | {' | '.join(_ratio(timed[names[0]], timed[name]) for name in names[1:])} |")
    lines += [
        "",
        "The values agree to 1e-8 and better: "
        + "; ".join(
            f"{d}: {max(abs(value / values[names[0]] - 1) for value in values.values()):.0e}"
            for d, (_, values) in found.items()
        )
        + ".",
        "",
        "| of 50 000 features in 64 dimensions | s |",
        "| --- | --- |",
        *(f"| {name} | {numbers.median(times):.3g} |" for name, times in streamed.items()),
        "",
        f"{about['cpu']}, {about['cores']} cores shared with other work; Python {about['python']}, torch",
        f"{about['torch']}, numpy {version('numpy')}, scipy {version('scipy')}.",
        f"Made by `python bench/frechet_speed.py --rounds {rounds}`.",
    ]
    return "\n".join(lines) + "\n"


def _ratio(ours: list[float], theirs: list[float]) -> str:
    pairs = [[first + second for first, second in zip(times[::2], times[1::2])] for times in (ours, theirs)]
    ratios = [a / b for a, b in zip(*pairs)]
    low, high = median_interval(ratios)
    return f"**{numbers.median(ratios):.3f}** ({low:.3f} .. {high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Seconds of the Frechet distance, ours and by others' formulas.")
    parser.add_argument("--rounds", type=int, default=3, help="palindromic rounds; two runs of each way in one")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "frechet.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {d: compared(distances(d), options.rounds) for d in options.dimensions}
    streamed = {name: [_seconds(call) for _ in range(5)] for name, call in streams().items()}
    text = report(found, streamed, options.rounds)
    write_text(options.out, text)
    print(text)


if __name__ == "__main__":
    main()
