"""Random times, and data made noisy there."""

import pytest
import torch

import fastsample as fs
from fastsample.distill.times import noisy, random_nodes

SCHEDULES = [fs.VP.linear(), fs.VPContinuous(), fs.EDM(), fs.Flow(shift=3.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_random_times_lie_within_the_schedule_and_fill_it(schedule):
    torch.manual_seed(0)
    t = random_nodes(schedule, 4000, torch.device("cpu")).t
    assert t.dtype == torch.float64
    assert schedule.t_min <= t.min() < t.max() <= schedule.t_max
    if isinstance(schedule, fs.EDM):
        assert t.log().mean() == pytest.approx(-1.2, abs=0.1)  # standard error 0.02
        assert t.log().std() == pytest.approx(1.2, abs=0.07)  # five standard errors
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
    torch.testing.assert_close(noisy(x0, eps, fs.nodes(schedule, t))[:, 0], torch.tensor(expected))
