"""Latent consistency: the formulas of LCM re-derived, its optimum, and students that diffusers loads and samples."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill, solvers

from .pipelines import BETAS, SIZE, diffusers, quiet, random, stable_diffusion, text, unet

pytest.importorskip("accelerate")
VP = fs.VP.scaled_linear()
ALPHAS = torch.cumprod(1 - torch.tensor(VP.betas, dtype=torch.float64), 0)  # alpha^2 at each index
UNCOND = {"encoder_hidden_states": random(1, 5, 8, seed=9)}


class Line(nn.Module):
    """A network whose answer differs for each number, time and condition; it notes what it is asked."""

    def __init__(self, seed):
        super().__init__()
        self.weight = nn.Parameter(random(4, seed=seed).double())
        self.asked = []

    def forward(self, x, t, c=0.0, w=None, more=None):
        self.asked.append({"x": x.detach(), "t": t, "w": w, "c": c, "more": more})
        a, b, d, e = self.weight
        rows = [-1, *[1] * (x.dim() - 1)]
        c = torch.as_tensor(c, dtype=x.dtype).reshape(rows)
        w = 0.0 if w is None else w.to(x).reshape(rows)
        return torch.tanh(a * x + b * t.to(x).reshape(rows) / 500 + d * c + e * w)


def line(seed, predicts="eps"):
    return fs.Denoiser(Line(seed), VP, predicts)


def guided(seed=1, scale=8.0, predicts="eps"):
    return fs.Guided(line(seed, predicts), uncond={"c": torch.tensor([-0.7], dtype=torch.float64)}, scale=scale)


def student(seed=2, predicts="eps", **options):
    return distill.bounded(line(seed, predicts), distill.LCMBoundary(**options))


def data(n=6):
    """Latents, which do not end at -1 and 1, and a condition."""
    return {"x0": 2 * random(n, 3, seed=4).double(), "c": random(n, seed=5).double()}


PLAIN = distill.Scales(6.0, 16.0, distill.Plain("w"))


def test_the_times_are_those_of_lcm():
    times = [node.t for node in distill.LatentConsistency(student(), guided()).grid.nodes]
    assert times == [*range(999, 0, -20), 0]


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_the_step_of_the_teacher_is_the_guided_ddim_step_of_diffusers(predicts):
    """Guidance of eps and of x0 at once is what both do to the network's output."""
    method = distill.LatentConsistency(student(predicts=predicts), guided(predicts=predicts), scales=PLAIN)
    names = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    scheduler = diffusers.DDIMScheduler(
        **BETAS, set_alpha_to_one=False, clip_sample=False, timestep_spacing="trailing",
        prediction_type=names[predicts],
    )  # fmt: skip
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = ALPHAS, ALPHAS[0]  # theirs are float32
    scheduler.set_timesteps(50)
    torch.manual_seed(0)
    batch = data(32)
    method.loss("student", batch, 0)
    after, before = method.student.network.asked  # the target is asked first
    network, uncond = method.teacher.model.network, torch.tensor([-0.7])
    for k in range(32):
        x, c, t = before["x"][k : k + 1], batch["c"][k : k + 1], before["t"][k : k + 1]
        cond, empty = network(x, t, c), network(x, t, uncond)
        output = empty + before["w"][k].double() * (cond - empty)  # w as the student was told it, float32
        expected = scheduler.step(output, int(t), x).prev_sample
        torch.testing.assert_close(after["x"][k : k + 1], expected, rtol=1e-6, atol=1e-6)
        assert after["t"][k] == max(int(t) - 20, 0)
    assert len(set(before["t"].tolist())) > 10
    assert 6 <= before["w"].min() < before["w"].max() < 16


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
def test_the_step_with_one_scale_is_that_of_diffusers_to_the_last_digits(predicts):
    method = distill.LatentConsistency(student(predicts=predicts), guided(predicts=predicts, scale=7.5))
    names = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}
    scheduler = diffusers.DDIMScheduler(**BETAS, set_alpha_to_one=False, clip_sample=False,
                                        timestep_spacing="trailing", prediction_type=names[predicts])  # fmt: skip
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = ALPHAS, ALPHAS[0]
    scheduler.set_timesteps(50)
    torch.manual_seed(0)
    batch = data(32)
    method.loss("student", batch, 0)
    after, before = method.student.network.asked
    network = method.teacher.model.network
    for k in range(32):
        x, c, t = before["x"][k : k + 1], batch["c"][k : k + 1], before["t"][k : k + 1]
        cond, empty = network(x, t, c), network(x, t, torch.tensor([-0.7], dtype=torch.float64))
        expected = scheduler.step(empty + 7.5 * (cond - empty), int(t), x).prev_sample
        torch.testing.assert_close(after["x"][k : k + 1], expected, rtol=1e-10, atol=1e-10)


def lcm_loss(method, batch, *, c=0.001):
    """The loss of LCM, eps networks, written index by index as its authors have it; w is scale - 1."""
    x0, text = batch["x0"], batch["c"]
    i = torch.randint(50, (len(x0),))
    start = 1000 - 20 * i - 1  # we count from the noise, they from the data
    eps = torch.randn(x0.shape, dtype=torch.float64)
    w = 5 + 10 * torch.rand(len(x0), dtype=torch.float64)
    end = (start - 20).clamp(min=0)
    networks = method.student.network, method.teacher.model.network
    losses = []
    for k in range(len(x0)):
        ask = {"t": start[k : k + 1], "c": text[k : k + 1], "w": (1 + w[k : k + 1]).float()}
        a, b = ALPHAS[start[k]].sqrt(), (1 - ALPHAS[start[k]]).sqrt()
        z = a * x0[k : k + 1] + b * eps[k : k + 1]
        cond = networks[1](z, ask["t"], ask["c"])
        empty = networks[1](z, ask["t"], torch.tensor([-0.7], dtype=torch.float64))
        noise = cond + w[k] * (cond - empty)
        clean = (z - b * cond) / a + w[k] * ((z - b * cond) / a - (z - b * empty) / a)
        prev = ALPHAS[end[k]].sqrt() * clean + (1 - ALPHAS[end[k]]).sqrt() * noise

        def f(x, t, ask=ask):
            out = networks[0](x, **{**ask, "t": t[None]})
            scaled = 10 * t.double()
            c_skip, c_out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25).sqrt()
            return c_skip * x + c_out * (x - (1 - ALPHAS[t]).sqrt() * out) / ALPHAS[t].sqrt()

        losses.append(((f(z, start[k]) - f(prev, end[k]).detach()) ** 2 + c**2).sqrt() - c)
    return torch.cat(losses).mean()


def test_the_loss_and_its_gradient_are_those_of_lcm():
    method = distill.LatentConsistency(student(), guided(), scales=PLAIN)
    weight = method.student.network.weight
    torch.manual_seed(3)
    loss = method.loss("student", data(40), 0)
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.manual_seed(3)
    expected = lcm_loss(method, data(40))
    (theirs,) = torch.autograd.grad(expected, weight)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(gradient, theirs, rtol=1e-7, atol=1e-9)
    assert method.teacher.model.network.weight.grad is None


def test_c_of_the_huber_distance_is_for_each_number_and_not_for_the_norm():
    a, b = random(3, 4, 5, seed=1), random(3, 4, 5, seed=2)
    a[2], b[2] = 1e-4, 0.0
    found = distill.Huber(0.001)(a, b)
    expected = [sum(math.hypot(d, 0.001) - 0.001 for d in row) / 20 for row in (a - b).flatten(1).tolist()]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-9)
    assert not torch.allclose(found, distill.PseudoHuber(0.001)(a, b), rtol=0.1)
    half = distill.Huber(1e-4)(a.half(), b.half())  # 1e-8 is 0 in float16
    assert half.dtype == torch.float32
    assert distill.Huber()(a, a).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="positive and finite, got 0"):
        distill.Huber(0)


STD, MEAN, EMPTY = 0.3, 0.5, -0.1  # data N(MEAN, STD^2); without the condition N(EMPTY, STD^2)


class Gaussian(nn.Module):
    """x0 of N(m, STD^2), m = MEAN with the condition and EMPTY without: guided by w it is exactly that of the mean
    EMPTY + w (MEAN - EMPTY), whose path ends at index 0 at a (x - alpha m) + alpha_0 m, a = root_0 / root.
    """

    def __init__(self, consistent=False, error=0.0):
        super().__init__()
        self.consistent, self.error = consistent, nn.Parameter(torch.tensor(error))

    def forward(self, x, t, c, w=None):
        x, rows = x.double(), [-1, 1]
        alpha, sigma = (f(t.double()).reshape(rows) for f in (VP.alpha, VP.sigma))
        root = (alpha**2 * STD**2 + sigma**2).sqrt()
        if not self.consistent:
            mean = torch.where(c > 0, MEAN, EMPTY).reshape(rows)
            return mean + alpha * STD**2 / root**2 * (x - alpha * mean)
        mean = EMPTY + w.double().reshape(rows) * (MEAN - EMPTY)
        first = fs.node(VP, 0.0)
        end = first.alpha * mean + math.hypot(first.alpha * STD, first.sigma) / root * (x - alpha * mean)
        skip, out = distill.LCMBoundary().factors(VP, fs.nodes(VP, t.double()))
        out, skip = (number.reshape(rows) for number in (out, skip))
        return torch.where(out > 0, (end + self.error * sigma - skip * x) / out, x)


def gaussian(error=0.0, times=50, **options):
    one = fs.Denoiser(Gaussian(), VP, "x0", dtype=torch.float64)
    other = fs.Denoiser(Gaussian(consistent=True, error=error), VP, "x0", dtype=torch.float64)
    teacher = fs.Guided(one, uncond={"c": torch.zeros(1)}, scale=1.0)
    scales = distill.Scales(1.0, 5.0, distill.Plain("w"))
    return distill.LatentConsistency(distill.bounded(other, "lcm"), teacher, scales=scales, times=times, **options)


def gaussian_loss(method):
    torch.manual_seed(1)
    x0 = MEAN + STD * torch.randn(40_000, 1, dtype=torch.float64)
    return method.loss("student", {"x0": x0, "c": torch.ones(40_000)}, 0)


def test_the_exact_function_of_every_scale_is_the_fixed_point():
    """What is left there are the errors of the teacher's steps, and the gradient points back to it from both sides."""
    losses = [gaussian_loss(gaussian(times=times)).item() for times in (10, 50, 250)]
    assert losses[0] > 4 * losses[1] > 16 * losses[2]  # of a step of first order, five times shorter: 25 at the best
    assert gaussian_loss(gaussian(solver=solvers.heun)).item() < 0.2 * losses[1]
    for error in (-0.5, -0.05, 0.05, 0.5):
        method = gaussian(error, solver=solvers.heun)
        loss = gaussian_loss(method)
        loss.backward()
        assert loss.item() > 1.1 * gaussian_loss(gaussian(solver=solvers.heun)).item()
        assert math.copysign(1, method.student.network.error.grad) == math.copysign(1, error)


def test_a_student_that_is_not_told_the_scale_cannot_be_right():
    method = gaussian()
    wrong = dataclasses.replace(method, scales=distill.Scales(1.0, 5.0, lambda scale: {"w": 0 * scale + 3}))
    assert gaussian_loss(wrong).item() > 2 * gaussian_loss(method).item()


def test_the_last_target_is_the_step_of_the_teacher_itself():
    """At index 0 c_out is 0: the network is not heard, whatever it says."""
    method = distill.LatentConsistency(student(), guided(), times=1, distance="l2")
    torch.manual_seed(0)
    loss = method.loss("student", data(), 0).item()
    after, before = method.student.network.asked
    s = fs.nodes(VP, torch.full((6,), 999.0))
    with torch.no_grad():
        f = method.student.predict(before["x"], s, c=data()["c"])
    assert loss == pytest.approx(float((f - after["x"]).square().mean()), rel=1e-12)
    assert torch.equal(method.student.predict(after["x"], fs.nodes(VP, torch.zeros(6)), c=data()["c"]), after["x"])


def test_one_uncond_serves_all_samples_and_so_does_one_for_each():
    one = distill.LatentConsistency(student(), guided())
    each = guided()
    each = dataclasses.replace(each, uncond={"c": torch.full((6,), -0.7, dtype=torch.float64)})
    losses = []
    for method in (one, distill.LatentConsistency(student(), each), distill.LatentConsistency(student(), line(1))):
        torch.manual_seed(0)
        losses.append(method.loss("student", data(), 0).item())
    assert losses[0] == losses[1] != losses[2]


def test_guidance_may_be_wrapped():
    clipped = fs.Thresholded(guided(), limit=1.0)
    method = distill.LatentConsistency(student(), clipped, scales=PLAIN)
    assert method.loss("student", data(), 0).isfinite()
    assert [model.network for model in method.frozen] == [clipped.model.model.network]


def test_names_with_a_dot_become_dictionaries_of_which_uncond_replaces_its_own_part():
    batch = {**data(), "more.text": random(6, 2, seed=6), "more.size": random(6, 2, seed=7)}
    teacher = guided()
    empty = {**teacher.uncond, "more": {"text": torch.zeros(1, 2)}}
    method = distill.LatentConsistency(student(), dataclasses.replace(teacher, uncond=empty))
    method.loss("student", batch, 0)
    told = method.student.network.asked[0]["more"]
    assert torch.equal(told["text"], batch["more.text"])
    (both,) = method.teacher.model.network.asked  # cond and uncond in one batch
    assert torch.equal(both["more"]["size"], torch.cat([batch["more.size"]] * 2))
    assert torch.equal(both["more"]["text"], torch.cat([batch["more.text"], torch.zeros(6, 2)]))


def test_no_gradient_reaches_target_or_teacher_and_each_is_asked_once():
    method = distill.LatentConsistency(student(), guided(), target=0.95)
    method.loss("student", data(), 0).backward()
    assert method.kept["target"].weight.grad is None
    assert method.teacher.model.network.weight.grad is None
    assert len(method.student.network.asked) == len(method.kept["target"].asked) == 1


def test_the_moving_average_follows_the_student():
    method = distill.LatentConsistency(student(), guided(), target=0.95)
    average, now = method.kept["target"].weight, method.student.network.weight
    assert torch.equal(average, now)
    with torch.no_grad():
        before = now.clone()
        now += 1.0
    method.after(0)
    torch.testing.assert_close(average.detach(), before + 0.05, rtol=0, atol=1e-12)


def test_latents_need_not_lie_in_the_range_of_images():
    batches = distill.Batches(data(64)["x0"].float(), {"c": data(64)["c"]}, size=16, bounded=False)
    method = distill.LatentConsistency(student(), guided(), scales=PLAIN)
    before = method.student.network.weight.clone()
    trained = distill.train(method, batches, steps=3, lr=1e-2)
    assert isinstance(trained, distill.Bounded)
    assert not torch.equal(trained.network.weight, before)


def run(out, steps, **options):
    batches = distill.Batches(data(64)["x0"].float(), {"c": data(64)["c"]}, size=16, bounded=False)
    method = distill.LatentConsistency(
        student(**options), guided(), scales=PLAIN, target=0.9, distance=distill.Huber(0.01)
    )
    if steps < 8:  # the run is stopped there
        method = Stopped(method.student, method.teacher, scales=PLAIN, target=0.9, distance=distill.Huber(0.01))
    done = distill.train(method, batches, steps=8, out=out, lr=1e-2, save_every=4, accumulate=2, ema=(0.9, 0.99))
    return done, method


class Stop(Exception):
    pass


class Stopped(distill.LatentConsistency):
    def loss(self, role, batch, step):
        if step == 6:
            raise Stop
        return super().loss(role, batch, step)


Stopped.__name__ = "LatentConsistency"


def test_a_run_that_was_stopped_ends_with_the_same_bits(tmp_path):
    whole, method = run(tmp_path / "whole", 8)
    with pytest.raises(Stop):
        run(tmp_path / "parts", 6)
    again, resumed = run(tmp_path / "parts", 8)
    assert torch.equal(whole.network.weight, again.network.weight)
    assert torch.equal(method.kept["target"].weight, resumed.kept["target"].weight)
    states = [(tmp_path / name / "step-000008" / "state.safetensors").read_bytes() for name in ("whole", "parts")]
    assert states[0] == states[1]


def test_another_scaling_of_the_boundary_is_another_model_and_refused(tmp_path):
    run(tmp_path, 8)
    manifest = json.loads((tmp_path / "step-000008" / "manifest.json").read_text())
    settings = manifest["configuration"]["method"]
    assert settings["boundary"] == {"name": "lcm", "sigma_data": 0.5, "timestep_scaling": 10.0}
    assert settings["scales"] == "6 to 16, as w"
    assert "0.01" in str(settings["distance"])
    with pytest.raises(ValueError, match=r"timestep_scaling was 10\.0, now 1\.0"):
        run(tmp_path, 8, timestep_scaling=1.0)


@pytest.mark.parametrize("times", [50, 25])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_students_are_sampled_at_the_times_of_diffusers(times, steps):
    """One step begins at the noise, 999."""
    scheduler = distill.lcm_scheduler(student(), times)
    scheduler.set_timesteps(steps)
    found = [node.t for node in fs.grid(VP, steps, distill.skipping(times)).nodes]
    assert found == [*scheduler.timesteps.tolist(), -1]
    assert found[0] == 999
    trained = [node.t for node in distill.LatentConsistency(student(), guided(), times=times).grid.nodes]
    assert set(found[:-1]) <= set(trained)


@pytest.mark.parametrize("predicts", ["eps", "v", "x0"])
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("scaling", [10.0, 0.01])
def test_our_plan_and_the_scheduler_of_diffusers_take_the_same_steps(steps, predicts, scaling, monkeypatch):
    """From the same noises, with the boundary that was trained with; 0.01 is one that would be noticed if left out."""
    model = student(predicts=predicts, timestep_scaling=scaling)
    noise = fs.noise((3,), seeds=range(4), dtype=torch.float64)
    plan = fs.trace(solvers.consistency, fs.grid(VP, steps, distill.skipping()))
    ours = fs.sample(model, plan, noise, condition={"c": data(4)["c"]})
    scheduler = distill.lcm_scheduler(model)
    scheduler.set_timesteps(steps)
    draws = iter(range(2, 20))
    module = diffusers.schedulers.scheduling_lcm
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: noise.draw(next(draws)))
    x = noise.draw(0) * VP.sigma(999.0)  # a pipeline of diffusers begins with sigma = 1, 0.3% more
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = model.network(x, torch.full((4,), float(t), dtype=torch.float64), data(4)["c"])
            x = scheduler.step(output, t, x).prev_sample
    torch.testing.assert_close(ours, x.double(), rtol=1e-5, atol=1e-5)  # their table of alphas is float32
    if scaling < 1:
        plain = fs.sample(fs.Denoiser(model.network, VP, predicts), plan, noise, condition={"c": data(4)["c"]})
        assert (plain - ours).abs().max() > 1e-3


def test_a_student_that_is_told_the_scale_runs_in_the_pipeline_of_diffusers(tmp_path, monkeypatch):
    """Trained, saved, loaded by LatentConsistencyModelPipeline: its images are those of fs.sample."""
    folder = stable_diffusion(tmp_path)
    pipe = quiet(diffusers.StableDiffusionPipeline.from_pretrained(folder))
    teacher = fs.from_diffusers(pipe.unet, pipe.scheduler)
    with torch.no_grad():
        told = pipe.encode_prompt("a cat", "cpu", 1, True)
    guide = fs.Guided(teacher, uncond={"encoder_hidden_states": told[1]}, scale=1.0)
    scales = distill.Scales(6.0, 16.0, distill.Embedded(SIZE))
    model = distill.bounded(distill.scaled_student(teacher, SIZE), "lcm")
    words = told[0].expand(8, -1, -1).clone()
    batches = distill.Batches(2 * random(8, 4, 8, 8, seed=3), {"encoder_hidden_states": words}, size=4, bounded=False)
    model = distill.train(distill.LatentConsistency(model, guide, scales=scales), batches, steps=3, lr=1e-3)

    fs.save_pretrained(model, tmp_path / "student")
    network = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "student")
    parts = {**pipe.components, "unet": network, "scheduler": distill.lcm_scheduler(model)}
    parts.pop("image_encoder")
    lcm = diffusers.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)
    lcm.save_pretrained(tmp_path / "lcm")
    lcm = quiet(diffusers.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "lcm"))
    assert lcm.scheduler.config.timestep_scaling == 10.0

    noise = fs.noise((4, 8, 8), seeds=[7, 8])
    draws = iter(range(2, 20))
    module = diffusers.schedulers.scheduling_lcm
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **options: noise.draw(next(draws)))
    images = []
    for scale in (8.5, 12.0):
        draws = iter(range(2, 20))
        start = noise.draw(0)
        theirs = lcm(
            ["a cat", "a cat"], num_inference_steps=4, guidance_scale=scale, latents=start, output_type="latent"
        ).images
        condition = {"encoder_hidden_states": told[0].expand(2, -1, -1), **scales.told(scale, 2)}
        plan = fs.trace(solvers.consistency, fs.grid(model.schedule, 4, distill.skipping()))
        shifted = Started(noise.sample_shape, noise.seeds, noise.device, noise.dtype)
        ours = fs.sample(model, plan, shifted, condition=condition)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)  # float32 alphas; x0 divides by alpha, 15 fold
        images.append(ours)
    assert not torch.allclose(*images, atol=1e-3)


class Started(fs.Noise):
    """The first noise is divided by sigma: diffusers starts at the noise itself."""

    def draw(self, k):
        return super().draw(k) / (fs.node(VP, 999.0).sigma if k == 0 else 1)


def test_a_student_without_a_boundary_is_refused():
    with pytest.raises(TypeError, match=r"needs a boundary.*Denoiser without; pass distill\.bounded\(student, 'lcm'\)"):
        distill.LatentConsistency(line(2), guided())


def test_times_that_reach_the_boundary_are_refused():
    with pytest.raises(ValueError, match=r"the last of 1000 times of spacing trailing is t = 0, .* take fewer times"):
        distill.LatentConsistency(student(), guided(), times=1000)


def test_random_scales_need_guidance():
    with pytest.raises(TypeError, match=r"random scales need a teacher with guidance"):
        distill.LatentConsistency(student(), line(1), scales=PLAIN)


def test_a_schedule_without_indices_has_no_boundary_of_lcm():
    with pytest.raises(ValueError, match="EDM has no time index"):
        distill.bounded(fs.Denoiser(Line(1), fs.EDM(), "x0"), "lcm")


def test_pairs_and_starts_that_do_not_fit_are_refused():
    teacher = guided()
    with pytest.raises(ValueError, match="one network; make a copy"):
        distill.LatentConsistency(distill.bounded(teacher.model, "lcm"), teacher)
    zero = VP.zero_terminal_snr()
    eps = fs.Guided(fs.Denoiser(Line(1), zero), uncond={"c": torch.zeros(1)}, scale=2.0)
    with pytest.raises(ValueError, match="the teacher predicts eps, which says nothing of x0 at alpha = 0"):
        distill.LatentConsistency(distill.bounded(fs.Denoiser(Line(2), zero, "v"), "lcm"), eps)


def test_what_the_scheduler_of_diffusers_cannot_hold_is_refused():
    with pytest.raises(ValueError, match=r"for a VP schedule and networks that predict eps, x0, v, got flow"):
        distill.lcm_scheduler(student(predicts="flow"))
    with pytest.raises(ValueError, match=r"sigma_data = 0\.5, this student LCMBoundary\(sigma_data=0\.25"):
        distill.lcm_scheduler(student(sigma_data=0.25))


def test_flow_networks_are_trained_on_their_own_schedule():
    schedule = fs.Flow(shift=3.0)
    model = distill.bounded(fs.Denoiser(Line(2), schedule, "flow"), "lcm")
    teacher = fs.Guided(fs.Denoiser(Line(1), schedule, "flow"), uncond={"c": torch.zeros(1)}, scale=3.0)
    method = distill.LatentConsistency(model, teacher, times=8, spacing=fs.uniform_t)
    assert [method.grid.nodes[0].t, method.grid.nodes[-1].sigma] == [1.0, 0.0]
    loss = method.loss("student", data(), 0)
    loss.backward()
    assert loss.isfinite()
    assert method.student.network.weight.grad.isfinite().all()


def test_the_text_of_a_tiny_unet_reaches_student_and_teacher():
    teacher = fs.from_diffusers(unet(), diffusers.DDPMScheduler(**BETAS))
    model = distill.bounded(distill.student_of(teacher), "lcm")
    method = distill.LatentConsistency(model, fs.Guided(teacher, uncond=UNCOND, scale=7.5))
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        losses.append(method.loss("student", {"x0": random(2, 4, 8, 8, seed=3), **text(2, seed)}, 0).item())
    assert losses[0] == losses[1] != losses[2]
