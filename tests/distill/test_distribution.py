"""Distribution matching: exact on Gaussians; alternating with its critic; and better than its teacher in one step."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill, solvers
from fastsample.distill import draws
from fastsample.distill.discriminator import critic_loss
from fastsample.distill.distribution import between
from fastsample.zoo.exact import GaussianMixture

pytest.importorskip("accelerate")
MEAN, STD = 0.2, 0.3  # of the teacher's data
SCHEDULES = [fs.VP.scaled_linear(), fs.VPContinuous(), fs.EDM(), fs.Flow()]


class Exact(nn.Module):
    """The denoiser of N(mean, std^2), as any prediction."""

    def __init__(self, schedule, predicts, mean, std):
        super().__init__()
        self.schedule, self.predicts = schedule, fs.prediction(predicts)
        self.mean, self.std = (nn.Parameter(torch.tensor(float(number), dtype=torch.float64)) for number in (mean, std))

    def forward(self, x, t):
        alpha, sigma = (f(t.double())[:, None] for f in (self.schedule.alpha, self.schedule.sigma))
        gain = alpha * self.std**2 / ((alpha * self.std) ** 2 + sigma**2)
        x0 = self.mean + gain * (x.double() - alpha * self.mean)
        p, q = self.predicts.output(alpha, sigma)
        return (p * x + q * x0).to(x.dtype)


class Affine(nn.Module):
    """A generator: mean + std z of the noise z that it starts from."""

    def __init__(self, schedule, mean, std):
        super().__init__()
        self.sigma = float(schedule.sigma(schedule.t_max))
        self.mean, self.std = (nn.Parameter(torch.tensor(float(number), dtype=torch.float64)) for number in (mean, std))

    def forward(self, x, t):
        return (self.mean + self.std * x.double() / self.sigma).to(x.dtype)


def exact(schedule, predicts="v", mean=MEAN, std=STD):
    return fs.Denoiser(Exact(schedule, predicts, mean, std), schedule, predicts, time="t", dtype=torch.float64)


def affine(schedule, mean, std):
    return fs.Denoiser(Affine(schedule, mean, std), schedule, "x0", time="t", dtype=torch.float64)


def gaussian(schedule, mean, std, predicts="v", **options):
    """The method with a student that makes N(mean, std^2), and the critic that knows it."""
    student = affine(schedule, mean, std)
    return distill.DistributionMatching(
        student, exact(schedule, predicts), exact(schedule, predicts, mean, std), **options
    )


def unit_noise(n):
    """What the expectation over a unit normal is a sum over, exact for polynomials of degree 2 n - 1."""
    z, weight = np.polynomial.hermite_e.hermegauss(n)
    return torch.tensor(z), torch.tensor(weight / math.sqrt(2 * math.pi))


def divergence(mean, std, alpha, sigma):
    """KL between the two Gaussians, student's and teacher's, noised."""
    mine, other = ((alpha * s) ** 2 + sigma**2 for s in (std, STD))
    return 0.5 * (mine / other + alpha**2 * (mean - MEAN) ** 2 / other - 1 - torch.log(mine / other))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow"])
def test_the_step_is_the_gradient_of_the_divergence_between_gaussians(schedule, predicts):
    """At each noise level, for mean and width of the student, against its closed form; the expectation is exact, since
    all is linear in the two noises."""
    found = gaussian(schedule, 0.5, 0.7, predicts, weight=lambda at: (at.alpha / at.sigma) ** 2, normalise=False)
    z, weight = unit_noise(3)
    for share in (0.05, 0.4, 0.95):
        t = between(schedule, torch.tensor([share], dtype=torch.float64))
        at = fs.nodes(schedule, t.expand(9))
        first, second = z.repeat_interleave(3)[:, None], z.repeat(3)[:, None]
        x0 = 0.5 + 0.7 * first
        x = at.alpha[:, None] * x0 + at.sigma[:, None] * second
        with torch.no_grad():
            step = found.step(x0, found.teacher.predict(x, at), found.critic.predict(x, at), at)
        probability = (weight[:, None] * weight).flatten()[:, None]
        mean, std = (torch.tensor(number, dtype=torch.float64, requires_grad=True) for number in (0.5, 0.7))
        divergence(mean, std, at.alpha[0], at.sigma[0]).backward()
        # float64, but x0 of an eps network is a small difference where the noise is strong
        scale = float(at.sigma[0] / at.alpha[0]) ** 2 * 1e-15 + 1e-12
        torch.testing.assert_close((probability * step).sum(), mean.grad, rtol=1e-9, atol=scale)
        torch.testing.assert_close((probability * step * first).sum(), std.grad, rtol=1e-9, atol=scale)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("weight", [distill.alike, distill.by_alpha])
def test_the_gradient_is_zero_at_the_teachers_distribution_and_points_back_to_it(schedule, weight):
    def gradient(mean, std):
        method = gaussian(schedule, mean, std, weight=weight)
        torch.manual_seed(0)
        loss = method.loss("student", {"x0": torch.zeros(4096, 1, dtype=torch.float64)}, 0)
        loss.backward()
        network = method.student.network
        return loss.item(), network.mean.grad.item(), network.std.grad.item()

    assert all(abs(number) < 1e-10 for number in gradient(MEAN, STD))  # float64: the two x0 are equal but for rounding
    assert gradient(MEAN - 0.1, STD)[1] < -1e-2
    assert gradient(MEAN + 0.1, STD)[1] > 1e-2
    assert gradient(MEAN, STD - 0.1)[2] < -1e-2
    assert gradient(MEAN, STD + 0.1)[2] > 1e-2


def test_the_loss_has_the_step_as_its_gradient_and_half_its_square_as_value():
    """As written in the paper: alpha (x0_fake - x0_real) / mean |x0 - x0_real|, for two numbers a sample."""
    schedule = fs.VP.scaled_linear()
    method = gaussian(schedule, 0.5, 0.7, weight=distill.by_alpha)
    x0 = torch.randn(5, 2, dtype=torch.float64)
    at = fs.nodes(schedule, torch.tensor([20.0, 200.0, 500.0, 800.0, 980.0]))
    real, fake = torch.randn(2, 5, 2, dtype=torch.float64)
    expected = at.alpha[:, None] * (fake - real) / ((x0 - real).abs().sum(1, keepdim=True) / 2)
    torch.testing.assert_close(method.step(x0, real, fake, at), expected)

    torch.manual_seed(3)
    leaf = x0.clone().requires_grad_()
    loss = method._student_loss(leaf, {})
    loss.backward()
    torch.manual_seed(3)
    at = fs.nodes(schedule, between(schedule, 0.02 + 0.96 * torch.rand(5, dtype=torch.float64)))
    x = at.alpha[:, None] * x0 + at.sigma[:, None] * torch.randn_like(x0)
    with torch.no_grad():
        step = method.step(x0, method.teacher.predict(x, at), method.critic.predict(x, at), at)
    torch.testing.assert_close(leaf.grad, step / step.numel())
    torch.testing.assert_close(loss.detach(), 0.5 * step.square().mean())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow"])
def test_the_best_critic_is_the_denoiser_of_what_the_student_makes(schedule, predicts):
    def gradient(mean, std):
        student, critic = affine(schedule, 0.5, 0.7), exact(schedule, predicts, mean, std)
        method = distill.DistributionMatching(student, exact(schedule), critic)
        torch.manual_seed(0)
        method.loss("critic", {"x0": torch.zeros(50_000, 1, dtype=torch.float64)}, 0).backward()
        assert student.network.mean.grad is None
        return critic.network.mean.grad.item(), critic.network.std.grad.item()

    best = gradient(0.5, 0.7)
    for k, (low, high) in enumerate(
        [(gradient(0.3, 0.7), gradient(0.7, 0.7)), (gradient(0.5, 0.5), gradient(0.5, 0.9))]
    ):
        assert low[k] < 0 < high[k]
        assert abs(best[k]) < 0.2 * min(-low[k], high[k])  # noise of 50 thousand samples


def test_student_and_critic_together_find_the_teachers_gaussian():
    """From another one, by their losses alone: the critic follows the student, the student the two."""
    method = gaussian(fs.VPContinuous(), -0.5, 0.6, ratio=2)
    optimizers = {name: torch.optim.Adam(model.network.parameters(), lr=2e-2) for name, model in method.roles.items()}
    batch = {"x0": torch.zeros(128, 1, dtype=torch.float64)}
    torch.manual_seed(0)
    for step in range(800):
        for role in method.turns(step):
            optimizers[role].zero_grad()
            method.loss(role, batch, step).backward()
            optimizers[role].step()
    network = method.student.network
    assert network.mean.item() == pytest.approx(MEAN, abs=0.05)  # Adam does not rest: steps of up to lr
    assert network.std.item() == pytest.approx(STD, abs=0.05)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
@pytest.mark.parametrize("steps", [1, 4])
def test_backward_simulation_is_the_students_own_sampling(schedule, steps):
    """Against a loop over single nodes, which noises x0 again; the sampler's plan walks the same way."""
    student, spacing = exact(schedule, "v", -0.1, 0.5), fs.karras if isinstance(schedule, fs.EDM) else fs.uniform_t
    method = distill.DistributionMatching(
        student, exact(schedule), exact(schedule, "v", 0.0, 1.0), steps=steps, spacing=spacing
    )
    like = torch.zeros(64, 3, dtype=torch.float64)
    torch.manual_seed(5)
    x, at = method.inputs(like)
    assert not x.requires_grad
    assert student.count.calls == steps - 1

    torch.manual_seed(5)
    chosen = torch.randint(steps, (64,))
    nodes = fs.grid(schedule, steps, spacing).nodes
    state, states = nodes[0].sigma * torch.randn_like(like), []
    for k in range(steps):
        states.append(state)
        if k + 1 < steps:
            with torch.no_grad():
                x0 = student.predict(state, nodes[k])
            state = nodes[k + 1].alpha * x0 + nodes[k + 1].sigma * torch.randn_like(like)
    for row, k in enumerate(chosen.tolist()):
        assert torch.equal(x[row], states[k][row])
        assert at.t[row] == nodes[k].t
    assert set(chosen.tolist()) == set(range(steps))

    noise = fs.noise((3,), seeds=range(8), dtype=torch.float64)
    plan = fs.trace(solvers.consistency, method.grid)
    _, path = fs.sample(student, plan, noise, trajectory=True)
    state = nodes[0].sigma * noise.draw(0)
    for k, (s, t) in enumerate(method.grid.steps()):
        torch.testing.assert_close(path[k], state)
        with torch.no_grad():
            state = t.alpha * student.predict(state, s) + t.sigma * noise.draw(k + 2)  # 1 is the one before the first
    torch.testing.assert_close(path[-1], state)


def test_no_gradient_flows_through_earlier_steps():
    """The last evaluation alone: the gradient is that of the sample at its input held constant."""
    schedule = fs.VP.scaled_linear()
    student = exact(schedule, "v", 0.6, 0.5)
    method = distill.DistributionMatching(student, exact(schedule), exact(schedule, "v", 0.6, 0.5), steps=4)
    like = {"x0": torch.zeros(32, 1, dtype=torch.float64)}
    torch.manual_seed(0)
    method.loss("student", like, 0).backward()
    found = student.network.mean.grad.clone()
    student.network.mean.grad = None
    torch.manual_seed(0)
    x, at = method.inputs(like["x0"])
    method._student_loss(student.predict(x.detach(), at), {}).backward()
    torch.testing.assert_close(found, student.network.mean.grad)
    assert found.abs() > 1e-3


def test_the_critic_comes_at_every_step_and_the_student_after_each_ratio(toy):
    method = distill.DistributionMatching(toy(seed=1), toy(seed=2), toy(seed=3), ratio=3)
    assert [method.turns(step) for step in range(7)] == [
        ("critic",), ("critic",), ("critic", "student"), ("critic",), ("critic",), ("critic", "student"), ("critic",),
    ]  # fmt: skip
    assert list(method.roles) == ["student", "critic"]
    assert json.loads(json.dumps(method.settings()))["ratio"] == 3


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_run_stopped_between_turns_of_the_student_goes_on_bit_for_bit(toy, loader, tmp_path, stop):
    """Of both models and of the head, which is nobody's network; with two steps of the student and dropout."""

    def run(out, steps=9):
        torch.manual_seed(0)
        method = distill.DistributionMatching(
            toy(seed=1, dropout=0.1), toy(seed=2), toy(seed=3, dropout=0.1), steps=2, ratio=4, head=head(), gan=0.1
        )
        distill.train(method, loader, steps=steps, out=out, save_every=1, keep=99)
        return (out / f"step-{steps:06d}" / "state.safetensors").read_bytes()

    whole = run(tmp_path / "whole")
    stopped = tmp_path / "stopped"
    shutil.copytree(tmp_path / "whole" / f"step-{stop:06d}", stopped / f"step-{stop:06d}")
    assert run(stopped) == whole
    assert b"helper" in whole


def head():
    """On the toy's second hidden layer, 64 numbers a sample."""
    return distill.Discriminator(64, at=lambda network: network.layers[4], width=16)


def test_the_head_learns_with_the_critic_and_the_student_learns_through_it(toy, loader):
    student, critic = toy(seed=1), toy(seed=3)
    method = distill.DistributionMatching(
        student, toy(seed=2), critic, head=head(), weight=lambda at: 0 * at.alpha, gan=1.0
    )
    assert list(method.helpers) == ["critic"]
    batch = next(iter(loader))
    method.loss("critic", batch, 0).backward()
    assert all(p.grad.abs().sum() > 0 for p in method.head.parameters())
    assert critic.network.layers[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in student.network.parameters())

    frozen = [*critic.network.parameters(), *method.head.parameters()]  # as the trainer does
    for p in frozen:
        p.grad = None
        p.requires_grad_(False)
    method.loss("student", batch, 0).backward()
    assert student.network.layers[0].weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in frozen)


def test_without_weight_or_head_the_student_learns_nothing(toy, loader):
    """So what it learned above came through the head."""
    student = toy(seed=1)
    method = distill.DistributionMatching(student, toy(seed=2), toy(seed=3), weight=lambda at: 0 * at.alpha)
    method.loss("student", next(iter(loader)), 0).backward()
    assert all(p.grad is None or not p.grad.any() for p in student.network.parameters())


def test_the_loss_of_the_critic_with_a_head_is_the_sum_of_both(toy, loader):
    """The images and the samples share one evaluation; each part as if it were alone."""
    batch = next(iter(loader))
    models = toy(seed=1), toy(seed=2), toy(seed=3)
    shared = head()
    alone = distill.DistributionMatching(*models)
    both = [distill.DistributionMatching(*models, head=shared, critic_gan=weight) for weight in (0.0, 0.5)]

    def value(method):
        torch.manual_seed(0)
        return method.loss("critic", batch, 0)

    torch.testing.assert_close(value(both[0]), value(alone))
    heard = []
    hook = shared.register_forward_hook(lambda module, args, logits: heard.append(logits))
    difference = value(both[1]) - value(both[0])
    hook.remove()
    fakes, reals = heard[0].chunk(2)
    torch.testing.assert_close(difference, 0.5 * critic_loss(reals, fakes))
    assert models[2].count.rows == 64 + 2 * 3 * 64


def test_a_training_step_changes_student_critic_and_head(toy, loader, weights):
    student, critic, teacher = toy(seed=1), toy(seed=3), toy(seed=2)
    method = distill.DistributionMatching(student, teacher, critic, ratio=1, head=head())
    before = [weights(model) for model in (student, critic, teacher)]
    layers = [p.detach().clone() for p in method.head.parameters()]
    assert distill.train(method, loader, steps=2, lr=1e-3) is student
    for model, old in zip((student, critic), before):
        changed = [not torch.equal(value, old[key]) for key, value in weights(model).items()]
        assert all(changed)
    assert all(torch.equal(value, before[2][key]) for key, value in weights(teacher).items())
    assert all(not torch.equal(value, old) for value, old in zip(method.head.parameters(), layers))


def test_a_guided_teacher_and_dropped_labels_reach_all_three(toy, loader):
    told = []

    class Told(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x, t, class_labels):
            told.append(class_labels)
            return self.inner(x, t, class_labels)

    student, base, critic = (fs.Denoiser(Told(toy(seed=k).network), fs.VP.scaled_linear(), "v") for k in (1, 2, 3))
    teacher = fs.Guided(base, uncond={"class_labels": 2}, scale=3.0)
    method = distill.DistributionMatching(student, teacher, critic, drop=0.5, null={"class_labels": 2})
    method.loss("student", next(iter(loader)), 0).backward()
    own, fake, real = told
    assert torch.equal(own, fake)
    assert torch.equal(real, torch.cat([own, torch.full_like(own, 2)]))
    assert 8 < int((own == 2).sum()) < 56


@pytest.mark.parametrize("role", ["student", "critic"])
def test_the_loss_of_a_batch_is_the_mean_of_those_of_its_parts(toy, loader, role):
    """Whoever has which samples: what is drawn for one does not depend on it."""
    models = [fs.Denoiser(toy(seed=k).network.double(), fs.VP.scaled_linear(), "v") for k in (1, 2, 3)]
    method = distill.DistributionMatching(*models, steps=3, head=head(), gan=1.0, critic_gan=1.0)
    batch = {key: value.double() if key == "x0" else value for key, value in next(iter(loader)).items()}

    def loss(first, count):
        generator = torch.Generator().manual_seed(4)
        rows = {key: value[first : first + count] for key, value in batch.items()}
        with draws.part(generator, first=first, count=count, total=64):
            return method.loss(role, rows, 0)

    parts = (16 * loss(0, 16) + 48 * loss(16, 48)) / 64
    torch.testing.assert_close(parts, loss(0, 64), rtol=1e-5, atol=0)  # logits are float32


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_times_lie_between_the_ends_and_are_evenly_spread(schedule):
    share = torch.linspace(0, 1, 101, dtype=torch.float64)
    t = between(schedule, share)
    assert (t.diff() > 0).all()
    torch.testing.assert_close(t[[0, -1]], torch.tensor([schedule.t_min, schedule.t_max], dtype=torch.float64))
    if isinstance(schedule, fs.EDM):  # the spacing of their own sampler
        karras = fs.grid(schedule, 100, fs.karras, end=schedule.t_min)
        torch.testing.assert_close(t.flip(0), torch.tensor([n.t for n in karras.nodes], dtype=torch.float64))
    elif not isinstance(schedule, fs.VP):
        torch.testing.assert_close(t.diff(), t.diff()[:1].expand(100))
    else:
        assert torch.equal(t, t.round())


def test_models_that_do_not_fit_are_refused(toy):
    student, teacher, critic = toy(seed=1), toy(seed=2), toy(seed=3)
    other = fs.Denoiser(toy(seed=4).network, fs.VP.linear(), "v")
    wrong = [
        ((teacher, teacher, critic), {}, "student and teacher are one network"),
        ((student, teacher, student), {}, r"critic and student are one network; make a copy: student_of\(teacher\)"),
        ((student, teacher, teacher), {}, "critic and teacher are one network"),
        ((student, teacher, other), {}, r"the critic's schedule VP\(1000 betas, 0.0001 .. 0.02\) is not the teacher's"),
        ((student, teacher, critic), {"ratio": 0}, "ratio must be at least 1 .*, got 0"),
        ((student, teacher, critic), {"low": 0.5, "high": 0.5}, "need 0 <= low < high <= 1, got low = 0.5, high = 0.5"),
        ((student, teacher, critic), {"gan": -1.0}, r"not negative, got -1\.0 and 0\.01"),
        ((student, teacher, critic), {"steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ((student, teacher, critic), {"head": distill.Discriminator(64)}, "Toy has no mid_block"),
        ((student, teacher, critic), {"drop": 0.5}, "needs the values that mean no condition"),
    ]
    for models, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            distill.DistributionMatching(*models, **options)


def test_an_eps_student_where_alpha_is_zero_is_refused_and_an_eps_teacher_is_not(toy):
    schedule = fs.VP.scaled_linear().zero_terminal_snr()
    eps, v, w = (fs.Denoiser(toy(seed=k).network, schedule, name) for k, name in enumerate(["eps", "v", "v"]))
    with pytest.raises(ValueError, match=r"the student predicts eps, which says nothing of x0 at alpha = 0"):
        distill.DistributionMatching(eps, v, w)
    with pytest.warns(UserWarning, match="predicts eps"):
        distill.DistributionMatching(toy("eps", seed=1), toy(seed=2), toy(seed=3))
    for method in (distill.DistributionMatching(v, eps, w), distill.DistributionMatching(v, w, eps)):
        for role in method.roles:
            assert method.loss(role, {"x0": torch.rand(256, 2)}, 0).isfinite()


def centres():
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4) + math.pi / 8
    return 0.8 * torch.stack([angle.cos(), angle.sin()], 1)


def energy(a, b):
    """The energy distance of two samples, [N, D]: 0 for equal distributions."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


@pytest.mark.slow
def test_a_ring_is_learned_in_one_step(toy):
    """Eight Gaussians, of which one step of the teacher's DDIM makes one blot."""
    schedule = fs.VP.scaled_linear()
    mixture = GaussianMixture(schedule, torch.ones(8), centres(), torch.tensor(0.05**2))
    data = distill.Batches(mixture.sample(4096, seed=3).float().clamp(-1, 1), size=256)
    teacher = distill.train(distill.Diffusion(toy("v", seed=1, width=128)), data, steps=1500, lr=4e-3, ema=0.99)
    method = distill.DistributionMatching(distill.student_of(teacher), teacher, distill.student_of(teacher), ratio=2)
    student = distill.train(method, data, steps=2000, lr=1e-3, ema=0.99)
    real, noise = mixture.sample(4000, seed=1).float(), fs.noise((2,), seeds=range(4000))

    def ddim(steps):
        return fs.sample(teacher, fs.trace(solvers.ddim, fs.grid(schedule, steps, fs.uniform_t)), noise)

    made = fs.sample(student, fs.trace(solvers.consistency, method.grid), noise)
    found, one, fifty = (energy(samples, real) for samples in (made, ddim(1), ddim(50)))
    floor = energy(mixture.sample(4000, seed=2).float(), real)
    print(f"\nenergy distance {found:.4f}; teacher's DDIM in 1 and 50 steps {one:.4f}, {fifty:.4f}; real {floor:.4f}")
    shares = torch.bincount(torch.cdist(made.double(), centres()).argmin(1), minlength=8) / 4000
    assert found < 0.05 * one
    assert shares.min() > 0.08
    assert shares.max() < 0.18
