"""The methods: exact on Gaussians, whose best answers are known; and learning on a toy in the plane."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill
from fastsample.distill.method import dropped

pytest.importorskip("accelerate")
STD, MEAN = 0.3, 0.2  # of the Gaussian data


class GaussianNetwork(nn.Module):
    """The exact v of data N(MEAN, STD^2), or, as `consistent`, of the end of its probability-flow path.

    The path from x at t ends at MEAN + STD (x - alpha MEAN) / root, root^2 = (alpha STD)^2 + sigma^2.
    """

    def __init__(self, schedule, consistent=False, error=0.0, predicts="v"):
        super().__init__()
        self.schedule, self.consistent, self.predicts = schedule, consistent, predicts
        self.error = nn.Parameter(torch.tensor(error))

    def forward(self, x, t):
        alpha, sigma = (f(t.double())[:, None] for f in (self.schedule.alpha, self.schedule.sigma))
        root = (alpha**2 * STD**2 + sigma**2).sqrt()
        off = x.double() - alpha * MEAN
        x0 = MEAN + (STD * off / root if self.consistent else alpha * STD**2 * off / root**2)
        p, q = fs.prediction(self.predicts).output(alpha, sigma)
        return (p * x + q * (x0 + self.error * sigma)).to(x.dtype)


def gaussian(consistent=False, error=0.0, predicts="v", schedule=None):
    schedule = schedule or fs.VP.scaled_linear()
    return fs.Denoiser(GaussianNetwork(schedule, consistent, error, predicts), schedule, predicts)


def data(n=200_000):
    torch.manual_seed(0)
    return {"x0": MEAN + STD * torch.randn(n, 1)}


@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow"])
@pytest.mark.parametrize("schedule", [fs.VP.scaled_linear(), fs.VPContinuous(), fs.Flow()], ids=repr)
def test_the_gradient_of_diffusion_vanishes_at_the_exact_denoiser_alone(predicts, schedule):
    def gradient(error):
        method = distill.Diffusion(gaussian(False, error, predicts, schedule))
        method.loss("model", data(), 0).backward()
        return float(method.model.network.error.grad)

    low, exact, high = gradient(-0.1), gradient(0.0), gradient(0.1)
    assert low < 0 < high
    assert abs(exact) < 0.1 * min(-low, high)  # noise of 200 thousand samples


@pytest.mark.parametrize("times", [4, 16, 64])
@pytest.mark.parametrize("predicts", ["x0", "v", "flow"])
def test_the_consistency_loss_of_the_exact_function_is_the_error_of_the_steps(times, predicts):
    """Nothing but what one DDIM step of the teacher errs by, which a Gaussian tells in closed form."""
    method = distill.ConsistencyDistillation(gaussian(True, 0.0, predicts), gaussian(), times=times)
    loss = method.loss("student", data(400_000), 0).item()
    expected = expected_loss(method.grid)
    assert loss == pytest.approx(expected, rel=0.04)  # five standard errors at 64 times
    assert expected < {4: 0.09, 16: 0.06, 64: 0.02}[times]


def expected_loss(grid):
    """Of x = alpha MEAN + root z each interval moves the end by (jump - STD) z."""
    losses = []
    z = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    density = torch.exp(-z * z / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])
    for s, t in grid.steps():
        root_s, root_t = (math.hypot(node.alpha * STD, node.sigma) for node in (s, t))
        x0 = s.alpha * STD**2 / root_s
        x_t = t.alpha * x0 + t.sigma * (root_s - s.alpha * x0) / s.sigma
        jump = x0 if t.sigma == 0 else STD * x_t / root_t
        distance = ((jump - STD) ** 2 * z**2 + 0.00054**2).sqrt() - 0.00054
        losses.append(max((s.alpha / s.sigma) ** 2, 1) * float((distance * density).sum()))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("predicts", ["x0", "v", "flow"])
def test_the_consistency_gradient_points_back_to_the_exact_function(predicts):
    def gradient(error):
        method = distill.ConsistencyDistillation(gaussian(True, error, predicts), gaussian(), times=64)
        torch.manual_seed(1)
        method.loss("student", data(), 0).backward()
        return float(method.student.network.error.grad)

    assert gradient(-0.05) < 0 < gradient(0.05)


def test_consistency_solves_a_gaussian():
    """Trained from far off, the one free number ends where one step gives the Gaussian back."""
    method = distill.ConsistencyDistillation(gaussian(True, 0.5), gaussian(), times=64)
    loader = [{"x0": data(1024)["x0"].clamp(-1, 1)}]
    student = distill.train(method, loader, steps=200, lr=2e-2)
    assert student.network.error.item() == pytest.approx(0, abs=0.03)


@pytest.mark.parametrize("schedule", [fs.VP.scaled_linear(), fs.Flow(), fs.EDM()], ids=repr)
@pytest.mark.parametrize("predicts", ["v", "flow"])
def test_the_boundary_holds_exactly(schedule, predicts, toy):
    """At sigma = 0 the student's x0 is x, whatever its network says."""
    model = fs.Denoiser(toy().network, schedule, predicts)
    x = torch.randn(8, 2)
    t = torch.full((8,), schedule.t_zero, dtype=torch.float64)
    assert torch.equal(model.predict(x, fs.nodes(model.schedule, t)), x)


def test_the_target_of_the_last_interval_is_the_step_of_the_teacher(toy):
    """With one interval the student is asked for the teacher's own x0."""
    teacher = toy(seed=3)
    equal = distill.ConsistencyDistillation(toy(seed=3), teacher, times=1)
    other = distill.ConsistencyDistillation(toy(seed=4), teacher, times=1)
    batch = {"x0": torch.rand(64, 2), "class_labels": torch.zeros(64, dtype=torch.long)}
    assert equal.loss("student", batch, 0).item() < 1e-5
    assert other.loss("student", batch, 0).item() > 1e-2


def test_no_gradient_reaches_the_target_or_the_teacher(toy):
    student, teacher = toy(seed=1), toy(seed=2)
    method = distill.ConsistencyDistillation(student, teacher)
    method.loss("student", {"x0": torch.rand(16, 2)}, 0).backward()
    assert all(p.grad is None for p in teacher.network.parameters())
    assert student.count.calls == 2
    assert teacher.count.calls == 1


def test_both_passes_of_the_student_meet_the_same_dropout_mask(toy):
    masks = []
    student = toy(dropout=0.5)
    student.network.layers[2].register_forward_hook(lambda module, args, out: masks.append(out == 0))
    method = distill.ConsistencyDistillation(student, toy(seed=1))
    student.network.train()
    method.loss("student", {"x0": torch.rand(16, 2)}, 0)
    assert torch.equal(*masks)
    method.loss("student", {"x0": torch.rand(16, 2)}, 0)
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("pair", ["eps v", "v x0", "x0 eps", "flow v"])
def test_conversion_is_zero_for_a_student_that_equals_the_teacher(pair):
    has, becomes = pair.split()
    method = distill.Conversion(gaussian(False, 0.0, becomes), gaussian(False, 0.0, has), limit=math.inf)
    assert method.loss("student", data(1000), 0).item() < 1e-6
    other = distill.Conversion(gaussian(False, 0.2, becomes), gaussian(False, 0.0, has), limit=math.inf)
    assert other.loss("student", data(1000), 0).item() > 1e-3


def test_conversion_clips_what_the_teacher_says_and_leaves_the_teacher_alone():
    class Says(nn.Module):
        def __init__(self, x0):
            super().__init__()
            self.x0 = nn.Parameter(torch.tensor(x0))

        def forward(self, x, t):
            return self.x0.expand_as(x)

    student, teacher = (fs.Denoiser(Says(x0), fs.VP.scaled_linear(), "x0") for x0 in (0.5, 3.0))
    for limit, expected in ((1.0, 0.25), (0.5, 0.0), (math.inf, 6.25)):
        loss = distill.Conversion(student, teacher, limit=limit).loss("student", {"x0": 0.5 * torch.rand(16, 2)}, 0)
        assert loss.item() == pytest.approx(expected)
        loss.backward()
    assert student.network.x0.grad is not None
    assert teacher.network.x0.grad is None


def test_conversion_refuses_data_that_its_limit_would_distort(toy):
    """As latents: what the teacher rightly says of them would be clipped in silence."""
    student, teacher, latents = toy("v", seed=1), toy("eps", seed=2), torch.tensor([[4.2, -1.0]])
    with pytest.raises(ValueError, match=r"x0 of the batch reaches 4\.2, .* limit = 1; .* pass limit=math\.inf"):
        distill.Conversion(student, teacher).loss("student", {"x0": latents}, 0)
    assert distill.Conversion(student, teacher, limit=math.inf).loss("student", {"x0": latents}, 0).isfinite()
    loader = distill.Batches(latents, size=1, bounded=False)
    with pytest.raises(ValueError, match=r"reaches 4\.2"):
        distill.progressive(teacher, loader, updates=1, rounds=(1,), conversion=1, progress=False)


@pytest.mark.parametrize("weight", ["snr", "interval"])
def test_a_weight_that_leaves_the_first_interval_untrained_is_refused(toy, weight):
    """There, at alpha = 0, one step begins."""
    flow = [fs.Denoiser(toy(seed=seed).network, fs.Flow(), "flow") for seed in (1, 2)]
    for make in (
        distill.ConsistencyDistillation,
        lambda student, teacher, **o: distill.ConsistencyTraining(student, **o),
    ):
        with pytest.raises(ValueError, match=rf"weight '{weight}' is 0 at alpha = 0, .*\(t = 1\).*'truncated_snr'"):
            make(*flow, weight=weight, times=4, spacing=fs.uniform_t)
        make(*flow, weight="truncated_snr", times=4, spacing=fs.uniform_t)
        make(toy(seed=1), toy(seed=2), weight=weight, times=4)


def test_an_eps_student_is_warned_of_with_the_remedy(toy):
    with pytest.warns(UserWarning, match=r"predicts eps.*magnifies its errors by 14\.6.*predicts='v'"):
        distill.ConsistencyDistillation(toy("eps"), toy("eps"))


def test_an_eps_network_where_alpha_is_zero_is_refused(toy):
    schedule = fs.VP.scaled_linear().zero_terminal_snr()
    eps, v = (fs.Denoiser(toy(seed=seed).network, schedule, name) for seed, name in enumerate(["eps", "v"]))
    for make in (distill.ConsistencyDistillation, distill.Conversion):
        with pytest.raises(ValueError, match=r"the teacher predicts eps, which says nothing of x0 at alpha = 0"):
            make(v, eps)
    with pytest.raises(ValueError, match=r"the student predicts eps, .*\(t = 999 of VP"):
        distill.ConsistencyDistillation(eps, v)
    below = distill.ConsistencyDistillation(v, eps, times=2, spacing=fs.at_times([900.0, 400.0]))
    assert below.loss("student", {"x0": torch.rand(16, 2)}, 0).isfinite()


def test_times_that_cannot_be_placed_are_refused_before_any_training(toy):
    with pytest.raises(ValueError, match=r"times counts the intervals, at least 1 \(N = 2 times\), got 0"):
        distill.ConsistencyDistillation(toy(), toy(), times=0)


def test_pairs_that_do_not_fit_are_refused(toy):
    teacher = toy("v")
    other = fs.Denoiser(toy().network, fs.VP.linear(), "v")
    for method in (distill.ConsistencyDistillation, distill.Conversion):
        with pytest.raises(ValueError, match="one network; make a copy"):
            method(teacher, teacher)
        with pytest.raises(ValueError, match=r"schedule VP\(1000 betas, 0.0001 .. 0.02\) is not the teacher's"):
            method(other, teacher)


def test_a_student_is_a_copy_with_the_weights_of_the_teacher(toy):
    teacher = fs.Denoiser(
        toy().network, fs.VP.scaled_linear(), "eps", time="unit", dtype=torch.float64, spacing=fs.trailing
    )
    teacher.network.requires_grad_(False)
    student = distill.student_of(teacher, predicts="v")
    assert student.prediction.name == "v"
    assert (student.time, student.dtype, student.spacing) == (fs.TIMES["unit"], torch.float64, fs.trailing)
    assert student.schedule is teacher.schedule
    for a, b in zip(student.network.parameters(), teacher.network.parameters()):
        assert torch.equal(a, b)
        assert a is not b
        assert a.requires_grad
    with pytest.raises(TypeError, match=r"only a torch\.nn\.Module"):
        distill.student_of(fs.Denoiser(lambda x, t: x, fs.VP.linear()))


def test_conditions_are_dropped_together_at_the_asked_share():
    torch.manual_seed(0)
    condition = {"class_labels": torch.ones(20_000, dtype=torch.long), "text": torch.ones(20_000, 3)}
    out = dropped(condition, {"class_labels": 10, "text": torch.tensor([0.0, 5.0, 0.0])}, 0.15)
    gone = out["class_labels"] == 10
    assert float(gone.float().mean()) == pytest.approx(0.15, abs=0.013)  # five standard errors
    assert torch.equal(out["text"][gone], torch.tensor([[0.0, 5.0, 0.0]]).expand(int(gone.sum()), 3))
    assert torch.equal(out["text"][~gone], torch.ones(int((~gone).sum()), 3))
    assert out["class_labels"].dtype == torch.long
    kept = dropped({**condition, "size": condition["text"]}, {"class_labels": 10}, 1.0)
    assert (kept["class_labels"] == 10).all()
    assert torch.equal(kept["size"], condition["text"])  # null does not name it


@pytest.mark.parametrize("name", ["Diffusion", "Conversion", "ConsistencyDistillation"])
def test_a_null_value_of_another_name_is_refused(toy, name):
    models = [toy()] if name == "Diffusion" else [toy(seed=1), toy(seed=2)]
    method = getattr(distill, name)(*models, drop=0.1, null={"label": 2})
    batch = {"x0": torch.rand(16, 2), "class_labels": torch.zeros(16, dtype=torch.long)}
    with pytest.raises(ValueError, match=r"null names \['label'\], but .* are \['class_labels'\]"):
        method.loss(next(iter(method.roles)), batch, 0)


@pytest.mark.parametrize("name", ["Conversion", "ConsistencyDistillation"])
def test_teacher_target_and_student_are_told_the_same_labels(name):
    """Of a sample whose label is dropped, all of them must speak without it."""
    told = []

    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x, t, class_labels):
            told.append(class_labels)
            return x * self.weight

    student, teacher = (fs.Denoiser(Told(), fs.VP.scaled_linear(), "v") for _ in range(2))
    method = getattr(distill, name)(student, teacher, drop=0.5, null={"class_labels": 2})
    method.loss("student", {"x0": torch.rand(64, 2), "class_labels": torch.zeros(64, dtype=torch.long)}, 0)
    assert len(told) == student.count.calls + teacher.count.calls >= 2
    assert all(torch.equal(labels, told[0]) for labels in told)
    assert set(told[0].tolist()) == {0, 2}


def test_dropping_without_a_null_value_is_refused(toy):
    with pytest.raises(ValueError, match=r"needs the values that mean no condition: null=\{'class_labels': 10\}"):
        distill.Diffusion(toy(), drop=0.1)
    with pytest.raises(ValueError, match="share from 0 to 1, got 2"):
        distill.Diffusion(toy(), drop=2.0, null={"class_labels": 2})


@pytest.mark.slow
def test_a_ring_is_learned_then_walked_in_one_step(toy, loader, ring):
    """Diffusion, conversion from eps to v, consistency: each ends nearer to the data than it began."""
    null = {"class_labels": 2}
    start = toy("eps", width=128)
    far = energy_distance(walk(start, 50), ring)
    teacher = distill.train(
        distill.Diffusion(start, drop=0.1, null=null), loader, steps=1200, lr=3e-3, warmup=20, ema=0.99
    )
    near = energy_distance(walk(teacher, 50), ring)
    assert near < 0.01 * far
    blind = energy_distance(walk(teacher, 1), ring)

    student = distill.student_of(teacher, predicts="v")
    train = partial(distill.train, loader=loader, ema=0.98)
    train(distill.Conversion(student, teacher), steps=400, lr=2e-3)
    converted = energy_distance(walk(student, 50), ring)
    assert converted < 2 * near
    train(distill.ConsistencyDistillation(student, teacher), steps=600, lr=1e-3)
    quick = energy_distance(walk(student, 1), ring)
    assert quick < 0.2 * blind


def walk(model, steps, n=512):
    """DDIM on equal steps in t, half the samples of each class."""
    labels = torch.arange(n) % 2
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        for s, t in fs.grid(model.schedule, steps, fs.uniform_t).steps():
            x = fs.exponential_step(x, model.predict(x, s, class_labels=labels), s, t)
    return x, labels


def energy_distance(one, other):
    """Szekely's energy distance, the label as a third coordinate; 0 for equal distributions."""
    a, b = (torch.cat([x, labels[:, None].float()], 1) for x, labels in (one, other))
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())
