"""Adams-Bashforth and PNDM: equal steps, how often they evaluate, and starts of full order."""

import math
from functools import partial

import pytest
import torch

import fastsample as fs
from fastsample import solvers
from fastsample.zoo.exact import gaussian_flow

from .cases import Toy, gaussian, mixture

EDM = fs.EDM(sigma_min=0.1, sigma_max=4.0)
NOISE = fs.noise((2,), seeds=range(4), dtype=torch.float64)


def equal_steps(steps):
    return fs.grid(EDM, steps, fs.uniform_t, end=0.1)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_ipndm_is_adams_bashforth_where_steps_are_equal_in_sigma(order):
    both = [
        fs.solve(mixture(EDM), solver, equal_steps(9), NOISE, order=order)
        for solver in (solvers.ipndm, solvers.ipndm_v)
    ]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)
    if order > 1:
        uneven = [
            fs.solve(mixture(EDM), solver, fs.grid(EDM, 9, fs.karras), NOISE, order=order)
            for solver in (solvers.ipndm, solvers.ipndm_v)
        ]
        assert (uneven[0] - uneven[1]).abs().max() > 1e-4


def test_pndm_starts_with_runge_kutta_and_so_has_order_4_where_steps_are_equal_in_sigma():
    assert slope(solvers.pndm) == pytest.approx(4, abs=0.3)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10])
def test_pndm_says_what_it_evaluates(steps):
    """diffusers' list of timesteps has the repeated ones in it."""
    for solver, extra in ((solvers.pndm, 3 * min(steps, 3)), (solvers.plms, 1)):
        assert fs.trace(solver, equal_steps(steps)).nfe == steps + extra
    to_zero = fs.grid(EDM, steps, fs.uniform_t)
    assert fs.trace(solvers.pndm, to_zero).nfe == steps + 3 * min(steps - 1, 3)
    assert fs.trace(solvers.plms, to_zero).nfe == steps + (steps > 1)


@pytest.mark.parametrize("solver", [solvers.ipndm, solvers.ipndm_v, solvers.lms, solvers.deis])
@pytest.mark.parametrize("order", [0, 5])
def test_orders_that_do_not_exist_are_refused(solver, order):
    with pytest.raises(ValueError, match=f"has orders 1 to 4, got {order}"):
        fs.solve(Toy(EDM), solver, equal_steps(3), NOISE, order=order)


@pytest.mark.parametrize(
    "solver",
    [
        solvers.dpmpp_2m,
        solvers.dpmpp_3m,
        solvers.dpm_solver_2m,
        solvers.dpm_solver_3m,
        partial(solvers.unipc_2, corrector=False),  # which would move the state before with the last evaluation too
        partial(solvers.unipc_3, corrector=False),
        solvers.multistep,
        solvers.deis,
        solvers.lms,
        solvers.ipndm,
        solvers.plms,
        solvers.pndm,
        solvers.flow_2m,
    ],
    ids=str,
)
def test_multistep_solvers_obey_the_order_that_the_grid_leaves(solver):
    """With `lower_order_final` the last interval looks at no older evaluation: its row is that of DDIM."""
    grid = fs.grid(EDM, 8, end=0.1, lower_order_final=True)
    s, t = grid.nodes[-2:]
    share = 1 - t.sigma / s.sigma  # of the last x0 in `exponential_step`
    assert last_share(solver, grid) == pytest.approx(share, rel=1e-9)
    assert abs(last_share(solver, fs.grid(EDM, 8, end=0.1)) / share - 1) > 0.01


def last_share(solver, grid):
    """How much the end moves with the x0 of the last evaluation."""

    class Pushed:
        schedule = grid.schedule

        def predict(self, x, node, **condition):
            return 0 * x + float(node == grid.nodes[-2])

    return float(fs.solve(Pushed(), solver, grid, torch.zeros(1, 1, dtype=torch.float64)))


def slope(solver):
    model = gaussian(EDM)
    s, t = fs.node(EDM, 4.0), fs.node(EDM, 0.1)
    exact = gaussian_flow(NOISE.draw(0) * 4.0, s, t, model.means[0], model.variances[0])
    errors = [float((fs.solve(model, solver, equal_steps(n), NOISE) - exact).abs().max()) for n in (160, 640)]
    return math.log(errors[0] / errors[1]) / math.log(4)
