"""What other libraries get wrong and ours must not, where no other test shows it.

The rest: steps that do not divide the table, repeated times of cosine with karras, eps at zero terminal SNR, more steps
than indices, torch's default dtype: test_limits.py. 3M and iPNDM_v of full order: test_order.py. SDE solvers of few
steps: test_stochastic.py. History between two runs of a pipeline: test_scheduler.py.
"""

import math

import pytest
import torch

import fastsample as fs
from fastsample import solvers

from .cases import SCHEDULES, mixture

VP = fs.VP.linear()
NOISE = fs.noise((2,), seeds=range(4), dtype=torch.float64)
FROM_ALPHA_0 = ("vp_zero_snr", "flow", "flow_shift")


def error(solver, grid, **options):
    """The greatest, against the exact end of the same grid."""
    exact = fs.solve(mixture(grid.schedule), solvers.exact, grid, NOISE.draw(0))
    return float((fs.solve(mixture(grid.schedule), solver, grid, NOISE, **options) - exact).abs().max())


@pytest.mark.parametrize("spacing", [fs.exponential, fs.beta, fs.karras], ids=lambda spacing: spacing.__name__)
@pytest.mark.parametrize("solver", [solvers.dpmpp_2m, solvers.unipc_3], ids=lambda solver: solver.__name__)
def test_no_spacing_has_a_floor_of_the_error(solver, spacing):
    """diffusers cuts the times of these to integers, and the error stays at 1e-3."""
    coarse, fine = (error(solver, fs.grid(VP, n, spacing, end=2.0)) for n in (40, 320))
    assert fine < 2e-4
    assert fine < coarse / 32  # order 2 gives 64


@pytest.mark.parametrize("spacing", [fs.exponential, fs.beta], ids=lambda spacing: spacing.__name__)
def test_the_network_is_told_the_time_of_the_state_it_sees(spacing):
    """There sigma and the time differ by up to a tenth."""
    grid = fs.grid(VP, 17, spacing)
    told = []
    model = fs.Denoiser(lambda x, t: told.append(float(t[0])) or x, VP, "v", dtype=torch.float64)
    fs.sample(model, fs.trace(solvers.dpmpp_2m, grid), NOISE)
    levels = [math.exp(-float(VP.lam(t))) for t in told]
    assert levels == pytest.approx([math.exp(-node.lam) for node in grid.nodes[:-1]], rel=1e-9)
    assert sum(t != round(t) for t in told) >= 14  # no index but by accident, and at the ends


@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_every_sample_may_have_times_of_its_own(name):
    """A vector of times raises in every scheduler of diffusers."""
    solver, spacings = solvers.get(name), (fs.uniform_lam, fs.quadratic_t, fs.uniform_t)
    plans = [fs.trace(solver, fs.grid(VP, 5, spacing)) for spacing in spacings]
    model = mixture(VP)
    together = [plan for plan in plans if plan.nfe == plans[0].nfe]
    assert len(together) > 1 or name == "restart"  # which takes as many steps again as each grid has there
    noise = fs.noise((2,), seeds=range(len(together)), dtype=torch.float64)
    x = fs.sample(model, together, noise)
    for k, plan in enumerate(together):
        alone = fs.sample(model, plan, fs.noise((2,), seeds=[k], dtype=torch.float64))
        torch.testing.assert_close(x[k : k + 1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_nothing_is_kept_between_two_runs_of_whatever_shape(name):
    plan = fs.trace(solvers.get(name), fs.grid(VP, 6, fs.quadratic_t))
    model = mixture(VP)
    first = fs.sample(model, plan, NOISE)
    fs.sample(model, plan, fs.noise((2,), seeds=range(9)))  # another batch, another dtype
    other = fs.Denoiser(lambda x, t: x, VP, "v")
    fs.sample(other, plan, fs.noise((3, 5), seeds=[0]))
    with pytest.raises(FloatingPointError):
        fs.sample(fs.Denoiser(lambda x, t: x / (t[0] > 300), VP, "v"), plan, NOISE)  # breaks off half-way
    assert torch.equal(fs.sample(model, plan, NOISE), first)
    again = fs.solve(model, solvers.get(name), fs.grid(VP, 6, fs.quadratic_t), NOISE)
    assert torch.equal(fs.solve(model, solvers.get(name), fs.grid(VP, 6, fs.quadratic_t), NOISE), again)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_one_step_is_finite_and_between_the_data(name, schedule):
    """diffusers gives NaN at one step, or raises."""
    chosen = SCHEDULES[schedule]
    for end in (None, chosen.t_min):
        start = 0.98 * chosen.t_max if schedule in FROM_ALPHA_0 else None
        grid = fs.grid(chosen, 1, start=start, end=end)
        plan = fs.trace(solvers.get(name), grid)
        x = fs.sample(mixture(chosen), plan, NOISE)
        assert x.isfinite().all()
        if end is None and plan.nfe == 1:
            assert x.abs().max() < 1  # E[x0 | x] of components within 0.7 of 0


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(solvers.SOLVERS))
def test_1001_steps_are_finite(name):
    """One more than the table has."""
    x = fs.solve(mixture(VP), solvers.get(name), fs.grid(VP, 1001), NOISE)
    assert x.isfinite().all()
    assert x.abs().max() < 3


@pytest.mark.parametrize("solver", [solvers.dpmpp_2m, solvers.dpmpp_3m, solvers.unipc_2, solvers.unipc_3])
def test_the_order_of_the_last_steps_is_what_the_grid_says_at_every_number_of_steps(solver):
    """The official code, and diffusers, let it fall below 10 or 15 steps unasked: three times the error at just 10."""
    options = {} if solver in (solvers.dpmpp_2m, solvers.dpmpp_3m) else {"corrector": False}
    used = {}
    for lower in (False, True):
        for steps in (8, 9, 10, 11, 14, 15, 16):
            grid = fs.grid(VP, steps, fs.uniform_t, end=0.0, lower_order_final=lower)
            used.setdefault(lower, set()).add(len(fs.trace(solver, grid, **options).rows[-1].b))
    order = 3 if solver in (solvers.dpmpp_3m, solvers.unipc_3) else 2
    assert used == {False: {order}, True: {1}}


def test_ten_steps_of_uniform_t_are_as_good_as_nine_and_eleven():
    errors = {n: error(solvers.dpmpp_2m, fs.grid(VP, n, fs.uniform_t, end=0.0)) for n in (9, 10, 11)}
    assert errors[10] < 1.2 * (errors[9] * errors[11]) ** 0.5


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_sde_solvers_of_order_2_and_3_run_with_fewer_steps_than_they_remember(steps):
    """UnboundLocalError in k-diffusion (2M, one step) and in diffusers (order 3)."""
    for solver in (solvers.sde_dpmpp_2m, solvers.sde_dpmpp_3m, solvers.sa_solver):
        for end in (None, 0.0):
            assert fs.solve(mixture(VP), solver, fs.grid(VP, steps, end=end), NOISE).isfinite().all()


@pytest.mark.parametrize("solver", [solvers.lms, solvers.deis, solvers.multistep], ids=lambda solver: solver.__name__)
def test_many_steps_do_not_diverge(solver):
    """LMS and DEIS-3 of diffusers stall or diverge: they solve for their weights in float32."""
    few, many = (error(solver, fs.grid(VP, n, end=0.0)) for n in (60, 600))
    assert many < 1e-5
    assert many < few / 100


def test_a_network_for_v_starts_at_zero_terminal_snr():
    """Where diffusers' DDIM with eps returns infinity, and only that has to be refused."""
    schedule = SCHEDULES["vp_zero_snr"]
    grid = fs.grid(schedule, 20, fs.trailing)
    assert grid.nodes[0].alpha == 0
    truth = mixture(schedule)

    def network(x, t):
        node = fs.node(schedule, float(t[0]))
        p, q = fs.prediction("v").output(node.alpha, node.sigma)
        return p * x + q * truth.predict(x, node)

    model = fs.Denoiser(network, schedule, "v", dtype=torch.float64)
    plan = fs.trace(solvers.ddim, grid)
    torch.testing.assert_close(fs.sample(model, plan, NOISE), fs.sample(truth, plan, NOISE), rtol=1e-9, atol=1e-9)
