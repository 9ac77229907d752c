"""Agreement with diffusers where it computes the same thing, fed the same denoiser at its own levels.

The denoiser is exact and is asked at the scheduler's sigma, not at its rounded timestep; so what is compared is the
formulas alone. Known differences, each held by a test or kept out of the comparison by a setting:
- diffusers' third-order multistep halves the last difference (`curvature=0.5` here), and so has order 2;
- its Heun counts 2 N - 1 calls as N timesteps: N intervals, the last by Euler, as here;
- `lower_order_final` is an option of our grid;
- its DEIS takes polynomials in lam where the paper takes t (`multistep` in lam here);
- its PNDM counts the evaluations of its start as timesteps (`plms`, `pndm`);
- its DDPM adds beta's noise at the last step unless that is at index 0 (seen with "trailing"); here never at sigma = 0;
- its Euler with churn asks the network at sigma and not at the raised sigma of the paper, so it is not compared.
"""

import pytest
import torch

import fastsample as fs
from fastsample import solvers

from .cases import mixture

diffusers = pytest.importorskip("diffusers", reason="the golden tests need pip install 'fastsample[diffusers]'")

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
VP = fs.VP.linear()
NOISE = fs.noise((2,), seeds=range(8), dtype=torch.float64)
# Their tables of sigma are float32 and the grid starts at alpha = 0.006, by which x0 = (x - sigma eps) / alpha divides:
# a rounding of 6e-8 becomes 1e-5 in the first x0.
FLOAT32 = 2e-5

LOWER = {"lower_order_final": True}
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
# (scheduler, its settings, our solver, our options), all in the frame alpha^2 + sigma^2 = 1
MULTISTEP = [
    ("DPMSolverMultistepScheduler", {"solver_order": 1}, solvers.dpmpp_1, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 2}, solvers.dpmpp_2m, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 2, **LOWER}, solvers.dpmpp_2m, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 2, "use_karras_sigmas": True}, solvers.dpmpp_2m, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 2, **SIGMA_MIN}, solvers.dpmpp_2m, {}),
    # solver_type "heun" takes the second step with the whole Taylor term of the slope, as dpmpp_3m does
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "solver_type": "heun"}, solvers.dpmpp_3m, {"curvature": 0.5}),
    (
        "DPMSolverMultistepScheduler",
        {"algorithm_type": "dpmsolver", "solver_order": 2, **SIGMA_MIN},
        solvers.dpm_solver_2m,
        {},
    ),
    ("UniPCMultistepScheduler", {"solver_order": 1, **SIGMA_MIN}, solvers.unipc_1, {}),
    ("UniPCMultistepScheduler", {"solver_order": 2, **SIGMA_MIN}, solvers.unipc_2, {}),
    ("UniPCMultistepScheduler", {"solver_order": 3, **SIGMA_MIN}, solvers.unipc_3, {}),
    ("UniPCMultistepScheduler", {"solver_order": 2, **LOWER}, solvers.unipc_2, {}),
    ("UniPCMultistepScheduler", {"solver_order": 3, **LOWER}, solvers.unipc_3, {}),
    (
        "UniPCMultistepScheduler",
        {"solver_order": 3, "solver_type": "bh1", **SIGMA_MIN},
        solvers.unipc_3,
        {"variant": "bh1"},
    ),
    (
        "UniPCMultistepScheduler",
        {"solver_order": 3, "solver_type": "bh1", "predict_x0": False, **SIGMA_MIN},
        solvers.unipc_3,
        {"variant": "bh1", "predicts": "eps"},
    ),
    *(
        ("DEISMultistepScheduler", {"solver_order": k, **lower}, solvers.multistep, {"variable": "lam", "order": k})
        for k in (1, 2, 3)
        for lower in (LOWER, {})
    ),
]


@pytest.mark.parametrize("steps", [2, 5, 12])
@pytest.mark.parametrize(("name", "settings", "solver", "options"), MULTISTEP)
def test_multistep_solvers_match_diffusers(name, settings, solver, options, steps):
    scheduler = getattr(diffusers, name)(**LINEAR, **{"lower_order_final": False, **settings})
    scheduler.set_timesteps(steps)
    grid = grid_at(VP, scheduler.sigmas, lower_order_final=settings.get("lower_order_final", False))
    start = NOISE.draw(0) * grid.nodes[0].sigma
    theirs = run(scheduler, start, lambda x, k: eps(x, grid.nodes[k]))
    # weights that multiply differences of eps by up to sigma / alpha = 157, or by B(h) = h, lose a digit more
    atol = 5e-4 if "variant" in options or solver is solvers.dpm_solver_2m else FLOAT32
    torch.testing.assert_close(fs.solve(mixture(VP), solver, grid, NOISE, **options), theirs, rtol=0, atol=atol)


@pytest.mark.parametrize(("solver", "skipped", "extra"), [(solvers.plms, True, 1), (solvers.pndm, False, 9)])
def test_pndm_matches_diffusers_and_counts_the_evaluations_of_its_start(solver, skipped, extra):
    """Where steps divide the table: elsewhere theirs steps to t - T // N, not to its next timestep."""
    scheduler = diffusers.PNDMScheduler(
        **LINEAR, skip_prk_steps=skipped, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(10)
    asked = scheduler.timesteps.tolist()
    grid = fs.grid(VP, 10, fs.trailing)
    start = NOISE.draw(0) * grid.nodes[0].sigma
    theirs = run(scheduler, start, lambda x, k: eps(x, fs.node(VP, asked[k])))
    plan = fs.trace(solver, grid)
    assert plan.nfe == len(asked) == 10 + extra
    torch.testing.assert_close(fs.solve(mixture(VP), solver, grid, NOISE), theirs, rtol=0, atol=FLOAT32)


def test_the_singlestep_solver_matches_diffusers():
    """An odd number of evaluations: pairs, each a step of ours, then one alone to sigma = 0."""
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        **LINEAR, solver_order=2, lower_order_final=True, use_exponential_sigmas=True
    )
    scheduler.set_timesteps(9)
    evaluations = grid_at(VP, scheduler.sigmas)
    grid = grid_at(VP, [*scheduler.sigmas[:-1:2], 0.0])
    start = NOISE.draw(0) * grid.nodes[0].sigma
    theirs = run(scheduler, start, lambda x, k: eps(x, evaluations.nodes[k]))
    ours = fs.solve(mixture(VP), solvers.dpmpp_2s, grid, NOISE)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=FLOAT32)
    assert fs.trace(solvers.dpmpp_2s, grid).nfe == len(scheduler.timesteps) == 9


@pytest.mark.parametrize("eta", [0.0, 0.7, 1.0])
def test_ddim_matches_diffusers(eta):
    scheduler = diffusers.DDIMScheduler(**LINEAR, clip_sample=False, timestep_spacing="trailing")
    scheduler.set_timesteps(20)
    grid = fs.grid(VP, 20, fs.at_times(scheduler.timesteps.tolist()))
    start = NOISE.draw(0) * grid.nodes[0].sigma
    theirs = run(
        scheduler,
        start,
        lambda x, k: eps(x, grid.nodes[k]),
        lambda k: {"eta": eta, "variance_noise": NOISE.draw(k + 2)},
    )
    torch.testing.assert_close(fs.solve(mixture(VP), solvers.ddim, grid, NOISE, eta=eta), theirs, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize(("variance", "large"), [("fixed_small", 0.0), ("fixed_large", 1.0)])
def test_ddpm_matches_diffusers(variance, large, monkeypatch):
    scheduler = diffusers.DDPMScheduler(**LINEAR, clip_sample=False, timestep_spacing="leading", variance_type=variance)
    scheduler.set_timesteps(20)
    grid = fs.grid(VP, 20, fs.at_times(scheduler.timesteps.tolist()))
    draws = iter(range(2, 99))
    module = diffusers.schedulers.scheduling_ddpm
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: NOISE.draw(next(draws)))
    start = NOISE.draw(0) * grid.nodes[0].sigma
    theirs = run(scheduler, start, lambda x, k: eps(x, grid.nodes[k]))
    ours = fs.solve(mixture(VP), solvers.ddpm, grid, NOISE, large=large)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_euler_and_heun_match_diffusers(name):
    scheduler = getattr(diffusers, name)(**LINEAR, timestep_spacing="trailing")
    scheduler.set_timesteps(12)
    heun = name.startswith("Heun")
    levels = scheduler.sigmas.tolist()  # Heun has each inner level twice: once as an end, once as a start
    grid = grid_at(VP, [levels[0], *levels[1:-1:2], 0.0] if heun else levels)
    evaluated = [grid_at(VP, [level]).nodes[0] for level in levels[:-1]]
    start = NOISE.draw(0) * grid.nodes[0].sigma
    # their state is x / alpha; theirs at sigma = 0 is ours, where alpha = 1
    theirs = run(scheduler, start / grid.nodes[0].alpha, lambda x, k: eps(evaluated[k].alpha * x, evaluated[k]))
    solver = solvers.heun if heun else solvers.euler
    torch.testing.assert_close(fs.solve(mixture(VP), solver, grid, NOISE), theirs, rtol=0, atol=FLOAT32)
    assert fs.trace(solver, grid).nfe == len(scheduler.timesteps) == (23 if heun else 12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_euler_matches_diffusers_on_a_flow_from_t_1(shift):
    flow = fs.Flow()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(10)
    grid = fs.grid(flow, 10, fs.at_times(scheduler.sigmas[:-1].double().tolist()))
    assert grid.nodes[0].alpha == 0
    model = mixture(flow)

    def velocity(x, k):  # eps - x0 = (x - x0) / sigma
        node = grid.nodes[k]
        return (x - model.predict(x, node)) / node.sigma

    theirs = run(scheduler, NOISE.draw(0), velocity)
    torch.testing.assert_close(
        fs.solve(model, solvers.euler, grid, NOISE), theirs, rtol=0, atol=2e-6
    )  # alpha is not small


def test_diffusers_third_order_is_not_ours():
    """They differ by the half of the last difference, by more than any rounding; test_order.py says which is right."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **LINEAR, solver_order=3, solver_type="heun", lower_order_final=False
    )
    scheduler.set_timesteps(12)
    grid = grid_at(VP, scheduler.sigmas)
    theirs = run(scheduler, NOISE.draw(0) * grid.nodes[0].sigma, lambda x, k: eps(x, grid.nodes[k]))
    assert (fs.solve(mixture(VP), solvers.dpmpp_3m, grid, NOISE) - theirs).abs().max() > 1e-3


def run(scheduler, x, predict, options=lambda k: {}):
    """Sample with a scheduler of diffusers; predict(x, k) is the network's output at evaluation k, in float64."""
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(predict(x.double(), k), t, x, **options(k)).prev_sample
    return x.double()


def eps(x, node):
    return (x - node.alpha * mixture(VP).predict(x, node)) / node.sigma


def grid_at(schedule, levels, **options):
    """The grid with these values of sigma / alpha."""
    levels = torch.as_tensor(levels, dtype=torch.float64)
    nodes = [fs.node(schedule, float(schedule.time(-level.log()))) for level in levels]
    return fs.Grid(schedule, tuple(nodes), **options)
