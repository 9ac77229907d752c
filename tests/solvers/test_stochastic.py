"""Solvers that add noise: the distribution they end with, and the noise-free solvers they meet."""

import math
from itertools import pairwise

import pytest
import torch

import fastsample as fs
from fastsample import solvers
from fastsample.zoo.exact import GaussianMixture

from .cases import CASES, SCHEDULES, Case, gaussian, mixture

NOISE = fs.noise((2,), seeds=range(4), dtype=torch.float64)
# Jumping back and forth with E[x0 | x] keeps the mean alone: consistency sampling needs a consistency model.
SDE = [case for case in CASES if not case.order and case.solver is not solvers.consistency]


@pytest.mark.parametrize("schedule", [fs.VPContinuous(), fs.EDM()], ids=["vp", "edm"])
@pytest.mark.parametrize("case", SDE, ids=str)
def test_many_steps_end_with_the_distribution_of_the_data(case, schedule):
    mean, variance, n = 0.4, 0.25, 40_000
    model = GaussianMixture(schedule, torch.ones(1), torch.full((1, n), mean), torch.full((1, 1), variance))
    noise = fs.noise((n,), seeds=[0], dtype=torch.float64)  # n numbers of one sample: one draw a step
    options = {**case.options, "s_noise": 1.0} if "s_noise" in case.options else case.options
    x = fs.solve(model, case.solver, fs.grid(schedule, 300), noise, **options)
    # four standard deviations of either estimate; the steps' own error of first order is 0.11 at 100, 0.04 at 300
    assert abs(float(x.mean()) - mean) < 4 * math.sqrt(variance / n)
    assert abs(float(x.var()) / variance - 1) < 4 * math.sqrt(2 / n) + 0.04


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_with_eta_1_equals_ddpm(name):
    schedule = SCHEDULES[name]
    for end in (None, schedule.t_min):
        grid = fs.grid(schedule, 6, fs.quadratic_t, end=end)
        both = [
            fs.solve(mixture(schedule), f, grid, NOISE, **o)
            for f, o in [(solvers.ddim, {"eta": 1.0}), (solvers.ddpm, {})]
        ]
        torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [solvers.euler, solvers.heun], ids=["euler", "heun"])
def test_churn_out_of_its_range_is_no_churn(solver):
    grid = fs.grid(fs.EDM(), 8)
    z = NOISE.draw(0)
    plain = fs.solve(mixture(fs.EDM()), solver, grid, z)
    assert torch.equal(fs.solve(mixture(fs.EDM()), solver, grid, z, s_churn=40.0, s_tmin=100.0), plain)
    assert not torch.equal(fs.solve(mixture(fs.EDM()), solver, grid, NOISE, s_churn=40.0), plain)


@pytest.mark.parametrize("s_churn", [3.0, 40.0])  # below and above the most that a step may add
@pytest.mark.parametrize("second", [False, True], ids=["euler", "heun"])
@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow"])
def test_churn_is_algorithm_2_of_karras_in_the_frame_x_over_alpha(name, second, s_churn):
    options = {"s_churn": s_churn, "s_tmin": 0.05, "s_tmax": 50.0, "s_noise": 1.003}
    schedule = SCHEDULES[name]
    grid = fs.grid(schedule, 8, fs.karras, start=0.98 * schedule.t_max)
    levels = [node.sigma / node.alpha for node in grid.nodes]

    denoiser = mixture(fs.EDM())
    x, evaluations = NOISE.draw(0) * levels[0], 0
    for t, t_next in pairwise(levels):
        if options["s_tmin"] <= t <= options["s_tmax"]:
            t_hat = t * (1 + min(options["s_churn"] / len(grid), math.sqrt(2) - 1))
            x = x + math.sqrt(t_hat**2 - t**2) * options["s_noise"] * NOISE.draw(evaluations + 1)
        else:
            t_hat = t
        d = (x - denoiser.predict(x, fs.Node(t_hat, 1.0, t_hat))) / t_hat
        x_next, evaluations = x + (t_next - t_hat) * d, evaluations + 1
        if second and t_next > 0:
            d_next = (x_next - denoiser.predict(x_next, fs.Node(t_next, 1.0, t_next))) / t_next
            x_next, evaluations = x + (t_next - t_hat) * (d + d_next) / 2, evaluations + 1
        x = x_next

    solver = solvers.heun if second else solvers.euler
    ours = fs.solve(mixture(schedule), solver, grid, NOISE, **options)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def test_the_large_variance_of_ddpm_is_beta_and_the_small_one_its_tilde():
    betas = torch.tensor(fs.VP.linear().betas, dtype=torch.float64)
    bar = (1 - betas).cumprod(0)
    grid = fs.grid(fs.VP.linear(), 1000, fs.trailing)  # every index, as in the paper
    for large, variance in [(1.0, betas[1:]), (0.0, betas[1:] * (1 - bar[:-1]) / (1 - bar[1:]))]:
        plan = fs.trace(solvers.ddpm, grid, large=large)
        c = torch.tensor([row.c[0] for row in plan.rows[:-1]], dtype=torch.float64)
        torch.testing.assert_close(c.flip(0) ** 2, variance, rtol=1e-8, atol=0)  # 1 - SNR ratio cancels 4 digits
        assert plan.rows[-1].c == ()


def test_eta_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got 1.5"):
        fs.trace(solvers.ddim, fs.grid(fs.EDM(), 2), eta=1.5)


def test_consistency_sampling_noises_x0_to_each_level():
    schedule = fs.VPContinuous()
    end = 0.3
    point = gaussian(schedule).means
    model = GaussianMixture(schedule, torch.ones(1), point, torch.zeros(1, 2))
    x = fs.solve(model, solvers.consistency, fs.grid(schedule, 3, end=end), NOISE)
    node = fs.node(schedule, end)
    torch.testing.assert_close(x, node.alpha * point + node.sigma * NOISE.draw(4))


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_solver_finds_the_only_point_of_the_data(case: Case, steps):
    point = torch.tensor([[0.7, -0.3]], dtype=torch.float64)
    model = GaussianMixture(fs.VPContinuous(), torch.ones(1), point, torch.zeros(1, 2))
    x = fs.solve(model, case.solver, fs.grid(fs.VPContinuous(), steps), NOISE, **case.options)
    torch.testing.assert_close(x, point.expand(4, 2), rtol=0, atol=1e-9)
