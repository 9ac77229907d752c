"""Sliced Wasserstein distances, against scipy, closed forms and repeated draws."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import wasserstein_distance

from fastsample.bench.measure import Features, Measure
from fastsample.bench.reference import Reference
from fastsample.bench.sliced import SlicedWasserstein, _directions, sliced_wasserstein

PLAIN = Features("plain", lambda images: images.flatten(1))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_of(rows):
    return Reference(PLAIN, rows.mean(0), torch.cov(rows.T), len(rows), "some rows", rows)


@given(m=st.integers(2, 30), n=st.integers(2, 30), d=st.integers(1, 5), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_of_order_one_it_is_scipys_along_each_direction(m, n, d, seed):
    a, b = normal(m, d, seed=seed) + 0.3, normal(n, d, seed=seed + 1)
    units = _directions(d, 7, seed)
    exact = [wasserstein_distance((a @ u).numpy(), (b @ u).numpy()) for u in units]
    found = sliced_wasserstein(a, b, p=1, directions=7, seed=seed)
    assert found.value == pytest.approx(sum(exact) / 7, rel=1e-10)
    assert (found.n_a, found.n_b) == (m, n)


@given(m=st.integers(2, 12), n=st.integers(2, 12), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_of_order_two_unequal_numbers_are_matched_by_their_quantiles(m, n, seed):
    """Each point as many times as makes both sides equal in number: then the sorted ones belong together."""
    a, b = normal(m, 3, seed=seed), normal(n, 3, seed=seed + 1)
    units = _directions(3, 5, 0)
    low = (units @ a.T).repeat_interleave(n, dim=1).sort(dim=1).values
    high = (units @ b.T).repeat_interleave(m, dim=1).sort(dim=1).values
    exact = float((low - high).square().mean().sqrt())
    assert sliced_wasserstein(a, b, directions=5).value == pytest.approx(exact, rel=1e-10)


def test_of_a_shift_it_is_the_shift_over_the_root_of_the_dimension():
    """E over directions (u . shift)^2 = |shift|^2 / d; known to 2.2 percent from 4000 directions, of its square."""
    a, shift = normal(50, 8), normal(8, seed=1)
    found = sliced_wasserstein(a + shift, a, directions=4000)
    along = _directions(8, 4000, 0) @ shift
    assert found.value == pytest.approx(float(along.square().mean().sqrt()), rel=1e-12)
    assert found.value == pytest.approx(float(shift.norm()) / 8**0.5, rel=0.04)


def test_of_two_gaussians_it_is_that_of_their_means_and_deviations():
    """W_2^2 = shift^2 + (1 - s)^2 along every direction, of N(0, I) and N(shift, s^2 I)."""
    d, s, shift = 4, 1.5, torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    found = sliced_wasserstein(s * normal(40_000, d) + shift, normal(30_000, d, seed=1), directions=100)
    along = float((_directions(d, 100, 0) @ shift).square().mean())
    exact = math.sqrt(along + (1 - s) ** 2)
    assert abs(found.value - exact) < 4 * found.se + 0.01 * exact  # and the reference's own drawing


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("paired", [False, True])
def test_the_standard_error_is_that_of_repeated_draws(p, paired):
    """First-order, so of distances well above those of two draws of one distribution."""
    reference, drawn = normal(300, 3), []
    for seed in range(1, 161):
        x = normal(250, 3, seed=seed)
        other = x + 0.2 * normal(250, 3, seed=1000 + seed) if paired else reference
        drawn.append(sliced_wasserstein(1.1 * x + 0.5, other, p=p, directions=32, paired=paired))
    spread = float(torch.tensor([f.value for f in drawn]).std())
    told = sum(f.se for f in drawn) / len(drawn)
    assert 0.8 * spread < told < 1.25 * spread  # the sd of 160 draws is known to 5.6 percent


@pytest.mark.parametrize("p", [1, 2])
def test_the_influence_is_the_derivative_of_the_distance(p):
    """Doubling the weight of one sample moves it by its influence over n."""
    a, b = normal(3000, 3) + 0.7, normal(2000, 3, seed=1)
    found = sliced_wasserstein(a, b, p=p, directions=16)
    assert abs(float(found.influence.mean())) < 1e-12
    i = int(found.influence.abs().argmax())
    moved = sliced_wasserstein(torch.cat([a, a[i : i + 1]]), b, p=p, directions=16).value - found.value
    assert moved * 3001 == pytest.approx(float(found.influence[i]), rel=0.03)


def test_a_set_and_its_copy_are_at_no_distance():
    a = normal(20, 3)
    found = sliced_wasserstein(a, a)
    assert (found.value, found.se) == (0, None)
    assert float(found.influence.abs().max()) == 0


def test_pieces_change_nothing_and_the_seed_does(monkeypatch):
    a, b = normal(40, 3) + 0.3, normal(50, 3, seed=1)
    whole = sliced_wasserstein(a, b, directions=20)
    assert sliced_wasserstein(a, b, directions=20, seed=1).value != whole.value
    monkeypatch.setattr("fastsample.bench.sliced.LIMIT", 150)
    parts = sliced_wasserstein(a, b, directions=20)
    assert parts.value == pytest.approx(whole.value, rel=1e-12)
    torch.testing.assert_close(parts.influence, whole.influence)


def test_the_measure_scores_against_its_reference():
    rows, samples = normal(200, 4), normal(150, 4, seed=1) + 0.5
    measure = SlicedWasserstein("sliced", PLAIN, reference_of(rows), directions=64)
    assert isinstance(measure, Measure)
    score, exact = measure.score(samples), sliced_wasserstein(samples, rows, directions=64)
    assert (score.value, score.se, score.n, score.better) == (exact.value, exact.se, 150, "less")
    assert float(measure.influence(samples).std()) / math.sqrt(150) == pytest.approx(score.se)
    floor = measure.floor()
    assert floor.n == 100
    assert 0 < floor.value < score.value


def test_toward_a_teacher_the_noises_are_shared():
    teacher = normal(60, 4, seed=1)
    samples = teacher + 0.1
    measure = SlicedWasserstein("sliced", PLAIN, reference_of(normal(100, 4)), p=1, directions=64).toward(teacher)
    assert measure.name == "sliced_converged"
    score = measure.score(samples)
    assert score.value == pytest.approx(sliced_wasserstein(samples, teacher, p=1, directions=64).value)
    assert score.se < 1e-12  # whichever noises are drawn, it is the same shift


def test_what_has_no_distance_is_refused():
    with pytest.raises(ValueError, match="p must be 1 or 2, got 3"):
        sliced_wasserstein(normal(5, 2), normal(5, 2), p=3)
    with pytest.raises(ValueError, match="directions must be at least 1, got 0"):
        SlicedWasserstein("sliced", PLAIN, reference_of(normal(9, 2)), directions=0)
    with pytest.raises(ValueError, match=r"of one d, with n of at least 2, got \[5, 2\] and \[5, 3\]"):
        sliced_wasserstein(normal(5, 2), normal(5, 3))
    with pytest.raises(ValueError, match="equal number, got 5 and 6"):
        sliced_wasserstein(normal(5, 2), normal(6, 2), paired=True)
    with pytest.raises(ValueError, match="NaN"):
        sliced_wasserstein(normal(5, 2) * torch.nan, normal(5, 2))
    bare = Reference(PLAIN, torch.zeros(2).double(), torch.eye(2).double(), 10, "bare")
    with pytest.raises(ValueError, match="the reference bare holds their mean and covariance alone"):
        SlicedWasserstein("sliced", PLAIN, bare)
