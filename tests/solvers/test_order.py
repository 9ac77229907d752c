"""The order of convergence, against flows that are known: it finds a wrong factor, which a golden test may copy."""

import math
from functools import cache

import pytest
import torch
from scipy.integrate import solve_ivp

import fastsample as fs
from fastsample import solvers
from fastsample.grid import exponential_step
from fastsample.solvers.forms import X0
from fastsample.solvers.multistep import VARIABLES, advance
from fastsample.solvers.unipc import unified
from fastsample.zoo.exact import gaussian_flow

from .cases import DETERMINISTIC, gaussian, mixture

# One problem in the frame x / alpha, from lam = -3 to lam = 3, on three schedules.
SCHEDULES = [fs.VPContinuous(), fs.EDM(), fs.Flow(shift=3.0)]
NOISE = fs.noise((2,), seeds=range(8), dtype=torch.float64).draw(0)
IN_T = (solvers.deis, solvers.pndm)  # they look at the schedule's own t
PROBLEMS = {"gaussian": gaussian, "mixture": mixture}


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_the_error_falls_with_the_order_that_the_docstring_states(case):
    # At 40 to 160 steps the next order still adds or takes some tenths, never a whole one.
    found = order(case.solver, fs.VPContinuous(), "mixture", least=case.steps, **case.options)
    assert case.order - 0.4 < found < case.order + 0.4


@pytest.mark.slow
@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_the_error_falls_as_fast_on_a_gaussian(case):
    """Or faster: its flow is simpler."""
    assert case.order - 0.4 < order(case.solver, fs.Flow(shift=3.0), "gaussian", **case.options)


FAMILY = [
    *((form, variable, k, False) for form in ("eps", "x0") for variable in VARIABLES for k in (1, 2, 3, 4)),
    *((form, "angle", k, True) for form in ("eps", "x0") for k in (1, 2, 3, 4)),
    *(("flow", "tau", k, corrector) for k, corrector in ((2, False), (4, False), (2, True))),
]


@pytest.mark.parametrize(("form", "variable", "k", "corrector"), FAMILY)
def test_the_family_has_its_order_for_every_value_and_variable(form, variable, k, corrector):
    options = {"predicts": form, "variable": variable, "order": k, "corrector": corrector}
    k = k + corrector
    assert k - 0.5 < order(solvers.multistep, fs.Flow(shift=3.0), "mixture", **options) < k + 0.5


@pytest.mark.parametrize("solver", [solvers.dpmpp_2m, solvers.dpm_solver_2, solvers.unipc_3, solvers.multistep])
def test_a_final_order_of_1_leaves_order_2(solver):
    """One Euler step of local order 2 at the end, at a step that shrinks as all do."""
    schedule = fs.EDM(sigma_min=0.05, sigma_max=20.0)

    def error(steps):
        grid = fs.grid(schedule, steps, fs.uniform_lam, end=0.05, lower_order_final=True)
        plain = fs.grid(schedule, steps, fs.uniform_lam, end=0.05)
        both = [fs.solve(mixture(schedule), solver, g, NOISE) for g in (grid, plain)]
        return float((both[0] - both[1]).abs().max())

    assert math.log(error(40) / error(160)) / math.log(4) == pytest.approx(2, abs=0.25)


def test_the_order_test_finds_a_forgotten_half():
    assert order(_dpmpp_2m_without_its_half, fs.VPContinuous(), "mixture") < 1.2


def test_the_order_test_finds_a_corrector_that_forgets_the_older_evaluations():
    assert order(_unipc_with_a_first_order_corrector, fs.VPContinuous(), "mixture") < 2.2


@pytest.mark.parametrize("case", [case for case in DETERMINISTIC if case.solver not in IN_T], ids=str)
def test_all_schedules_agree_where_they_place_the_same_levels(case):
    """The frame x / alpha at the same sigma / alpha: a solver's result must not depend on the schedule there."""
    ends = [
        _at_levels(case.solver, schedule, [-3 + 0.6 * k for k in range(11)], "mixture", case.options)
        for schedule in SCHEDULES
    ]
    for end in ends[1:]:  # up to rounding, of times to levels and back
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-9)


def order(solver, schedule, problem, *, least=40, **options):
    """The slope of log(error) over log(1 / steps), from `least` to four times as many."""
    coarse, fine = (_error(solver, schedule, steps, problem, options) for steps in (least, 4 * least))
    return math.log(coarse / fine) / math.log(4)


def _error(solver, schedule, steps, problem, options):
    return float((_end(solver, schedule, steps, problem, options) - exact(problem)).square().mean().sqrt())


def _end(solver, schedule, steps, problem, options):
    """x / alpha at lam = 3, by equal steps in lam after a first one that is cut in seven, each four times the last.

    A multistep solver begins with order 1: the error of that one step would hide an order of 4 behind one of 2.
    """
    h = 6 / steps
    first = [-3.0, *(-3 + h / 4**i for i in range(6, 0, -1))]
    return _at_levels(solver, schedule, [*first, *(-3 + h * k for k in range(1, steps + 1))], problem, options)


def _at_levels(solver, schedule, lams, problem, options):
    grid = fs.Grid(schedule, tuple(fs.node(schedule, float(schedule.time(lam))) for lam in lams))
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
    def shares(nodes, s, t):
        return unified(X0, "bh2", nodes, s, t)

    known, before = [], x
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        if known:
            x = advance(X0, shares, before, [known[0], (x0, s)], s)
        before = x
        known = [(x0, s), *known][:2]
        x = advance(X0, shares, x, known, t)
    return x
