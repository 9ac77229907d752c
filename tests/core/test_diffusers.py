"""diffusers networks and schedulers as models."""

import pytest
import torch

import fastsample as fs

from .toys import ddim

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        num_class_embeds=4,
    ).eval()


LABELS = {"class_labels": torch.tensor([0, 3])}
NOISE = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("scheduler", "schedule", "predicts", "spacing"),
    [
        (lambda: diffusers.DDPMScheduler(), fs.VP.linear(), "eps", "leading"),
        (lambda: diffusers.DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing",
                                         rescale_betas_zero_snr=True),
         fs.VP.linear().zero_terminal_snr(), "v", "trailing"),
        (lambda: diffusers.DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2"),
         fs.VP.cosine(), "eps", "linspace of DPMSolverMultistepScheduler"),
        (lambda: diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012,
                                         prediction_type="sample"), fs.VP.scaled_linear(), "x0", "leading"),
        (lambda: diffusers.DDPMScheduler(beta_schedule="sigmoid", num_train_timesteps=100),
         fs.VP.sigmoid(steps=100), "eps", "leading"),
        (lambda: diffusers.DDPMScheduler(trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=3),
         fs.VP((0.1, 0.2, 0.3)), "eps", "leading"),
        (lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), fs.Flow(shift=3.0), "flow",
         "times of FlowMatchEulerDiscreteScheduler"),
        (lambda: diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=2.0,
                                                       prediction_type="flow_prediction"), fs.Flow(2.0), "flow",
         "times of DPMSolverMultistepScheduler"),
    ],
)  # fmt: skip
def test_a_scheduler_is_read(unet, scheduler, schedule, predicts, spacing):
    named = {**scheduler().config, "_class_name": type(scheduler()).__name__}  # as it stands in a file
    for given in (scheduler(), named):
        model = fs.from_diffusers(unet, given)
        assert model.schedule == schedule
        assert model.prediction.name == predicts
        assert getattr(model.spacing, "__name__", None) == spacing


def test_a_configuration_without_its_class_is_read_as_ddims(unet):
    config = diffusers.DPMSolverMultistepScheduler(timestep_spacing="leading").config
    for given in (config, dict(config)):
        assert fs.from_diffusers(unet, given).spacing.__name__ == "leading"


def loop_of_diffusers(unet, scheduler, x):
    with torch.no_grad():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, **LABELS).sample, t, x).prev_sample
    return x


EVERY_PREDICTION = pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])


@pytest.mark.parametrize(("spacing", "steps"), [("leading", 1), ("leading", 12), ("trailing", 1), ("trailing", 5)])
@EVERY_PREDICTION
def test_our_ddim_is_the_loop_of_diffusers(unet, spacing, prediction_type, steps):
    """Where it holds in diffusers: its DDIM steps to t - T // N, which `linspace`, and `trailing` where N does not
    divide T, do not evaluate next."""
    scheduler = diffusers.DDIMScheduler(
        prediction_type=prediction_type, timestep_spacing=spacing, clip_sample=False, steps_offset=0
    )
    scheduler.set_timesteps(steps)
    model = fs.from_diffusers(unet, scheduler)
    plan = fs.trace(ddim, fs.grid(model.schedule, steps, spacing=model.spacing, round_to_index=True))
    assert [row.node.t for row in plan.rows] == scheduler.timesteps.tolist()

    # diffusers starts at the noise itself, we at sigma times it: sigma of the first time is not quite 1
    theirs = loop_of_diffusers(unet, scheduler, plan.start.sigma * NOISE)
    close(fs.sample(model, plan, NOISE, condition=LABELS), theirs)


def close(ours, theirs):
    """1e-5 of the largest number: the table of diffusers is float32, and eps is divided by an alpha down to 0.006."""
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@EVERY_PREDICTION
def test_our_ddim_is_the_first_order_dpm_solver_of_diffusers(unet, spacing, prediction_type):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        prediction_type=prediction_type, timestep_spacing=spacing, solver_order=1
    )
    scheduler.set_timesteps(12)
    model = fs.from_diffusers(unet, scheduler)
    plan = fs.trace(ddim, fs.grid(model.schedule, 12, spacing=model.spacing))
    theirs = loop_of_diffusers(unet, scheduler, plan.start.sigma * NOISE)
    close(fs.sample(model, plan, NOISE, condition=LABELS), theirs)


def test_a_flow_is_the_loop_of_diffusers(unet):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(6)
    model = fs.from_diffusers(unet, scheduler)
    plan = fs.trace(ddim, fs.grid(model.schedule, 6, spacing=model.spacing))
    close(fs.sample(model, plan, NOISE, condition=LABELS), loop_of_diffusers(unet, scheduler, NOISE))


def test_class_labels_matter(unet):
    model = fs.from_diffusers(unet, diffusers.DDPMScheduler())
    plan = fs.trace(ddim, fs.grid(model.schedule, 2))
    one, other = (
        fs.sample(model, plan, NOISE, condition={"class_labels": torch.full((2,), label)}) for label in (0, 3)
    )
    assert not torch.equal(one, other)


def test_a_compiled_network_is_read_too(unet):
    compiled = fs.from_diffusers(torch.compile(unet, backend="eager"), diffusers.DDPMScheduler())
    plain = fs.from_diffusers(unet, diffusers.DDPMScheduler())
    node = fs.node(plain.schedule, 500.0)
    with torch.no_grad():
        torch.testing.assert_close(compiled.predict(NOISE, node, **LABELS), plain.predict(NOISE, node, **LABELS))


def test_half_precision_networks_work(unet):
    half = fs.from_diffusers(diffusers.UNet2DModel.from_config(unet.config).bfloat16(), diffusers.DDPMScheduler())
    x0 = half.predict(NOISE, fs.node(half.schedule, 500.0), **LABELS)
    assert (half.dtype, x0.dtype) == (torch.bfloat16, torch.float32)


def test_a_continuous_euler_network_is_told_the_logarithm_of_sigma(unet):
    scheduler = diffusers.EulerDiscreteScheduler(timestep_type="continuous", prediction_type="v_prediction")
    assert fs.from_diffusers(unet, scheduler).time is fs.TIMES["log_sigma"]
    assert fs.from_diffusers(unet, diffusers.EulerDiscreteScheduler()).time is fs.TIMES["index"]


def test_the_offset_of_leading_is_read(unet):
    scheduler = diffusers.DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(10)
    model = fs.from_diffusers(unet, scheduler)
    grid = fs.grid(model.schedule, 10, spacing=model.spacing)
    assert [node.t for node in grid.nodes[:-1]] == scheduler.timesteps.tolist()


@pytest.mark.parametrize(
    "network",
    [torch.nn.Linear(2, 2), lambda x, t: x, lambda x, timestep: x],
    ids=["module", "function", "no return_dict"],
)
def test_networks_with_another_signature_are_refused(network):
    with pytest.raises(ValueError, match=r"from_diffusers passes \(x, timestep, .*wrap it yourself"):
        fs.from_diffusers(network, diffusers.DDPMScheduler())


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({}, "lacks num_train_timesteps"),
        ({"num_train_timesteps": 1000}, "neither betas nor a shift"),
        ({"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": True}, "pass one of image_seq_len"),
        ({"num_train_timesteps": 500, "shift": 3.0}, "told 1000 sigma, but num_train_timesteps is 500"),
        ({"num_train_timesteps": 1000, "shift": 3.0, "invert_sigmas": True}, "invert_sigmas True"),
        ({**diffusers.DDPMScheduler().config, "beta_schedule": "wave"}, "beta_schedule 'wave'"),
        ({**diffusers.DDPMScheduler().config, "prediction_type": "score"}, "prediction_type 'score'"),
        ({**diffusers.DDPMScheduler().config, "timestep_spacing": "odd"}, "timestep_spacing 'odd'"),
    ],
)
def test_configurations_that_cannot_be_read_are_refused(unet, config, says):
    with pytest.raises(ValueError, match=says):
        fs.from_diffusers(unet, config)


def test_what_is_no_scheduler_is_refused(unet):
    with pytest.raises(TypeError, match="diffusers scheduler or its config, got NoneType"):
        fs.from_diffusers(unet, None)


@pytest.mark.parametrize(
    ("shape", "labels", "said"),
    [
        ((3, 8, 8), 2, r"\[B, 1, \.\.\.\], got \[2, 3, 8, 8\]"),
        ((1, 8, 8), 3, "'class_labels' has 3 rows for a batch of 2"),
    ],
    ids=["channels", "labels"],
)
def test_a_wrong_shape_is_named_before_the_network_trips_over_it(unet, shape, labels, said):
    model = fs.from_diffusers(unet, diffusers.DDIMScheduler())
    plan = fs.trace(ddim, fs.grid(model.schedule, 2))
    condition = {"class_labels": torch.zeros(labels, dtype=torch.long)}
    with pytest.raises(ValueError, match=said):
        fs.sample(model, plan, fs.noise(shape, range(2)), condition=condition)
