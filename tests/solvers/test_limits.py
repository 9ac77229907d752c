"""Starts at alpha = 0, ends at sigma = 0, single steps: where lam is infinite."""

import pytest
import torch

import fastsample as fs
from fastsample import solvers

from .cases import CASES, DETERMINISTIC, SCHEDULES, Toy, grids, mixture

NOISE = fs.noise((2,), seeds=range(4), dtype=torch.float64)
FROM_ALPHA_0 = [case for case in CASES if case.solver is not solvers.heun]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("case", FROM_ALPHA_0, ids=str)
def test_a_start_at_alpha_0_is_the_limit_of_starts_near_it(case, shift):
    schedule = fs.Flow(shift)
    for end in (None, 0.05):
        grid = fs.grid(schedule, 6, fs.uniform_t, end=end)
        # 2S has a node halfway in lam, which for 1e-300 would be nearer to t = 1 than float64 can say
        alpha = 1e-12 if case.solver is solvers.dpmpp_2s else 1e-300
        near = fs.Grid(schedule, (fs.Node(1.0, alpha, 1.0), *grid.nodes[1:]))
        limit, close = (fs.solve(Toy(schedule), case.solver, g, NOISE, **case.options) for g in (grid, near))
        # lam = -690 there, and the differences to that evaluation fade as h / 690, up to four of them
        torch.testing.assert_close(limit, close, rtol=0, atol=0.01)


@pytest.mark.parametrize("options", [{}, {"s_churn": 1.0}])
def test_heun_refuses_a_start_at_alpha_0_and_says_what_to_do(options):
    grid = fs.grid(fs.Flow(), 4, fs.uniform_t)
    remedy = r"alpha = 0 \(t = 1\); start it at t < 1, or use a solver that moves x itself, such as dpmpp_2m"
    with pytest.raises(ValueError, match=remedy):
        fs.solve(Toy(fs.Flow()), solvers.heun, grid, NOISE, **options)
    with pytest.raises(ValueError, match=remedy):
        fs.trace(solvers.heun, grid, **options)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", [case for case in CASES if "s_churn" not in case.options], ids=str)
def test_one_step_to_sigma_0_returns_x0(case, name):
    schedule = SCHEDULES[name]
    grid, _ = grids(case, schedule, 1)
    start = grid.nodes[0]
    x0 = Toy(schedule).predict(start.sigma * NOISE.draw(0), start)
    torch.testing.assert_close(fs.solve(Toy(schedule), case.solver, grid, NOISE, **case.options), x0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_euler_and_dpmpp_1_are_one_solver(name):
    schedule = SCHEDULES[name]
    for end in (None, schedule.t_min):
        grid = fs.grid(schedule, 5, fs.quadratic_t, end=end)
        first, *rest = (
            fs.solve(mixture(schedule), solver, grid, NOISE)
            for solver in (solvers.ddim, solvers.euler, solvers.dpmpp_1)
        )
        for other in rest:
            torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_float32_states_stay_near_float64(case):
    grid = fs.grid(fs.VPContinuous(), 10)
    z = NOISE.draw(0)
    single, double = (
        fs.solve(mixture(fs.VPContinuous()), case.solver, grid, noise, **case.options) for noise in (z.float(), z)
    )
    assert single.dtype == torch.float32
    # 1e-7 a step, and 200 times that in the frame of Heun, whose x / alpha starts at alpha = 0.006
    torch.testing.assert_close(single.double(), double, rtol=0, atol=5e-5)
