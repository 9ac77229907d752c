"""Predictions: four ways to say the same x0."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fastsample as fs
from fastsample.prediction import PREDICTIONS

from .toys import REGULAR

number = st.floats(-3, 3)
share = st.floats(0.01, 0.99)
# what each name means, from x0 and eps alone
MEANING = {
    "eps": lambda a, s, x0, eps: eps,
    "x0": lambda a, s, x0, eps: x0,
    "v": lambda a, s, x0, eps: a * eps - s * x0,
    "flow": lambda a, s, x0, eps: eps - x0,
}


@pytest.mark.parametrize("schedule", REGULAR.values(), ids=REGULAR.keys())
@given(share, number, number)
def test_every_prediction_means_what_its_name_says_and_gives_x0_back(schedule, share, x0, eps):
    t = schedule.t_min + share * (schedule.t_max - schedule.t_min)
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    x = alpha * x0 + sigma * eps
    size = max(1.0, alpha / sigma, sigma / alpha) ** 2  # the factors by which rounding of x grows
    for name, prediction in PREDICTIONS.items():
        p, q = prediction.output(alpha, sigma)
        output = p * x + q * x0
        assert output == pytest.approx(MEANING[name](alpha, sigma, x0, eps), abs=1e-14 * size)
        u, w = prediction.x0(alpha, sigma)
        assert u * x + w * output == pytest.approx(x0, abs=1e-13 * size)


def test_a_prediction_is_found_by_its_name():
    assert fs.prediction("v") is PREDICTIONS["v"]
    assert fs.prediction(PREDICTIONS["v"]) is PREDICTIONS["v"]
    with pytest.raises(ValueError, match="unknown prediction 'epsilon'; choose one of eps, x0, v, flow"):
        fs.prediction("epsilon")
