"""Samplers for models that jump: what they do to a model that jumps exactly."""

import pytest
import torch

import fastsample as fs
from fastsample import solvers

from .cases import SCHEDULES, mixture
from .test_stochastic import MEAN, VARIANCE, Drawn

NOISE = fs.noise((2,), seeds=range(4), dtype=torch.float64)


class Jumping(Drawn):
    """The perfect consistency model of N(MEAN, VARIANCE): x0 is where the flow ends."""

    def predict(self, x, node):
        return self.mean + (VARIANCE / (node.alpha**2 * VARIANCE + node.sigma**2)) ** 0.5 * (x - node.alpha * self.mean)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow"])
def test_consistency_sampling_of_a_perfect_model_has_the_distribution_of_the_data(name, steps):
    schedule = SCHEDULES[name]
    grid = fs.grid(schedule, steps, fs.uniform_t)
    model, start = Jumping(schedule, steps), grid.nodes[0]
    x = start.alpha * model.mean + (start.alpha**2 * VARIANCE + start.sigma**2) ** 0.5 * model.noise()
    x = solvers.consistency(model, x, grid)
    assert float(x[0]) == pytest.approx(MEAN, rel=1e-9)
    assert float(x[1:].square().sum()) == pytest.approx(VARIANCE, rel=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_tcd_without_noise_is_ddim_and_with_all_of_it_consistency_sampling(name):
    schedule = SCHEDULES[name]
    grid = fs.grid(schedule, 5, fs.uniform_t)
    model = mixture(schedule)
    none, ddim = (fs.solve(model, f, grid, NOISE, **o) for f, o in [(solvers.tcd, {"gamma": 0.0}), (solvers.ddim, {})])
    torch.testing.assert_close(none, ddim, rtol=1e-9, atol=1e-9)
    most, consistency = (
        fs.solve(model, f, grid, NOISE, **o) for f, o in [(solvers.tcd, {"gamma": 1.0}), (solvers.consistency, {})]
    )
    level = fs.node(schedule, schedule.t_min)
    # the old noise at t_min is kept; of each step's state that is this share, of a noise of a few units
    torch.testing.assert_close(most, consistency, rtol=0, atol=20 * level.sigma / level.alpha)
    assert (none - consistency).abs().max() > 0.02


@pytest.mark.parametrize("gamma", [0.2, 0.7])
def test_tcd_steps_below_each_time_and_noises_up_to_it(gamma):
    schedule = fs.VPContinuous()
    grid = fs.grid(schedule, 3, fs.uniform_t)
    x, model = NOISE.draw(0) * grid.nodes[0].sigma, mixture(schedule)
    for k, (s, t) in enumerate(grid.steps()):
        x0 = model.predict(x, s)
        eps = (x - s.alpha * x0) / s.sigma
        x = t.alpha * x0 + t.sigma * eps
        if t.sigma > 0:
            time = schedule.t_min + (1 - gamma) * (t.t - schedule.t_min)
            alpha, sigma = float(schedule.alpha(time)), float(schedule.sigma(time))
            ratio = t.alpha / alpha  # Zheng et al. 2024, Eq. 15: alpha_t / alpha_s' x_s' + sqrt(1 - ratio^2) z, for VP
            x = ratio * (alpha * x0 + sigma * eps) + (1 - ratio**2) ** 0.5 * NOISE.draw(k + 2)
    torch.testing.assert_close(fs.solve(model, solvers.tcd, grid, NOISE, gamma=gamma), x, rtol=1e-9, atol=1e-9)


def test_gamma_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.5"):
        fs.trace(solvers.tcd, fs.grid(fs.EDM(), 2), gamma=1.5)
