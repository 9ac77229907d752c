"""Measures of quality, against closed forms, other algorithms and repeated draws."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from fastsample import bench
from fastsample.bench import Statistics, frechet_distance, statistics
from fastsample.bench.quality import _influence
from fastsample.noise import mix
from fastsample.zoo.data import digits

MANY = 10**6


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


def gaussian(mean, values, axes):
    return Statistics(mean, axes * values @ axes.T, MANY)


@given(d=st.integers(1, 40), rank=st.integers(1, 40), seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_commuting_gaussians_of_any_rank_match_the_closed_form(d, rank, seed):
    axes, shift = rotation(d, seed), normal(d, seed=seed + 1)
    a, b = (0.1 + normal(d, seed=seed + k).square() for k in (2, 3))
    a[rank:] = 0
    b[: max(0, d - rank)] = 0
    exact = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    found = frechet_distance(gaussian(shift, a, axes), gaussian(torch.zeros_like(shift), b, axes))
    assert found.value == pytest.approx(float(exact), rel=1e-10, abs=1e-10)
    assert found.mean_term == pytest.approx(float(shift.square().sum()))
    assert found.value == pytest.approx(found.mean_term + found.cov_term)


def test_full_rank_matches_scipy():
    a, b = normal(400, 12) @ normal(12, 12, seed=1), normal(300, 12, seed=2) + 0.3
    of_a, of_b = statistics(a), statistics(b)
    root = sqrtm(of_a.cov.numpy() @ of_b.cov.numpy()).real
    exact = (of_a.mean - of_b.mean).square().sum() + of_a.cov.trace() + of_b.cov.trace() - 2 * np.trace(root)
    assert frechet_distance(a, b).value == pytest.approx(float(exact), rel=1e-9)


def test_it_is_symmetric_and_invariant_under_rotation_and_shift():
    a, b = normal(300, 10), 2 * normal(200, 10, seed=1) + 1
    turn = rotation(10, seed=5)
    value = frechet_distance(a, b).value
    assert frechet_distance(b, a).value == pytest.approx(value, rel=1e-10)
    turned = frechet_distance(a @ turn + 7, b @ turn + 7)
    assert turned.value == pytest.approx(value, rel=1e-9)
    assert turned.se == pytest.approx(frechet_distance(a, b).se, rel=1e-8)


@pytest.mark.parametrize("n", [200, 20])
def test_it_is_zero_between_a_set_and_itself_also_where_the_rank_is_not_full(n):
    a = normal(n, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert 0 <= frechet_distance(a, a).value < 1e-11


def test_it_converges_to_the_distance_of_the_distributions():
    values = 0.2 + normal(6, seed=3).square()
    exact = float((1 - values.sqrt()).square().sum()) + 6 * 0.04
    errors = []
    for n in (300, 3000, 30000):
        a = normal(n, 6, seed=n) * values.sqrt() + 0.2
        errors.append(abs(frechet_distance(a, gaussian(torch.zeros(6).double(), torch.ones(6).double(),
                                                       torch.eye(6).double())).value - exact))  # fmt: skip
    assert errors[2] < errors[0]
    assert errors[2] < 0.02 * exact


def test_the_standard_error_is_that_of_repeated_draws_and_the_jackknife_takes_the_bias_away():
    mix = 0.3 * normal(8, 8) + 0.5 * torch.eye(8).double()
    zero = torch.zeros(8).double()
    reference = Statistics(zero, mix @ mix.T, MANY)
    wider = mix @ mix.T * 2.0
    true = frechet_distance(Statistics(zero + 0.2, wider, MANY), reference).value
    source = generator(1)
    draws = [torch.randn(400, 8, generator=source, dtype=torch.float64) @ mix.T * 2**0.5 + 0.2 for _ in range(150)]
    found = [frechet_distance(draw, reference) for draw in draws]
    value, se, debiased = (torch.tensor([getattr(f, name) for f in found]) for name in ("value", "se", "debiased"))
    spread = float(value.std())
    assert 0.8 * spread < float(se.mean()) < 1.3 * spread  # sd of 150 draws is known to 6 percent
    assert abs(float(debiased.mean()) - true) < 4 * spread / 150**0.5
    assert abs(float(debiased.mean()) - true) < abs(float(value.mean()) - true)
    assert float(((debiased - true).abs() < 1.96 * se).double().mean()) > 0.88


def test_the_jackknife_is_that_of_distances_measured_anew_without_each_block():
    a, b = normal(83, 5) + torch.arange(83).double()[:, None] / 40, normal(200, 5, seed=1)
    found = frechet_distance(a, b)
    blocks = torch.tensor([mix(i) % 8 for i in range(83)])
    assert sorted(set(blocks.tolist())) == list(range(8))
    without = [frechet_distance(a[blocks != k], b).value * float((blocks != k).double().mean()) for k in range(8)]
    assert found.debiased == pytest.approx(8 * found.value - sum(without), rel=1e-9)


def test_the_influence_function_is_the_derivative_of_the_distance():
    """Doubling the weight of one sample moves the distance by its influence over n."""
    a, b = normal(4000, 5), 1.5 * normal(4000, 5, seed=1) + 0.3
    influence = _influence(a, statistics(a), statistics(b))
    assert abs(float(influence.mean())) < 1e-2 * float(influence.std())
    i = int(influence.abs().argmax())
    moved = frechet_distance(torch.cat([a, a[i : i + 1]]), b).value - frechet_distance(a, b).value
    assert moved * 4001 == pytest.approx(float(influence[i]), rel=0.02)


def test_too_few_samples_warn_with_the_numbers():
    with pytest.warns(UserWarning, match="20 samples in 30 dimensions"):
        frechet_distance(normal(20, 30), normal(100, 30))


def test_what_has_no_distance_is_refused():
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet_distance(normal(20, 3), normal(20, 4))
    with pytest.raises(ValueError, match="NaN"):
        statistics(torch.full((5, 2), torch.nan))
    with pytest.raises(ValueError, match="at least 2"):
        statistics(torch.zeros(1, 2))


def test_from_statistics_alone_there_is_no_standard_error():
    found = frechet_distance(statistics(normal(50, 3)), normal(60, 3, seed=1))
    assert (found.se, found.debiased, found.n_a, found.n_b) == (None, None, 50, 60)


@pytest.mark.parametrize("measure", [bench.fd_digits, bench.fd_pixels])
def test_the_measures_of_digits_grow_with_noise(measure):
    images = digits("all")[0]
    quality = measure(images)
    noise = torch.randn(images.shape, generator=generator(0))
    scores = [quality(images + sigma * noise) for sigma in (0.0, 0.2, 0.5, 1.0)]
    values = [score.value for score in scores]
    assert values[0] < 1e-9
    assert values == sorted(values)
    assert values[1] + 2 * scores[1].se < values[2] - 2 * scores[2].se
    assert scores[1].n == 1797
    assert quality.name == measure.__name__
    assert quality(5 * images + 1) == quality((5 * images + 1).clamp(-1, 1))  # what a picture can show


def test_endpoint_error_is_the_root_mean_square_and_its_se_that_of_repeated_draws():
    zeros = torch.zeros(500, 1, 3, 3)
    assert bench.endpoint_rms(zeros + 0.25, zeros).value == pytest.approx(0.25)
    assert bench.endpoint_rms(zeros, zeros).value == 0
    scales = [torch.rand(500, 1, 1, 1, generator=generator(k)).expand(500, 1, 3, 3) for k in range(100)]
    found = [bench.endpoint_rms(scale, zeros) for scale in scales]
    spread = float(torch.tensor([f.value for f in found]).std())
    assert 0.75 * spread < sum(f.se for f in found) / 100 < 1.3 * spread
    with pytest.raises(ValueError, match="shape"):
        bench.endpoint_rms(zeros, zeros[:3])


def test_classes_that_take_turns_do_not_upset_the_jackknife():
    """Sample i has class i mod 10, as the demo draws them: blocks of i mod 8 would each hold half of the classes."""
    means = 3 * torch.randn(10, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(4000, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    features = means[torch.arange(4000) % 10] + noise
    distance = frechet_distance(features[:2000], features[2000:])
    assert abs(distance.debiased) < 4 * distance.se  # the truth is 0
