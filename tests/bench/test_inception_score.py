"""The Inception Score, against its definition, its bounds and repeated draws."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from fastsample.bench.extractor import extractor
from fastsample.bench.inception_score import InceptionScore, inception_score
from fastsample.bench.measure import Features, Measure
from fastsample.zoo.data import digits

LOGITS = Features("digits' scores", extractor(), shape=(1, 8, 8))


def logits(n, seed=0, scale=2.0):
    return scale * torch.randn(n, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(logits):
    logs = log_softmax(logits.numpy(), axis=1)
    p = np.exp(logs)
    return float(np.exp(np.mean(np.sum(p * (logs - np.log(p.mean(0))), axis=1))))


def test_it_is_its_definition_and_the_splits_are_the_authors():
    """Salimans et al.'s code takes part k from k n // 10 to (k + 1) n // 10 and prints mean and population sd."""
    given = logits(1003)
    found = inception_score(given)
    assert found.value == pytest.approx(by_definition(given), rel=1e-12)
    parts = [by_definition(given[k * 1003 // 10 : (k + 1) * 1003 // 10]) for k in range(10)]
    assert found.split_mean == pytest.approx(np.mean(parts), rel=1e-12)
    assert found.split_sd == pytest.approx(np.std(parts), rel=1e-10)


def test_it_runs_from_one_to_the_number_of_classes():
    alike = inception_score(torch.zeros(100, 10) + torch.arange(10))
    assert alike.value == pytest.approx(1.0)
    assert alike.se == pytest.approx(0.0, abs=1e-12)
    sure = 1000 * torch.nn.functional.one_hot(torch.arange(200) % 8, 8).double()  # exp(-1000) is 0 in float64
    assert inception_score(sure).value == pytest.approx(8.0)
    missing = 1000 * torch.nn.functional.one_hot(torch.arange(200) % 5, 8).double()
    assert inception_score(missing).value == pytest.approx(5.0)


def test_its_error_and_its_bias_are_those_of_repeated_draws():
    true = by_definition(logits(200_000, seed=1000))  # to 0.0025
    drawn = [inception_score(logits(100, seed=k)) for k in range(600)]
    value, se, debiased = (np.array([getattr(f, name) for f in drawn]) for name in ("value", "se", "debiased"))
    assert 0.88 * value.std() < se.mean() < 1.12 * value.std()  # the sd of 600 draws is known to 3 percent
    noise = 4 * value.std() / math.sqrt(600)
    assert value.mean() < true - noise
    assert abs(debiased.mean() - true) < noise
    assert np.mean(abs(debiased - true) < 1.96 * se) > 0.92


def test_the_influence_is_the_derivative_of_the_score():
    """Doubling the weight of one sample moves it by its influence over n."""
    given = logits(4000)
    found = inception_score(given)
    assert abs(float(found.influence.mean())) < 1e-12
    i = int(found.influence.abs().argmax())
    moved = inception_score(torch.cat([given, given[i : i + 1]])).value - found.value
    assert moved * 4001 == pytest.approx(float(found.influence[i]), rel=0.02)


def test_real_digits_score_near_ten_and_noise_does_not():
    measure = InceptionScore("inception_score", LOGITS)
    assert isinstance(measure, Measure)
    images = digits("all")[0]
    real = measure.score(LOGITS(images))
    assert list(real) == ["all", "split"]
    assert 9.3 < real["all"].value <= 10
    score, split = real.values()
    assert (score.n, score.better, split.better) == (1797, "more", "more")
    assert split.value < score.value < score.debiased
    one = measure.score(LOGITS(images[:1].expand(100, -1, -1, -1)))["all"]
    assert one.value == pytest.approx(1.0, abs=1e-6)  # one image again and again is of no variety
    exact = inception_score(LOGITS(images))
    assert split.se == pytest.approx(exact.split_sd * math.sqrt(10 / 9) / math.sqrt(10))
    influence = measure.influence(LOGITS(images))["all"]
    assert float(influence.std()) / math.sqrt(1797) == pytest.approx(score.se)


def test_what_is_no_set_of_logits_is_refused():
    with pytest.raises(ValueError, match=r"20 samples at least for 10 splits, got \[19, 10\]"):
        inception_score(logits(19))
    with pytest.raises(ValueError, match="two classes"):
        inception_score(torch.zeros(100, 1))
    with pytest.raises(ValueError, match="splits must be at least 2, got 1"):
        inception_score(logits(100), splits=1)
    with pytest.raises(ValueError, match="NaN"):
        inception_score(logits(100) * torch.nan)
