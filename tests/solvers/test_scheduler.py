"""PlanScheduler by itself: loops as pipelines write them, against `fs.sample` and against diffusers' schedulers."""

import itertools
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastsample as fs
from fastsample import solvers

diffusers = pytest.importorskip("diffusers", reason="PlanScheduler needs pip install 'fastsample[diffusers]'")

from fastsample.solvers import PlanScheduler

LINEAR = diffusers.DDIMScheduler(clip_sample=False).config
NOISE = fs.noise((2, 4, 4), seeds=range(3))
# eps over an alpha of 0.006 makes 1e-5 of a rounding of 6e-8
FLOAT32 = 2e-5


def network(x, t):
    """No denoiser of anything, but smooth, and it depends on the time."""
    t = torch.as_tensor(t, dtype=torch.float32).reshape(-1, *[1] * (x.dim() - 1)).to(x)
    return 0.8 * torch.tanh(x.flip(-1)) + 0.1 * torch.cos(t / 150)


def model_of(config, **options):
    schedule = fs.from_diffusers(_Unet(), config, **options).schedule
    return fs.Denoiser(network, schedule, predicts_of(config), time="index")


def predicts_of(config):
    names = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
    return names[config["prediction_type"]] if "prediction_type" in config else "flow"


class _Unet(torch.nn.Module):
    def forward(self, x, timestep, return_dict=True): ...


def loop(scheduler, x, first=0, net=network, noise=NOISE, **options):
    """What a pipeline does."""
    for k, t in enumerate(scheduler.timesteps[first:]):
        output = net(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(output, t, x, variance_noise=noise.draw(k + 2), **options).prev_sample
    return x


def their_loop(scheduler, x, first=0, net=network):
    scale = getattr(scheduler, "scale_model_input", lambda x, t: x)
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(net(scale(x, t), t), t, x).prev_sample
    return x


def made(steps=6, config=LINEAR, mu=None, **options):
    scheduler = PlanScheduler.from_config(config, **options)
    scheduler.set_timesteps(steps, mu=mu)
    return scheduler


def start(scheduler):
    return NOISE.draw(0) * scheduler.init_noise_sigma


def close(ours, theirs, tolerance=FLOAT32):
    assert theirs.isfinite().all()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_every_solver_by_name_makes_what_sample_makes(name):
    for spacing in (None, "karras"):
        scheduler = made(solver=name, spacing=spacing)
        model = model_of(LINEAR)
        grid = fs.grid(model.schedule, 6, getattr(fs, spacing or "leading"))
        plan = fs.trace(solvers.get(name), grid)
        assert len(scheduler.timesteps) == plan.nfe
        close(loop(scheduler, start(scheduler)), fs.sample(model, plan, NOISE), 1e-6)


@pytest.mark.parametrize(
    ("solver", "steps"),
    [("ddim", 1), ("dpmpp_2m", 1), ("unipc_3", 1), ("heun", 1), ("unipc_3", 2), ("dpmpp_2m", 300), ("ddim", 1001)],
)
def test_any_number_of_steps_is_that_of_sample(solver, steps):
    scheduler = made(steps, solver=solver, spacing="uniform_lam")
    model = model_of(LINEAR)
    plan = fs.trace(solvers.get(solver), fs.grid(model.schedule, steps))
    close(loop(scheduler, start(scheduler)), fs.sample(model, plan, NOISE), 1e-5)


CONFIGS = {
    "trailing": diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing"),
    "ddpm": diffusers.DDPMScheduler(clip_sample=False),
    "pndm": diffusers.PNDMScheduler(beta_schedule="scaled_linear", steps_offset=1, skip_prk_steps=True),
    "v": diffusers.DDIMScheduler(clip_sample=False, prediction_type="v_prediction"),
    "x0": diffusers.DDIMScheduler(clip_sample=False, prediction_type="sample"),
    "dpm": diffusers.DPMSolverMultistepScheduler(),
    "dpm_leading": diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading", steps_offset=1),
    "dpm_karras": diffusers.DPMSolverMultistepScheduler(use_karras_sigmas=True),
    "unipc": diffusers.UniPCMultistepScheduler(beta_schedule="squaredcos_cap_v2"),
    "euler": diffusers.EulerDiscreteScheduler(),
    "euler_karras": diffusers.EulerDiscreteScheduler(use_karras_sigmas=True),
    "ancestral": diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing"),
    "cogvideox": diffusers.CogVideoXDDIMScheduler(
        snr_shift_scale=3.0,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
    ),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow_beta": diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, use_beta_sigmas=True),
    "flow_terminal": diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0, shift_terminal=0.1),
    "unipc_flow": diffusers.UniPCMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_is_read_with_the_times_of_its_own_scheduler(name):
    theirs = CONFIGS[name]
    theirs.set_timesteps(7)
    scheduler = made(7, theirs.config, solver="ddim")
    times = torch.tensor(list(dict.fromkeys(theirs.timesteps.tolist())))  # PLMS asks twice at one of them
    # Karras spacing is rounded there to whole times, UniPC's of a flow cut to them, Euler's times are float32
    tolerance = {"dpm_karras": 0.51, "unipc_flow": 1.0}.get(name, 0.01)
    torch.testing.assert_close(scheduler.timesteps, times.float(), rtol=0, atol=tolerance)
    model = model_of(theirs.config)
    close(loop(scheduler, start(scheduler)), fs.sample(model, scheduler.plan, NOISE), 1e-6)


@pytest.mark.parametrize("spacing", [None, "uniform_t"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_made_with_it_has_its_spacing(name, spacing):
    scheduler = made(7, CONFIGS[name].config, spacing=spacing, solver="ddim")
    model = fs.from_diffusers(_Unet(), scheduler)
    grid = fs.grid(model.schedule, 7, spacing=model.spacing, lower_order_final=scheduler.config.lower_order_final)
    assert grid.nodes == scheduler.grid.nodes
    assert fs.trace(solvers.ddim, grid).rows == scheduler.plan.rows


def test_a_class_keeps_the_defaults_that_its_configuration_does_not_name():
    """A live scheduler marks its defaults; a file of an older diffusers leaves them out."""
    old = {
        "_class_name": "DPMSolverMultistepScheduler",
        "num_train_timesteps": 1000,
        "beta_start": 1e-4,
        "beta_end": 0.02,
    }
    for config in (old, diffusers.DPMSolverMultistepScheduler().config):
        scheduler = made(config=config)
        assert (scheduler.config.timestep_spacing, scheduler.config.lower_order_final) == ("linspace", True)
        assert scheduler.config.replaces == "DPMSolverMultistepScheduler"
    assert PlanScheduler.from_config(diffusers.DDPMScheduler().config).config.clip_sample is True
    again = PlanScheduler.from_config(
        made(config=old, solver="ddim").config, solver="heun", timestep_spacing="trailing"
    )
    assert (again.config.solver, again.config.timestep_spacing) == ("heun", "trailing")
    assert again.config.replaces == "DPMSolverMultistepScheduler"
    back = diffusers.DPMSolverMultistepScheduler.from_config(again.config)
    assert (back.config.timestep_spacing, back.config.beta_end) == ("trailing", 0.02)


def pair(name, **settings):
    return getattr(diffusers, name)(**settings)


AGREE = [
    (pair("DDIMScheduler", clip_sample=False, timestep_spacing="trailing"), "ddim"),
    (pair("DDIMScheduler", clip_sample=False, timestep_spacing="trailing", prediction_type="v_prediction"), "ddim"),
    (pair("DPMSolverMultistepScheduler"), "dpmpp_2m"),
    (pair("DPMSolverMultistepScheduler", timestep_spacing="trailing", prediction_type="sample"), "dpmpp_2m"),
    (pair("UniPCMultistepScheduler"), "unipc_2"),
    (pair("UniPCMultistepScheduler", solver_order=3), "unipc_3"),
    (pair("FlowMatchEulerDiscreteScheduler", shift=3.0), "euler"),
    (pair("FlowMatchEulerDiscreteScheduler", shift=2.0, use_karras_sigmas=True), "euler"),
    (pair("EDMEulerScheduler"), "euler"),
    (pair("EDMEulerScheduler", sigma_data=1.0, prediction_type="v_prediction", sigma_schedule="exponential"), "euler"),
    (pair("EDMDPMSolverMultistepScheduler", final_sigmas_type="zero"), "dpmpp_2m"),
    (
        pair(
            "EulerDiscreteScheduler",
            timestep_type="continuous",
            prediction_type="v_prediction",
            use_karras_sigmas=True,
            timestep_spacing="leading",
            sigma_min=0.002,
            sigma_max=700.0,
        ),
        "euler",
    ),
]


@pytest.mark.parametrize(("theirs", "solver"), AGREE, ids=[f"{type(s).__name__}-{name}" for s, name in AGREE])
def test_it_ends_where_the_scheduler_of_diffusers_does(theirs, solver):
    theirs.set_timesteps(10)  # T / N is whole
    scheduler = made(10, theirs.config, solver=solver, unit_start=True)
    x = NOISE.draw(0) * theirs.init_noise_sigma if hasattr(theirs, "init_noise_sigma") else NOISE.draw(0)
    if theirs.config.get("sigma_data") or theirs.config.get("sigma_max"):
        assert scheduler.init_noise_sigma == pytest.approx(float(theirs.init_noise_sigma))
    close(loop(scheduler, x), their_loop(theirs, x), 5e-5)  # their levels are float32, and sums of up to 700 sigma


@pytest.mark.parametrize(("linear", "mu", "shift"), [(False, 1.1, math.exp(1.1)), (True, 1.1, 1.1)])
def test_mu_shifts_a_dynamic_flow(linear, mu, shift):
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type="linear" if linear else "exponential"
    )
    sigmas = [1.0, 0.75, 0.5, 0.25]
    scheduler = PlanScheduler.from_config(theirs.config, solver="euler")
    theirs.set_timesteps(sigmas=sigmas, mu=mu)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    torch.testing.assert_close(scheduler.sigmas, theirs.sigmas)
    close(loop(scheduler, NOISE.draw(0)), their_loop(theirs, NOISE.draw(0)))
    expected = [shift * t / (1 + (shift - 1) * t) for t in sigmas]
    assert scheduler.sigmas.tolist() == pytest.approx([*expected, 0.0])
    with pytest.raises(ValueError, match="set_timesteps needs mu"):
        scheduler.set_timesteps(4)


def test_times_and_levels_of_ones_own():
    scheduler = PlanScheduler.from_config(LINEAR, solver="dpmpp_2m")
    scheduler.set_timesteps(timesteps=[999, 700.5, 300, 20])
    assert scheduler.timesteps.tolist() == [999, 700.5, 300, 20]
    assert scheduler.num_inference_steps == 4
    sd = diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False)
    scheduler = PlanScheduler.from_config(sd.config, solver="dpmpp_2m")
    table = diffusers.schedulers.AysSchedules["StableDiffusionSigmas"]
    assert (table[0], table[-1]) == (14.615, 0.0)  # beyond the table's 14.6146 by its rounding
    scheduler.set_timesteps(sigmas=table)
    torch.testing.assert_close(scheduler.sigmas, torch.tensor(table), rtol=1e-4, atol=0)
    named = PlanScheduler.from_config(sd.config, solver="dpmpp_2m", spacing="ays_sd15")
    named.set_timesteps(10)
    torch.testing.assert_close(named.timesteps, scheduler.timesteps, rtol=1e-4, atol=0)
    flow = PlanScheduler.from_config(diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).config, solver="euler")
    flow.set_timesteps(timesteps=[1000, 600, 200])
    torch.testing.assert_close(flow.timesteps, torch.tensor([1000.0, 600, 200]))


def test_the_end_above_zero_is_that_of_the_grid():
    scheduler = made(5, solver="dpmpp_2m", spacing="uniform_lam", final_sigmas_type="sigma_min")
    model = model_of(LINEAR)
    plan = fs.trace(solvers.dpmpp_2m, fs.grid(model.schedule, 5, end=model.schedule.t_min))
    close(loop(scheduler, start(scheduler)), fs.sample(model, plan, NOISE), 1e-6)
    config = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="sigma_min").config
    theirs = diffusers.DPMSolverMultistepScheduler.from_config(config, lower_order_final=False)
    theirs.set_timesteps(5)
    scheduler = made(5, config, solver="dpmpp_2m", lower_order_final=False)
    close(loop(scheduler, NOISE.draw(0)), their_loop(theirs, NOISE.draw(0)))
    with pytest.raises(ValueError, match="last evaluation of leading already stands at 0"):
        made(5, solver="dpmpp_2m", final_sigmas_type="sigma_min")


# What a step does


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "ddim", "unipc_3"])
def test_a_run_begins_anew_each_time(solver):
    scheduler = made(solver=solver)
    first = loop(scheduler, start(scheduler))
    assert scheduler.step_index is None
    assert torch.equal(loop(scheduler, start(scheduler)), first)  # without set_timesteps
    assert torch.equal(loop(scheduler, start(scheduler)[:2], noise=fs.noise((2, 4, 4), range(2))), first[:2])
    for t in itertools.islice(scheduler.timesteps, 3):  # broken off
        scheduler.step(NOISE.draw(0), t, NOISE.draw(1))
    assert torch.equal(loop(scheduler, start(scheduler)), first)
    copied = [t.clone() for t in scheduler.timesteps]  # times that only their value tells
    x = start(scheduler)
    for t in copied:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert torch.equal(x, first)
    scheduler.step(x, copied[0], x)
    scheduler.set_timesteps(6)
    x = start(scheduler)
    for t in copied:
        x = scheduler.step(network(x, t), t, x).prev_sample
    assert torch.equal(x, first)
    x = start(scheduler)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
    assert torch.equal(x, first)


@pytest.mark.parametrize("to_one", [True, False])
def test_the_end_of_ddim_above_zero_is_sigma_min(to_one):
    """Stable Diffusion 1.x is configured with set_alpha_to_one=False."""
    theirs = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=to_one, steps_offset=1)
    end = "zero" if to_one else "sigma_min"
    scheduler = made(5, theirs.config, solver="ddim", unit_start=True, final_sigmas_type=end)
    theirs.set_timesteps(5)
    close(loop(scheduler, start(scheduler)), their_loop(theirs, start(scheduler)))


def test_the_output_holds_the_prediction_of_x0():
    scheduler = made(solver="dpmpp_2m")
    x = start(scheduler)
    t = scheduler.timesteps[0]
    out = scheduler.step(network(x, t), t, x)
    model = model_of(LINEAR)
    close(out.pred_original_sample, model.predict(x, fs.node(model.schedule, float(t))), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_state_is_kept_in_float32_where_the_pipeline_passes_it_on(dtype):
    """A wide last step of rounding alone, but none that adds up over the steps."""
    scheduler = made(50, solver="dpmpp_2m", spacing="uniform_lam")

    def half(x, t):
        return network(x.to(dtype).float(), t)

    x = exact = start(scheduler).to(dtype)
    exact = exact.float()
    for t in scheduler.timesteps:
        x = scheduler.step(half(x, t), t, x).prev_sample
        assert x.dtype == dtype
    for t in scheduler.timesteps:
        exact = scheduler.step(half(exact, t), t, exact).prev_sample
    assert torch.equal(x, exact.to(dtype))


def test_what_a_pipeline_writes_into_the_state_counts():
    """As inpainting does, in half precision, where the state is kept beside what was returned."""
    scheduler = made(4, solver="dpmpp_2m")
    results = {}
    for change in ("none", "in place", "another tensor"):
        x = start(scheduler).half()
        for k, t in enumerate(scheduler.timesteps):
            x = scheduler.step(network(x.float(), t), t, x).prev_sample
            if k == 1 and change != "none":
                x = x.mul_(0.5) if change == "in place" else x * 0.5
        results[change] = x
    assert torch.equal(results["in place"], results["another tensor"])
    assert not torch.equal(results["in place"], results["none"])


def test_it_runs_in_inference_mode():
    scheduler = made(4, solver="dpmpp_2m")
    expected = loop(scheduler, start(scheduler))
    with torch.inference_mode():
        assert torch.equal(loop(scheduler, start(scheduler)), expected)
        assert loop(scheduler, start(scheduler).half(), net=lambda x, t: network(x.float(), t)).isfinite().all()


def test_float64_stays():
    scheduler = made(4, solver="dpmpp_2m")
    assert loop(scheduler, start(scheduler).double()).dtype == torch.float64


class Recorder(TorchDispatchMode):
    """Refuses what reads a number back from the device."""

    WAITS = ("_local_scalar_dense", "item", "is_nonzero", "nonzero", "equal", "masked_select")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        self.names.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", solvers.SOLVERS)
def test_a_step_never_waits_for_the_device(name):
    scheduler = made(solver=name)
    generator = torch.Generator().manual_seed(0)
    x = start(scheduler)
    output = network(x, 500.0)
    with Recorder() as recorder:
        for t in scheduler.timesteps:  # without begin_index: the place in `timesteps` tells the index
            x = scheduler.step(output, t, scheduler.scale_model_input(x, t), generator).prev_sample
    assert "mul" in recorder.names
    scheduler.set_begin_index(0)
    x = x.to("meta")  # where any look at a number raises
    for t in scheduler.timesteps.to("meta"):
        noise = {"variance_noise": x}
        x = scheduler.step(x, t, x, **noise).prev_sample
    assert x.is_meta


def test_the_recorder_would_see_a_wait():
    with pytest.raises(AssertionError, match="waits"), Recorder():
        float(torch.ones(1))


def test_noise_follows_the_generators():
    scheduler = made(solver="ddpm")
    x = start(scheduler)

    def run(x, seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, generator=generators).prev_sample
        return x

    whole = run(x, [3, 4, 5])
    assert torch.equal(whole, run(x, [3, 4, 5]))
    torch.testing.assert_close(run(x[1:2], [4]), whole[1:2])
    assert not torch.equal(whole, run(x, [3, 4, 6]))


@pytest.mark.parametrize(
    "settings",
    [
        {"clip_sample": True},
        {"clip_sample": True, "clip_sample_range": 0.7},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.0},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1e4},
        {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1.5},
    ],
    ids=str,
)
def test_x0_is_bounded_as_the_configuration_says(settings):
    theirs = diffusers.DDIMScheduler(**{"clip_sample": False, **settings}, timestep_spacing="trailing")
    scheduler = made(5, theirs.config, solver="ddim")
    model = model_of(theirs.config)
    if "clip_sample" in settings:
        bounded = fs.Thresholded(model, limit=settings.get("clip_sample_range", 1.0))
    else:
        bounded = fs.Thresholded(model, dynamic=0.8) if settings["sample_max_value"] > 2 else None
    x = start(scheduler)
    ours = loop(scheduler, x)
    if bounded is not None:
        close(ours, fs.sample(bounded, scheduler.plan, NOISE), 1e-6)
    assert (ours - loop(made(5, LINEAR, solver="ddim", timestep_spacing="trailing"), x)).abs().max() > 0.1
    theirs.set_timesteps(5)
    for t in theirs.timesteps:
        x = theirs.step(network(x, t), t, x, use_clipped_model_output=True).prev_sample
    if settings.get("sample_max_value") != 1.5:
        close(ours, x)
    else:  # the quantile of clipped numbers, where it falls between one that is clipped and one that is not
        assert (ours - x).abs().mean() < 0.05


def test_a_variance_that_is_predicted_too_is_left_out():
    scheduler = made(4, solver="dpmpp_2m")
    expected = loop(scheduler, start(scheduler))
    both = loop(scheduler, start(scheduler), net=lambda x, t: torch.cat([network(x, t), x], 1))
    assert torch.equal(both, expected)
    with pytest.raises(ValueError, match=r"returned shape \[3, 2, 4\] for a sample of \[3, 2, 4, 4\]"):
        loop(scheduler, start(scheduler), net=lambda x, t: network(x, t)[..., 0])


def test_the_eta_of_ddim_pipelines_must_be_that_of_the_plan():
    scheduler = made(solver="ddim", solver_options={"eta": 0.5})
    x, t = start(scheduler), scheduler.timesteps[0]
    for eta in (0.0, 0.5, None):
        scheduler.step(x, t, x, eta=eta, use_clipped_model_output=None)
    with pytest.raises(ValueError, match=r"asks for eta = 0.7, and the plan is ddim\(eta=0.5\); leave"):
        scheduler.step(x, t, x, eta=0.7)
    ancestral = made(solver="euler_ancestral")  # its own default is 1
    ancestral.step(x, ancestral.timesteps[0], x, eta=1.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 's_churn'"):
        scheduler.step(x, t, x, s_churn=1.0)


# Beginning late, and ready plans


@pytest.mark.parametrize("solver", ["dpmpp_2m", "heun", "dpmpp_2s", "dpmpp_3s", "unipc_2", "ddpm"])
@pytest.mark.parametrize("strength", [0.2, 0.5, 0.99])
@pytest.mark.parametrize("told", [True, False])
def test_a_late_beginning_is_the_strength_of_a_grid(solver, strength, told):
    steps, image = 8, torch.linspace(-1, 1, 3 * 32).reshape(3, 2, 4, 4)
    scheduler = made(steps, solver=solver, spacing="uniform_lam")
    skipped = (steps - int(steps * strength)) * scheduler.order
    if told:
        scheduler.set_begin_index(skipped)
    t = scheduler.timesteps[skipped : skipped + 1]
    x = scheduler.add_noise(image, NOISE.draw(0), t.repeat(3))
    model = model_of(LINEAR)
    plan = fs.trace(solvers.get(solver), fs.grid(model.schedule, steps, strength=strength))
    expected = fs.sample(model, plan, NOISE, init=image)
    close(loop(scheduler, x, first=skipped), expected, 1e-5)  # the time is float32 where noise is added
    assert scheduler.begin_index == (skipped if told else None)
    close(loop(scheduler, x, first=skipped), expected, 1e-5)


def test_a_run_begins_at_the_start_of_an_interval_alone():
    scheduler = made(solver="heun")
    assert (scheduler.order, len(scheduler.timesteps)) == (2, 11)
    for t in (scheduler.timesteps[3], scheduler.timesteps.clone()[3]):
        x = start(scheduler)
        if t.untyped_storage().data_ptr() == scheduler.timesteps.untyped_storage().data_ptr():
            with pytest.raises(ValueError, match="heun cannot begin at evaluation 3: it stands within an interval"):
                scheduler.step(x, t, x)
        else:  # the value stands there twice, and means where the interval begins
            scheduler.step(x, t, x)
            assert scheduler.step_index == 5
    scheduler.set_begin_index(99)
    with pytest.raises(ValueError, match="evaluation 99: there are 11"):
        scheduler.step(x, scheduler.timesteps.to("meta")[0], x)


def test_a_time_of_another_run_is_refused():
    scheduler = made(solver="ddim")
    x = start(scheduler)
    with pytest.raises(ValueError, match=r"time 37 is not one of this run's, 830, 664, 498"):
        scheduler.step(x, 37, x)
    with pytest.raises(ValueError, match="one time for the whole batch"):
        scheduler.step(x, torch.tensor([830.0, 664.0, 498.0]), x)
    assert scheduler.step(x, torch.tensor([830.0] * 3), x).prev_sample.shape == x.shape


def test_a_ready_plan_is_run_and_saved(tmp_path):
    schedule = fs.VP.linear()
    plan = fs.trace(solvers.heun, fs.grid(schedule, 4, fs.karras))
    plan.save(tmp_path / "plan.json")
    expected = fs.sample(model_of(LINEAR), plan, NOISE)
    for given in (plan, tmp_path / "plan.json", str(tmp_path / "plan.json")):
        scheduler = made(7, plan=given)
        close(loop(scheduler, start(scheduler)), expected, 1e-6)
    scheduler.save_pretrained(tmp_path / "saved")
    loaded = PlanScheduler.from_pretrained(tmp_path / "saved")
    loaded.set_timesteps(7)
    assert loaded.plan == plan
    close(loop(loaded, start(loaded)), expected, 1e-6)
    with pytest.raises(ValueError, match="plan has 7 evaluations and the pipeline asks for 4 steps"):
        loaded.set_timesteps(4)
    with pytest.raises(ValueError, match="made with a plan and is given timesteps too"):
        loaded.set_timesteps(timesteps=[900, 100])
    with pytest.raises(ValueError, match="plan says all by itself, but solver = ddim"):
        PlanScheduler.from_config(LINEAR, plan=plan, solver="ddim")
    named = PlanScheduler.from_config(loaded.config, solver="ddim")
    assert named.config.plan is None


def test_a_ready_plan_begins_late_where_it_remembers_nothing():
    grid = fs.grid(fs.VP.linear(), 6)
    tail = fs.trace(solvers.ddim, fs.Grid(grid.schedule, grid.nodes[2:]))
    scheduler = made(6, plan=fs.trace(solvers.ddim, grid))
    scheduler.set_begin_index(2)
    x = tail.start.sigma * NOISE.draw(0)
    close(loop(scheduler, x, first=2), fs.sample(model_of(LINEAR), tail, NOISE), 1e-6)
    scheduler = made(6, plan=fs.trace(solvers.dpmpp_2m, grid))
    scheduler.set_begin_index(2)
    with pytest.raises(ValueError, match="the ready plan remembers evaluations before it"):
        loop(scheduler, x, first=2)


def test_a_plan_for_other_networks_is_refused():
    with pytest.raises(ValueError, match="does not fit this model's"):
        made(4, plan=fs.trace(solvers.ddim, fs.grid(fs.VP.scaled_linear(), 4)))
    plan = fs.trace(solvers.ddim, fs.grid(fs.VP.linear(), 4))
    object.__setattr__(plan, "predicts", "v")
    with pytest.raises(ValueError, match="tuned for networks that predict v, this one predicts eps"):
        made(4, plan=plan)
    churned = {"s_churn": 2.0}
    with pytest.raises(ValueError, match="adds noise before its first evaluation"):
        made(4, solver="euler", solver_options=churned)
    made(4, solver="euler", solver_options={**churned, "s_tmax": 10.0})


def test_a_warm_start_reaches_the_network_and_the_state():
    gaussian = fs.Gaussian(torch.tensor(0.2), torch.tensor(0.3))
    plan = fs.trace(solvers.dpmpp_2m, fs.grid(fs.VP.linear(), 5, start=800.0, warm=gaussian))
    scheduler = made(5, plan=plan)
    expected = fs.sample(model_of(LINEAR), plan, NOISE)
    close(loop(scheduler, start(scheduler)), expected, 1e-6)
    x = start(scheduler)
    for t in scheduler.timesteps:  # as DiTPipeline has it: on with what the network saw
        x = scheduler.scale_model_input(x, t)
        x = scheduler.step(network(x, t), t, x).prev_sample
    close(x, expected, 1e-6)
    x = start(scheduler)
    for t in scheduler.timesteps:  # two batches at once, as guidance has it
        seen = scheduler.scale_model_input(torch.cat([x, x]), t)
        x = scheduler.step(network(seen, t)[:3], t, x).prev_sample
    close(x, expected, 1e-6)
    with pytest.raises(ValueError, match="scale_model_input was not called"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_zero_terminal_snr_needs_a_network_that_says_x0_there():
    config = diffusers.DDIMScheduler(
        rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction", clip_sample=False
    ).config
    scheduler = made(5, config, solver="dpmpp_2m")
    close(loop(scheduler, start(scheduler)), fs.sample(model_of(config), scheduler.plan, NOISE), 1e-6)
    assert scheduler.sigmas[0] == math.inf
    with pytest.raises(ValueError, match="eps network says nothing of x0 at alpha = 0"):
        made(5, {**config, "prediction_type": "epsilon"}, solver="dpmpp_2m")


# The rest of what pipelines and trainers ask


def ddim_with(**options):
    return made(solver="ddim", solver_options=options)


def test_noise_is_added_as_diffusers_adds_it():
    x, z = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).chunk(2)
    x, z = x.expand(4, 3, 4, 4), z.expand(4, 3, 4, 4)
    t = torch.tensor([0, 10, 500, 999])
    theirs = diffusers.DDPMScheduler()
    ours = PlanScheduler.from_config(theirs.config)  # set_timesteps is not needed
    torch.testing.assert_close(ours.add_noise(x, z, t), theirs.add_noise(x, z, t))
    torch.testing.assert_close(ours.get_velocity(x, z, t), theirs.get_velocity(x, z, t))
    assert ours.add_noise(x.half(), z.half(), t).dtype == torch.float16
    torch.testing.assert_close(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert (len(ours), ours.init_noise_sigma) == (1000, pytest.approx(fs.node(fs.VP.linear(), 999.0).sigma))
    for dynamic in (False, True):
        theirs = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=dynamic)
        ours = PlanScheduler.from_config(theirs.config)
        theirs.set_timesteps(4, mu=0.7)
        torch.testing.assert_close(ours.scale_noise(x, theirs.timesteps, z), theirs.scale_noise(x, theirs.timesteps, z))
        assert ours.init_noise_sigma == 1
    with pytest.raises(AttributeError, match="alphas_cumprod"):
        _ = ours.alphas_cumprod
    edm = PlanScheduler.from_config(diffusers.EDMEulerScheduler().config)
    torch.testing.assert_close(edm.add_noise(x[:1], z[:1], torch.tensor([math.log(3.0) / 4])), x[:1] + 3 * z[:1])


@pytest.mark.parametrize(
    ("error", "says", "make"),
    [
        (ValueError, "unknown solver 'dpm2'", lambda: made(solver="dpm2")),
        (ValueError, "ddim has no option 'churn'; it has eta", lambda: ddim_with(churn=1)),
        (ValueError, "cannot be: .* give a ready plan", lambda: ddim_with(eta=torch.ones(1))),
        (ValueError, "spacing 'karas' is not one of .*uniform_lam, ", lambda: made(spacing="karas")),
        (ValueError, "'zero' or 'sigma_min', got 'one'", lambda: made(final_sigmas_type="one")),
        (TypeError, "got 'solvr', which is neither", lambda: made(solvr="ddim")),
        (TypeError, "takes the config of a scheduler, got str", lambda: PlanScheduler.from_config("folder")),
        (ValueError, "not know the networks of SCMScheduler", lambda: made(config={"_class_name": "SCMScheduler"})),
        (ValueError, "prediction_type 'score'", lambda: made(config={**LINEAR, "prediction_type": "score"})),
        (ValueError, "beta_schedule 'wave'", lambda: made(config={**LINEAR, "beta_schedule": "wave"})),
        (ValueError, "at least 1, timesteps or sigmas, got None", lambda: made(None)),
        (ValueError, "at least 1, timesteps or sigmas, got 0", lambda: made(0)),
        (ValueError, "say the same thing twice", lambda: made().set_timesteps(timesteps=[1], sigmas=[1.0])),
        (ValueError, "is 3, but 2 times were given", lambda: made().set_timesteps(3, timesteps=[900, 1])),
        (ValueError, "call set_timesteps", lambda: PlanScheduler.from_config(LINEAR).step(NOISE, 1, NOISE)),
        (ValueError, "sigma_max = None", lambda: made(config=diffusers.EulerDiscreteScheduler(
            timestep_type="continuous", prediction_type="v_prediction").config)),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_before_any_step(error, says, make):
    with pytest.raises(error, match=says):
        make()


def test_the_name_is_found_and_others_are_not():
    assert solvers.PlanScheduler is PlanScheduler
    with pytest.raises(AttributeError, match="has no attribute 'PlanSchedular'"):
        _ = solvers.PlanSchedular
