"""Latency: the order of the calls, the phases, the intervals, what is put back, and when a GPU is waited for."""

import contextlib
import itertools
import json
import math
import time
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsample import bench
from fastsample.bench.latency import CallFailed, Round, Started, Timing, one_round, start, timed, timing


def noted(names, into):
    return {name: (lambda name=name: into.append(name)) for name in names}


def test_calls_are_interleaved_in_palindromes_after_a_warm_up():
    order = []
    times = bench.interleaved(noted("ABC", order), bench.latency(rounds=2, warmup=1))
    assert "".join(order) == "ABC" + "ABCCBA" * 2
    assert [len(t.samples_s) for t in times.values()] == [4, 4, 4]


def test_a_round_with_a_baseline_calls_it_beside_every_call_of_every_case():
    order = []
    how = bench.latency(baseline="Z")
    calls = noted("AZBC", order)
    even, odd = one_round(calls, 0, how), one_round(calls, 1, how)
    assert "".join(order) == "ZAZBZC" + "CZBZAZ" + "AZBZCZ" + "ZCZBZA"
    for one in (even, odd):
        assert set(one.seconds) == set(one.beside) == set("ABC")
        assert {len(times) for times in [*one.seconds.values(), *one.beside.values()]} == {2}
        assert len(one.of("Z")) == 6


def test_a_baseline_alone_is_timed_there_and_back():
    order = []
    one = one_round(noted("Z", order), 0, bench.latency(baseline="Z"))
    assert "".join(order) == "ZZ"
    assert len(one.of("Z")) == 2
    assert timing([one], "Z", batch=1).ratio is None


def test_a_baseline_that_is_no_case_is_named_before_anything_runs():
    order = []
    with pytest.raises(ValueError, match="baseline 'Q' is none of the cases: A, B"):
        one_round(noted("AB", order), 0, bench.latency(baseline="Q"))
    assert order == []


def test_a_call_that_fails_is_named_and_its_cause_kept():
    with pytest.raises(CallFailed, match="B: ZeroDivisionError") as caught:
        one_round({"A": int, "B": lambda: 1 / 0})
    assert caught.value.name == "B"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still but for the seconds that a call puts on it."""
    found = SimpleNamespace(s=1000.0)
    monkeypatch.setattr(time, "perf_counter", lambda: found.s)
    return found


def test_the_first_call_and_the_warm_up_are_phases_of_their_own(clock):
    pauses = iter([60.0, 3.0, 2.0])

    def call():
        clock.s += next(pauses)

    begun = start(call, bench.latency(warmup=2))
    assert (begun.first_s, begun.warmup_s) == (60.0, (3.0, 2.0))
    assert next(pauses, None) is None


@pytest.mark.parametrize("others", [1, 2, 5])
@pytest.mark.parametrize("true", [0.5, 1.0, 1.05])
def test_calls_that_find_their_own_caches_warm_do_not_move_the_ratio(clock, others, true):
    """A call after one of its own kind is a fifth faster here, as small networks on a CPU are."""
    last = [""]

    def call(name, seconds):
        clock.s += seconds * (0.8 if last[0] == name else 1.0)
        last[0] = name

    calls = {"Z": partial(call, "Z", 1.0)} | {f"{k}": partial(call, f"{k}", true) for k in range(others)}
    how = bench.latency(baseline="Z")
    rounds = [one_round(calls, number, how) for number in range(10)]
    for k in range(others):
        ratio = timing(rounds, f"{k}", batch=1).ratio
        assert ratio.median == pytest.approx(true, rel=1e-9)  # seconds are differences of clock readings near 1000
        low, high = sum(r < 0.9 * true for r in ratio.ratios), sum(r > 1.1 * true for r in ratio.ratios)
        assert low == high  # each side had the advantage equally often


@given(st.lists(st.tuples(st.floats(1e-6, 1e3), st.floats(1e-6, 1e3)), min_size=1, max_size=20))
def test_exchanging_the_sides_inverts_the_ratio_and_its_interval(pairs):
    there, back = (
        timing([Round({"A": (p[i],)}, {"A": (p[1 - i],)}, "Z") for p in pairs], "A", batch=1).ratio for i in (0, 1)
    )
    assert there.median == pytest.approx(1 / back.median)
    assert (there.low, there.high) == pytest.approx((1 / back.high, 1 / back.low))


def test_a_round_comes_back_from_json_as_it_was():
    one = one_round(noted("ABZ", []), 3, bench.latency(baseline="Z"))
    assert Round.read(json.loads(json.dumps(asdict(one)))) == one


def test_the_ratio_is_the_median_of_pairs_and_no_drift_that_both_share_moves_it():
    drift = [1.0, 7.0, 0.3, 20.0]  # the machine's speed, from pair to pair
    rounds = [
        Round({"A": (1.5 * a, 1.5 * b), "B": (2.0 * a, 2.0 * b)}, {"A": (a, b), "B": (a, b)}, "Z")
        for a, b in itertools.pairwise(drift)
    ]
    found = timing(rounds, "A", batch=4, started=Started(9.0, (2.0,)), load_s=3.0, memory={"rss": 5}, energy_j=0.1)
    assert (found.ratio.median, found.ratio.low, found.ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert len(found.ratio.ratios) == 6
    assert found.baseline == "Z"
    assert (found.load_s, found.first_s, found.warmup_s) == (3.0, 9.0, (2.0,))
    assert (found.memory, found.energy_j) == ({"rss": 5}, 0.1)
    assert timing(rounds, "B", batch=4).ratio.median == pytest.approx(2.0)
    base = timing(rounds, "Z", batch=4)
    assert (base.baseline, base.ratio) == ("Z", None)
    assert len(base.steady.samples_s) == 12


def test_a_case_of_another_batch_than_the_baseline_is_compared_by_the_image():
    rounds = [Round({"A": (3.0, 3.0)}, {"A": (1.0, 1.0)}, "Z")]
    assert timing(rounds, "A", batch=8, baseline_batch=2).ratio.median == pytest.approx(3.0 / 8 / (1.0 / 2))
    assert timing(rounds, "A", batch=8).ratio.median == pytest.approx(3.0)


def test_rounds_that_lack_a_case_are_left_out_of_its_timing():
    rounds = [Round({"A": (1.0, 2.0), "B": (3.0, 4.0)}), Round({"A": (5.0, 6.0)})]
    assert timing(rounds, "A", batch=1).steady.samples_s == (1.0, 2.0, 5.0, 6.0)
    assert timing(rounds, "B", batch=1).steady.samples_s == (3.0, 4.0)
    with pytest.raises(ValueError, match="none of the 2 rounds timed 'C'"):
        timing(rounds, "C", batch=1)


def test_rounds_of_two_baselines_are_not_mixed():
    rounds = [Round({"A": (1.0, 1.0)}, {"A": (1.0, 1.0)}, name) for name in "YZ"]
    with pytest.raises(ValueError, match="'A' have the baselines 'Y', 'Z'"):
        timing(rounds, "A", batch=1)


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=300))
def test_quantiles_are_those_of_numpy(values):
    times = bench.Times(tuple(values))
    assert times.p50_s == pytest.approx(np.quantile(values, 0.5))
    assert times.p90_s == pytest.approx(np.quantile(values, 0.9))
    if len(values) < 100:
        assert times.p99_s is None
    else:
        assert times.p99_s == pytest.approx(np.quantile(values, 0.99))


def test_images_a_second_are_those_of_the_median_call():
    assert Timing(batch=8, steady=bench.Times((0.5, 0.25, 60.0))).images_per_s == pytest.approx(16)


def test_pairs_run_in_the_order_abba():
    order = []
    ratio = bench.paired_ratio(lambda: order.append("A"), lambda: order.append("B"), pairs=4, warmup=0)
    assert "".join(order) == "ABBABAAB"
    assert len(ratio.ratios) == 4


def test_a_paired_ratio_finds_a_factor_of_two():
    ratio = bench.paired_ratio(lambda: time.sleep(0.004), lambda: time.sleep(0.002), pairs=12)
    assert 1.5 < ratio.median < 2.2  # sleeping costs some 60 us more than asked
    assert ratio.low <= ratio.median <= ratio.high


def test_times_are_seconds():
    times = bench.interleaved({"sleep": lambda: time.sleep(0.005)}, bench.latency(rounds=3))["sleep"]
    assert 0.005 <= times.median_s < 0.05
    low, high = times.interval_s
    assert low <= times.median_s <= high


def test_threads_are_set_for_the_measurement_and_put_back_even_after_an_error():
    before = torch.get_num_threads()
    other = 2 if before == 1 else 1
    seen = []
    bench.interleaved({"a": lambda: seen.append(torch.get_num_threads())}, bench.latency(rounds=1, threads=other))
    assert set(seen) == {other}
    with pytest.raises(ZeroDivisionError):
        bench.interleaved({"a": lambda: 1 / 0}, bench.latency(threads=other))
    assert torch.get_num_threads() == before


def test_the_interval_of_the_median_covers_it():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2000, 20, generator=generator).exp()  # log-normal: skewed as times are; its median is 1
    spans = [bench.median_interval(row) for row in draws.tolist()]
    covered = sum(low <= 1 <= high for low, high in spans) / 2000
    assert 0.94 <= covered <= 0.98  # 0.9586 exactly: 1 - 2 P(Binomial(20, 1/2) < 6)


def test_the_interval_uses_the_order_statistics_of_the_tables():
    assert bench.median_interval(range(20)) == (5, 14)
    assert bench.median_interval(range(100)) == (39, 60)
    assert bench.median_interval([3, 1, 2]) == (1, 3)
    with pytest.raises(ValueError, match="no values"):
        bench.median_interval([])


@pytest.mark.parametrize("n", [1, 2, 5, 6, 7, 8, 9, 29, 99, 500, 1000])
def test_the_interval_of_the_median_is_that_of_the_binomial_in_whole_numbers(n):
    k = 1
    while 40 * sum(math.comb(n, fewer) for fewer in range(k + 1)) <= 2**n:  # P(Binomial(n, 1/2) <= k) <= 0.025
        k += 1
    assert bench.median_interval(range(n)) == (k - 1, n - k)


def test_the_interval_of_the_median_of_many_times_takes_no_time():
    n, begin = 100_000, time.perf_counter()
    low, high = bench.median_interval(range(n))
    assert time.perf_counter() - begin < 2  # 10 ms; from the binomials themselves it took minutes
    assert low + high == n - 1
    assert (high - low) / math.sqrt(n) == pytest.approx(1.96, abs=0.01)  # the normal approximation


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"threads": 0}, {"batch": 0}, {"warmup": -1}])
def test_wrong_numbers_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        bench.latency(**wrong)


class FakeCuda:
    """torch.cuda for a machine without one: a clock that the work moves on, and a note of what was asked."""

    def __init__(self):
        self.clock_ms, self.notes = 100.0, []

    def work(self, ms):
        self.notes.append("work")
        self.clock_ms += ms

    def Event(self, enable_timing):
        assert enable_timing
        fake = self

        class Event:
            def record(self):
                fake.notes.append("record")
                self.at = fake.clock_ms

            def elapsed_time(self, end):
                fake.notes.append("elapsed")
                return end.at - self.at

        return Event()

    def synchronize(self, device=None):
        self.notes.append("synchronize")

    def device(self, device):
        return contextlib.nullcontext()


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    for name in ("Event", "synchronize", "device"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_a_gpu_is_waited_for_once_at_each_end_and_never_between(cuda):
    def steps():
        for _ in range(50):
            cuda.work(0.5)

    seconds = timed(steps, torch.device("cuda"))
    assert cuda.notes == ["synchronize", "record", *["work"] * 50, "record", "synchronize", "elapsed"]
    assert seconds == pytest.approx(0.025)  # milliseconds made seconds


def test_every_phase_on_a_gpu_is_timed_by_its_own_clock(cuda):
    work = iter([900.0, 30.0, 20.0, 20.0])

    def call():
        cuda.work(next(work))

    how = bench.latency(warmup=1)
    begun = start(call, how, device="cuda")
    found = timing([one_round({"A": call}, 0, how, device="cuda")], "A", batch=1, started=begun)
    assert [found.first_s, *found.warmup_s, *found.steady.samples_s] == pytest.approx([0.9, 0.03, 0.02, 0.02])
    assert cuda.notes.count("synchronize") == 2 * 4


def test_cases_of_one_round_may_be_on_two_devices(cuda):
    calls = {"gpu": lambda: cuda.work(40.0), "cpu": lambda: cuda.notes.append("cpu")}
    one = one_round(calls, device={"gpu": "cuda", "cpu": "cpu"})
    assert one.seconds["gpu"] == pytest.approx((0.04, 0.04))
    waited = ["synchronize", "record", "work", "record", "synchronize", "elapsed"]
    assert cuda.notes == [*waited, "cpu", "cpu", *waited]


def test_other_accelerators_are_waited_for_at_both_ends_too(monkeypatch):
    notes = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: notes.append(device.type))
    timed(lambda: notes.append("work"), torch.device("mps"))
    assert notes == ["mps", "work", "mps"]


@pytest.mark.gpu
def test_on_a_gpu_the_work_itself_is_timed_and_not_its_launch():
    x = torch.randn(4096, 4096, device="cuda")
    calls = {"one": lambda: x @ x, "eight": lambda: [x @ x for _ in range(8)]}
    times = bench.interleaved(calls, bench.latency(rounds=5), device="cuda")
    assert 5 < times["eight"].median_s / times["one"].median_s < 11


@pytest.mark.gpu
def test_on_a_gpu_the_ratio_to_a_baseline_is_that_of_the_work():
    x = torch.randn(4096, 4096, device="cuda")
    calls = {"Z": lambda: x @ x, "four": lambda: [x @ x for _ in range(4)]}
    how = bench.latency(baseline="Z")
    begun = {name: start(call, how, device="cuda") for name, call in calls.items()}
    assert all(one.first_s > 0 for one in begun.values())
    rounds = [one_round(calls, number, how, device="cuda") for number in range(5)]
    assert 3 < timing(rounds, "four", batch=1).ratio.median < 5
