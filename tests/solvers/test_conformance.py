"""A plan computes what the solver's function computes, for every solver on every schedule."""

import pytest
import torch

import fastsample as fs
from fastsample import solvers

from .cases import CASES, SCHEDULES, Toy, grids, mixture

EVERY = [(case, name) for case in CASES for name in SCHEDULES]


@pytest.mark.parametrize(("case", "name"), EVERY, ids=[f"{case}-{name}" for case, name in EVERY])
def test_a_plan_equals_the_direct_run_of_its_solver(case, name):
    schedule = SCHEDULES[name]
    noise = fs.noise((2,), seeds=range(3), dtype=torch.float64)
    for steps in (1, 2, 3, 7):
        for grid in grids(case, schedule, steps):
            plan = fs.trace(case.solver, grid, **case.options)
            assert plan.memory <= 4
            assert plan.stochastic == _adds_noise(case, grid)
            for model in (Toy(schedule), mixture(schedule)):
                direct = fs.solve(model, case.solver, grid, noise, **case.options)
                # float64 rounds to 1e-16; the rewriting of a state by others loses some digits of it
                torch.testing.assert_close(fs.sample(model, plan, noise), direct, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("case", "name"), EVERY, ids=[f"{case}-{name}" for case, name in EVERY])
def test_a_solver_evaluates_as_often_as_its_plan_and_its_docstring_say(case, name):
    schedule = SCHEDULES[name]
    noise = fs.noise((2,), seeds=range(2), dtype=torch.float64)
    for steps in (1, 2, 3, 7):
        for grid in grids(case, schedule, steps):
            model = Toy(schedule)
            fs.solve(model, case.solver, grid, noise, **case.options)
            plan = fs.trace(case.solver, grid, **case.options)
            infinite = sum(s.alpha == 0 or t.sigma == 0 for s, t in grid.steps())
            assert plan.nfe == len(model.calls) == case.evaluations * (steps - infinite) + infinite
            assert [row.node for row in plan.rows] == model.calls


def test_a_deterministic_plan_needs_no_noise_but_the_first():
    grid = fs.grid(fs.EDM(), 3)
    z = torch.ones(1, 2)
    for solver, options in [(solvers.ddim, {"eta": 0.0}), (solvers.heun, {"s_churn": 0.0}), (solvers.euler, {})]:
        fs.sample(Toy(fs.EDM()), fs.trace(solver, grid, **options), z)
        fs.solve(Toy(fs.EDM()), solver, grid, z, **options)


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_every_named_solver_is_tested_and_found_by_name(name):
    assert solvers.get(name).__name__ == name
    assert solvers.get(name) in [case.solver for case in CASES]


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown solver 'ddimm'; choose one of ddpm, ddim"):
        solvers.get("ddimm")


def _adds_noise(case, grid):
    if case.order:
        return False
    if "s_churn" in case.options:
        return any(s.alpha == 0 or s.sigma / s.alpha >= case.options["s_tmin"] for s, _ in grid.steps())
    return any(t.sigma > 0 for _, t in grid.steps())
