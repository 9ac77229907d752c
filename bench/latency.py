"""Latency: seconds a call, measured so that a busy machine disturbs all candidates alike.

Candidates are interleaved (A B C, C B A, ...), every raw time is kept, and the median stands for them: on a loaded
machine the ratio of separately measured means is off by 5 to 7 percent, the median of paired ratios by 3.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import comb

import torch

Call = Callable[[], object]


@dataclass(frozen=True)
class Latency:
    """How `run` measures latency.

    rounds: every case is timed twice a round, once on the way there and once on the way back.
    warmup: calls of each case that are not counted, with the full case.
    batch: images a call; None: the batch of the run.
    threads: of the CPU while it measures, put back afterwards; None leaves them. One, since on a busy machine two
        made medians 6 to 10 times the minimum.
    """

    rounds: int = 10
    warmup: int = 1
    batch: int | None = None
    threads: int | None = 1

    def __post_init__(self) -> None:
        for name, least in (("rounds", 1), ("warmup", 0), ("batch", 1), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} of a latency must be at least {least}, got {value}")


latency = Latency  # bench.latency(rounds=20) reads like bench.fd_digits(images)


@dataclass(frozen=True)
class Times:
    """The times of one candidate: every sample, in the order measured. Medians, never means."""

    samples_s: tuple[float, ...]

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_s)

    @property
    def interval_s(self) -> tuple[float, float]:
        """The 95% interval of the median."""
        return median_interval(self.samples_s)


@dataclass(frozen=True)
class Ratio:
    """Time of a over time of b: the median of paired ratios and its 95% interval."""

    median: float
    low: float
    high: float
    ratios: tuple[float, ...]


def interleaved(
    calls: Mapping[str, Call], how: Latency | None = None, *, device: str | torch.device = "cpu"
) -> dict[str, Times]:
    """Time every call in palindromic rounds: A B C, C B A, ...

    device: where the calls work; on a GPU its own clock is used (CUDA events), and it is waited for at both ends.
    """
    how, device = how or Latency(), torch.device(device)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    with _threads(how.threads):
        for call in calls.values():
            for _ in range(how.warmup):
                call()
        for _ in range(how.rounds):
            for name in [*calls, *reversed(list(calls))]:
                samples[name].append(_time(calls[name], device))
    return {name: Times(tuple(times)) for name, times in samples.items()}


def paired_ratio(
    a: Call,
    b: Call,
    *,
    pairs: int = 20,
    warmup: int = 2,
    threads: int | None = 1,
    device: str | torch.device = "cpu",
) -> Ratio:
    """Time of a over time of b, from pairs measured side by side in the order A B, B A, A B, ...

    On a loaded machine this finds a difference of 5% that separate medians miss.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    device = torch.device(device)
    ratios = []
    with _threads(threads):
        for call in [a, b] * warmup:
            call()
        for k in range(pairs):
            if k % 2 == 0:
                time_a, time_b = _time(a, device), _time(b, device)
            else:
                time_b, time_a = _time(b, device), _time(a, device)
            ratios.append(time_a / time_b)
    return Ratio(statistics.median(ratios), *median_interval(ratios), tuple(ratios))


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a median, from two order statistics; below 6 values the least and the greatest.

    The k-th smallest of n and the k-th greatest enclose the median with probability 1 - 2 P(Binomial(n, 1/2) < k).
    """
    ordered, n = sorted(values), len(values)
    if not n:
        raise ValueError("no values, no median")
    k, outside = 1, 2 * (1 + n) / 2**n
    while outside <= 0.05:
        k += 1
        outside += 2 * comb(n, k) / 2**n
    return ordered[k - 1], ordered[n - k]


def _time(call: Call, device: torch.device) -> float:
    if device.type == "cuda":
        return _time_cuda(call, device)
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def _time_cuda(call: Call, device: torch.device) -> float:
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1000


@contextmanager
def _threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
