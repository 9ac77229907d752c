"""Samples that each stand at their own time, and random times."""

import pytest
import torch

import fastsample as fs
from fastsample.distill.times import noisy, random_times, x0_at

SCHEDULES = [fs.VP.linear(), fs.VPContinuous(), fs.EDM(), fs.Flow(shift=3.0)]


class Shift(torch.nn.Module):
    """Something that depends on x and t, in doubles."""

    def forward(self, x, t):
        return torch.tanh(x) + torch.cos(t)[:, None]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow"])
def test_x0_at_many_times_equals_predict_at_each(schedule, predicts):
    model = fs.Denoiser(Shift(), schedule, predicts, dtype=torch.float64)
    t = torch.linspace(schedule.t_min, 0.9 * schedule.t_max, 5, dtype=torch.float64)
    x = torch.linspace(-2, 2, 10, dtype=torch.float64).view(5, 2)
    one = [model.predict(x[i : i + 1], fs.node(schedule, float(t[i]))) for i in range(5)]
    torch.testing.assert_close(x0_at(model, x, t), torch.cat(one))


@pytest.mark.parametrize("time", [*fs.TIMES, lambda schedule, node: 10 * node.sigma])
def test_every_unit_of_time_is_understood_for_a_batch(time):
    schedule = fs.VP.scaled_linear()
    model = fs.Denoiser(Shift(), schedule, "v", time=time, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0, 500.5, 999.0], dtype=torch.float64)
    x = torch.ones(4, 2, dtype=torch.float64)
    one = [model.predict(x[:1], fs.node(schedule, float(moment))) for moment in t]
    torch.testing.assert_close(x0_at(model, x, t), torch.cat(one))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_random_times_lie_within_the_schedule_and_fill_it(schedule):
    torch.manual_seed(0)
    t = random_times(schedule, 4000, torch.device("cpu"))
    assert t.dtype == torch.float64
    assert schedule.t_min <= t.min() < t.max() <= schedule.t_max
    if isinstance(schedule, fs.EDM):
        assert t.log().mean() == pytest.approx(-1.2, abs=0.1)  # standard error 0.02
    else:
        middle = (schedule.t_min + schedule.t_max) / 2
        assert (t < middle).float().mean() == pytest.approx(0.5, abs=0.04)  # five standard errors
    if isinstance(schedule, fs.VP):
        assert torch.equal(t, t.round())
        assert t.min() == 0
        assert t.max() == 999


def test_noisy_is_alpha_x0_plus_sigma_eps():
    schedule = fs.VP.linear()
    x0, eps = torch.full((3, 2), 2.0), torch.full((3, 2), 1.0)
    t = torch.tensor([-1.0, 300.0, 999.0], dtype=torch.float64)
    expected = [2 * float(schedule.alpha(moment)) + float(schedule.sigma(moment)) for moment in t]
    torch.testing.assert_close(noisy(schedule, x0, eps, t)[:, 0], torch.tensor(expected))
