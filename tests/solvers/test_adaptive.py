"""Solvers that choose their own steps, against flows that are known."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import solvers
from fastsample.solvers import adaptive
from fastsample.zoo.exact import GaussianMixture

from .cases import SCHEDULES, Toy, gaussian, mixture

Z = fs.noise((2,), seeds=range(6), dtype=torch.float64).draw(0)
ADAPTIVE = [solvers.exact, solvers.rk45, solvers.dpm_solver_12, solvers.dpm_solver_23]
DPM = [solvers.dpm_solver_12, solvers.dpm_solver_23]


@pytest.mark.parametrize("ends_at_zero", [True, False])
@pytest.mark.parametrize("name", SCHEDULES)
def test_exact_is_the_closed_form_of_a_gaussian(name, ends_at_zero):
    schedule = SCHEDULES[name]
    grid = fs.grid(schedule, 1, fs.uniform_t, end=None if ends_at_zero else schedule.t_min)
    start, end = grid.nodes
    model, efforts = gaussian(schedule), []
    known = fs.Gaussian(model.means[0], model.variances[0]).move(Z * start.sigma, start, end)
    ours = fs.solve(model, solvers.exact, grid, Z, report=efforts.append)
    torch.testing.assert_close(ours, known, rtol=0, atol=1e-8)  # the tolerance; the floor's error is 1e-12 / 2 std
    assert efforts[0].evaluations < 400


@pytest.fixture(scope="module")
def problem():
    with np.load(Path(__file__).parent / "data" / "gmm2.npz", allow_pickle=False) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


@pytest.mark.parametrize(("end", "key"), [(0.0, "y_sigma_min"), (None, "y_sigma_0")])
@pytest.mark.parametrize("tolerance", [1e-6, 1e-8, 1e-10])
def test_exact_ends_where_the_reference_of_the_known_problem_ends(problem, tolerance, end, key):
    vp = fs.VP.linear()
    model = GaussianMixture(vp, problem["mix_logw"].exp(), problem["mix_mean"], problem["mix_var"])
    grid = fs.grid(vp, 3, fs.uniform_t, end=end)
    ours = fs.solve(model, solvers.exact, grid, problem["noise"] / grid.nodes[0].sigma, tolerance=tolerance)
    error = (ours / grid.nodes[-1].alpha - problem[key]).abs().max()
    assert error < 3 * tolerance  # a tolerance holds for each step; theirs was 1e-11


def test_the_error_of_the_floor_is_what_the_module_says():
    schedule = fs.EDM()
    grid = fs.grid(schedule, 1)
    model = GaussianMixture(schedule, torch.ones(1), torch.zeros(1, 2), torch.full((1, 2), 0.25))
    best, high = (fs.solve(model, solvers.exact, grid, Z, floor=floor, tolerance=1e-10) for floor in (1e-6, 0.01))
    error, width = (high - best).abs() / (best / 0.5).abs(), 0.5  # for one standard deviation
    torch.testing.assert_close(error, torch.full_like(error, 0.01**2 / (2 * width)), rtol=1e-3, atol=0)


@pytest.mark.parametrize("schedule", [fs.VPContinuous(), fs.EDM(), fs.Flow(shift=3.0)], ids=repr)
@pytest.mark.parametrize("solver", ADAPTIVE[1:], ids=lambda solver: solver.__name__)
def test_a_smaller_tolerance_gives_a_smaller_error_for_more_evaluations(solver, schedule):
    grid = fs.grid(schedule, 2, fs.uniform_t, start=0.98 * schedule.t_max, end=schedule.t_min)
    known, errors, efforts = fs.solve(mixture(schedule), solvers.exact, grid, Z, tolerance=1e-11), [], []
    for tolerance in (1e-2, 1e-4, 1e-6):
        ours = fs.solve(
            mixture(schedule), solver, grid, Z, rtol=tolerance, atol=tolerance, limit=100_000, report=efforts.append
        )
        errors.append(float((ours - known).abs().max()))
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 1e-4  # some hundred steps of 1e-6
    assert efforts[0].evaluations < efforts[1].evaluations < efforts[2].evaluations


@pytest.mark.parametrize(("pair", "orders"), [(adaptive._pair_12, (1, 2)), (adaptive._pair_23, (2, 3))])
def test_both_of_a_pair_have_their_order(pair, orders):
    """The error of one step of size h is of order p + 1."""
    schedule, model = fs.VPContinuous(), mixture(fs.VPContinuous())
    s = fs.node(schedule, 0.5)
    x, errors = Z * s.sigma, []
    for h in (0.1, 0.05):
        t = fs.node(schedule, float(schedule.time(s.lam + h)))
        grid = fs.Grid(schedule, (s, t))
        known = solvers.exact(model, x, grid, tolerance=1e-13)
        eps = (x - s.alpha * model.predict(x, s)) / s.sigma
        errors.append([float((end - known).square().mean().sqrt()) for end in pair(model, x, eps, s, t, grid)])
    for coarse, fine, order in zip(*errors, orders):
        assert order + 0.75 < math.log2(coarse / fine) < order + 1.4


@pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda solver: solver.__name__)
def test_the_effort_is_what_the_model_was_asked(solver):
    schedule, efforts = fs.VPContinuous(), []
    model = Toy(schedule)
    fs.solve(model, solver, fs.grid(schedule, 7), Z, report=efforts.append)
    assert efforts[0].evaluations == len(model.calls)
    network = fs.Denoiser(lambda x, t: x.tanh(), schedule, dtype=torch.float64)
    fs.solve(network, solver, fs.grid(schedule, 7), Z, report=efforts.append)
    assert efforts[1].evaluations == network.count.calls
    if solver in DPM:  # the first evaluation of a step is kept where the step is repeated
        assert (efforts[0].evaluations - 1 - efforts[0].steps) % (1 if solver is solvers.dpm_solver_12 else 2) == 0


@pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda solver: solver.__name__)
def test_the_nodes_between_have_no_part(solver):
    schedule = fs.VPContinuous()
    both = [fs.solve(mixture(schedule), solver, fs.grid(schedule, n, end=0.01), Z) for n in (1, 9)]
    assert torch.equal(*both)


@pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda solver: solver.__name__)
def test_a_sample_keeps_its_tolerance_in_any_company(solver):
    """The steps are the batch's: alone a sample takes others, and ends elsewhere, but as near to the truth."""
    schedule, grid = fs.EDM(), fs.grid(fs.EDM(), 1, end=0.002)
    known = fs.solve(mixture(schedule), solvers.exact, grid, Z, tolerance=1e-11)
    options = {"tolerance": 1e-5} if solver is solvers.exact else {"rtol": 1e-5, "atol": 1e-5}
    for batch in (Z, Z[:1], Z.repeat(50, 1)):
        ours = fs.solve(mixture(schedule), solver, grid, batch, **options)
        error = (ours - known.repeat(50, 1)[: len(batch)]).abs().max()
        assert error < 1e-3  # a hundred steps of 1e-5


@pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda solver: solver.__name__)
def test_a_state_in_float32_stays_so(solver):
    grid = fs.grid(fs.EDM(), 1)
    options = {"tolerance": 1e-5} if solver is solvers.exact else {}
    single = fs.solve(mixture(fs.EDM()), solver, grid, Z.float(), **options)
    assert single.dtype == torch.float32
    double = fs.solve(mixture(fs.EDM()), solver, grid, Z, **options)
    torch.testing.assert_close(single.double(), double, rtol=0, atol=1e-3)  # another step may be taken at the margin


@pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda solver: solver.__name__)
def test_they_are_no_plans_and_say_so(solver):
    with pytest.raises(ValueError, match=rf"{solver.__name__} chooses its steps .* run it with fs.solve"):
        fs.trace(solver, fs.grid(fs.EDM(), 3))


@pytest.mark.parametrize("solver", DPM, ids=lambda solver: solver.__name__)
def test_dpm_solvers_refuse_a_start_at_alpha_0(solver):
    with pytest.raises(ValueError, match=r"alpha = 0 \(t = 1\); start it at t < 1, or use rk45"):
        fs.solve(Toy(fs.Flow()), solver, fs.grid(fs.Flow(), 1, fs.uniform_t), Z)


@pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda solver: solver.__name__)
def test_a_run_without_end_is_given_up(solver):
    """A network that rounds as float16 does: no step is small enough for this tolerance."""

    class Rough:
        schedule = fs.VPContinuous()

        def predict(self, x, node):
            return x.half().double()

    options = {"tolerance": 1e-9} if solver is solvers.exact else {"rtol": 1e-9, "atol": 1e-9}
    with pytest.raises(RuntimeError, match=r"took 500 evaluations and is at t = .*a larger tolerance"):
        fs.solve(Rough(), solver, fs.grid(fs.VPContinuous(), 1), Z, limit=500, **options)


@pytest.mark.parametrize("solver", ADAPTIVE, ids=lambda solver: solver.__name__)
def test_nan_ends_a_run_at_once(solver):
    class Broken:
        schedule = fs.VPContinuous()

        def predict(self, x, node):
            return x * (math.nan if node.t < 0.5 else 1.0)

    with pytest.raises(FloatingPointError, match="met NaN or infinity at t = 0"):
        fs.solve(Broken(), solver, fs.grid(fs.VPContinuous(), 1), Z)


def test_options_out_of_range_are_refused():
    grid = fs.grid(fs.EDM(), 1)
    for tolerance in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="finite relative tolerance of at least 1e-13"):
            fs.solve(Toy(fs.EDM()), solvers.exact, grid, Z, tolerance=tolerance)
    for limit in (0, -5):
        with pytest.raises(RuntimeError, match=f"took {limit} evaluations"):
            fs.solve(Toy(fs.EDM()), solvers.exact, grid, Z, limit=limit)
    for floor in (0.0, 1e4):
        with pytest.raises(ValueError, match=r"floor of rk45 must be a level sigma / alpha above 0 and below .* 80"):
            fs.solve(Toy(fs.EDM()), solvers.rk45, grid, Z, floor=floor)
    with pytest.raises(ValueError, match=r"h must be positive and safety in \(0, 1\), got -1 and 0.9"):
        fs.solve(Toy(fs.EDM()), solvers.dpm_solver_12, grid, Z, h=-1.0)
