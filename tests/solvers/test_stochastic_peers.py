"""Agreement of the solvers that add noise with diffusers and k-diffusion, fed the same denoiser and the same noises.

Known differences, each held by a test or kept out of the comparison:
- k-diffusion and diffusers halve the last difference of "3M" (`curvature=0.5` here);
- k-diffusion's dpmpp_sde takes eta as its ancestral samplers do, which is ours at eta = 1; its Brownian motion joins
  the noises of two half steps in another way, so it is handed ours;
- diffusers' SA-Solver changes polynomials through two points, which the paper does not; with more, or one, it agrees;
- diffusers' DDPM adds noise at the last step unless that is at index 0, and its TCD ends at index 0, not at sigma = 0.
"""

import importlib.util
import math
import sys
import types

import pytest
import torch

import fastsample as fs
from fastsample import solvers
from fastsample.solvers.stochastic import reverse

from .cases import SCHEDULES, mixture

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
VP = fs.VP.linear()
NOISE = fs.noise((2,), seeds=range(8), dtype=torch.float64)
FLOAT32 = 2e-5  # tables of sigma in float32, and alpha = 0.006 at the start: see test_diffusers.py
LEVELS = [12.0, 7.0, 3.0, 1.1, 0.4, 0.1, 0.03, 0.0]


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers", reason="needs pip install 'fastsample[diffusers]'")


@pytest.fixture(scope="module")
def k_diffusion():
    """k_diffusion.sampling by itself: the package around it wants torchvision, scikit-image and more."""
    for needed in ("k_diffusion", "torchdiffeq", "torchsde", "tqdm"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"needs pip install k-diffusion ({needed} is missing)")
    folder = importlib.util.find_spec("k_diffusion").submodule_search_locations[0]
    package = types.ModuleType("bare_k_diffusion")
    package.__path__ = [folder]
    package.utils = types.ModuleType("bare_k_diffusion.utils")
    package.utils.append_dims = lambda x, dims: x.view(*x.shape, *[1] * (dims - x.dim()))
    sys.modules.update({"bare_k_diffusion": package, "bare_k_diffusion.utils": package.utils})
    yield importlib.import_module("bare_k_diffusion.sampling")
    for name in [name for name in sys.modules if name.startswith("bare_k_diffusion")]:
        del sys.modules[name]


# (theirs, its options, ours, our options)
K_DIFFUSION = [
    ("euler_ancestral", {}, solvers.euler_ancestral, {}),
    ("euler_ancestral", {"eta": 0.7, "s_noise": 1.01}, solvers.euler_ancestral, {"eta": 0.7, "s_noise": 1.01}),
    ("euler_ancestral", {"eta": 1.4}, solvers.euler_ancestral, {"eta": 1.4}),
    ("dpm_2_ancestral", {"eta": 0.7, "s_noise": 1.01}, solvers.dpm2_ancestral, {"eta": 0.7, "s_noise": 1.01}),
    ("dpm_2_ancestral", {}, solvers.dpm2_ancestral, {}),
    ("dpmpp_2s_ancestral", {}, solvers.dpmpp_2s_ancestral, {}),
    ("dpmpp_2s_ancestral", {"eta": 0.7, "s_noise": 1.01}, solvers.dpmpp_2s_ancestral, {"eta": 0.7, "s_noise": 1.01}),
    ("dpmpp_2m_sde", {}, solvers.sde_dpmpp_2m, {}),
    ("dpmpp_2m_sde", {"eta": 0.6, "s_noise": 1.01}, solvers.sde_dpmpp_2m, {"eta": 0.6, "s_noise": 1.01}),
    ("dpmpp_2m_sde", {"solver_type": "heun"}, solvers.sde_dpmpp_2m, {"midpoint": False}),
    ("dpmpp_3m_sde", {}, solvers.sde_dpmpp_3m, {"curvature": 0.5}),
    (
        "dpmpp_3m_sde",
        {"eta": 0.6, "s_noise": 1.01},
        solvers.sde_dpmpp_3m,
        {"eta": 0.6, "s_noise": 1.01, "curvature": 0.5},
    ),
    ("dpmpp_sde", {}, solvers.sde_dpmpp_2s, {}),
    ("dpmpp_sde", {"s_noise": 1.01}, solvers.sde_dpmpp_2s, {"s_noise": 1.01}),
]


@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow"])
@pytest.mark.parametrize(("theirs", "settings", "solver", "options"), K_DIFFUSION)
def test_solvers_match_k_diffusion_on_every_schedule(k_diffusion, theirs, settings, solver, options, name):
    """In their frame, x / alpha at the level sigma / alpha, whatever the schedule."""
    schedule, denoiser = SCHEDULES[name], mixture(fs.EDM())
    grid, calls, drawn = grid_at(schedule, LEVELS), [], []

    def model(x, sigma):
        calls.append(sigma)
        level = float(sigma[0])
        return denoiser.predict(x, fs.Node(level, 1.0, level))

    def noise(sigma, sigma_next):
        z = NOISE.draw(len(calls) + 1)
        drawn.append((float(sigma), float(sigma_next), z))
        if theirs != "dpmpp_sde" or len(drawn) % 2:
            return z
        s, m, t = (fs.Node(level, 1.0, level) for level in (*drawn[-2][:2], float(sigma_next)))
        kept, _, second = reverse(m, t, 1.0)
        return (kept * reverse(s, m, 1.0)[2] * drawn[-2][2] + second * z) / reverse(s, t, 1.0)[2]

    sigmas = torch.tensor(LEVELS, dtype=torch.float64)
    sampler = getattr(k_diffusion, f"sample_{theirs}")
    ends = sampler(model, NOISE.draw(0) * LEVELS[0], sigmas, noise_sampler=noise, disable=True, **settings)
    ours = fs.solve(mixture(schedule), solver, grid, NOISE, **options)
    torch.testing.assert_close(ours, ends, rtol=0, atol=1e-9)  # both in float64
    assert fs.trace(solver, grid, **options).nfe == len(calls)


def test_k_diffusion_fails_at_one_step_where_we_do_not(k_diffusion):
    sigmas, x = torch.tensor([3.0, 0.0], dtype=torch.float64), NOISE.draw(0)
    with pytest.raises(UnboundLocalError):
        k_diffusion.sample_dpmpp_2m_sde(lambda x, sigma: x, x, sigmas, noise_sampler=lambda *s: x, disable=True)
    assert fs.solve(mixture(fs.EDM()), solvers.sde_dpmpp_2m, grid_at(fs.EDM(), [3.0, 0.0]), NOISE).isfinite().all()


@pytest.mark.parametrize("steps", [2, 6, 12])
@pytest.mark.parametrize(
    ("settings", "solver", "options"),
    [
        ({"solver_order": 1}, solvers.sde_dpmpp_1, {}),
        ({"solver_order": 2, "solver_type": "midpoint"}, solvers.sde_dpmpp_2m, {}),
        ({"solver_order": 2, "solver_type": "heun"}, solvers.sde_dpmpp_2m, {"midpoint": False}),
    ],
)
def test_sde_multistep_solvers_match_diffusers(diffusers, settings, solver, options, steps):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **LINEAR, algorithm_type="sde-dpmsolver++", lower_order_final=False, **settings
    )
    scheduler.set_timesteps(steps)
    grid = grid_at(VP, scheduler.sigmas)
    theirs = run(
        scheduler,
        NOISE.draw(0) * grid.nodes[0].sigma,
        lambda x, k: eps(x, grid.nodes[k]),
        lambda k: {"variance_noise": NOISE.draw(k + 2)},
    )
    ours = fs.solve(mixture(VP), solver, grid, NOISE, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=FLOAT32)


def test_the_ancestral_euler_matches_diffusers(diffusers, monkeypatch):
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**LINEAR, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    patch(monkeypatch, diffusers.schedulers.scheduling_euler_ancestral_discrete)
    levels = scheduler.sigmas.tolist()
    grid = grid_at(VP, levels)
    nodes = grid.nodes
    start = NOISE.draw(0) * nodes[0].sigma / nodes[0].alpha
    theirs = run(scheduler, start, lambda x, k: eps(nodes[k].alpha * x, nodes[k]).double())
    ours = fs.solve(mixture(VP), solvers.euler_ancestral, grid, NOISE)
    # their state is float32 at the level 150, ours float64
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("eta", "s_noise"), [(1.0, 1.0), (0.6, 1.01), (0.0, 1.0)])
def test_the_ancestral_euler_for_flows_matches_diffusers(diffusers, monkeypatch, eta, s_noise):
    if not hasattr(diffusers, "LTXEulerAncestralRFScheduler"):
        pytest.skip("this diffusers has no LTXEulerAncestralRFScheduler")
    scheduler = diffusers.LTXEulerAncestralRFScheduler(eta=eta, s_noise=s_noise)
    sigmas = [0.97, 0.8, 0.55, 0.3, 0.1, 0.0]
    scheduler.set_timesteps(sigmas=sigmas)
    patch(monkeypatch, diffusers.schedulers.scheduling_ltx_euler_ancestral_rf, torch.float32)
    flow = fs.Flow()
    grid = fs.Grid(flow, tuple(fs.node(flow, sigma) for sigma in sigmas))
    model = mixture(flow)
    x = (NOISE.draw(0) * sigmas[0]).float()
    for k, t in enumerate(scheduler.timesteps[: len(grid)]):
        velocity = (x.double() - model.predict(x.double(), grid.nodes[k])) / grid.nodes[k].sigma
        x = scheduler.step(velocity.float(), t, x).prev_sample
    ours = fs.solve(model, solvers.euler_ancestral_flow, grid, NOISE, eta=eta, s_noise=s_noise)
    torch.testing.assert_close(ours, x.double(), rtol=0, atol=1e-5)  # a float32 state


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_sa_solver_of_one_point_matches_diffusers(diffusers, tau):
    scheduler = diffusers.SASolverScheduler(
        **LINEAR, predictor_order=1, corrector_order=1, tau_func=lambda t: torch.tensor(tau), lower_order_final=False
    )
    scheduler.set_timesteps(10)
    grid = grid_at(VP, scheduler.sigmas)
    module = diffusers.schedulers.scheduling_sasolver
    draws = iter(range(2, 99))
    original, module.randn_tensor = module.randn_tensor, lambda *args, **options: NOISE.draw(next(draws))
    try:
        start = NOISE.draw(0) * grid.nodes[0].sigma
        theirs = run(scheduler, start, lambda x, k: eps(x, grid.nodes[k]))
    finally:
        module.randn_tensor = original
    ours = fs.solve(mixture(VP), solvers.sa_solver, grid, NOISE, tau=tau, predictor=1, corrector=1)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("points", [3, 4])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_the_steps_of_sa_solver_match_diffusers(diffusers, tau, points):
    """A predictor and a corrector, each through 3 and 4 points: a whole run begins with 2, which diffusers changes."""
    from fastsample.solvers.sa_solver import _mean

    scheduler = diffusers.SASolverScheduler(**LINEAR, tau_func=lambda t: torch.tensor(tau))
    scheduler.set_timesteps(12)
    scheduler.sigmas = scheduler.sigmas.double()
    grid = grid_at(VP, scheduler.sigmas)
    x, z, *known = (NOISE.draw(k) for k in range(points + 2))  # newest first
    k = 5
    scheduler._step_index, scheduler.model_outputs = k, known[::-1]
    theirs = scheduler.stochastic_adams_bashforth_update(
        known[0], sample=x, noise=z, order=points, tau=torch.tensor(tau, dtype=torch.float64)
    )
    s, t = grid.nodes[k : k + 2]
    keep, gain, std = reverse(s, t, tau**2)
    mean = _mean([(known[i], grid.nodes[k - i]) for i in range(points)], s, t, tau**2)
    torch.testing.assert_close(keep * x + gain * mean + std * z, theirs, rtol=0, atol=1e-6)

    scheduler.model_outputs = known[:0:-1]  # those before the new one
    theirs = scheduler.stochastic_adams_moulton_update(
        known[0],
        last_sample=x,
        last_noise=z,
        this_sample=x,
        order=points,
        tau=torch.tensor(tau, dtype=torch.float64),
    )
    s, t = grid.nodes[k - 1 : k + 1]
    keep, gain, std = reverse(s, t, tau**2)
    mean = _mean([(known[i], grid.nodes[k - i]) for i in range(points)], s, t, tau**2)
    torch.testing.assert_close(keep * x + gain * mean + std * z, theirs, rtol=0, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 20, 100])
def test_ddpm_with_learned_variance_matches_diffusers(diffusers, monkeypatch, steps):
    scheduler = diffusers.DDPMScheduler(
        **LINEAR, clip_sample=False, timestep_spacing="leading", variance_type="learned_range"
    )
    scheduler.set_timesteps(steps)
    patch(monkeypatch, diffusers.schedulers.scheduling_ddpm)
    grid = fs.grid(VP, steps, fs.at_times(scheduler.timesteps.tolist()))

    def network(x, t):
        """eps of the mixture, and something between -1 and 1 that differs from number to number."""
        return torch.cat([eps(x, fs.node(VP, float(t[0]))), torch.tanh(x + t[:, None] / 500 - 1)], 1)

    times = [torch.full((8,), float(t), dtype=torch.float64) for t in scheduler.timesteps]
    theirs = run(scheduler, NOISE.draw(0) * grid.nodes[0].sigma, lambda x, k: network(x, times[k]))
    ours = fs.solve(fs.Denoiser(network, VP, dtype=torch.float64), solvers.ddpm_learned, grid, NOISE)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=FLOAT32)
    fixed = fs.solve(fs.Denoiser(network, VP, dtype=torch.float64), solvers.ddpm, grid, NOISE)
    assert steps == 1 or (fixed - ours).abs().max() > 0.01


def test_lcm_matches_diffusers_with_its_boundary_condition_in_the_model(diffusers, monkeypatch):
    scheduler = diffusers.LCMScheduler(original_inference_steps=50, **{**LINEAR, "clip_sample": False})
    scheduler.set_timesteps(4)
    patch(monkeypatch, diffusers.schedulers.scheduling_lcm)
    grid = fs.grid(VP, 4, fs.at_times(scheduler.timesteps.tolist()))

    class Bounded:
        schedule = VP

        def predict(self, x, node):
            scaled = 10 * node.t / 0.5
            return x / (scaled**2 + 1) + mixture(VP).predict(x, node) * scaled / math.sqrt(scaled**2 + 1)

    start = NOISE.draw(0) * grid.nodes[0].sigma
    theirs = run(scheduler, start, lambda x, k: eps(x, grid.nodes[k]))
    torch.testing.assert_close(fs.solve(Bounded(), solvers.consistency, grid, NOISE), theirs, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0])
def test_tcd_matches_diffusers(diffusers, monkeypatch, gamma):
    """At indices of which (1 - gamma) is whole: theirs is rounded down."""
    scheduler = diffusers.TCDScheduler(**LINEAR)
    scheduler.set_timesteps(timesteps=[990, 700, 400, 100])
    patch(monkeypatch, diffusers.schedulers.scheduling_tcd)
    grid = fs.grid(VP, 4, fs.at_times([990, 700, 400, 100, 0]), end=0.0)
    theirs = run(
        scheduler, NOISE.draw(0) * grid.nodes[0].sigma, lambda x, k: eps(x, grid.nodes[k]), lambda k: {"eta": gamma}
    )
    ours = fs.solve(mixture(VP), solvers.tcd, grid, NOISE, gamma=gamma)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=FLOAT32)


def patch(monkeypatch, module, dtype=torch.float64):
    """Their noises are ours, in order: one after each evaluation."""
    draws = iter(range(2, 2000))
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: NOISE.draw(next(draws)).to(dtype))


def run(scheduler, x, predict, options=lambda k: {}):
    """Sample with a scheduler of diffusers; predict(x, k) is the network's output at evaluation k, in float64."""
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(x.double(), k), t, x, **options(k)).prev_sample
    return x.double()


def eps(x, node):
    return (x - node.alpha * mixture(VP).predict(x, node)) / node.sigma


def grid_at(schedule, levels):
    """The grid with these values of sigma / alpha."""
    levels = torch.as_tensor(levels, dtype=torch.float64)
    return fs.Grid(schedule, tuple(fs.node(schedule, float(schedule.time(-level.log()))) for level in levels))
