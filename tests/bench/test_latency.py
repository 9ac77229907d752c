"""Latency: the order of the calls, the intervals, and what is put back."""

import time

import pytest
import torch

from fastsample import bench


def test_calls_are_interleaved_in_palindromes_after_a_warm_up():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ABC"}
    times = bench.interleaved(calls, bench.latency(rounds=2, warmup=1))
    assert "".join(order) == "ABC" + "ABCCBA" * 2
    assert [len(t.samples_s) for t in times.values()] == [4, 4, 4]


def test_pairs_run_in_the_order_abba():
    order = []
    ratio = bench.paired_ratio(lambda: order.append("A"), lambda: order.append("B"), pairs=4, warmup=0)
    assert "".join(order) == "ABBAABBA"
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


@pytest.mark.parametrize("wrong", [{"rounds": 0}, {"threads": 0}, {"batch": 0}, {"warmup": -1}])
def test_wrong_numbers_are_named(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        bench.latency(**wrong)


@pytest.mark.gpu
def test_on_a_gpu_the_work_itself_is_timed_and_not_its_launch():
    x = torch.randn(4096, 4096, device="cuda")
    calls = {"one": lambda: x @ x, "eight": lambda: [x @ x for _ in range(8)]}
    times = bench.interleaved(calls, bench.latency(rounds=5), device="cuda")
    assert 5 < times["eight"].median_s / times["one"].median_s < 11
