"""The kernel distance, against double loops, enumeration and repeated draws."""

import math
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsample.bench.kernel_distance import KernelDistance, kernel_distance
from fastsample.bench.measure import Features, Measure
from fastsample.bench.reference import Reference
from fastsample.bench.rows import halves

DRAWS = 800
PLAIN = Features("plain", lambda images: images.flatten(1))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draws(count, *shape, seed=0):
    return normal(count, *shape, seed=seed).unbind(0)


def reference_of(rows):
    return Reference(PLAIN, rows.mean(0), torch.cov(rows.T), len(rows), "some rows", rows)


def looped(a, b, paired=False):
    """The definition, term by term."""

    def k(x, y):
        return (sum(p * q for p, q in zip(x, y)) / len(x) + 1) ** 3

    a, b = a.tolist(), b.tolist()
    m, n = len(a), len(b)
    of_a = sum(k(a[i], a[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    of_b = sum(k(b[i], b[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    cross = [k(a[i], b[j]) for i in range(m) for j in range(n) if not (paired and i == j)]
    return of_a + of_b - 2 * sum(cross) / len(cross)


@given(m=st.integers(4, 9), n=st.integers(4, 9), d=st.integers(1, 5), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_it_is_the_double_loop_of_its_definition(m, n, d, seed):
    a, b = normal(m, d, seed=seed) + 0.3, normal(n, d, seed=seed + 1)
    found = kernel_distance(a, b)
    assert found.value == pytest.approx(looped(a, b), rel=1e-10, abs=1e-12)
    assert (found.n_a, found.n_b) == (m, n)
    twin = normal(m, d, seed=seed + 2)
    assert kernel_distance(a, twin, paired=True).value == pytest.approx(looped(a, twin, True), rel=1e-10, abs=1e-12)


def test_the_variance_is_hoeffdings_from_pairs_of_pairs():
    """Pairs that share one sample, both, or none, each kind counted by itself."""
    m = 8
    a, b = 2 * normal(m, 2) + 1, normal(5, 2, seed=1)
    k_aa, toward = ((a @ other.T / 2 + 1) ** 3 for other in (a, b))
    h = k_aa - toward.mean(1)[:, None] - toward.mean(1)
    none = float(torch.stack([h[i, j] * h[p, q] for i, j, p, q in permutations(range(m), 4)]).mean())
    one = float(torch.stack([h[i, j] * h[i, k] for i, j, k in permutations(range(m), 3)]).mean()) - none
    two = float(torch.stack([h[i, j] ** 2 for i, j in permutations(range(m), 2)]).mean()) - none
    assert min(one, two) > 0
    wanted = 4 * (m - 2) / (m * (m - 1)) * one + 2 / (m * (m - 1)) * two
    assert kernel_distance(a, b).se ** 2 == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_blocks_change_nothing(monkeypatch, paired):
    a, b = normal(11, 3) + 0.5, normal(11 if paired else 8, 3, seed=1)
    whole = kernel_distance(a, b, paired=paired)
    # bench.kernel_distance names the function, not this module
    monkeypatch.setitem(kernel_distance.__globals__, "BLOCK", 3)
    parts = kernel_distance(a, b, paired=paired)
    for name in ("value", "se", "se_both"):
        assert getattr(parts, name) == pytest.approx(getattr(whole, name), rel=1e-10)
    torch.testing.assert_close(parts.influence, whole.influence)


def test_the_mean_over_all_subsets_is_the_value_of_the_whole():
    """So the usual mean over a hundred subsets estimates the same number, with the noise of choosing them."""
    a, b = normal(6, 2) + 0.4, normal(5, 2, seed=1)
    found = [
        kernel_distance(a[list(i)], b[list(j)]).value
        for i in combinations(range(6), 4)
        for j in combinations(range(5), 4)
    ]
    assert sum(found) / len(found) == pytest.approx(kernel_distance(a, b).value, rel=1e-10)


def test_it_is_unbiased_at_small_n():
    """Of draws from a few points with known chances, where the true distance is a finite sum."""
    points, chances = normal(5, 3) + 0.3, torch.tensor([0.4, 0.1, 0.2, 0.2, 0.1], dtype=torch.float64)
    others = normal(4, 3, seed=1)
    k = (torch.cat([points, others]) @ torch.cat([points, others]).T / 3 + 1) ** 3
    weights = torch.cat([chances, -torch.full((4,), 0.25, dtype=torch.float64)])
    true = float(weights @ k @ weights)
    source = torch.Generator().manual_seed(2)
    found = torch.tensor([
        kernel_distance(
            points[torch.multinomial(chances, 5, replacement=True, generator=source)],
            others[torch.randint(4, (6,), generator=source)],
        ).value
        for _ in range(DRAWS)
    ])  # fmt: skip
    assert abs(float(found.mean()) - true) < 4 * float(found.std()) / math.sqrt(DRAWS)


@pytest.mark.parametrize("away", [0.5, 0.0], ids=["apart", "equal"])
@pytest.mark.parametrize("kind", ["fixed", "both", "paired"])
def test_the_standard_error_is_that_of_repeated_draws(kind, away):
    """Also where both sides are of one distribution, where only terms of second order are left."""
    if kind == "paired":
        noises = draws(DRAWS, 30, 4, seed=3)
        others = draws(DRAWS, 30, 4, seed=4)
        found = [
            kernel_distance(x + away, 0.8 * x + 0.6 * y, paired=True) for x, y in zip(noises, others)
        ]  # one covariance on both sides
    else:
        held = draws(1, 40, 4, seed=5) * DRAWS if kind == "fixed" else draws(DRAWS, 40, 4, seed=5)
        found = [kernel_distance(x + away, y) for x, y in zip(draws(DRAWS, 30, 4, seed=6), held)]
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    errors = torch.tensor([f.se_both if kind == "both" else f.se for f in found], dtype=torch.float64)
    told, seen = float(errors.square().mean()), float(values.var())
    noise = float(((values - values.mean()) ** 2).std()) / math.sqrt(DRAWS)  # of `seen`
    # a variance below 0 counts as 0, which where all is of second order adds up to a quarter
    assert -4 * noise < told - seen < 4 * noise + (0.25 * seen if away == 0 else 0)
    if kind != "fixed":
        assert abs(float(values.mean()) - true_distance(away, 4)) < 4 * float(values.std()) / math.sqrt(DRAWS)


def true_distance(away, d):
    """MMD^2 of N(away, I) and N(0, I): E (z + 1)^3 from the moments of z = x.y / d, a sum over d coordinates.

    Of its square and its cube, by how many of the indices are equal.
    """

    def cube(a, b):
        one, two, three = a * b, (1 + a * a) * (1 + b * b), (a**3 + 3 * a) * (b**3 + 3 * b)
        second = (d * two + d * (d - 1) * one**2) / d**2
        third = (d * three + 3 * d * (d - 1) * two * one + d * (d - 1) * (d - 2) * one**3) / d**3
        return third + 3 * second + 3 * one + 1

    return cube(away, away) + cube(0, 0) - 2 * cube(away, 0)


@pytest.mark.parametrize("paired", [False, True])
def test_the_influence_is_what_goes_when_a_sample_goes(paired):
    """Of a U-statistic that holds exactly: (m - 2) times the fall of the value when sample i is left out."""
    a, b = normal(9, 3) + 0.5, normal(9, 3, seed=1)
    found = kernel_distance(a, b, paired=paired)
    for i in range(9):
        kept = torch.arange(9) != i
        left = kernel_distance(a[kept], b[kept] if paired else b, paired=paired).value
        assert float(found.influence[i]) == pytest.approx(7 * (found.value - left), rel=1e-8, abs=1e-10)


def test_small_distances_of_far_away_features_keep_their_digits():
    a, b = normal(40, 3) * 1e-3 + 10, normal(50, 3, seed=1) * 1e-3 + 10.001

    def total(x, y, same):
        k = (x.numpy().astype(np.longdouble) @ y.numpy().astype(np.longdouble).T / 3 + 1) ** 3
        return (k.sum() - np.trace(k)) / (len(x) * (len(x) - 1)) if same else k.mean()

    exact = total(a, a, True) + total(b, b, True) - 2 * total(a, b, False)
    assert abs(kernel_distance(a, b).value - float(exact)) < 1e-9  # of kernel values of a million: 16 digits hold 1e-10
    assert float(exact) > 1e-3


def test_a_set_and_its_copy_are_at_no_distance_as_pairs():
    a = normal(20, 3)
    found = kernel_distance(a, a, paired=True)
    assert (found.value, found.se) == (0, 0)


def test_the_measure_scores_against_its_reference():
    rows, samples = normal(200, 4), normal(150, 4, seed=1) + 0.5
    measure = KernelDistance("kernel", PLAIN, reference_of(rows))
    assert isinstance(measure, Measure)
    score, exact = measure.score(samples), kernel_distance(samples, rows)
    assert (score.value, score.se, score.n, score.better) == (exact.value, exact.se, 150, "less")
    assert score.debiased is None  # it has no bias
    assert measure.score(samples) == score  # also with what is kept of the reference
    influence = measure.influence(samples)
    assert float(influence.std()) / math.sqrt(150) == pytest.approx(score.se, rel=0.05)  # far apart: first order
    floor = measure.floor()
    assert floor.n == 100
    assert abs(floor.value) < 4 * floor.se


def test_the_floor_has_the_error_of_both_halves():
    rows = normal(60, 3)
    a, b = halves(rows)
    found = kernel_distance(a, b)
    floor = KernelDistance("kd", PLAIN, reference_of(rows)).floor()
    assert (floor.value, floor.se, floor.n) == (found.value, found.se_both, 30)
    assert found.se_both > found.se


def test_toward_a_teacher_the_noises_are_shared():
    rows, teacher = normal(100, 4), normal(60, 4, seed=1)
    samples = teacher + 0.01 * normal(60, 4, seed=2)
    measure = KernelDistance("kernel", PLAIN, reference_of(rows)).toward(teacher)
    assert measure.name == "kernel_converged"
    score = measure.score(samples)
    assert score.value == pytest.approx(looped(samples, teacher, True), rel=1e-8, abs=1e-12)
    assert score.se < 0.1 * kernel_distance(samples, teacher).se
    assert abs(score.value) < 4 * score.se  # as near as that, samples cannot be told from the teacher's


def test_too_few_wrong_and_missing_features_are_refused():
    with pytest.raises(ValueError, match=r"samples must be \[n, d\] with n of at least 4 .* got \[3, 2\]"):
        kernel_distance(normal(3, 2), normal(5, 2))
    with pytest.raises(ValueError, match="the reference hold NaN"):
        kernel_distance(normal(5, 2), normal(5, 2) * torch.nan)
    with pytest.raises(ValueError, match="3 and 2 dimensions"):
        kernel_distance(normal(5, 3), normal(5, 2))
    with pytest.raises(ValueError, match="equal number, got 5 and 6"):
        kernel_distance(normal(5, 2), normal(6, 2), paired=True)


def test_a_reference_without_rows_is_refused_before_anything_is_sampled():
    reference = Reference(PLAIN, torch.zeros(2).double(), torch.eye(2).double(), 10, "bare")
    with pytest.raises(ValueError, match="kid needs the features of every image, and the reference bare holds"):
        KernelDistance("kid", PLAIN, reference)
    other = Features("other", lambda images: images.flatten(1))
    with pytest.raises(ValueError, match="another extractor"):
        KernelDistance("kid", other, reference_of(normal(9, 2)))
