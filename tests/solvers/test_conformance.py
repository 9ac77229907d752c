"""A plan computes what the solver's function computes, for every solver on every schedule."""

import pytest
import torch

import fastsample as fs
from fastsample import solvers

from .cases import CASES, SCHEDULES, Toy, grids, mixture

EVERY = [(case, name) for case in CASES for name in SCHEDULES]


@pytest.mark.parametrize(("case", "name"), EVERY, ids=[f"{case}-{name}" for case, name in EVERY])
def test_a_plan_equals_the_direct_run_of_its_solver_and_evaluates_as_often_as_its_docstring_says(case, name):
    schedule = SCHEDULES[name]
    noise = fs.noise((2,), seeds=range(3), dtype=torch.float64)
    for steps in (1, 2, 6):
        for grid in grids(case, schedule, steps):
            plan = fs.trace(case.solver, grid, **case.options)
            assert plan.memory <= case.memory
            assert plan.stochastic == _adds_noise(case, grid)
            toy = Toy(schedule)
            direct = fs.solve(toy, case.solver, grid, noise, **case.options)
            assert plan.nfe == len(toy.calls) == case.nfe(grid)
            assert [row.node for row in plan.rows] == toy.calls
            # float64 rounds to 1e-16; the rewriting of a state by others loses some digits of it
            torch.testing.assert_close(fs.sample(toy, plan, noise), direct, rtol=1e-9, atol=1e-9)
            if steps == 6:  # and on a flow that bends
                model = mixture(schedule)
                direct = fs.solve(model, case.solver, grid, noise, **case.options)
                torch.testing.assert_close(fs.sample(model, plan, noise), direct, rtol=1e-9, atol=1e-9)


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
    with pytest.raises(ValueError, match=r"unknown solver 'ddimm'; choose one of .*ddpm, ddim"):
        solvers.get("ddimm")


def _adds_noise(case, grid):
    if case.order:
        return False
    if "s_churn" in case.options:
        return any(s.alpha == 0 or s.sigma / s.alpha >= case.options["s_tmin"] for s, _ in grid.steps())
    if case.solver is solvers.tcd:  # nothing lies below t_min to add noise from
        return any(t.t > grid.schedule.t_min for _, t in grid.steps())
    if case.solver is solvers.restart:  # from an inner node
        return len(grid) > 1
    return any(t.sigma > 0 for _, t in grid.steps())
