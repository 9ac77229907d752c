"""The multistep family: its members under their own names, its weights in closed form, its ends."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad

import fastsample as fs
from fastsample import solvers
from fastsample.solvers.forms import FORMS
from fastsample.solvers.multistep import VARIABLES, Lam, lagrange, quadrature, weights
from fastsample.solvers.unipc import unified
from fastsample.zoo.exact import gaussian_flow

from .cases import SCHEDULES, Toy, gaussian, mixture

EDM = fs.EDM()
NOISE = fs.noise((2,), seeds=range(4), dtype=torch.float64)


def nodes(schedule, *levels):
    return [fs.node(schedule, float(schedule.time(-math.log(level)))) for level in levels]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(
    ("solver", "options"),
    [
        (solvers.ddim, {"predicts": "x0", "order": 1}),
        (solvers.ddim, {"predicts": "eps", "order": 1}),
        (solvers.ddim, {"predicts": "flow", "order": 1}),
        (solvers.dpmpp_3m, {"predicts": "x0", "variable": "lam", "order": 3}),
        (solvers.dpm_solver_3m, {"predicts": "eps", "variable": "lam", "order": 3}),
        (solvers.deis, {"predicts": "eps", "variable": "t", "order": 3}),
        (solvers.lms, {"predicts": "eps", "variable": "sigma", "order": 4}),
        (solvers.flow_2m, {"predicts": "flow", "variable": "tau", "order": 2}),
    ],
)
def test_solvers_with_names_are_members(solver, options, name):
    schedule = SCHEDULES[name]
    for end in (None, schedule.t_min):
        grid = fs.grid(schedule, 6, fs.quadratic_t, start=0.98 * schedule.t_max, end=end)
        both = [
            fs.solve(mixture(schedule), f, grid, NOISE, **o) for f, o in ((solver, {}), (solvers.multistep, options))
        ]
        torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("solver", "predicts"), [(solvers.dpmpp_2m, "x0"), (solvers.dpm_solver_2m, "eps")])
def test_the_predictor_of_unipc_with_b_2_and_order_2_is_the_two_step_solver(solver, predicts):
    grid = fs.grid(fs.VP.linear(), 7)
    both = [
        fs.solve(mixture(fs.VP.linear()), f, grid, NOISE, **options)
        for f, options in ((solver, {}), (solvers.unipc_2, {"predicts": predicts, "corrector": False}))
    ]
    torch.testing.assert_close(*both, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("h", [0.01, 0.5, 3.0, 9.0])
@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_the_quadrature_gives_the_weights_of_unipc_in_closed_form(predicts, h):
    form, (s, a, b, t) = FORMS[predicts], nodes(EDM, 1.0, math.exp(h), math.exp(1.7 * h), math.exp(-h))
    for known in ([s, a, b], [s, a, t], [s, a, b, t]):
        ours = weights(form, Lam(), EDM, known, s, t)
        assert ours == pytest.approx(unified(form, "bh2", known, s, t), rel=1e-9, abs=1e-12)


def test_equal_steps_in_sigma_have_the_weights_of_adams_and_bashforth():
    levels = nodes(EDM, 0.4, 0.5, 0.6, 0.7)  # newest first
    t = nodes(EDM, 0.3)[0]
    for weight, count in (
        ([3 / 2, -1 / 2], 2),
        ([23 / 12, -16 / 12, 5 / 12], 3),
        ([55 / 24, -59 / 24, 37 / 24, -9 / 24], 4),
    ):
        ours = weights(FORMS["eps"], VARIABLES["sigma"], EDM, levels[:count], levels[0], t)
        assert ours == pytest.approx(weight, rel=1e-12)


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("predicts", FORMS)
def test_polynomials_in_the_variable_are_integrated_exactly(predicts, variable):
    """By scipy's adaptive quadrature in q itself, over a step of 4 in lam."""
    schedule, g = fs.VPContinuous(), VARIABLES[variable]
    known = nodes(schedule, 2.0, 9.0, 30.0)
    s, t = known[0], nodes(schedule, 2 * math.exp(-4.0))[0]
    q, level = {
        "eps": (lambda u: u, lambda q: q),
        "x0": (lambda u: 1 / u, lambda q: 1 / q),
        "flow": (lambda u: u / (1 + u), lambda q: q / (1 - q)),
    }[predicts]

    def at(u):
        return float(g(schedule, np.array([-math.log(u)]))[0])

    def power(place, degree):
        return at(level(place)) ** degree

    ours = weights(FORMS[predicts], g, schedule, known, s, t)
    low, high = q(math.exp(-s.lam)), q(math.exp(-t.lam))
    for degree in (0, 1, 2):
        theirs = quad(power, low, high, (degree,), epsabs=0, epsrel=1e-11, limit=200)[0]
        mean = sum(share * at(math.exp(-node.lam)) ** degree for share, node in zip(ours, known))
        assert mean == pytest.approx(theirs / (high - low), rel=1e-8)


@pytest.mark.parametrize("predicts", FORMS)
def test_infinite_steps_have_the_weights_of_very_long_ones(predicts):
    form, g = FORMS[predicts], VARIABLES["angle"]
    flow = fs.Flow()
    far, near = fs.node(flow, 1.0), fs.node(flow, 0.0)
    known = nodes(flow, 0.5, 3.0)
    to_zero = weights(form, g, flow, known, known[0], near)
    assert to_zero == pytest.approx(weights(form, g, flow, known, known[0], nodes(flow, 1e-13)[0]), abs=1e-9)
    if predicts != "eps":
        known = [far, known[0]]  # a corrector's
        from_zero = weights(form, g, flow, known, far, known[1])
        known[0] = nodes(flow, 1e13)[0]
        assert from_zero == pytest.approx(weights(form, g, flow, known, known[0], known[1]), abs=1e-9)


def test_a_node_at_infinity_counts_nothing():
    flow = fs.Flow()
    far, (s, t) = fs.node(flow, 1.0), nodes(flow, 2.0, 1.0)
    for variable in ("lam", "sigma", "root"):
        assert weights(FORMS["x0"], VARIABLES[variable], flow, [s, far], s, t) == [1.0, 0.0]
        assert weights(FORMS["x0"], VARIABLES[variable], flow, [far, s], far, s) == [0.0, 1.0]
    assert weights(FORMS["x0"], VARIABLES["angle"], flow, [s, far], s, t)[1] < 0


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("predicts", ["eps", "x0"])
def test_a_plan_remembers_one_evaluation_for_each_order(predicts, order, corrector):
    options = {"predicts": predicts, "variable": "angle", "order": order, "corrector": corrector}
    plan = fs.trace(solvers.multistep, fs.grid(fs.VP.linear(), 9), **options)
    assert plan.memory == order + (corrector and order < 9)
    assert plan.nfe == 9
    assert plan.remembers == predicts or order == 1


@pytest.mark.parametrize("variable", VARIABLES)
@pytest.mark.parametrize("predicts", FORMS)
def test_every_member_runs_from_noise_to_sigma_0_on_every_schedule(predicts, variable):
    for schedule in SCHEDULES.values():
        alpha_0 = float(schedule.alpha(schedule.t_max)) < 1e-3
        start = 0.98 * schedule.t_max if alpha_0 and predicts == "eps" else None
        for steps in (1, 5):
            grid = fs.grid(schedule, steps, fs.quadratic_t, start=start)
            options = {"predicts": predicts, "variable": variable, "order": 4}
            for corrector in (False, True):
                end = fs.solve(Toy(schedule), solvers.multistep, grid, NOISE, **options, corrector=corrector)
                assert end.isfinite().all()


@pytest.mark.parametrize("solver", [solvers.flow_2m, solvers.flow_heun, solvers.dpmpp_2m])
def test_solvers_of_order_2_keep_it_from_alpha_0_to_sigma_0(solver):
    flow = fs.Flow()
    model = gaussian(flow)
    exact = gaussian_flow(NOISE.draw(0), fs.node(flow, 1.0), fs.node(flow, 0.0), model.means[0], model.variances[0])

    def error(steps):
        return float((fs.solve(model, solver, fs.grid(flow, steps, fs.uniform_t), NOISE) - exact).abs().max())

    assert math.log2(error(40) / error(80)) > 1.6


@pytest.mark.parametrize("solver", [solvers.lms, solvers.deis, solvers.multistep, solvers.unipc_3])
def test_many_steps_still_help(solver):
    """LMS and DEIS in diffusers stall, as they solve for their weights in float32."""
    schedule = fs.VPContinuous()
    ends = [
        fs.solve(mixture(schedule), solver, fs.grid(schedule, n, fs.karras, end=0.001), NOISE) for n in (160, 320, 640)
    ]
    assert (ends[2] - ends[1]).abs().max() < 0.3 * (ends[1] - ends[0]).abs().max()


def test_a_variable_may_be_a_function_and_an_angle_have_its_own_scale():
    grid = fs.grid(EDM, 6)
    named, own = (
        fs.solve(mixture(EDM), solvers.multistep, grid, NOISE, variable=variable)
        for variable in ("angle", lambda schedule, lam: np.arctan(np.exp(-lam) / 0.75))
    )
    torch.testing.assert_close(named, own)
    plan = fs.trace(solvers.multistep, grid, variable=solvers.Angle(0.5))
    assert plan.solver == "multistep(variable=Angle(sigma_data=0.5))"
    assert not torch.equal(fs.sample(mixture(EDM), plan, NOISE), named)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        (solvers.multistep, {"order": 5}, "multistep has orders 1 to 4, got 5"),
        (solvers.multistep, {"order": 0}, "multistep has orders 1 to 4, got 0"),
        (solvers.multistep, {"predicts": "noise"}, "one of eps, x0, flow.*got 'noise'"),
        (solvers.multistep, {"variable": "time"}, "unknown variable 'time'; choose one of lam, sigma, root"),
        (solvers.unipc, {"order": 4}, "unipc has orders 1 to 3, got 4"),
        (solvers.unipc_2, {"variant": "bh3"}, "unknown variant 'bh3' of unipc; choose one of bh1, bh2"),
        (solvers.unipc_2, {"predicts": "flow"}, "unipc integrates x0 or eps in lam, got predicts='flow'"),
    ],
)
def test_wrong_options_are_named_before_any_evaluation(solver, options, message):
    model = Toy(EDM)
    with pytest.raises(ValueError, match=message):
        fs.solve(model, solver, fs.grid(EDM, 3), NOISE, **options)
    assert not model.calls


def test_quadrature_points_lie_in_the_step_and_weights_add_up_to_1():
    for form in FORMS.values():
        for start, end in ((-2.0, -1.9), (-3.0, 4.0), (-0.5, math.inf if form.name != "x0" else 50.0)):
            lam, share = quadrature(form, start, end)
            assert share.sum() == pytest.approx(1)
            assert (share > 0).all()
            assert start < lam.min() < lam.max() < end


def test_lagrange_polynomials_are_1_at_their_own_place_and_0_at_the_others():
    places = np.array([0.3, 1.0, 2.5])
    np.testing.assert_allclose(lagrange(places, places), np.eye(3), atol=1e-15)
