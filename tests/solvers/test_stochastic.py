"""Solvers that add noise: the distribution they end with, and the noise-free solvers they meet."""

import math
from functools import partial
from itertools import pairwise

import pytest
import torch

import fastsample as fs
from fastsample import solvers
from fastsample.noise import Noise
from fastsample.solvers.stochastic import reverse
from fastsample.zoo.exact import GaussianMixture

from .cases import CASES, SCHEDULES, Case, gaussian, grids, mixture

NOISE = fs.noise((2,), seeds=range(4), dtype=torch.float64)
# Jumping back and forth with E[x0 | x] keeps the mean alone: few-step sampling needs a model made for it.
SDE = [case for case in CASES if not case.order and case.solver not in (solvers.consistency, solvers.tcd)]


FIRST_ORDER = [
    solvers.ddim,
    solvers.ddpm,
    solvers.euler,
    solvers.euler_ancestral,
    solvers.euler_ancestral_flow,
    solvers.sde_dpmpp_1,
]
MEAN, VARIANCE = 0.4, 0.25


class Drawn:
    """The denoiser of N(MEAN, VARIANCE), and a state held as its factors of 1, of z_1, of z_2 ...: all of it is linear.

    So the end's distribution is known exactly, without drawing any number.
    """

    def __init__(self, schedule, draws):
        self.schedule, self.factors, self.drawn = schedule, torch.eye(draws + 1, dtype=torch.float64), 0
        self.mean = MEAN * self.factors[0]

    def predict(self, x, node):
        gain = node.alpha * VARIANCE / (node.alpha**2 * VARIANCE + node.sigma**2)
        return self.mean + gain * (x - node.alpha * self.mean)

    def noise(self):
        self.drawn += 1
        return self.factors[self.drawn]


def variance_error(case, grid):
    """How far the variance at the grid's end is from that of q(x_t), relative to it."""
    model, first, last = Drawn(grid.schedule, 1 + 2 * case.evaluations * len(grid)), grid.nodes[0], grid.nodes[-1]
    x = first.alpha * model.mean + math.sqrt(first.alpha**2 * VARIANCE + first.sigma**2) * model.noise()
    options = {**case.options, "s_noise": 1.0} if "s_noise" in case.options else case.options
    x = case.solver(model, x, grid, **options)
    assert float(x[0]) == pytest.approx(last.alpha * MEAN, rel=1e-9)
    return abs(float(x[1:].square().sum()) / (last.alpha**2 * VARIANCE + last.sigma**2) - 1)


@pytest.mark.parametrize("schedule", [fs.VPContinuous(), fs.EDM()], ids=["vp", "edm"])
@pytest.mark.parametrize("case", SDE, ids=str)
def test_the_distribution_at_the_end_converges_with_the_order_stated(case, schedule):
    start, end = (float(schedule.time(lam)) for lam in (-3.0, 3.0))
    coarse, fine = (variance_error(case, fs.grid(schedule, n, fs.uniform_lam, start=start, end=end)) for n in (80, 160))
    order = 1 if case.solver in FIRST_ORDER else 2
    assert abs(math.log2(coarse / fine) - order) < 0.1  # the next order is a whole one away, and 1 / 80 of it is here
    assert fine < (0.05 if order == 1 else 1e-3)


class Many(Noise):
    """Noises for a large batch from one seed a draw, where one for each sample would take all of the test's time."""

    def draw(self, k):
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1000 + k), dtype=self.dtype)


SAMPLED = [solvers.sde_dpmpp_2m, solvers.sde_dpmpp_3m, solvers.sde_dpmpp_2s, solvers.sa_solver, solvers.dpm2_ancestral]


@pytest.mark.parametrize("solver", SAMPLED, ids=lambda solver: solver.__name__)
def test_samples_of_a_mixture_have_its_moments(solver):
    """A state that bends the flow, where no closed form helps: the mean, the variance and their standard errors."""
    schedule, n = fs.VPContinuous(), 10_000
    noise = Many((2,), tuple(range(n)), torch.device("cpu"), torch.float64)
    x = fs.solve(mixture(schedule), solver, fs.grid(schedule, 60), noise)
    data = mixture(schedule).sample(400_000, seed=1)
    for moment in (lambda v: v, lambda v: v**2, lambda v: v.prod(1, keepdim=True)):
        ours, theirs = moment(x), moment(data)
        error = (ours.mean(0) - theirs.mean(0)).abs() / (theirs.std(0) / math.sqrt(n))
        assert float(error.max()) < 4  # standard errors; five such numbers a solver


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
    with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\], got 1.5"):
        fs.trace(solvers.euler_ancestral_flow, fs.grid(fs.Flow(), 2, fs.uniform_t), eta=1.5)
    for solver in (solvers.sde_dpmpp_1, solvers.sde_dpmpp_2s, solvers.euler_ancestral):
        with pytest.raises(ValueError, match="eta must be a number of at least 0, got -1"):
            fs.trace(solver, fs.grid(fs.EDM(), 2), eta=-1.0)
    with pytest.raises(ValueError, match=r"tau must lie in \[0, 1e\+100\], got -1.0"):
        fs.trace(solvers.sa_solver, fs.grid(fs.EDM(), 2), tau=-1.0)


# (ours, its options, the solver without noise)
WITHOUT_NOISE = [
    (solvers.sde_dpmpp_1, {"eta": 0.0}, solvers.dpmpp_1),
    (solvers.sde_dpmpp_2m, {"eta": 0.0}, solvers.dpmpp_2m),
    (solvers.sde_dpmpp_3m, {"eta": 0.0}, solvers.dpmpp_3m),
    (solvers.sde_dpmpp_2s, {"eta": 0.0}, solvers.dpmpp_2s),
    (solvers.euler_ancestral, {"eta": 0.0}, solvers.euler),
    (solvers.dpmpp_2s_ancestral, {"eta": 0.0}, solvers.dpmpp_2s),
    (solvers.sa_solver, {"tau": 0.0, "predictor": 1, "corrector": 0}, solvers.ddim),
    (solvers.sa_solver, {"tau": 0.0, "predictor": 3, "corrector": 0}, solvers.dpmpp_3m),
    (solvers.sa_solver, {"tau": 9.0, "s_tmin": 1e6, "corrector": 0}, solvers.dpmpp_3m),
]


@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow"])
@pytest.mark.parametrize(("solver", "options", "plain"), WITHOUT_NOISE)
def test_without_noise_an_sde_solver_is_its_ode_solver(solver, options, plain, name):
    schedule = SCHEDULES[name]
    for end in (None, schedule.t_min):
        grid = fs.grid(schedule, 6, fs.uniform_lam, start=0.98 * schedule.t_max, end=end)
        ours, theirs = (fs.solve(mixture(schedule), f, grid, NOISE, **o) for f, o in [(solver, options), (plain, {})])
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_the_ancestral_euler_is_ddim(eta, name):
    schedule = SCHEDULES[name]
    grid = fs.grid(schedule, 6, fs.quadratic_t)
    both = [fs.solve(mixture(schedule), f, grid, NOISE, eta=eta) for f in (solvers.euler_ancestral, solvers.ddim)]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_sde_dpmpp_1_and_sa_solver_of_one_point_are_ddpm(name):
    schedule = SCHEDULES[name]
    for end in (None, schedule.t_min):
        grid = fs.grid(schedule, 6, fs.quadratic_t, end=end)
        first, *rest = (
            fs.solve(mixture(schedule), f, grid, NOISE, **o)
            for f, o in [
                (solvers.ddpm, {}),
                (solvers.sde_dpmpp_1, {}),
                (solvers.sa_solver, {"predictor": 1, "corrector": 0}),
            ]
        )
        for other in rest:
            torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.3, 1.0, 2.0])
def test_the_noise_of_a_whole_step_is_made_of_its_halves(eta):
    s, m, t = (fs.node(fs.VPContinuous(), time) for time in (0.8, 0.5, 0.3))
    kept, _, second = reverse(m, t, eta)
    keep, _, std = reverse(s, t, eta)
    assert (kept * reverse(s, m, eta)[2]) ** 2 + second**2 == pytest.approx(std**2, rel=1e-12)
    assert kept * reverse(s, m, eta)[0] == pytest.approx(keep, rel=1e-12)


STEPWISE = [case for case in SDE if "s_churn" not in case.options and case.solver is not solvers.restart]


@pytest.mark.parametrize("case", STEPWISE, ids=str)
def test_no_noise_is_added_on_the_way_to_sigma_0(case):
    plan = fs.trace(case.solver, fs.grid(fs.VPContinuous(), 4), **case.options)
    assert plan.rows[-1].c == () or not any(plan.rows[-1].c)
    assert any(plan.rows[-2].c)


@pytest.mark.parametrize("case", SDE, ids=str)
def test_few_steps_are_finite_on_every_schedule(case):
    """diffusers' sde-dpmsolver++ of order 3 and k-diffusion's dpmpp_2m_sde of one step raise UnboundLocalError."""
    for schedule in SCHEDULES.values():
        for steps in (1, 2, 3):
            for grid in grids(case, schedule, steps):
                end = fs.solve(mixture(schedule), case.solver, grid, NOISE, **case.options)
                assert end.isfinite().all()


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_the_ancestral_euler_for_flows_is_the_same_on_every_schedule(eta):
    """In the frame x / (alpha + sigma), whose sigma is that of rectified flow."""
    ends = []
    for schedule in (fs.Flow(), fs.EDM(), fs.VP.linear()):
        times = [float(schedule.time(lam)) for lam in (-3.0, -1.0, 0.5, 2.0, 3.0)]
        grid = fs.Grid(schedule, tuple(fs.node(schedule, t) for t in times))
        x = fs.solve(mixture(schedule), solvers.euler_ancestral_flow, grid, NOISE, eta=eta)
        ends.append(x / (grid.nodes[-1].alpha + grid.nodes[-1].sigma))
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_the_ancestral_euler_for_flows_is_that_of_its_users(eta):
    """As ComfyUI writes it: down by the flow, then rescale, and add noise to the level."""
    schedule = fs.Flow()
    grid = fs.grid(schedule, 5, fs.uniform_t)
    x, model = NOISE.draw(0), mixture(schedule)
    for k, (s, t) in enumerate(grid.steps()):
        x0 = model.predict(x, s)
        down = t.t * (1 + (t.t / s.t - 1) * eta)
        x = x + (x - x0) / s.t * (down - s.t)
        if t.t > 0:
            share = (1 - t.t) / (1 - down)
            x = share * x + (t.t**2 - (share * down) ** 2) ** 0.5 * NOISE.draw(k + 2)
    torch.testing.assert_close(
        fs.solve(mixture(schedule), solvers.euler_ancestral_flow, grid, NOISE, eta=eta), x, rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_ancestral_euler_for_flows_starts_at_alpha_0_and_traces(shift):
    grid = fs.grid(fs.Flow(shift), 5, fs.uniform_t)
    plan = fs.trace(solvers.euler_ancestral_flow, grid)
    direct = fs.solve(mixture(fs.Flow(shift)), solvers.euler_ancestral_flow, grid, NOISE)
    torch.testing.assert_close(fs.sample(mixture(fs.Flow(shift)), plan, NOISE), direct, rtol=1e-9, atol=1e-9)
    assert plan.nfe == 5
    none = fs.solve(mixture(fs.Flow(shift)), solvers.euler_ancestral_flow, grid, NOISE, eta=0.0)
    torch.testing.assert_close(none, fs.solve(mixture(fs.Flow(shift)), solvers.euler, grid, NOISE))


@pytest.mark.parametrize("lower", [False, True])
def test_the_order_falls_over_the_last_steps_where_the_grid_says_so(lower):
    grid = fs.grid(fs.VPContinuous(), 6, end=0.01, lower_order_final=lower)
    for solver in (solvers.sde_dpmpp_2m, solvers.sde_dpmpp_3m, partial(solvers.sa_solver, corrector=0)):
        last = fs.trace(solver, grid).rows[-1]
        assert (len(last.b) == 1) == lower


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
