"""Boundaries: the papers' factors, the identity at the least noise, and models that have one."""

import math

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill, solvers
from fastsample.distill.boundary import boundary, boundary_of, karras_prediction

SCHEDULES = [fs.EDM(), fs.VP.scaled_linear(), fs.VPContinuous(), fs.Flow()]


class Wave(nn.Module):
    """Any function of x and t, never small."""

    def forward(self, x, t):
        return 3 * torch.cos(2 * x + t[:, None].sin()) + 5


def denoiser(schedule, predicts="v"):
    return fs.Denoiser(Wave(), schedule, predicts)


def at(schedule, *times):
    return fs.nodes(schedule, torch.tensor(times, dtype=torch.float64))


def states(count=7, dtype=torch.float32):
    return 10 * torch.randn(count, 2, generator=torch.Generator().manual_seed(1), dtype=dtype)


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow", karras_prediction()], ids=str)
def test_at_the_least_noise_of_edm_the_function_is_the_state_to_the_bit(predicts):
    schedule = fs.EDM()
    model = distill.bounded(denoiser(schedule, predicts), "edm")
    x = states()
    assert torch.equal(model.predict(x, fs.node(schedule, schedule.t_min)), x)
    assert torch.equal(model.predict(x, at(schedule, *[schedule.t_min] * 7)), x)
    assert torch.equal(model.predict(x, fs.node(schedule, schedule.t_zero)), x)
    assert not torch.equal(model.predict(x, fs.node(schedule, 2 * schedule.t_min)), x)


@pytest.mark.parametrize("predicts", ["x0", "v", "flow"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_at_the_least_noise_the_function_is_the_state_over_alpha(schedule, predicts):
    model = distill.bounded(denoiser(schedule, predicts), "edm")
    x, end = states(), fs.node(schedule, schedule.t_min)
    torch.testing.assert_close(model.predict(x, end), x / end.alpha, rtol=2e-7, atol=0)  # one rounding
    torch.testing.assert_close(model.predict(x, at(schedule, *[end.t] * 7)), x / end.alpha, rtol=2e-7, atol=0)


def test_the_function_of_lcm_is_the_state_to_the_bit_at_index_zero():
    schedule = fs.VP.scaled_linear()
    model = distill.bounded(denoiser(schedule, "eps"), distill.LCMBoundary())
    x = states()
    assert torch.equal(model.predict(x, fs.node(schedule, 0)), x)
    assert torch.equal(model.predict(x, at(schedule, *[0.0] * 7)), x)
    assert torch.equal(model.predict(x, fs.node(schedule, -1)), x)


@pytest.mark.parametrize("t", [0.002, 0.003, 0.5, 80.0])
def test_the_function_of_an_edm_network_is_that_of_song_et_al(t):
    """F with c_in and c_noise of Karras et al., and c_skip, c_out of Song et al. 2023, App. C, written out here."""
    sd, least = 0.5, 0.002
    network = Wave()
    model = distill.edm_model(network, sigma_data=sd, noise_scale=1000.0, boundary="edm")
    x = states(dtype=torch.float64)
    said = network(x / math.sqrt(t**2 + sd**2), torch.full((7,), 250 * math.log(t), dtype=torch.float64))
    skip = sd**2 / ((t - least) ** 2 + sd**2)
    out = sd * (t - least) / math.sqrt(sd**2 + t**2)
    for node in (fs.node(model.schedule, t), at(model.schedule, *[t] * 7)):
        torch.testing.assert_close(model.predict(x, node), skip * x + out * said, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0.002, 0.5, 80.0])
def test_an_edm_network_without_a_boundary_is_the_denoiser_of_karras_et_al(t):
    sd = 0.5
    network, x = Wave(), states(dtype=torch.float64)
    model = distill.edm_model(network, sigma_data=sd)
    said = network(x / math.sqrt(t**2 + sd**2), torch.full((7,), math.log(t) / 4, dtype=torch.float64))
    expected = sd**2 / (t**2 + sd**2) * x + t * sd / math.sqrt(sd**2 + t**2) * said
    torch.testing.assert_close(model.predict(x, fs.node(model.schedule, t)), expected, rtol=1e-12, atol=1e-12)
    p, q = model.prediction.output(1.0, t)
    torch.testing.assert_close(p * x + q * expected, said, rtol=1e-9, atol=1e-9)


def test_a_vp_network_has_the_boundary_of_edm_in_x_over_alpha():
    """The same x0 told at the same sigma / alpha gives the same f, whatever the schedule."""

    class Says(nn.Module):
        def forward(self, x, t):
            return torch.full_like(x, 0.7)

    vp, edm = fs.VPContinuous(), fs.EDM()
    node = fs.node(vp, 0.3)
    least = vp.sigma(vp.t_min) / vp.alpha(vp.t_min)
    one = distill.bounded(fs.Denoiser(Says(), vp, "x0"), distill.EDMBoundary(0.4))
    other = distill.bounded(fs.Denoiser(Says(), edm, "x0"), distill.EDMBoundary(0.4, t_min=float(least)))
    x = states(dtype=torch.float64)
    y = other.predict(x / node.alpha, fs.node(edm, node.sigma / node.alpha))
    torch.testing.assert_close(one.predict(x, node), y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("index", [0, 1, 20, 999])
def test_the_function_of_lcm_is_that_of_its_code(index):
    schedule = fs.VP.scaled_linear()
    plain = denoiser(schedule, "eps")
    model = distill.bounded(plain, "lcm")
    x, node = states(dtype=torch.float64), fs.node(schedule, index)
    skip = 0.25 / ((10 * index) ** 2 + 0.25)
    out = 10 * index / ((10 * index) ** 2 + 0.25) ** 0.5
    expected = skip * x + out * plain.predict(x, node)
    torch.testing.assert_close(model.predict(x, node), expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.predict(x, at(schedule, *[index] * 7)), expected, rtol=1e-9, atol=1e-9)


def test_the_factors_of_lcm_are_those_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler()
    for index in (0, 1, 259, 999):
        skip, out = scheduler.get_scalings_for_boundary_condition_discrete(index)
        own = distill.LCMBoundary().factors(fs.VP.scaled_linear(), fs.node(fs.VP.scaled_linear(), index))
        assert own == pytest.approx((float(skip), float(out)), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [
        *(("edm", schedule) for schedule in [*SCHEDULES, fs.VP.scaled_linear().zero_terminal_snr()]),
        *(("lcm", schedule) for schedule in SCHEDULES[1:]),  # EDM has no index
    ],
    ids=repr,
)
def test_each_sample_has_the_factors_of_its_own_node(schedule, kind):
    limit = boundary(kind)
    times = [schedule.t_max, 0.5 * schedule.t_max, schedule.t_min + 1e-3, schedule.t_min, schedule.t_zero]
    together = limit.factors(schedule, at(schedule, *times))
    for k, t in enumerate(times):
        single = limit.factors(schedule, fs.node(schedule, t))
        assert [float(row[k]) for row in together] == pytest.approx(single, rel=1e-9, abs=1e-12)
        assert all(math.isfinite(factor) for factor in single)


@pytest.mark.parametrize("kind", ["edm", "lcm"])
def test_plans_run_a_bounded_model_as_they_solve_it(kind):
    """`fs.sample` may take the network's output as it is: the factors must be in it."""
    schedule = fs.VP.scaled_linear()
    model = distill.bounded(denoiser(schedule, "v"), kind)
    grid = fs.grid(schedule, 3, fs.uniform_t)
    noise = fs.noise((2,), seeds=range(5), dtype=torch.float64)
    for solver in (solvers.consistency, solvers.ddim, solvers.tcd):
        walked = fs.sample(model, fs.trace(solver, grid), noise)
        torch.testing.assert_close(walked, fs.solve(model, solver, grid, noise), rtol=1e-10, atol=1e-10)


def test_one_step_of_consistency_sampling_is_the_function_itself():
    model = distill.edm_model(Wave(), boundary="edm")
    first = fs.node(model.schedule, 80.0)
    z = states()
    x = fs.sample(model, fs.trace(solvers.consistency, fs.grid(model.schedule, 1, fs.karras)), z)
    torch.testing.assert_close(x, model.predict(80 * z, first), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [distill.EDMBoundary(0.3, 0.01), distill.LCMBoundary(0.4, 5.0)], ids=repr)
def test_a_boundary_is_made_again_from_its_settings(given):
    import json

    assert boundary(json.loads(json.dumps(given.settings()))) == given
    assert boundary(given.name) == type(given)()


def test_a_bounded_model_keeps_what_its_model_was():
    model = fs.Denoiser(Wave(), fs.VP.scaled_linear(), "v", time="unit", dtype=torch.float64, spacing=fs.trailing)
    own = distill.bounded(model, "lcm")
    assert own.network is model.network
    assert own.prediction is model.prediction
    assert (own.time, own.dtype, own.spacing) == (model.time, model.dtype, model.spacing)
    assert boundary_of(own) == distill.LCMBoundary()
    assert boundary_of(model) is None


def test_wrong_boundaries_are_refused():
    with pytest.raises(ValueError, match="unknown boundary 'karras'; choose one of edm, lcm"):
        boundary("karras")
    with pytest.raises(ValueError, match=r"boundary 'edm' has no \['scaling'\]; it has \['sigma_data', 't_min'\]"):
        boundary({"name": "edm", "scaling": 1})
    with pytest.raises(ValueError, match="sigma_data of a boundary must be positive and finite, got 0"):
        distill.EDMBoundary(0.0)
    with pytest.raises(ValueError, match="timestep_scaling of a boundary must be positive"):
        distill.LCMBoundary(timestep_scaling=-1.0)
    with pytest.raises(ValueError, match="EDM has no time index"):
        distill.bounded(denoiser(fs.EDM()), "lcm")
    with pytest.raises(ValueError, match=r"t_min of a boundary must lie between 0 and 80 of .*, got 90"):
        distill.bounded(denoiser(fs.EDM()), distill.EDMBoundary(t_min=90.0))
    with pytest.raises(ValueError, match=r"c_in of EDM is for alpha = 1, got Flow"):
        distill.edm_model(Wave(), fs.Flow())
