"""What is saved loads as the same model; what is damaged is refused by name."""

import json
import resource

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill, solvers
from fastsample.adapters.pretrained import weights_hash

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return fs.from_diffusers(network.eval(), diffusers.DDPMScheduler(prediction_type="v_prediction"))


def test_a_saved_model_predicts_the_same_after_loading(model, tmp_path):
    fs.save_pretrained(model, tmp_path / "model")
    loaded = fs.from_pretrained(tmp_path / "model")
    x, node = torch.randn(2, 1, 8, 8), fs.node(model.schedule, 500.0)
    assert loaded.schedule == model.schedule
    with torch.no_grad():
        torch.testing.assert_close(loaded.predict(x, node), model.predict(x, node), rtol=0, atol=0)


@pytest.mark.parametrize("schedule", [fs.EDM(), fs.Flow(shift=3.0), fs.VPContinuous(), fs.TrigFlow(1e-4)], ids=repr)
def test_every_schedule_survives_saving(model, schedule, tmp_path):
    fs.save_pretrained(fs.Denoiser(model.network, schedule, "x0"), tmp_path)
    loaded = fs.from_pretrained(tmp_path)
    assert loaded.schedule == schedule
    assert loaded.prediction.name == "x0"


def test_diffusers_loads_the_folder_itself(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    assert diffusers.UNet2DModel.from_pretrained(tmp_path).num_parameters() > 0


def test_others_may_read_what_is_saved(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_flipped_byte_in_the_weights_is_refused(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"safetensors is damaged.*get it again"):
        fs.from_pretrained(tmp_path)


def test_an_unfinished_folder_is_refused(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    (tmp_path / "fastsample.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no fastsample\.json"):
        fs.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"format": "x"}', '{"format": "fastsample.model", "version": 99}',
        "[" * 100_000, '{"format": "fastsample.model", "version": ' + "1" * 6000 + "}",
    ],
    ids=lambda text: repr(text[:60]),
)  # fmt: skip
def test_a_damaged_manifest_is_refused(model, tmp_path, text):
    fs.save_pretrained(model, tmp_path)
    (tmp_path / "fastsample.json").write_text(text)
    with pytest.raises(ValueError, match=r"fastsample\.json"):
        fs.from_pretrained(tmp_path)


def test_a_class_that_is_no_network_is_refused(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    manifest = json.loads((tmp_path / "fastsample.json").read_text())
    (tmp_path / "fastsample.json").write_text(json.dumps({**manifest, "network": "DDPMScheduler"}))
    with pytest.raises(ValueError, match="has no network 'DDPMScheduler'"):
        fs.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"sha256": ["a"]},
        {"sha256": None},
        {"schedule": {"type": "VP", "betas": "wrong"}},
        {"schedule": {"type": "VP", "betas": [0.1, 2.0]}},
        {"schedule": {"type": "VP", "betas": [0.1, 10**400]}},
        {"schedule": {"type": "EDM", "sigma_min": "wrong"}},
        {"schedule": {"type": ["VP"]}},
    ],
    ids=str,
)
def test_a_manifest_with_wrong_values_is_refused_by_its_name(model, tmp_path, changes):
    fs.save_pretrained(model, tmp_path)
    manifest = json.loads((tmp_path / "fastsample.json").read_text())
    (tmp_path / "fastsample.json").write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(ValueError, match=r"fastsample\.json is damaged"):
        fs.from_pretrained(tmp_path)


def test_a_compiled_network_is_saved_as_the_one_it_was_made_of(model, tmp_path):
    inner = torch.compile(model.network.network, backend="eager")
    fs.save_pretrained(fs.from_diffusers(inner, diffusers.DDPMScheduler()), tmp_path)
    assert type(fs.from_pretrained(tmp_path).network.network) is diffusers.UNet2DModel


def test_a_schedule_of_ones_own_cannot_be_saved(model, tmp_path):
    class Mine(fs.VPContinuous):
        pass

    with pytest.raises(ValueError, match="schedule of your own, which cannot be saved"):
        fs.save_pretrained(fs.Denoiser(model.network, Mine(), "v"), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_function_or_a_time_of_ones_own_cannot_be_saved(model, tmp_path):
    for network in (torch.nn.Identity(), lambda x, t: x):
        with pytest.raises(ValueError, match="needs a network with weights"):
            fs.save_pretrained(fs.Denoiser(network, fs.VP.linear()), tmp_path)
    own = fs.Denoiser(model.network, fs.VP.linear(), time=lambda schedule, node: node.t)
    with pytest.raises(ValueError, match="cannot be saved"):
        fs.save_pretrained(own, tmp_path)


def test_a_missing_file_is_called_missing(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="safetensors is missing"):
        fs.from_pretrained(tmp_path)


@pytest.fixture
def labelled():
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, num_class_embeds=5,
    )  # fmt: skip
    return fs.from_diffusers(network.eval(), diffusers.DDPMScheduler())


def test_the_label_of_no_class_is_saved_and_kept_when_saved_again(labelled, tmp_path):
    fs.save_pretrained(labelled, tmp_path / "a", null=4)
    loaded = fs.from_pretrained(tmp_path / "a")
    assert loaded.network.null == 4
    fs.save_pretrained(loaded, tmp_path / "b")
    assert fs.from_pretrained(tmp_path / "b").network.null == 4


def test_a_folder_without_a_label_of_no_class_has_none(labelled, tmp_path):
    fs.save_pretrained(labelled, tmp_path)
    assert "null" not in json.loads((tmp_path / "fastsample.json").read_text())
    assert fs.from_pretrained(tmp_path).network.null is None


def test_a_label_that_the_network_has_not_is_refused_as_null(labelled, model, tmp_path):
    for null in (5, -1, 2.0):
        with pytest.raises(ValueError, match=r"null must be one of the network's 5 class labels"):
            fs.save_pretrained(labelled, tmp_path / "new", null=null)
    with pytest.raises(ValueError, match=r"null must be one of the network's 0 class labels"):
        fs.save_pretrained(model, tmp_path / "new", null=0)
    assert not (tmp_path / "new").exists()


def test_a_manifest_with_a_null_that_is_no_label_is_refused(labelled, tmp_path):
    fs.save_pretrained(labelled, tmp_path, null=4)
    manifest = json.loads((tmp_path / "fastsample.json").read_text())
    (tmp_path / "fastsample.json").write_text(json.dumps({**manifest, "null": "none"}))
    with pytest.raises(ValueError, match=r"fastsample\.json is damaged"):
        fs.from_pretrained(tmp_path)


def plan_of(model, solver=solvers.ddim, steps=4):
    return fs.trace(solver, fs.grid(model.schedule, steps, fs.uniform_t))


def weights(model):
    return {key: value.clone() for key, value in model.network.state_dict().items()}


def test_a_student_is_loaded_with_its_plan_and_sampled_by_it(model, tmp_path):
    plan = plan_of(model)
    fs.save_pretrained(model, tmp_path, plan=plan, guidance=3.0, teacher=model)
    loaded = fs.from_pretrained(tmp_path)
    assert loaded.plan == plan
    assert (loaded.card.steps, loaded.card.guidance, loaded.card.teacher) == (4, 3.0, weights_hash(model))
    noise = fs.noise((1, 8, 8), seeds=range(2))
    torch.testing.assert_close(fs.sample(loaded, loaded.plan, noise), fs.sample(model, plan, noise), rtol=0, atol=0)
    manifest = json.loads((tmp_path / "fastsample.json").read_text())
    assert (manifest["steps"], manifest["plan"], manifest["guidance"]) == (4, "plan.json", 3.0)


def test_a_range_of_guidance_and_a_hash_of_the_teacher_are_kept_as_they_are(model, tmp_path):
    fs.save_pretrained(model, tmp_path, guidance=(2.0, 14.0), teacher="abc")
    card = fs.from_pretrained(tmp_path).card
    assert (card.plan, card.steps, card.guidance, card.teacher) == (None, None, (2.0, 14.0), "abc")


def test_the_hash_of_a_teacher_is_of_its_weights_alone_and_of_what_guidance_guides(model, labelled):
    before = weights_hash(model)
    assert before == weights_hash(fs.Denoiser(model.network, fs.EDM(), "x0"))
    assert weights_hash(fs.Guided(labelled, uncond={"class_labels": 4}, scale=2.0)) == weights_hash(labelled) != before
    with torch.no_grad():
        next(model.network.parameters()).view(-1)[0] += 1
    assert weights_hash(model) != before


def test_a_folder_of_before_students_had_plans_still_loads(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    manifest = json.loads((tmp_path / "fastsample.json").read_text())
    assert manifest.keys() == {"format", "version", "network", "predicts", "time", "schedule", "sha256"}
    (tmp_path / "scheduler_config.json").unlink()
    del manifest["sha256"]["scheduler_config.json"]
    (tmp_path / "fastsample.json").write_text(json.dumps(manifest))
    assert fs.from_pretrained(tmp_path).plan is None


@pytest.mark.parametrize("guidance", [(1.0,), "3", True, (1.0, float("nan"))], ids=repr)
def test_guidance_that_is_no_scale_is_refused(model, tmp_path, guidance):
    with pytest.raises(ValueError, match="guidance must be a scale or the range"):
        fs.save_pretrained(model, tmp_path / "new", guidance=guidance)
    assert not (tmp_path / "new").exists()


def test_a_plan_of_another_schedule_is_refused_before_anything_is_written(model, tmp_path):
    plan = fs.trace(solvers.ddim, fs.grid(fs.VP.cosine(), 4))
    with pytest.raises(ValueError, match="does not fit this model"):
        fs.save_pretrained(model, tmp_path / "new", plan=plan)
    assert not (tmp_path / "new").exists()


def test_a_plan_that_was_changed_is_refused(model, tmp_path):
    fs.save_pretrained(model, tmp_path, plan=plan_of(model))
    plan_of(model, steps=2).save(tmp_path / "plan.json")
    with pytest.raises(ValueError, match=r"plan\.json is damaged"):
        fs.from_pretrained(tmp_path)


def test_what_an_earlier_student_had_and_the_new_one_has_not_is_removed(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    fs.save_pretrained(model, tmp_path, plan=plan_of(model))
    fs.save_pretrained(model, tmp_path)
    assert not (tmp_path / "plan.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".saving-*"))


def test_a_full_disk_leaves_the_earlier_student_whole(model, tmp_path):
    fs.save_pretrained(model, tmp_path, plan=plan_of(model))
    before = weights(model)
    with torch.no_grad():
        next(model.network.parameters()).zero_()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # the weights are larger
    try:
        with pytest.raises(OSError, match=r"cannot write the model into .*free some space"):
            fs.save_pretrained(model, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    loaded = fs.from_pretrained(tmp_path)
    assert loaded.plan == plan_of(model)
    assert all(torch.equal(value, before[key]) for key, value in loaded.network.state_dict().items())
    assert not list(tmp_path.glob(".saving-*"))


def test_a_folder_that_cannot_be_written_is_named(model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write into .*file"):
        fs.save_pretrained(model, tmp_path / "file" / "model")


def test_a_pipeline_with_the_plan_scheduler_of_the_folder_makes_the_same_images(model, tmp_path):
    plan = plan_of(model)
    fs.save_pretrained(model, tmp_path, plan=plan)
    network = diffusers.UNet2DModel.from_pretrained(tmp_path)
    pipe = diffusers.DDPMPipeline(network, solvers.PlanScheduler.from_pretrained(tmp_path))
    images = pipeline_images(pipe)
    assert pipe.scheduler.plan == plan
    torch.testing.assert_close(images, sampled(model, plan), rtol=0, atol=2e-6)  # float32 through the network


def test_diffusers_own_ddim_reads_the_folder_and_makes_the_same_images(model, tmp_path):
    plan = fs.trace(solvers.ddim, fs.grid(model.schedule, 4, fs.trailing))  # whole indices, as diffusers has them
    fs.save_pretrained(model, tmp_path, plan=plan)
    scheduler = diffusers.DDIMScheduler.from_pretrained(tmp_path)
    config = scheduler.config
    assert (config.timestep_spacing, config.set_alpha_to_one, config.clip_sample) == ("trailing", True, False)
    pipe = diffusers.DDPMPipeline(diffusers.UNet2DModel.from_pretrained(tmp_path), scheduler)
    torch.testing.assert_close(pipeline_images(pipe), sampled(model, plan), rtol=0, atol=5e-6)  # its betas are float32


VPS = {
    "linear": fs.VP.linear(),
    "cosine": fs.VP.cosine(),
    "fifty": fs.VP.linear(0.002, 0.3, 50),
    "zero terminal": fs.VP.scaled_linear().zero_terminal_snr(),
}


@pytest.mark.parametrize("schedule", VPS.values(), ids=VPS)
def test_the_scheduler_of_a_folder_knows_the_schedule_of_the_network(model, schedule, tmp_path):
    fs.save_pretrained(fs.Denoiser(model.network, schedule, "v", time="index"), tmp_path)
    scheduler = solvers.PlanScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(5)
    assert len(scheduler) == len(schedule.betas)
    from_config = fs.from_diffusers(model.network.network, scheduler)
    assert from_config.prediction.name == "v"
    t = torch.linspace(0, schedule.t_max - 1, 7)
    torch.testing.assert_close(from_config.schedule.lam(t), schedule.lam(t), rtol=0, atol=1e-9)


def test_a_network_that_no_pipeline_could_ask_has_no_scheduler(model, tmp_path):
    fs.save_pretrained(fs.Denoiser(model.network, fs.EDM(), "x0"), tmp_path)
    assert not (tmp_path / "scheduler_config.json").exists()


def sampled(model, plan):
    """As a DDPMPipeline makes them, which begins at the noise itself: images in [0, 1], [B, H, W, C]."""
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    images = fs.sample(model, plan, noise / plan.start.sigma)
    return (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def pipeline_images(pipe):
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    found = pipe(batch_size=2, num_inference_steps=4, generator=generator, output_type="np").images
    return torch.from_numpy(found)


class Net(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.inner = nn.Linear(2, width)
        self.outer = nn.Linear(width, 2)
        self.tied = self.inner  # two names of one tensor

    def forward(self, x, t):
        return self.outer(self.inner(x).sin() + t[:, None] / 1000)


def test_a_torch_network_of_ones_own_is_saved_and_loaded_into_another(tmp_path):
    model = fs.Denoiser(Net(), fs.VP.scaled_linear(), "v")
    fs.save_pretrained(model, tmp_path, plan=plan_of(model))
    loaded = fs.from_pretrained(tmp_path, network=Net())
    noise = fs.noise((2,), seeds=range(3))
    assert not loaded.network.training
    torch.testing.assert_close(
        fs.sample(loaded, loaded.plan, noise), fs.sample(model, plan_of(model), noise), rtol=0, atol=0
    )


def test_a_network_of_ones_own_must_be_given_and_fit(model, tmp_path):
    fs.save_pretrained(fs.Denoiser(Net(), fs.VP.scaled_linear(), "v"), tmp_path / "own")
    with pytest.raises(ValueError, match=r"weights of a Net, .*network=Net\(\.\.\.\)"):
        fs.from_pretrained(tmp_path / "own")
    with pytest.raises(ValueError, match="does not fit the Net that was given"):
        fs.from_pretrained(tmp_path / "own", network=Net(width=5))
    with pytest.raises(ValueError, match="is of class labels of diffusers networks"):
        fs.save_pretrained(fs.Denoiser(Net(), fs.VP.scaled_linear()), tmp_path / "new", null=1)
    fs.save_pretrained(model, tmp_path / "theirs")
    with pytest.raises(ValueError, match=r"leave out network="):
        fs.from_pretrained(tmp_path / "theirs", network=Net())


@pytest.mark.parametrize("own", [False, True], ids=["of diffusers", "of one's own"])
def test_a_network_with_adapters_is_not_saved_as_one_without(model, tmp_path, own):
    pytest.importorskip("peft")
    network = fs.Denoiser(Net(), fs.VP.scaled_linear(), "v") if own else model
    student = distill.lora_student(network, rank=2, targets=["outer"] if own else ["conv1"])
    with pytest.raises(ValueError, match=r"has adapters .*distill\.merged\(student\).*distill\.save_lora"):
        fs.save_pretrained(student, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    fs.save_pretrained(distill.merged(student), tmp_path / "merged")


def test_a_model_that_is_more_than_its_network_is_not_saved_as_less(model, tmp_path):
    class Own(fs.Denoiser):
        pass

    with pytest.raises(ValueError, match="knows no way to save a Own"):
        fs.save_pretrained(Own(model.network, fs.VP.linear()), tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "changes", [{"plan": "other.json"}, {"weights": "other"}, {"guidance": "3"}, {"form": {"kind": 1}}], ids=str
)
def test_a_manifest_of_a_student_with_wrong_values_is_refused(model, tmp_path, changes):
    fs.save_pretrained(model, tmp_path, plan=plan_of(model))
    manifest = json.loads((tmp_path / "fastsample.json").read_text())
    (tmp_path / "fastsample.json").write_text(json.dumps({**manifest, **changes}))
    with pytest.raises(ValueError, match=r"fastsample\.json is damaged"):
        fs.from_pretrained(tmp_path)


def test_a_form_that_nobody_knows_is_named(model, tmp_path):
    fs.save_pretrained(model, tmp_path)
    manifest = json.loads((tmp_path / "fastsample.json").read_text())
    (tmp_path / "fastsample.json").write_text(json.dumps({**manifest, "form": {"name": "knot"}}))
    with pytest.raises(ValueError, match=r"in the form 'knot'; import fastsample\.distill"):
        fs.from_pretrained(tmp_path)
