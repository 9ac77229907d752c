"""Conversion: the loss is that of the student's own quantity, zero where it says what the teacher says."""

import math

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill

STD, MEAN = 0.3, 0.2
CASES = [
    pytest.param(schedule, predicts, teaches, id=f"{schedule!r}-{predicts}-{teaches}")
    for schedule in (fs.VP.scaled_linear(), fs.VPContinuous(), fs.Flow(shift=3.0))
    for predicts in ("v", "x0", "flow")
    for teaches in ("eps", "v", "x0", "flow")
    if schedule.alpha(schedule.t_max) > 0 or teaches != "eps"  # which says nothing of x0 at alpha = 0
]


class Gaussian(nn.Module):
    """What a network of any prediction says of data N(MEAN, STD^2), the x0 of which is off by `error`."""

    def __init__(self, schedule, predicts, error=0.0):
        super().__init__()
        self.schedule, self.predicts = schedule, predicts
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def forward(self, x, t):
        alpha, sigma = (f(t)[:, None] for f in (self.schedule.alpha, self.schedule.sigma))
        gain = alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)
        x0 = MEAN + gain * (x - alpha * MEAN) + self.error
        eps = (x - alpha * x0) / sigma
        return {"x0": x0, "eps": eps, "v": alpha * eps - sigma * x0, "flow": eps - x0}[self.predicts]


def pair(schedule, predicts, teaches, error):
    def model(name, off):
        network = Gaussian(schedule, name, off)
        return fs.Denoiser(network, schedule, name, time="t", dtype=torch.float64)

    return model(predicts, error), model(teaches, 0.0)


def loss_of(method, size=512):
    torch.manual_seed(0)
    data = MEAN + STD * torch.randn(size, 1, dtype=torch.float64)
    loss = method.loss("student", {"x0": data}, 0)
    loss.backward()
    return loss.item(), method.student.network.error.grad.item()


@pytest.mark.parametrize(("schedule", "predicts", "teaches"), CASES)
def test_the_loss_is_zero_where_the_student_says_what_the_teacher_says_and_points_there(schedule, predicts, teaches):
    low, best, high = (
        loss_of(distill.Conversion(*pair(schedule, predicts, teaches, error), limit=math.inf))
        for error in (-0.01, 0.0, 0.01)
    )
    assert best[0] < 1e-18  # near the data v magnifies the rounding of x0 by 1 / sigma
    assert abs(best[1]) < 1e-8
    assert low[1] < -1e-3
    assert high[1] > 1e-3
    assert low[0] == pytest.approx(high[0], rel=1e-6)


def test_of_a_v_student_an_error_of_x0_costs_its_square_times_snr_plus_one():
    """Salimans and Ho 2022, Sec. 4."""
    schedule = fs.VP.scaled_linear()
    student, teacher = pair(schedule, "v", "x0", 0.01)
    method = distill.Conversion(student, teacher, limit=math.inf)
    told = []
    student.network.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1]))
    found, _ = loss_of(method)
    snr = (schedule.alpha(told[0]) / schedule.sigma(told[0])).square()
    assert found == pytest.approx(float((1e-4 * (snr + 1)).mean()), rel=1e-6)
    assert snr.max() > 100 > 1 > snr.min()
