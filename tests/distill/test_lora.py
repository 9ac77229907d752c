"""LoRA students: begin as their teacher, train the adapters alone, and load in a pipeline of diffusers."""

import builtins

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastsample as fs
from fastsample import distill, solvers

from .pipelines import BETAS, diffusers, quiet, random, stable_diffusion, text, unet

pytest.importorskip("accelerate")
pytest.importorskip("peft")


def teacher(seed=0, **options):
    return fs.from_diffusers(unet(seed, **options), diffusers.DDPMScheduler(**BETAS))


def randomised(student, seed=5):
    """The student with adapters that say something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in student.network.named_parameters():
            if "lora_B" in name:
                value.copy_(0.05 * torch.randn(value.shape, generator=generator))
    return student


def said(model, t=400.0):
    with torch.no_grad():
        return model.output(random(2, 4, 8, 8, seed=3), fs.node(model.schedule, t), **text(2))


def bases(network):
    """The weights below the adapters, by the names of a network without them."""
    found = {k.replace(".base_layer", ""): v for k, v in network.named_parameters() if "lora_" not in k}
    return dict(sorted(found.items()))


def test_the_student_begins_as_its_teacher_and_only_the_adapters_are_trained():
    model = teacher()
    student = distill.lora_student(model, 4)
    assert torch.equal(said(student), said(model))
    trained = [name for name, value in student.network.named_parameters() if value.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert not any("lora_" in name for name, _ in model.network.named_parameters())
    assert not torch.equal(said(randomised(student)), said(model))


def test_the_weights_below_the_adapters_are_the_teachers_own():
    model = teacher()
    student = distill.lora_student(model, 4)
    own, shared = bases(model.network), bases(student.network)
    assert own.keys() == shared.keys()
    assert all(own[key] is shared[key] for key in own)
    assert not any(value.requires_grad for value in own.values())


def test_every_wide_module_of_a_unet_has_an_adapter_of_the_rank():
    student = distill.lora_student(teacher(), 3)
    adapted = {name.split(".lora_A")[0] for name, _ in student.network.named_parameters() if ".lora_A" in name}
    wide = {
        name
        for name, module in teacher().network.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and name.endswith(distill.lora.TARGETS)
    }
    assert adapted == wide
    ends = {name.rsplit(".", 1)[-1] for name in adapted}
    assert {"to_q", "to_k", "to_v", "proj", "proj_in", "conv1", "conv2", "conv", "time_emb_proj"} <= ends
    ranks = {len(value) for name, value in student.network.named_parameters() if ".lora_A" in name}
    assert ranks == {3}


def test_the_adapters_are_drawn_by_their_seed_and_leave_the_generator_alone():
    def drawn(seed):
        student = distill.lora_student(teacher(), 2, seed=seed)
        return torch.cat([v.flatten() for k, v in student.network.named_parameters() if "lora_A" in k])

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = drawn(0), drawn(0), drawn(1)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_adapters_are_float32_on_weights_of_half_precision():
    """Steps of 1e-4 would be lost in bfloat16."""
    model = teacher()
    model = fs.Denoiser(model.network.to(torch.bfloat16), model.schedule, "eps")
    student = randomised(distill.lora_student(model, 2))
    kinds = {("lora_" in name, value.dtype) for name, value in student.network.named_parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    assert said(student).isfinite().all()
    assert student.dtype == torch.bfloat16


def test_adapters_merge_into_an_ordinary_network_that_says_the_same(tmp_path):
    model = teacher()
    student = randomised(distill.lora_student(model, 4, alpha=10.0))
    before = {key: value.clone() for key, value in bases(model.network).items()}
    whole = distill.merged(student)
    assert {name for name, _ in whole.network.named_parameters()} == before.keys()
    torch.testing.assert_close(said(whole), said(student), rtol=0, atol=1e-5)
    for key, value in bases(model.network).items():  # the teacher's weights are no copy, and stay
        assert torch.equal(value, before[key])
    fs.save_pretrained(whole, tmp_path)
    assert torch.equal(said(fs.from_pretrained(tmp_path)), said(whole))
    assert not hasattr(whole.network.network, "peft_config")
    assert torch.equal(said(distill.lora_student(whole, 2)), said(whole))


def test_merging_keeps_the_boundary_of_a_student():
    student = distill.bounded(randomised(distill.lora_student(teacher(), 2)), "lcm")
    assert distill.merged(student).boundary == student.boundary


def test_any_network_can_have_adapters(toy):
    model = toy("v")
    student = distill.lora_student(model, 2, targets=["layers.0", "layers.3"])
    x, node = random(5, 2, seed=1), fs.node(model.schedule, 300.0)
    with torch.no_grad():
        assert torch.equal(student.predict(x, node), model.predict(x, node))
        randomised(student)
        assert not torch.equal(student.predict(x, node), model.predict(x, node))
        torch.testing.assert_close(distill.merged(student).predict(x, node), student.predict(x, node))


def test_training_the_adapters_leaves_the_teacher_as_it_was(toy, loader):
    """The two share weights, but neither adapters, nor train mode with its dropout, nor what has a gradient."""
    model = toy("v", dropout=0.5)
    model.network.eval()
    x, node = random(5, 2, seed=1), fs.node(model.schedule, 300.0)
    with torch.no_grad():
        before = model.predict(x, node)
    student, said_by = distill.lora_student(model, 2, targets=["layers.0", "layers.3"]), []

    class Method(distill.ConsistencyDistillation):
        def after(self, step):
            assert self.student.network.training
            said_by.append(model.predict(x, node))
            super().after(step)

    trained = distill.train(Method(student, model), loader, steps=3, lr=1e-2, progress=False)
    assert all(torch.equal(said, before) for said in said_by)
    assert len(said_by) == 3
    assert not model.network.training
    assert not any(value.requires_grad for value in model.network.parameters())
    with torch.no_grad():
        assert torch.equal(model.predict(x, node), before)
        assert not torch.equal(trained.predict(x, node), before)


@pytest.mark.parametrize("alpha", [None, 10.0])
def test_a_saved_lora_is_the_student_in_a_pipeline_of_diffusers(tmp_path, alpha, monkeypatch):
    """Trained for three steps; then its images in StableDiffusionPipeline are those of fs.sample."""
    folder = stable_diffusion(tmp_path)
    pipe = quiet(diffusers.StableDiffusionPipeline.from_pretrained(folder))
    model = fs.from_diffusers(pipe.unet, pipe.scheduler)
    with torch.no_grad():
        told, empty = pipe.encode_prompt("a cat", "cpu", 1, True)
    guided = fs.Guided(model, uncond={"encoder_hidden_states": empty}, scale=7.5)
    student = distill.bounded(distill.lora_student(model, 4, alpha=alpha), "lcm")
    words = {"encoder_hidden_states": told.expand(8, -1, -1).clone()}
    batches = distill.Batches(2 * random(8, 4, 8, 8, seed=3), words, size=4, bounded=False)
    method = distill.LatentConsistency(student, guided)
    student = distill.train(method, batches, steps=3, lr=3e-2, ema=0.5)
    assert distill.save_lora(student, tmp_path / "lora") == tmp_path / "lora" / "pytorch_lora_weights.safetensors"

    pipe = quiet(diffusers.StableDiffusionPipeline.from_pretrained(folder))
    pipe.scheduler = distill.lcm_scheduler(student)
    noise = fs.noise((4, 8, 8), seeds=[7, 8])
    module = diffusers.schedulers.scheduling_lcm
    images = []
    for load in (False, True):
        if load:
            pipe.load_lora_weights(tmp_path / "lora")
        draws = iter(range(2, 20))
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: noise.draw(next(draws)))  # noqa: B023
        start = noise.draw(0) * fs.node(model.schedule, 999.0).sigma  # diffusers takes its noise as the first state
        asked = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent"}
        images.append(pipe(["a cat"] * 2, latents=start, **asked).images)
    plan = fs.trace(solvers.consistency, fs.grid(model.schedule, 4, distill.skipping()))
    condition = {"encoder_hidden_states": told.expand(2, -1, -1)}
    ours = fs.sample(student, plan, noise, condition=condition)
    torch.testing.assert_close(ours, images[1], rtol=0, atol=1e-4)  # their alphas are float32, and x0 divides by them
    assert (images[0] - images[1]).abs().max() > 1e-2
    plain = fs.sample(model, plan, noise, condition=condition)
    torch.testing.assert_close(plain, images[0], rtol=0, atol=1e-3)  # without a boundary: 7e-6 of the state


def test_the_file_names_what_it_belongs_to_and_holds_alpha_in_its_weights(tmp_path):
    student = randomised(distill.lora_student(teacher(), 4, alpha=10.0))
    tensors = load_file(distill.save_lora(student, tmp_path))
    assert all(key.startswith("unet.") and key.endswith((".lora_A.weight", ".lora_B.weight")) for key in tensors)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    layer = student.network.network.get_submodule(name)
    delta = tensors[f"unet.{name}.lora_B.weight"] @ tensors[f"unet.{name}.lora_A.weight"]
    torch.testing.assert_close(delta, layer.get_delta_weight("default"))
    (tmp_path / "plain").touch()
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "plain").stat().st_mode}


def test_a_lora_of_a_transformer_says_so(tmp_path):
    torch.manual_seed(0)
    network = diffusers.SD3Transformer2DModel(
        num_layers=1, attention_head_dim=4, num_attention_heads=2, patch_size=2, sample_size=8, in_channels=4,
        joint_attention_dim=8, caption_projection_dim=8, pooled_projection_dim=6, out_channels=4,
    )  # fmt: skip
    model = fs.from_diffusers(network.eval(), diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0))
    student = randomised(distill.lora_student(model, 2))
    path = distill.save_lora(student, tmp_path)
    assert all(key.startswith("transformer.") for key in load_file(path))
    condition = {**text(2), "pooled_projections": random(2, 6, seed=4)}
    x, node = random(2, 4, 8, 8, seed=3), fs.node(model.schedule, 0.5)
    with torch.no_grad():
        expected = student.output(x, node, **condition)
        assert not torch.equal(model.output(x, node, **condition), expected)
        network.load_lora_adapter(str(tmp_path), prefix="transformer", use_safetensors=True)
        torch.testing.assert_close(model.output(x, node, **condition), expected, rtol=0, atol=1e-5)


def trained(out, stop=None):
    model = teacher()
    student = distill.bounded(distill.lora_student(model, 2), "lcm")

    class Method(distill.LatentConsistency):
        def loss(self, role, batch, step):
            if step == stop:
                raise KeyboardInterrupt
            return super().loss(role, batch, step)

    guided = fs.Guided(model, uncond={"encoder_hidden_states": random(1, 5, 8, seed=9)}, scale=7.5)
    scales = distill.Scales(6.0, 16.0, None)  # as the script of LCM-LoRA: random, and not told
    method = Method(student, guided, scales=scales, target=0.9)
    batches = distill.Batches(2 * random(8, 4, 8, 8, seed=3), text(8), size=4, bounded=False)
    return distill.train(method, batches, steps=4, out=out, save_every=2, lr=1e-2, accumulate=2, ema=(0.9, 0.99))


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path):
    """With gradient accumulation, two averages of the student and one as its target."""
    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "parts", stop=3)
    again = trained(tmp_path / "parts")
    for (name, one), (_, other) in zip(whole.network.named_parameters(), again.network.named_parameters()):
        assert torch.equal(one, other), name
    states = [(tmp_path / name / "step-000004" / "state.safetensors").read_bytes() for name in ("whole", "parts")]
    assert states[0] == states[1]
    assert not torch.equal(said(whole), said(teacher()))


def test_a_checkpoint_holds_the_adapters_and_refuses_other_weights_below_them(tmp_path):
    def run(seed):
        model = teacher(seed)
        student = distill.bounded(distill.lora_student(model, 2), "lcm")
        batches = distill.Batches(2 * random(8, 4, 8, 8, seed=3), text(8), size=4, bounded=False)
        return distill.train(distill.LatentConsistency(student, model), batches, steps=2, out=tmp_path, lr=1e-3)

    run(0)
    kept = load_file(tmp_path / "step-000002" / "state.safetensors")
    assert kept
    assert all("lora_" in key for key in kept)
    with pytest.raises(ValueError, match=r"frozen\.student was"):
        run(1)


def test_modules_that_are_not_there_are_refused_with_those_that_are(toy):
    with pytest.raises(ValueError, match=r"Toy has none of the modules to_q; pass targets=\[\.\.\.\].*: 0, 3, 5 \("):
        distill.lora_student(toy(), 2, targets=["to_q"])


def test_what_cannot_have_or_lacks_adapters_is_refused(toy, tmp_path):
    with pytest.raises(TypeError, match=r"only a torch\.nn\.Module can have adapters, got function"):
        distill.lora_student(fs.Denoiser(lambda x, t: x, fs.VP.linear()), 2)
    with pytest.raises(ValueError, match=r"rank must be at least 1 and alpha positive, got rank = 0, alpha = None"):
        distill.lora_student(toy(), 0)
    with pytest.raises(ValueError, match=r"got rank = 4, alpha = -1"):
        distill.lora_student(toy(), 4, alpha=-1)
    with pytest.raises(ValueError, match=r"Toy has no adapters; make the student by distill\.lora_student"):
        distill.save_lora(toy(), tmp_path / "new")
    with pytest.raises(ValueError, match=r"Toy has no adapters to merge"):
        distill.merged(toy())
    student = distill.lora_student(toy(), 2, targets=["layers.0"])
    with pytest.raises(ValueError, match=r"has adapters already; merge them first"):
        distill.lora_student(student, 2)
    assert not (tmp_path / "new").exists()


def test_without_peft_the_line_that_installs_it_is_given(toy, monkeypatch):
    real = builtins.__import__

    def absent(name, *arguments, **options):
        if name == "peft":
            raise ImportError("No module named 'peft'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match=r"pip install 'fastsample\[lora\]'"):
        distill.lora_student(toy(), 2)
