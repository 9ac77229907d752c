"""The order of convergence, against flows that are known: it finds a wrong factor, which a golden test may copy."""

import math
from functools import cache

import pytest
import torch
from scipy.integrate import solve_ivp

import fastsample as fs
from fastsample.grid import exponential_step
from fastsample.solvers.unipc import unified_step
from fastsample.zoo.exact import gaussian_flow

from .cases import DETERMINISTIC, gaussian, mixture

# One problem in the frame x / alpha, from lam = -3 to lam = 3, on three schedules.
SCHEDULES = [fs.VPContinuous(), fs.EDM(), fs.Flow(shift=3.0)]
NOISE = fs.noise((2,), seeds=range(8), dtype=torch.float64).draw(0)
PROBLEMS = {"gaussian": gaussian, "mixture": mixture}


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)
@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_the_error_falls_with_the_order_that_the_docstring_states(case, schedule, problem):
    # At 80 to 320 steps the next order still adds some tenths above, never a whole one, and takes one away below.
    assert case.order - 0.15 < order(case.solver, schedule, problem, **case.options) < case.order + 0.4


def test_the_order_test_finds_a_forgotten_half():
    assert order(_dpmpp_2m_without_its_half, fs.VPContinuous(), "mixture") < 1.2


def test_the_order_test_finds_a_corrector_that_forgets_the_older_evaluations():
    assert order(_unipc_with_a_first_order_corrector, fs.VPContinuous(), "mixture") < 2.2


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_all_schedules_agree_where_they_place_the_same_levels(case):
    """The frame x / alpha at the same sigma / alpha: a solver's result must not depend on the schedule there."""
    ends = [_end(case.solver, schedule, 10, "mixture", case.options) for schedule in SCHEDULES]
    for end in ends[1:]:  # up to rounding, of times to levels and back
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-9)


def order(solver, schedule, problem, **options):
    """The slope of log(error) over log(1 / steps)."""
    coarse, fine = (_error(solver, schedule, steps, problem, options) for steps in (80, 320))
    return math.log(coarse / fine) / math.log(4)


def _error(solver, schedule, steps, problem, options):
    return float((_end(solver, schedule, steps, problem, options) - exact(problem)).square().mean().sqrt())


def _end(solver, schedule, steps, problem, options):
    start, end = (float(schedule.time(lam)) for lam in (-3.0, 3.0))
    grid = fs.grid(schedule, steps, fs.uniform_lam, start=start, end=end)
    return fs.solve(PROBLEMS[problem](schedule), solver, grid, NOISE, **options) / grid.nodes[-1].alpha


@cache
def exact(problem):
    """x / alpha at lam = 3: in closed form for the Gaussian, by DOP853 for the mixture."""
    schedule = fs.EDM()
    model = PROBLEMS[problem](schedule)
    s, t = (fs.node(schedule, math.exp(-lam)) for lam in (-3.0, 3.0))
    if problem == "gaussian":
        return gaussian_flow(NOISE * s.sigma, s, t, model.means[0], model.variances[0])

    def derivative(sigma, y):
        y = torch.tensor(y).view_as(NOISE)
        return ((y - model.predict(y, fs.node(schedule, sigma))) / sigma).flatten().numpy()

    y = (NOISE * s.sigma).flatten().numpy()
    done = solve_ivp(derivative, (s.sigma, t.sigma), y, method="DOP853", rtol=1e-11, atol=1e-12)
    return torch.tensor(done.y[:, -1]).view_as(NOISE)


def _dpmpp_2m_without_its_half(model, x, grid):
    old = None
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        slope = (x0 - old[0]) * ((t.lam - s.lam) / (s.lam - old[1].lam)) if old else 0.0 * x0
        x = exponential_step(x, x0 + slope, s, t)
        old = x0, s
    return x


def _unipc_with_a_first_order_corrector(model, x, grid):
    known, before = [], x
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        if known:
            x = unified_step(before, [known[0], (x0, s)], s)
        before = x
        known = [(x0, s), *known][:2]
        x = unified_step(x, known, t)
    return x
