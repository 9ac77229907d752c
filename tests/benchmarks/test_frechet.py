"""The cost of the Frechet distance and of the statistics that it is taken from."""

from dataclasses import replace

import pytest
import torch

from fastsample.bench import Moments, frechet_distance, statistics


def features(n, d, seed):
    """Standard normal, shifted by `seed`."""
    return seed + torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("n", "d", "rounds"), [(1000, 64, 50), pytest.param(4096, 2048, 3, marks=pytest.mark.slow)], ids=str
)
def test_the_distance_of_two_statistics(measure, benchmark, n, d, rounds):
    benchmark.group = f"Frechet distance, {d} dimensions"
    a, b = (statistics(features(n, d, seed)) for seed in (0, 1))
    # Copies, since statistics keep their eigenvalues once computed.
    found = measure(lambda: frechet_distance(replace(a), replace(b)), rounds, warmup=1)
    # Means apart by 1 in every dimension; the mean term has a standard error of 2 sqrt(2 d / n) = 0.7 and 2.8.
    assert found.mean_term == pytest.approx(d, abs=4 * 2 * (2 * d / n) ** 0.5)


def test_the_distance_with_its_interval(measure, benchmark):
    benchmark.group = "Frechet distance from features, with error and jackknife, 1000 x 64"
    a, b = features(1000, 64, 0), features(1000, 64, 1)
    assert measure(lambda: frechet_distance(a, b)).se > 0


@pytest.mark.parametrize("n", [5000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_the_moments_of_features(measure, benchmark, n):
    benchmark.group = f"moments of {n} x 64 features"
    rows = features(n, 64, 0)
    assert measure(lambda: Moments.of(rows), 10).n == n
