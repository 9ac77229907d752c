"""Latency: seconds a call, measured so that a busy machine disturbs all candidates alike.

Candidates are interleaved in rounds (A B C, C B A), every raw time is kept, and the median stands for them. A case is
compared with a baseline Z by pairs of calls side by side, (Z A) on the way there and (A Z) on the way back, which
together are A B B A: each pair gives a ratio, and the median of them all is the result. On a loaded machine that is off
by 3 percent where the ratio of separately measured means is off by 5 to 7, and that of sums over four calls by 6 and
more, since one disturbed call spoils the whole sum.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from scipy.special import bdtr

from fastsample.process import using_threads

Call = Callable[[], object]


@dataclass(frozen=True)
class Latency:
    """How `run` measures latency.

    rounds: every case is timed twice a round, once on the way there and once on the way back.
    warmup: calls of each case between its first and the counted ones, with the full case.
    batch: images a call; None: the batch of the run.
    threads: of the CPU while it measures, put back afterwards; None leaves them. One, since on a busy machine two
        made medians 6 to 10 times the minimum.
    baseline: the name of the case that all others are compared with; it is called beside every call of theirs.
    """

    rounds: int = 10
    warmup: int = 1
    batch: int | None = None
    threads: int | None = 1
    baseline: str | None = None

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

    @property
    def p50_s(self) -> float:
        return self.median_s

    @property
    def p90_s(self) -> float:
        return _quantile(self.samples_s, 0.9)

    @property
    def p99_s(self) -> float | None:
        """None below 100 samples, of which no more than one would lie beyond it."""
        return _quantile(self.samples_s, 0.99) if len(self.samples_s) >= 100 else None


@dataclass(frozen=True)
class Ratio:
    """Time of a over time of b: the median of paired ratios and its 95% interval."""

    median: float
    low: float
    high: float
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class Timing:
    """How long one case takes, phase by phase, and what it needs.

    batch: images a call. steady: seconds a call after warm-up, every one of them. load_s: of making the model, where
    the run did that. first_s: the first call, with compilation and capture. warmup_s: the calls between.
    memory: bytes, as `peak_memory` names them. energy_j: of a call, where it is measured.
    ratio: time of an image over that of the case named `baseline`, in pairs side by side; None for the baseline itself.
    """

    batch: int
    steady: Times
    load_s: float | None = None
    first_s: float | None = None
    warmup_s: tuple[float, ...] = ()
    memory: dict[str, int] = field(default_factory=dict)
    energy_j: float | None = None
    ratio: Ratio | None = None
    baseline: str | None = None

    @property
    def images_per_s(self) -> float:
        """In the steady phase."""
        return self.batch / self.steady.median_s


@dataclass(frozen=True)
class Started:
    """The phases of a case before the counted calls. first_s: with compilation and capture."""

    first_s: float
    warmup_s: tuple[float, ...]


@dataclass(frozen=True)
class Round:
    """One interleaved round: seconds of each case on the way there and on the way back.

    beside: of the baseline's call next to each of those. The baseline is no key of either, unless it was alone.
    """

    seconds: dict[str, tuple[float, ...]]
    beside: dict[str, tuple[float, ...]] = field(default_factory=dict)
    baseline: str | None = None

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> Round:
        """From what JSON made of `dataclasses.asdict`."""
        seconds, beside = ({name: tuple(times) for name, times in body[part].items()} for part in ("seconds", "beside"))
        return cls(seconds, beside, body["baseline"])

    def of(self, name: str) -> tuple[float, ...]:
        """All the calls of a case in this round; none where it took no part."""
        own = self.seconds.get(name, ())
        return own + sum(self.beside.values(), ()) if name == self.baseline else own


class CallFailed(RuntimeError):
    """A call raised; `name` says whose, and `__cause__` what."""

    def __init__(self, name: str, cause: Exception):
        super().__init__(f"{name}: {type(cause).__name__}: {cause}")
        self.name = name


def start(call: Call, how: Latency | None = None, *, device: str | torch.device = "cpu") -> Started:
    """The first call of a case, then its warm-up. A process that goes on with earlier rounds starts its cases again."""
    how, device = how or Latency(), torch.device(device)
    with using_threads(how.threads):
        first = timed(call, device)
        return Started(first, tuple(timed(call, device) for _ in range(how.warmup)))


def one_round(
    calls: Mapping[str, Call],
    number: int = 0,
    how: Latency | None = None,
    *,
    device: str | torch.device | Mapping[str, str | torch.device] = "cpu",
) -> Round:
    """Time every call there and back: A B C, C B A, and beside the baseline Z: ZA ZB ZC, CZ BZ AZ.

    calls: by the name that how.baseline is one of; they must have been started. device: of all of them, or of each.
    number: of this round. In odd ones the pairs are turned, AZ BZ CZ, ZC ZB ZA: at the turn a call follows one of its
        own kind and finds its caches warm, which is then the case's advantage once and the baseline's once.
    Raises CallFailed, which names the case, where a call raises; nothing of that round is kept.
    """
    how = how or Latency()
    baseline = how.baseline
    if baseline is not None and baseline not in calls:
        raise ValueError(f"the baseline {baseline!r} is none of the cases: {', '.join(calls)}")
    names = [name for name in calls if name != baseline] or list(calls)
    if names == [baseline]:
        baseline = None  # alone there is nothing beside it
    seconds: dict[str, list[float]] = {name: [] for name in names}
    beside: dict[str, list[float]] = {name: [] for name in names if baseline is not None}

    def measure(name: str, into: list[float]) -> None:
        try:
            into.append(timed(calls[name], torch.device(device[name] if isinstance(device, Mapping) else device)))
        except Exception as error:
            raise CallFailed(name, error) from error

    def pair(name: str, *, turned: bool) -> None:
        if baseline is not None and not turned:
            measure(baseline, beside[name])
        measure(name, seconds[name])
        if baseline is not None and turned:
            measure(baseline, beside[name])

    odd = number % 2 == 1
    with using_threads(how.threads):
        for name in names:
            pair(name, turned=odd)
        for name in reversed(names):
            pair(name, turned=not odd)
    return Round(_tuples(seconds), _tuples(beside), how.baseline)


def timing(
    rounds: Sequence[Round],
    name: str,
    *,
    batch: int,
    started: Started | None = None,
    load_s: float | None = None,
    memory: Mapping[str, int] | None = None,
    energy_j: float | None = None,
    baseline_batch: int | None = None,
) -> Timing:
    """What the rounds say of one case. Its ratio is taken from the rounds in which it stood beside the baseline.

    batch, baseline_batch: images a call of the case and of the baseline; None: the same. The ratio is that of an image.
    """
    samples = tuple(seconds for one in rounds for seconds in one.of(name))
    if not samples:
        raise ValueError(f"none of the {len(rounds)} rounds timed {name!r}")
    baselines = {one.baseline for one in rounds if name in one.beside or name == one.baseline}
    if len(baselines) > 1:
        found = ", ".join(sorted(map(repr, baselines)))
        raise ValueError(f"the rounds of {name!r} have the baselines {found}; give those of one baseline")
    pairs = [pair for one in rounds if name in one.beside for pair in zip(one.seconds[name], one.beside[name])]
    images = (baseline_batch or batch) / batch
    return Timing(
        batch=batch,
        steady=Times(samples),
        load_s=load_s,
        first_s=started.first_s if started else None,
        warmup_s=started.warmup_s if started else (),
        memory=dict(memory or {}),
        energy_j=energy_j,
        ratio=_ratio([case / other * images for case, other in pairs]) if pairs else None,
        baseline=next(iter(baselines), None),
    )


def interleaved(
    calls: Mapping[str, Call], how: Latency | None = None, *, device: str | torch.device = "cpu"
) -> dict[str, Times]:
    """Time every call in palindromic rounds: A B C, C B A, ...

    device: where the calls work; on a GPU its own clock is used (CUDA events), and it is waited for at both ends.
    """
    how, device = how or Latency(), torch.device(device)
    with using_threads(how.threads):
        for call in calls.values():
            for _ in range(how.warmup):
                call()
    rounds = [one_round(calls, number, how, device=device) for number in range(how.rounds)]
    return {name: Times(tuple(seconds for one in rounds for seconds in one.of(name))) for name in calls}


def paired_ratio(
    a: Call,
    b: Call,
    *,
    pairs: int = 20,
    warmup: int = 2,
    threads: int | None = 1,
    device: str | torch.device = "cpu",
) -> Ratio:
    """Time of a over time of b, from pairs measured side by side in the order A B, B A, B A, A B, ...

    On a loaded machine this finds a difference of 5% that separate medians miss.
    """
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    device = torch.device(device)
    ratios = []
    with using_threads(threads):
        for call in [a, b] * warmup:
            call()
        for k in range(pairs):
            if k % 4 in (0, 3):
                time_a, time_b = timed(a, device), timed(b, device)
            else:
                time_b, time_a = timed(b, device), timed(a, device)
            ratios.append(time_a / time_b)
    return _ratio(ratios)


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """The 95% interval of a median, from two order statistics; below 6 values the least and the greatest.

    The k-th smallest of n and the k-th greatest enclose the median with probability 1 - 2 P(Binomial(n, 1/2) < k).
    """
    ordered, n = sorted(values), len(values)
    if not n:
        raise ValueError("no values, no median")
    k = max(1, bisect_right(range(n // 2), 0.025, key=lambda fewer: bdtr(fewer, n, 0.5)))
    return ordered[k - 1], ordered[n - k]


def _ratio(ratios: Sequence[float]) -> Ratio:
    """Between two middle values lies their geometric mean: a over b is then the inverse of b over a."""
    middle = math.exp(statistics.median(map(math.log, ratios)))
    return Ratio(middle, *median_interval(ratios), tuple(ratios))


def _quantile(values: Sequence[float], q: float) -> float:
    """Interpolated between the two nearest of the ordered values, the least at q = 0 and the greatest at q = 1."""
    ordered, place = sorted(values), q * (len(values) - 1)
    low = ordered[int(place)]
    return low + (place - int(place)) * (ordered[min(int(place) + 1, len(values) - 1)] - low)


def _tuples(lists: Mapping[str, list[float]]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(times) for name, times in lists.items()}


def timed(call: Call, device: torch.device) -> float:
    """Seconds of one call, the device's work included: it is waited for before and after, and never between."""
    if device.type == "cuda":
        return _time_cuda(call, device)
    wait = _nothing if device.type == "cpu" else partial(torch.accelerator.synchronize, device)
    wait()
    begin = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - begin


def _nothing() -> None:
    pass


def _time_cuda(call: Call, device: torch.device) -> float:
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1000
