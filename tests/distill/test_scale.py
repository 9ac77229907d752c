"""Guidance scales as a condition: drawn for each sample, used by the teacher, told to the student."""

import dataclasses
import math

import pytest
import torch

import fastsample as fs
from fastsample import distill
from fastsample.distill.method import described
from fastsample.distill.scale import at_scale

from .pipelines import SIZE, diffusers, random, text, unet


@pytest.fixture(scope="module")
def teacher():
    return fs.from_diffusers(unet(), diffusers.DDPMScheduler(beta_schedule="scaled_linear"))


def test_scales_are_uniform_from_low_to_high():
    torch.manual_seed(0)
    scale = distill.Scales(3.0, 15.0).draw(20_000)
    assert 3 <= scale.min() < 3.01
    assert 14.99 < scale.max() < 15
    assert scale.dtype == torch.float64
    assert float(scale.mean()) == pytest.approx(9, abs=5 * 12 / math.sqrt(12 * 20_000))  # five standard errors
    assert float(scale.std()) == pytest.approx(12 / math.sqrt(12), rel=0.02)


def test_a_guided_teacher_takes_a_scale_for_each_sample(teacher):
    """Sample i is that of the teacher whose one scale is that of sample i."""
    x, cond, uncond = random(3, 4, 8, 8, seed=2), text(3), text(3, seed=7)
    guided = fs.Guided(teacher, uncond=uncond, scale=1.0)
    at = fs.nodes(teacher.schedule, torch.tensor([900.0, 500.0, 20.0]))
    scale = torch.tensor([1.0, 4.5, 9.0], dtype=torch.float64)
    with torch.no_grad():
        found = at_scale(guided, scale).predict(x, at, **cond)
        for i, one in enumerate(scale):
            alone = dataclasses.replace(guided, scale=float(one)).predict(x, at, **cond)
            torch.testing.assert_close(found[i], alone[i], rtol=0, atol=2e-5)  # x0 of 15 times the network's eps
            assert i == 0 or not torch.allclose(found[i], teacher.predict(x, at, **cond)[i], atol=1e-3)
        inside = at_scale(fs.Thresholded(guided, limit=0.1), scale).predict(x, at, **cond)
    torch.testing.assert_close(inside, found.clamp(-0.1, 0.1))


def test_a_teacher_without_guidance_has_no_scale(teacher):
    with pytest.raises(TypeError, match=r"need a teacher with guidance, got Denoiser; wrap it: fs\.Guided\(teacher"):
        at_scale(teacher, torch.ones(2))
    with pytest.raises(TypeError, match=r"got Denoiser"):
        at_scale(fs.Thresholded(teacher), torch.ones(2))


def test_the_student_is_told_the_scale_as_it_wants():
    scale = torch.tensor([2.0, 7.5], dtype=torch.float64)
    embedded = distill.Scales(2, 14, distill.Embedded(SIZE)).told(scale)
    assert torch.equal(embedded["timestep_cond"], fs.guidance_embedding(scale, SIZE))
    assert torch.equal(distill.Scales(2, 14, distill.Plain()).told(scale)["guidance"], scale.float())
    own = distill.Scales(2, 14, lambda scale: {"w": scale - 1}).told(scale)
    assert torch.equal(own["w"], scale - 1)
    assert distill.Scales(2, 14, None).told(scale) == {}
    assert distill.Scales(2, 14, distill.Embedded(SIZE)).told(8.0, batch=3)["timestep_cond"].shape == (3, SIZE)


def test_the_embedding_is_that_of_the_pipeline_of_diffusers():
    pipe = diffusers.LatentConsistencyModelPipeline
    scale = torch.tensor([3.0, 8.5])
    theirs = pipe.get_guidance_scale_embedding(None, scale - 1, embedding_dim=SIZE)
    torch.testing.assert_close(distill.Embedded(SIZE)(scale)["timestep_cond"], theirs, rtol=0, atol=1e-6)


def test_a_checkpoint_remembers_the_scales():
    assert described(distill.Scales(6, 16)) == "6 to 16, as timestep_cond of 256"
    assert described(distill.Scales(6, 16, distill.Plain("w"))) == "6 to 16, as w"
    assert described(distill.Scales(2, 2.5, None)) == "2 to 2.5, not told"


@pytest.mark.parametrize("ends", [(3.0, 2.0), (math.nan, 2.0), (1.0, math.inf)])
def test_scales_that_cannot_be_drawn_are_refused(ends):
    with pytest.raises(ValueError, match=r"from low to high, finite, got "):
        distill.Scales(*ends)


def test_an_embedding_of_too_few_numbers_is_refused():
    with pytest.raises(ValueError, match="at least 4 numbers, got size 3"):
        distill.Embedded(3)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_a_student_that_is_told_the_scale_begins_as_its_teacher(teacher, scale):
    student = distill.scaled_student(teacher, SIZE)
    assert student.network.config["time_cond_proj_dim"] == SIZE
    x, at = random(2, 4, 8, 8, seed=3), fs.node(teacher.schedule, 600.0)
    with torch.no_grad():
        told = student.output(x, at, **text(2), **distill.Embedded(SIZE)(torch.full((2,), scale)))
        assert torch.equal(told, teacher.output(x, at, **text(2)))
    assert teacher.network.network.config.time_cond_proj_dim is None


def test_the_embedding_of_the_scale_is_trained_from_the_first_step_on(teacher):
    student = distill.scaled_student(teacher, SIZE)
    x, at = random(2, 4, 8, 8, seed=3), fs.node(teacher.schedule, 600.0)
    scale = torch.tensor([2.0, 8.0])
    student.output(x, at, **text(2), **distill.Embedded(SIZE)(scale)).square().mean().backward()
    projection = student.network.network.time_embedding.cond_proj.weight
    assert projection.grad.abs().max() > 0
    assert all(value.grad is None for value in teacher.network.parameters())
    with torch.no_grad():
        projection -= projection.grad
        one, other = student.output(x[:1].expand(2, -1, -1, -1), at, **text(1), **distill.Embedded(SIZE)(scale))
    assert not torch.equal(one, other)


def test_a_student_that_is_told_the_scale_is_saved_and_loaded_by_diffusers(teacher, tmp_path):
    student = distill.scaled_student(teacher, SIZE)
    with torch.no_grad():
        student.network.network.time_embedding.cond_proj.weight.normal_()
    fs.save_pretrained(student, tmp_path)
    loaded = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    assert loaded.config.time_cond_proj_dim == SIZE
    condition = {**text(2), **distill.Embedded(SIZE)(torch.tensor([2.0, 8.0]))}
    x, t = random(2, 4, 8, 8, seed=3), torch.tensor([600.0, 600.0])
    with torch.no_grad():
        expected = student.output(x, fs.node(teacher.schedule, 600.0), **condition)
        assert torch.equal(loaded(x, t, **condition).sample, expected)


def test_the_student_says_what_was_forgotten(teacher):
    student = distill.scaled_student(teacher, SIZE)
    with pytest.raises(ValueError, match=r"needs the condition 'timestep_cond'.*fs\.guidance_embedding\(scale, 32\)"):
        student.predict(random(2, 4, 8, 8, seed=3), fs.node(teacher.schedule, 600.0), **text(2))


def test_networks_that_cannot_be_told_the_scale_so_are_refused(teacher, toy):
    with pytest.raises(ValueError, match=r"Toy has no time_cond_proj_dim.*distill\.Plain"):
        distill.scaled_student(toy())
    with pytest.raises(ValueError, match=r"told the scale already \(time_cond_proj_dim = 32\); copy it by student_of"):
        distill.scaled_student(distill.scaled_student(teacher, SIZE))
