"""Students with a boundary or the scalings of EDM: saved as what they are, and run by a pipeline as that."""

import json

import pytest
import torch

import fastsample as fs
from fastsample import distill, solvers
from fastsample.adapters.diffusers import Sampled

diffusers = pytest.importorskip("diffusers")


@pytest.fixture
def network():
    torch.manual_seed(0)
    return diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 8),
        norm_num_groups=4, down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip


def students(network):
    plain = fs.Denoiser(Sampled(network), fs.VP.scaled_linear(), "v")
    return {
        "lcm": distill.bounded(plain, "lcm"),
        "edm boundary": distill.bounded(plain, {"name": "edm", "sigma_data": 0.4}),
        "edm scalings": distill.edm_model(Sampled(network)),
        "both": distill.edm_model(Sampled(network), sigma_data=0.6, boundary="edm"),
    }


NAMES = ["lcm", "edm boundary", "edm scalings", "both"]


def grid_of(model, steps=4):
    return fs.grid(model.schedule, steps, fs.karras if isinstance(model.schedule, fs.EDM) else fs.uniform_t)


@pytest.mark.parametrize("name", NAMES)
def test_a_student_is_the_same_after_saving(network, name, tmp_path):
    model = students(network)[name]
    plan = fs.trace(solvers.consistency, grid_of(model))
    fs.save_pretrained(model, tmp_path, plan=plan)
    loaded, noise = fs.from_pretrained(tmp_path), fs.noise((1, 8, 8), seeds=range(2))
    assert type(loaded) is type(model)
    assert loaded.prediction.name == model.prediction.name
    torch.testing.assert_close(fs.sample(loaded, loaded.plan, noise), fs.sample(model, plan, noise), rtol=0, atol=0)
    again = tmp_path / "again"
    fs.save_pretrained(loaded, again, plan=loaded.plan)
    first, second = (json.loads((folder / "fastsample.json").read_text()) for folder in (tmp_path, again))
    for manifest in (first, second):
        manifest["sha256"].pop("config.json")  # where diffusers notes the folder that it loaded from
    assert first == second


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("solver", [solvers.ddim, solvers.consistency], ids=lambda f: f.__name__)
def test_the_scheduler_of_the_folder_steps_the_bare_network_to_the_same_images(network, name, solver, tmp_path):
    model, noise = students(network)[name], fs.noise((1, 8, 8), seeds=range(2))
    plan = fs.trace(solver, grid_of(model))
    fs.save_pretrained(model, tmp_path, plan=plan)
    scheduler = solvers.PlanScheduler.from_pretrained(tmp_path)
    scheduler.set_timesteps(4)
    x = noise.draw(0) * scheduler.init_noise_sigma
    used = sorted(plan.noises)
    with torch.no_grad():
        for k, t in enumerate(scheduler.timesteps):
            output = network(scheduler.scale_model_input(x, t), t).sample
            z = {"variance_noise": noise.draw(k + 2)} if k in used else {}
            x = scheduler.step(output, t, x, **z).prev_sample
    torch.testing.assert_close(x, fs.sample(model, plan, noise), rtol=0, atol=2e-6)  # float32 through the network


def test_without_its_boundary_a_plan_does_the_same_by_the_bare_x0(network):
    model = students(network)["edm boundary"]
    bare = fs.Denoiser(model.network, model.schedule, model.prediction)
    plan = fs.trace(solvers.consistency, grid_of(model))
    noise = fs.noise((1, 8, 8), seeds=range(2))
    one, other = fs.sample(model, plan, noise), fs.sample(bare, distill.without_boundary(model, plan), noise)
    torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
    assert distill.without_boundary(bare, plan) is plan


def test_a_student_with_a_boundary_and_no_plan_has_no_scheduler(network, tmp_path):
    fs.save_pretrained(students(network)["lcm"], tmp_path)
    assert not (tmp_path / "scheduler_config.json").exists()


def test_scalings_that_no_scheduler_has_are_left_to_fs_sample(network, tmp_path):
    model = distill.edm_model(Sampled(network), noise_scale=1000.0)
    fs.save_pretrained(model, tmp_path, plan=fs.trace(solvers.ddim, grid_of(model)))
    assert not (tmp_path / "scheduler_config.json").exists()
    assert fs.from_pretrained(tmp_path).network.noise_scale == 1000.0
