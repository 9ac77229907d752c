"""Precision, recall, density and coverage, against known cases, plain loops, the authors' numbers and many draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastsample.bench.measure import Features, Measure
from fastsample.bench.neighbours import Neighbours, neighbours
from fastsample.bench.reference import Reference
from fastsample.zoo.data import digits

PLAIN = Features("plain", lambda images: images.flatten(1))
NAMES = ["precision", "recall", "density", "coverage"]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def reference_of(rows):
    return Reference(PLAIN, rows.mean(0), torch.cov(rows.T), len(rows), "some rows", rows)


def values(samples, reference, **options):
    return {name: share.value for name, share in neighbours(samples, reference, **options).items()}


def looped(samples, reference, near, wide):
    """The definitions, point by point."""

    def radius(points, i, k):
        return sorted(float((points[i] - points[j]).norm()) for j in range(len(points)) if j != i)[k - 1]

    def held(x, points, k):
        return [float((x - p).norm()) <= radius(points, i, k) for i, p in enumerate(points)]

    n = len(samples)
    return {
        "precision": sum(any(held(x, reference, near)) for x in samples) / n,
        "recall": sum(any(held(y, samples, near)) for y in reference) / len(reference),
        "density": sum(sum(held(x, reference, wide)) for x in samples) / (wide * n),
        "coverage": sum(
            any(float((y - x).norm()) <= radius(reference, i, wide) for x in samples) for i, y in enumerate(reference)
        )
        / len(reference),
    }


@given(n=st.integers(6, 12), size=st.integers(6, 12), seed=st.integers(0, 10**6), k=st.sampled_from([(1, 4), (3, 2)]))
@settings(max_examples=15, deadline=None)
def test_they_are_what_their_definitions_count(n, size, seed, k):
    samples, reference = normal(n, 2, seed=seed) + 0.5, normal(size, 2, seed=seed + 1)
    near, wide = k
    assert values(samples, reference, near=near, wide=wide) == pytest.approx(looped(samples, reference, near, wide))


@pytest.mark.parametrize(
    ("k", "precision", "recall", "density", "coverage"),
    [
        (3, 0.38875, 0.7888888888888889, 0.185, 0.23666666666666666),
        (5, 0.59, 0.89, 0.23625, 0.41333333333333333),
    ],
)
def test_they_are_those_of_the_authors_code(k, precision, recall, density, coverage):
    """Of the package prdc 0.2 (Naeem et al.), on digits and others with a fixed ripple over them."""
    images = digits("all")[0].flatten(1).double()
    ripple = torch.arange(800 * 64, dtype=torch.float64).view(800, 64).sin()
    found = values(images[900:1700] + 0.25 * ripple, images[:900], near=k, wide=k)
    assert [found[name] for name in NAMES] == pytest.approx([precision, recall, density, coverage], abs=1e-12)


def test_a_set_against_itself_has_all_of_them():
    points = normal(60, 3)
    assert values(points, points) == pytest.approx(dict.fromkeys(NAMES, 1.0))


def test_sets_that_do_not_meet_have_none_of_them():
    found = neighbours(normal(60, 3) + 100, normal(50, 3))
    assert [found[name].value for name in NAMES] == [0, 0, 0, 0]
    assert [found[name].se for name in NAMES] == [0, 0, 0, 0]


def test_a_dropped_mode_costs_recall_and_coverage_alone():
    near, far = normal(100, 2), normal(100, 2, seed=1) + 1000
    found = values(normal(200, 2, seed=2), torch.cat([near, far]))
    assert found["precision"] > 0.9
    assert found["density"] == pytest.approx(1.0, abs=0.3)
    assert 0.4 < found["recall"] <= 0.5
    assert 0.4 < found["coverage"] <= 0.5


def test_an_outlier_of_the_reference_fools_precision_and_not_density():
    """Its ball holds whatever lies between: why density counts. Naeem et al. 2020, Sec. 3.1."""
    reference = torch.cat([normal(100, 2), torch.tensor([[50.0, 0.0]], dtype=torch.float64)])
    between = normal(100, 2, seed=1) * 0.5 + torch.tensor([25.0, 0.0], dtype=torch.float64)
    found = values(between, reference)
    assert found["precision"] == 1
    assert found["density"] == pytest.approx(0.2)  # one ball of five
    assert found["coverage"] == pytest.approx(1 / 101)


def test_more_copies_than_neighbours_make_balls_of_one_point():
    """A closed ball of radius 0 holds its copies, an open one nothing; rounding decides neither."""
    points = (torch.arange(4, dtype=torch.float64)[:, None] * 7.7 + 0.1).repeat_interleave(8, dim=0).repeat(1, 3)
    assert values(points, points) == {"precision": 1, "recall": 1, "density": 0, "coverage": 0}


def test_of_equal_distributions_density_is_one_and_coverage_as_the_paper_says():
    """Naeem et al. 2020, Lemma 2: 1 - the chance that the k points next to a real one are all real."""
    n, size, k = 60, 80, 5
    alone = 1.0
    for i in range(1, k + 1):
        alone *= (size - i) / (n + size - i)
    found = [values(normal(n, 3, seed=2 * i), normal(size, 3, seed=2 * i + 1)) for i in range(150)]
    for name, true in (("density", 1.0), ("coverage", 1 - alone)):
        drawn = torch.tensor([f[name] for f in found])
        assert abs(float(drawn.mean()) - true) < 4 * float(drawn.std()) / 150**0.5


def test_the_influence_is_what_goes_when_a_sample_goes():
    """Of recall and coverage (n - 1) times, less the mean; of the two others what a sample adds to the mean."""
    samples, reference = 1.2 * normal(40, 2) + 0.4, normal(30, 2, seed=1)
    found = neighbours(samples, reference)
    left = [values(samples[torch.arange(40) != i], reference) for i in range(40)]
    for name in NAMES:
        fall = 39 * (found[name].value - torch.tensor([f[name] for f in left], dtype=torch.float64))
        torch.testing.assert_close(found[name].influence, fall - fall.mean())
        assert float(fall.std()) > 0


@pytest.mark.parametrize("away", [0.0, 0.8])
def test_the_standard_errors_are_those_of_repeated_draws_or_above(away):
    """Exact for precision and density; the jackknife's of recall and coverage are never below the truth on average."""
    reference = normal(250, 3)
    drawn = [neighbours(normal(200, 3, seed=i + 1) + away, reference) for i in range(120)]
    for name in NAMES:
        spread = float(torch.tensor([found[name].value for found in drawn]).std())
        told = sum(found[name].se for found in drawn) / len(drawn)
        most = {"recall": 2.6, "coverage": 1.8}.get(name, 1.25)
        assert 0.8 * spread < told < most * spread, name  # the sd of 120 draws is known to 6.5 percent


def test_pieces_change_nothing(monkeypatch):
    samples, reference = normal(40, 3) + 0.3, normal(50, 3, seed=1)
    whole = neighbours(samples, reference)
    monkeypatch.setitem(neighbours.__globals__, "LIMIT", 170)  # bench.neighbours names the function, not this module
    parts = neighbours(samples, reference)
    for name in NAMES:
        assert parts[name].value == pytest.approx(whole[name].value)
        torch.testing.assert_close(parts[name].influence, whole[name].influence)


def test_a_shift_of_everything_changes_nothing():
    samples, reference = normal(40, 3) + 0.3, normal(50, 3, seed=1)
    assert values(samples + 1e4, reference + 1e4) == pytest.approx(values(samples, reference))


def test_the_measure_scores_against_its_reference():
    rows, samples = normal(120, 3), normal(80, 3, seed=1) + 0.3
    measure = Neighbours("prdc", PLAIN, reference_of(rows))
    assert isinstance(measure, Measure)
    exact = neighbours(samples, rows)
    for _ in range(2):  # also with what is kept of the reference
        found = measure.score(samples)
        assert list(found) == NAMES
        for name in NAMES:
            assert found[name].value == exact[name].value
            assert (found[name].se, found[name].n, found[name].better) == (exact[name].se, 80, "more")
    for name, influence in measure.influence(samples).items():
        torch.testing.assert_close(influence, exact[name].influence)
    floor = measure.floor()
    assert floor["coverage"].value > 0.85
    assert floor["coverage"].n == 60


def test_what_has_no_neighbours_is_refused():
    with pytest.raises(ValueError, match="k = 5 for n = 6 features"):
        neighbours(normal(6, 2), normal(9, 2))
    with pytest.raises(ValueError, match="k = 0"):
        neighbours(normal(9, 2), normal(9, 2), near=0)
    with pytest.raises(ValueError, match=r"of one d, got \[9, 2\] and \[9, 3\]"):
        neighbours(normal(9, 2), normal(9, 3))
    with pytest.raises(ValueError, match="NaN"):
        neighbours(normal(9, 2) * torch.nan, normal(9, 2))
    with pytest.raises(ValueError, match="k = 7 for n = 8"):
        Neighbours("prdc", PLAIN, reference_of(normal(8, 2)), wide=7)
    bare = Reference(PLAIN, torch.zeros(2).double(), torch.eye(2).double(), 10, "bare")
    with pytest.raises(ValueError, match="the reference bare holds their mean and covariance alone"):
        Neighbours("prdc", PLAIN, bare)
