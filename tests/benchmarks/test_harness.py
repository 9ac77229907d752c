"""The harness is not in what it measures: the whole table is bench/results/harness_overhead.md."""

import statistics

import pytest

pytest.importorskip("diffusers")  # the network of the digits is one of theirs

from fastsample.bench import Case
from fastsample.bench.harness_overhead import LIMIT, free, measure
from fastsample.bench.overhead import dpmpp_2m
from fastsample.zoo import digits


def test_it_adds_less_than_two_percent_to_the_shortest_case():
    """CPU time, the added part by a network that costs nothing: ten microseconds of some five milliseconds."""
    real = digits()
    light, heavy = Case.product(model={"free": free(real), "digits": real}, solver=dpmpp_2m, steps=2)
    added_s = statistics.median(measure(light, 200).added_us) * 1e-6
    assert added_s / statistics.median(measure(heavy, 20).theirs.cpu_s) < LIMIT
