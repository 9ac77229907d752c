"""Starts at alpha = 0, ends at sigma = 0, single steps, very many steps: where lam or its steps leave the ordinary."""

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import solvers
from fastsample.solvers.exponential import moments

from .cases import CASES, DETERMINISTIC, SCHEDULES, Toy, grids, mixture

VP = fs.VP.linear()
NOISE = fs.noise((2,), seeds=range(4), dtype=torch.float64)
FROM_ALPHA_0 = [case for case in CASES if case.from_alpha_0]
NOT_FROM_ALPHA_0 = [case for case in DETERMINISTIC if not case.from_alpha_0 and case.solver is not solvers.heun]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("case", FROM_ALPHA_0, ids=str)
def test_a_start_at_alpha_0_is_the_limit_of_starts_near_it(case, shift):
    schedule = fs.Flow(shift)
    for end in (None, 0.05):
        grid = fs.grid(schedule, 6, fs.uniform_t, end=end)
        # 2S and 3S have nodes in between in lam, which for 1e-300 would be nearer to t = 1 than float64 can say
        alpha = 1e-12 if case.solver in (solvers.dpmpp_2s, solvers.dpmpp_3s) else 1e-300
        near = fs.Grid(schedule, (fs.Node(1.0, alpha, 1.0), *grid.nodes[1:]))
        limit, close = (fs.solve(Toy(schedule), case.solver, g, NOISE, **case.options) for g in (grid, near))
        # lam = -690 there, and the differences to that evaluation fade as h / 690, up to four of them
        torch.testing.assert_close(limit, close, rtol=0, atol=0.01)


@pytest.mark.parametrize("options", [{}, {"s_churn": 1.0}])
def test_heun_refuses_a_start_at_alpha_0_and_says_what_to_do(options):
    grid = fs.grid(fs.Flow(), 4, fs.uniform_t)
    remedy = r"alpha = 0 \(t = 1\); start it at t < 1, or use a solver that moves x itself, such as dpmpp_2m"
    with pytest.raises(ValueError, match=remedy):
        fs.solve(Toy(fs.Flow()), solvers.heun, grid, NOISE, **options)
    with pytest.raises(ValueError, match=remedy):
        fs.trace(solvers.heun, grid, **options)


@pytest.mark.parametrize("case", NOT_FROM_ALPHA_0, ids=str)
def test_solvers_that_divide_by_alpha_refuse_a_start_at_alpha_0_and_say_what_to_do(case):
    grid = fs.grid(fs.Flow(), 4, fs.uniform_t)
    remedy = r"alpha = 0 \(t = 1\).*(start it at t < 1, or use a solver for x0|use variant='bh2', or start below)"
    for run in (lambda: fs.solve(Toy(fs.Flow()), case.solver, grid, NOISE, **case.options),
                lambda: fs.trace(case.solver, grid, **case.options)):  # fmt: skip
        with pytest.raises(ValueError, match=remedy):
            run()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", [case for case in CASES if "s_churn" not in case.options], ids=str)
def test_one_step_to_sigma_0_returns_x0(case, name):
    schedule = SCHEDULES[name]
    grid, _ = grids(case, schedule, 1)
    start = grid.nodes[0]
    x0 = Toy(schedule).predict(start.sigma * NOISE.draw(0), start)
    torch.testing.assert_close(fs.solve(Toy(schedule), case.solver, grid, NOISE, **case.options), x0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ddim_euler_and_dpmpp_1_are_one_solver(name):
    schedule = SCHEDULES[name]
    for end in (None, schedule.t_min):
        grid = fs.grid(schedule, 5, fs.quadratic_t, end=end)
        first, *rest = (
            fs.solve(mixture(schedule), solver, grid, NOISE)
            for solver in (solvers.ddim, solvers.euler, solvers.dpmpp_1)
        )
        for other in rest:
            torch.testing.assert_close(other, first, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_float32_states_stay_near_float64(case):
    grid = fs.grid(fs.VPContinuous(), 10)
    z = NOISE.draw(0)
    single, double = (
        fs.solve(mixture(fs.VPContinuous()), case.solver, grid, noise, **case.options) for noise in (z.float(), z)
    )
    assert single.dtype == torch.float32
    # 1e-7 a step, and 200 times that in frames of eps, whose x / alpha starts at alpha = 0.006; a polynomial through
    # four of its values has weights of up to ten
    torch.testing.assert_close(single.double(), double, rtol=0, atol=5e-5 if case.options.get("order") != 4 else 5e-4)


@pytest.mark.parametrize("steps", [300, 400, 600])
def test_steps_that_do_not_divide_the_table_converge_as_others_do(steps):
    """diffusers' DDIM steps to t - T // N, not to its next timestep: 11 to 68 times the error there (#12633)."""
    exact = fs.solve(mixture(VP), solvers.unipc_3, fs.grid(VP, 400), NOISE)

    def error(n):
        return float((fs.solve(mixture(VP), solvers.ddim, fs.grid(VP, n, fs.trailing), NOISE) - exact).abs().max())

    assert error(steps) < 1.3 * error(250) * 250 / steps


@pytest.mark.parametrize("table", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", [case for case in CASES if case.options.get("s_churn") is None], ids=str)
def test_more_steps_than_the_table_has_indices_are_finite(case, table):
    """diffusers gives NaN in silence at 1001."""
    schedule = fs.VP.linear(1e-1 / table, 20 / table, table)
    grid = fs.grid(schedule, table + 1)
    end = fs.solve(mixture(schedule), case.solver, grid, NOISE, **case.options)
    assert end.isfinite().all()
    assert end.abs().max() < 3


def test_cosine_karras_asks_at_other_times_at_every_step():
    """diffusers rounds them, and asks at 998 nine times of twenty (#12771)."""
    schedule, told = fs.VP.cosine(), []

    def network(x, t):
        told.append(float(t[0]))
        return x

    plan = fs.trace(solvers.dpmpp_2m, fs.grid(schedule, 20, fs.karras))
    fs.sample(fs.Denoiser(network, schedule, "v"), plan, NOISE)
    assert len(set(told)) == 20
    assert told == pytest.approx([row.node.t for row in plan.rows], rel=1e-7)  # float32, and nothing cut off


@pytest.mark.parametrize("case", FROM_ALPHA_0, ids=str)
def test_an_eps_network_cannot_start_at_zero_terminal_snr(case):
    """diffusers returns infinity (#3851)."""
    schedule = SCHEDULES["vp_zero_snr"]
    model = fs.Denoiser(lambda x, t: x, schedule, "eps")
    grid = fs.grid(schedule, 4, fs.trailing)
    with pytest.raises(ValueError, match="eps network says nothing of x0 at alpha = 0"):
        fs.sample(model, fs.trace(case.solver, grid, **case.options), NOISE)


@pytest.mark.parametrize("case", DETERMINISTIC, ids=str)
def test_the_default_dtype_of_torch_changes_nothing(case):
    """UniPC of order 3 in diffusers solves for its weights in it."""
    grid = fs.grid(fs.VPContinuous(), 6)
    ends = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            ends.append(fs.sample(Toy(fs.VPContinuous()), fs.trace(case.solver, grid, **case.options), NOISE))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*ends)


@pytest.mark.parametrize("h", [-800.0, -60.0, -4.0, -1.001, -0.03, 1e-9, 1e-4, 0.03, 0.999, 1.001, 4.0, 60.0])
def test_the_moments_are_means_under_the_weight_at_every_step_size(h):
    """By Gauss-Legendre, on the 40 / |h| next to the end where the weight is greatest; beyond it is nothing."""
    u, w = np.polynomial.legendre.leggauss(60)
    u = min(1.0, 40 / abs(h)) * (u + 1) / 2
    w = w * np.exp(-abs(h) * u)
    u = u if h < 0 else 1 - u
    expected = [float((w * u**i).sum() / w.sum()) for i in (1, 2, 3, 4)]
    assert moments(h, 4) == pytest.approx(expected, rel=1e-12)


NAN, INF = float("nan"), float("inf")
NOISY = [solvers.sde_dpmpp_1, solvers.sde_dpmpp_2m, solvers.sde_dpmpp_3m, solvers.sde_dpmpp_2s, solvers.euler_ancestral,
         solvers.dpm2_ancestral, solvers.dpmpp_2s_ancestral, solvers.euler_ancestral_flow]  # fmt: skip
WRONG = [
    *((solver, {"eta": value}) for solver in [*NOISY, solvers.ddim] for value in (-1.0, NAN, INF, "1", None)),
    *((solver, {"s_noise": value}) for solver in [*NOISY, solvers.restart] for value in (-1.0, NAN, INF, "1")),
    *((solvers.ddpm, {"large": value}) for value in (-1.0, 2.0, NAN, "x")),
    *(
        (solver, {name: value})
        for solver in (solvers.euler, solvers.heun)
        for name in ("s_churn", "s_noise", "s_tmin", "s_tmax")
        for value in (-1.0, NAN, "x")
    ),
    (solvers.heun, {"s_churn": 2.0, "s_tmin": 5.0, "s_tmax": 1.0}),
    (solvers.heun, {"s_churn": INF}),
    *(
        (solver, {"curvature": value})
        for solver in (solvers.dpmpp_3m, solvers.dpm_solver_3m, solvers.sde_dpmpp_3m)
        for value in (NAN, INF, "x")
    ),
    *(
        (solver, {"order": value})
        for solver in (solvers.multistep, solvers.deis, solvers.lms, solvers.ipndm, solvers.ipndm_v, solvers.unipc)
        for value in (0, -1, 2.0, 2.5, "2", NAN, None)
    ),
    *((solvers.multistep, {"variable": value}) for value in (None, 1, [], "Angle")),
    *((solvers.multistep, {"predicts": value}) for value in (None, 1, "v")),
    *((solvers.sa_solver, {"tau": value}) for value in (-1.0, NAN, INF, "x", 1e200)),
    *((solvers.sa_solver, {name: value}) for name in ("s_tmin", "s_tmax") for value in (-1.0, NAN, "x")),
    *((solvers.sa_solver, {name: v}) for name in ("predictor", "corrector") for v in (-1, 1.5, 2.0, "2", NAN)),
    (solvers.sa_solver, {"predictor": 0}),
    *((solvers.tcd, {"gamma": value}) for value in (-0.1, 1.1, NAN, "x", None)),
]


@pytest.mark.parametrize(("solver", "options"), WRONG, ids=[f"{solver.__name__}-{o}" for solver, o in WRONG])
def test_options_without_sense_are_refused_by_name_before_any_evaluation(solver, options):
    """Most would pass in silence: a NaN is never above 0, so no noise would be added."""
    toy = Toy(fs.Flow())
    grid = fs.grid(fs.Flow(), 4, fs.uniform_t, start=0.9)
    name = next(iter(options))
    said = {"order": "orders", "s_tmin": "s_tmin", "s_churn": "s_churn|s_tmin"}.get(name, name)
    for run in (lambda: fs.trace(solver, grid, **options), lambda: fs.solve(toy, solver, grid, NOISE, **options)):
        with pytest.raises(ValueError, match=rf"({said}) .*(got|and|choose) "):
            run()
    assert not toy.calls


@pytest.mark.parametrize("value", [0.0, -1.0, NAN, INF, "x"])
def test_the_constants_of_a_variable_are_checked_when_it_is_made(value):
    with pytest.raises(ValueError, match=r"sigma_data of Angle must be a number of at least 0\.001, got"):
        solvers.Angle(value)
    with pytest.raises(ValueError, match=r"rho of Level must be a number of at least 0\.001, got"):
        solvers.Level(value)
