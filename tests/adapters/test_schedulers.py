"""The times of every usual diffusers scheduler, and its schedule."""

import math

import pytest
import torch

import fastsample as fs
from fastsample import solvers
from fastsample.adapters.schedulers import CONSISTENCY, DDIM, EULER, FLOW, KNOWN, MULTISTEP, dynamic_mu

diffusers = pytest.importorskip("diffusers")

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEPS = [*range(2, 41), 50, 77, 100]
NETWORK = torch.nn.Module()
NETWORK.forward = lambda x, timestep, return_dict=True: None  # never called here
INTERPOLATED = ("DPMSolverSDEScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "PNDMScheduler")


def made(name, **options):
    return getattr(diffusers, name)(**SD, **options)


def of(scheduler, **options):
    return fs.from_diffusers(NETWORK, scheduler, **options)


def ours(scheduler, steps, **options):
    model = of(scheduler, **options)
    return [node.t for node in fs.grid(model.schedule, steps, spacing=model.spacing).nodes[:-1]]


def theirs(scheduler, steps, **options):
    """Heun's scheduler names every time but the first twice, for its second evaluation."""
    scheduler.set_timesteps(steps, **options)
    return list(dict.fromkeys(scheduler.timesteps.tolist()))


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", [n for n in (*DDIM, *EULER, *MULTISTEP) if n not in INTERPOLATED])
def test_the_times_are_those_of_the_scheduler(name, spacing):
    options = {"timestep_spacing": spacing, "steps_offset": 1 if spacing == "leading" else 0}
    if name == "DPMSolverSinglestepScheduler":
        options = {}
    scheduler = made(name, **options)
    for steps in STEPS:
        assert ours(scheduler, steps) == pytest.approx(theirs(scheduler, steps), abs=1e-4), steps  # theirs are float32


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", INTERPOLATED)
def test_the_times_are_those_of_the_scheduler_without_its_inner_evaluations(name, spacing):
    if name == "DPMSolverSDEScheduler":
        pytest.importorskip("torchsde", reason="diffusers' DPMSolverSDEScheduler needs pip install torchsde")
    skip = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler = made(name, timestep_spacing=spacing, **skip)
    for steps in (2, 3, 10, 25):
        inner = theirs(scheduler, steps)
        if name == "PNDMScheduler":
            assert ours(scheduler, steps) == inner
        for t in ours(scheduler, steps):
            assert min(abs(t - other) for other in inner) < 1e-3, (steps, t)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"])
def test_one_step_of_linspace_starts_at_the_noise_where_theirs_starts_at_the_image(name):
    scheduler = made(name, timestep_spacing="linspace")
    assert (theirs(scheduler, 1), ours(scheduler, 1)) == ([0], [999])


def test_ties_of_trailing_are_rounded_to_even_where_theirs_follow_the_rounding_of_their_step():
    scheduler = made("DDIMScheduler", timestep_spacing="trailing")
    exact = [1000 - 1000 * i / 48 - 1 for i in range(48)]
    apart = [(t, a, b) for t, a, b in zip(exact, ours(scheduler, 48), theirs(scheduler, 48)) if a != b]
    assert apart
    for t, a, b in apart:
        assert (t % 1, abs(a - t), abs(b - t)) == (0.5, 0.5, 0.5)


CURVES = [
    *((name, "use_karras_sigmas") for name in (*EULER, *MULTISTEP) if name not in (*INTERPOLATED, EULER[1])),
    *((name, curve) for name in ("EulerDiscreteScheduler", "UniPCMultistepScheduler")
      for curve in ("use_exponential_sigmas", "use_beta_sigmas")),
    ("DPMSolverMultistepScheduler", "use_lu_lambdas"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "curve"), CURVES)
@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_the_noise_levels_of_curved_spacings_are_those_of_the_scheduler(name, curve, spacing):
    """Levels sigma / alpha: of the times some schedulers take the whole part alone."""
    options = {} if name == "DPMSolverSinglestepScheduler" else {"timestep_spacing": spacing}
    scheduler = made(name, **{curve: True}, **options)
    schedule = of(scheduler).schedule
    for steps in (2, 3, 4, 7, 10, 20, 30):
        scheduler.set_timesteps(steps)
        levels = [math.exp(-float(schedule.lam(t))) for t in ours(scheduler, steps)]
        expected = list(dict.fromkeys(scheduler.sigmas.tolist()[:-1]))
        assert levels == pytest.approx(expected, rel=1e-4)  # theirs come of a table in float32


def test_karras_of_a_whole_table_is_our_karras():
    model = of(made("DPMSolverMultistepScheduler", use_karras_sigmas=True))
    assert ours(made("DPMSolverMultistepScheduler", use_karras_sigmas=True), 12) == pytest.approx(
        [node.t for node in fs.grid(model.schedule, 12, spacing=fs.karras).nodes[:-1]], abs=1e-9
    )


def test_a_curved_spacing_with_zero_terminal_snr_starts_where_diffusers_does():
    scheduler = made(
        "EulerDiscreteScheduler", use_karras_sigmas=True, rescale_betas_zero_snr=True, prediction_type="v_prediction"
    )
    assert ours(scheduler, 10) == pytest.approx(theirs(scheduler, 10), abs=0.6)  # log(sigma) rises without end there
    assert ours(scheduler, 10)[0] < 999


def test_noise_levels_beyond_the_table_are_refused_with_what_to_do():
    scheduler = made("EulerDiscreteScheduler", use_karras_sigmas=True, sigma_max=700.0, sigma_min=0.002)
    with pytest.raises(ValueError, match=r"sigma_max = 700 of the scheduler lies outside its betas'.*fs\.EDM"):
        ours(scheduler, 10)


def test_sigma_min_and_sigma_max_are_the_ends_of_a_curve():
    scheduler = made("EulerDiscreteScheduler", use_karras_sigmas=True, sigma_max=10.0, sigma_min=0.1)
    schedule = of(scheduler).schedule
    levels = [math.exp(-float(schedule.lam(t))) for t in ours(scheduler, 8)]
    scheduler.set_timesteps(8)
    assert levels == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=1e-5)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "SASolverScheduler", "DPMSolverSinglestepScheduler"])
def test_the_clipped_end_of_a_cosine_schedule_is_read(name):
    scheduler = getattr(diffusers, name)(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1)
    for steps in (1, 5, 20):
        assert ours(scheduler, steps) == theirs(scheduler, steps)
        assert ours(scheduler, steps)[0] < 999


@pytest.mark.parametrize("name", CONSISTENCY)
def test_consistency_schedulers_choose_of_the_times_of_their_training(name):
    scheduler = made(name)
    for steps in (1, 2, 3, 4, 7, 8, 50):
        assert ours(scheduler, steps) == theirs(scheduler, steps)
    with pytest.raises(ValueError, match="original_inference_steps = 50, fewer than 51"):
        ours(scheduler, 51)


def levels_of_flow(scheduler, steps, **options):
    model = of(scheduler, **options)
    grid = fs.grid(model.schedule, steps, spacing=model.spacing)
    return [node.sigma for node in grid.nodes[:-1]]


FLOWS = [
    *((name, options) for name in FLOW for options in ({}, {"shift": 3.0})),
    *((FLOW[0], options) for options in (
        {"shift": 3.0, "shift_terminal": 0.02}, {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True, "shift": 2.0}, {"use_beta_sigmas": True})),
]  # fmt: skip


@pytest.mark.parametrize(("name", "options"), FLOWS, ids=str)
def test_the_levels_of_a_flow_scheduler(name, options):
    scheduler = getattr(diffusers, name)(**options)
    for steps in (2, 4, 7, 28):
        scheduler.set_timesteps(steps)
        expected = list(dict.fromkeys(scheduler.sigmas.tolist()[:-1]))
        assert levels_of_flow(scheduler, steps) == pytest.approx(expected, abs=1e-6)  # float32


@pytest.mark.parametrize("name", MULTISTEP)
def test_the_levels_of_a_multistep_scheduler_of_flows(name):
    scheduler = getattr(diffusers, name)(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction")
    assert of(scheduler).schedule == fs.Flow(3.0)
    for steps in (1, 4, 10):
        scheduler.set_timesteps(steps)
        # UniPC's first level is 1e-6 below 1; the last of theirs stands for the end
        assert levels_of_flow(scheduler, steps) == pytest.approx(scheduler.sigmas.tolist()[:-1], abs=3e-6)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_dynamic_shifting_follows_the_number_of_tokens(kind):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, time_shift_type=kind)
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)  # the line of FLUX's pipeline
    assert dynamic_mu(1024, scheduler.config) == pytest.approx(mu)
    scheduler.set_timesteps(6, mu=mu)
    for options in ({"image_seq_len": 1024}, {"mu": mu}):
        assert levels_of_flow(scheduler, 6, **options) == pytest.approx(scheduler.sigmas.tolist()[:-1], abs=1e-6)


def test_dynamic_shifting_of_a_multistep_scheduler():
    scheduler = diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, use_dynamic_shifting=True, prediction_type="flow_prediction"
    )
    assert of(scheduler, mu=0.8).schedule == fs.Flow(math.exp(0.8))
    scheduler.set_timesteps(6, mu=0.8)
    assert levels_of_flow(scheduler, 6, mu=0.8) == pytest.approx(scheduler.sigmas.tolist()[:-1], abs=3e-6)


@pytest.mark.parametrize("options", [{}, {"mu": 0.5, "image_seq_len": 256}], ids=str)
def test_dynamic_shifting_says_what_to_pass(options):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(ValueError, match=r"pass one of image_seq_len, .*\(height // 16\).* or mu"):
        of(scheduler, **options)


def test_a_shift_for_a_schedule_without_one_is_refused():
    for scheduler in (made("DDIMScheduler"), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)):
        with pytest.raises(ValueError, match=r"for a scheduler with use_dynamic_shifting"):
            of(scheduler, mu=0.5)


def test_options_left_over_of_another_class_are_not_read():
    """diffusers keeps them in the configuration of the class that does not know them."""
    karras = made("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    assert of(karras).spacing.__name__ == "karras of DPMSolverMultistepScheduler"
    assert of(diffusers.DDIMScheduler.from_config(karras.config)).spacing.__name__ == "leading"
    flow = diffusers.FlowMatchEulerDiscreteScheduler.from_config(made("DDIMScheduler").config, shift=3.0)
    assert of(flow).schedule == fs.Flow(3.0)
    unipc = diffusers.UniPCMultistepScheduler.from_config(flow.config, use_flow_sigmas=True, flow_shift=2.0)
    assert of(unipc).schedule == fs.Flow(2.0)


def test_the_signal_to_noise_ratio_of_cogvideox_is_shifted():
    scheduler = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0)
    alpha = of(scheduler).schedule.alpha(torch.arange(1000))
    torch.testing.assert_close(alpha, scheduler.alphas_cumprod.double().sqrt(), rtol=1e-5, atol=1e-6)  # float32
    zero = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=1.5, rescale_betas_zero_snr=True)
    alpha = of(zero).schedule.alpha(torch.arange(1000))
    torch.testing.assert_close(alpha, zero.alphas_cumprod.double().sqrt(), rtol=1e-5, atol=1e-6)


def test_a_subclass_has_the_times_of_its_class_and_a_stranger_none():
    class Mine(diffusers.EulerDiscreteScheduler):
        pass

    assert of(Mine(**SD)).spacing.__name__ == "linspace of EulerDiscreteScheduler"
    assert of({**diffusers.DDIMScheduler(**SD).config, "_class_name": "Another"}).spacing is None


def test_a_scheduler_that_tells_the_times_of_other_levels_has_no_spacing():
    """With log_linear, diffusers spaces the levels evenly in log(sigma) and tells times that are even themselves."""
    assert of(diffusers.EulerDiscreteScheduler(**SD, interpolation_type="log_linear")).spacing is None
    assert of(diffusers.EulerDiscreteScheduler(**SD, interpolation_type="log_linear", use_karras_sigmas=True)).spacing


def test_our_scheduler_stands_for_the_one_it_replaced():
    theirs = made("DPMSolverMultistepScheduler", use_karras_sigmas=True)
    plan_scheduler = solvers.PlanScheduler.from_config({**theirs.config, "_class_name": type(theirs).__name__})
    assert ours(plan_scheduler, 12) == ours(theirs, 12)


def test_a_scheduler_from_a_file_is_read_by_its_class_name(tmp_path):
    scheduler = made("DPMSolverMultistepScheduler", timestep_spacing="leading", steps_offset=1)
    scheduler.save_pretrained(tmp_path)
    config = diffusers.DPMSolverMultistepScheduler.load_config(tmp_path)
    assert ours(config, 20) == theirs(scheduler, 20)


def test_a_spacing_of_a_scheduler_has_no_other_start_or_end():
    model = of(made("DPMSolverMultistepScheduler"))
    with pytest.raises(ValueError, match=r"'linspace of DPMSolverMultistepScheduler' has fixed times"):
        fs.grid(model.schedule, 5, spacing=model.spacing, start=900.0)


def test_every_class_named_here_is_one_of_diffusers():
    assert [name for name in KNOWN if not hasattr(diffusers, name)] == []
