"""Progressive distillation: the target is two steps of the teacher, and rounds that are stopped go on bit for bit."""

import gc
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill, solvers
from fastsample.distill import checkpoint as checkpoints
from fastsample.distill.method import described
from fastsample.distill.weights import snr_plus_one, truncated_snr

from .conftest import Toy

pytest.importorskip("accelerate")
STD, MEAN = 0.3, 0.2  # of the Gaussian data
SCHEDULES = [fs.VP.scaled_linear(), fs.VP.scaled_linear().zero_terminal_snr(), fs.VPContinuous(), fs.Flow(shift=3.0)]
SPACINGS = [fs.uniform_t, fs.quadratic_t, fs.power_t(3), fs.uniform_lam]
CASES = [
    pytest.param(predicts, spacing, schedule, id=f"{predicts}-{spacing.__name__}-{schedule!r}")
    for schedule in SCHEDULES
    for spacing in SPACINGS
    for predicts in ["eps", "x0", "v", "flow"]
    # where alpha = 0, lam is infinite and eps says nothing of x0
    if schedule.alpha(schedule.t_max) > 0 or (predicts != "eps" and spacing is not fs.uniform_lam)
]


@pytest.fixture(autouse=True, scope="module")
def quick_collection():
    """accelerate collects garbage after each training; of all that is imported here that takes longer than a round."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def double(toy):
    """double(schedule, predicts, seed): the toy in float64, told 1000 sigma, on any schedule."""

    def make(schedule, predicts, seed):
        network = toy(seed=seed).network.double()
        return fs.Denoiser(network, schedule, predicts, time=lambda schedule, node: 1000 * node.sigma)

    return make


@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize(("predicts", "spacing", "schedule"), CASES)
def test_the_target_takes_one_step_to_where_two_steps_of_ddim_land(predicts, spacing, schedule, steps, double):
    """And is what Alg. 2 of the paper writes down."""
    teacher = double(schedule, predicts, seed=1)
    student = double(schedule, "v", seed=2)
    method = distill.ProgressiveDistillation(student, teacher, steps=steps, spacing=spacing)
    x = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    twice = fs.grid(schedule, 2 * steps, spacing)
    for i, (s, t) in enumerate(fs.grid(schedule, steps, spacing).steps()):
        interval = fs.Grid(schedule, twice.nodes[2 * i : 2 * i + 3])
        with torch.no_grad():
            end = solvers.ddim(teacher, x, interval)
        target = method.target(x, torch.full((6,), i))
        torch.testing.assert_close(fs.exponential_step(x, target, s, t), end, rtol=0, atol=1e-10)
        ratio = t.sigma / s.sigma
        written = (end - ratio * x) / (t.alpha - ratio * s.alpha)
        torch.testing.assert_close(target, written, rtol=1e-10, atol=1e-10)


def test_one_batch_may_mix_the_intervals(double):
    teacher, student = (double(fs.VPContinuous(), "v", seed) for seed in (1, 2))
    method = distill.ProgressiveDistillation(student, teacher, steps=4)
    x = torch.randn(4, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mixed = method.target(x, torch.tensor([3, 0, 2, 1]))
    for row, i in enumerate([3, 0, 2, 1]):
        alone = method.target(x[row : row + 1], torch.tensor([i]))
        torch.testing.assert_close(mixed[row : row + 1], alone)


def test_the_target_is_the_second_x0_of_the_teacher_in_the_last_interval_alone(double):
    """Published code has it so in every interval, which reaches another end."""
    teacher, student = (double(fs.VPContinuous(), "v", seed) for seed in (1, 2))
    method = distill.ProgressiveDistillation(student, teacher, steps=2)
    x = torch.randn(8, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    nodes = fs.grid(teacher.schedule, 4, fs.uniform_t).nodes

    def off(i):
        s, m = nodes[2 * i : 2 * i + 2]
        with torch.no_grad():
            second = teacher.predict(fs.exponential_step(x, teacher.predict(x, s), s, m), m)
        return float((method.target(x, torch.full((8,), i)) - second).abs().max())

    assert off(1) < 1e-12
    assert off(0) > 1e-2


def test_many_steps_do_not_cost_the_target_its_digits(double, toy):
    """At 4096 steps the division of Alg. 2 magnifies float32's rounding of the state a thousand times."""
    teacher, student = (double(fs.VPContinuous(), "v", seed) for seed in (1, 2))
    exact = distill.ProgressiveDistillation(student, teacher, steps=4096)
    single, copy = (fs.Denoiser(toy(seed=k).network, fs.VPContinuous(), "v", time=teacher.time) for k in (1, 2))
    rounded = distill.ProgressiveDistillation(copy, single, steps=4096)
    x = torch.randn(1, 2, generator=torch.Generator().manual_seed(0)).expand(64, 2)
    i = torch.arange(64) * 60
    best = exact.target(x.double(), i)
    assert float((rounded.target(x, i).double() - best).abs().max()) < 2e-5
    s, t = exact.grid.nodes[:2]
    end = fs.exponential_step(x[:1].double(), best[:1], s, t).float()
    ratio = t.sigma / s.sigma
    divided = (end - ratio * x[:1]) / (t.alpha - ratio * s.alpha)
    assert float((divided.double() - best[:1]).abs().max()) > 1e-3


class Gaussian(nn.Module):
    """The exact x0 of data N(MEAN, STD^2); or, with `steps`, what goes in one step as far as that does in two.

    Around alpha MEAN a step of DDIM from s to t multiplies by keep + gain c, where keep = sigma_t / sigma_s,
    gain = alpha_t - keep alpha_s, and x0 = MEAN + c (x - alpha_s MEAN).
    """

    def __init__(self, schedule, steps=None, error=0.0, predicts="x0"):
        super().__init__()
        self.schedule, self.predicts = schedule, fs.prediction(predicts)
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))
        self.table = None if steps is None else self.best(fs.grid(schedule, 2 * steps, fs.uniform_t).nodes)

    def exact(self, alpha, sigma):
        return alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)

    def best(self, nodes):
        table = {}
        for s, m, t in zip(nodes[::2], nodes[1::2], nodes[2::2]):
            two = 1.0
            for a, b in ((s, m), (m, t)):
                keep = b.sigma / a.sigma
                two *= keep + (b.alpha - keep * a.alpha) * self.exact(a.alpha, a.sigma)
            keep = t.sigma / s.sigma
            table[round(s.t, 9)] = (two - keep) / (t.alpha - keep * s.alpha)
        return table

    def forward(self, x, t):
        alpha, sigma = (f(t)[:, None] for f in (self.schedule.alpha, self.schedule.sigma))
        if self.table is None:
            c = self.exact(alpha, sigma)
        else:
            c = torch.tensor([[self.table[round(float(time), 9)]] for time in t], dtype=torch.float64)
        x0 = MEAN + c * (x - alpha * MEAN) + self.error
        p, q = self.predicts.output(alpha, sigma)
        return p * x + q * x0


def gaussian_loss(schedule, steps, error, predicts, weight="truncated_snr"):
    student = fs.Denoiser(Gaussian(schedule, steps, error, predicts), schedule, predicts, time="t")
    teacher = fs.Denoiser(Gaussian(schedule), schedule, "x0", time="t")
    method = distill.ProgressiveDistillation(student, teacher, steps=steps, weight=weight)
    torch.manual_seed(0)
    loss = method.loss("student", {"x0": MEAN + STD * torch.randn(256, 1, dtype=torch.float64)}, 0)
    loss.backward()
    return loss.item(), student.network.error.grad.item()


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("predicts", ["x0", "v", "flow"])
@pytest.mark.parametrize("schedule", [fs.VP.scaled_linear(), fs.Flow()], ids=repr)
def test_on_a_gaussian_the_loss_is_zero_at_the_best_student_and_points_back_to_it(schedule, predicts, steps):
    low, best, high = (gaussian_loss(schedule, steps, error, predicts) for error in (-0.01, 0.0, 0.01))
    assert best[0] < 1e-24
    assert abs(best[1]) < 1e-11
    assert low[1] < -1e-3
    assert high[1] > 1e-3


@pytest.mark.parametrize("name", ["truncated_snr", "snr+1"])
def test_an_error_of_x0_costs_its_square_times_the_weight_of_its_node(name):
    """An x0 that is off by 0.01 everywhere; with one interval that node is the first."""
    schedule = fs.VP.scaled_linear()
    alpha, sigma = float(schedule.alpha(999.0)), float(schedule.sigma(999.0))
    snr = (alpha / sigma) ** 2
    expected = 1e-4 * {"truncated_snr": max(snr, 1), "snr+1": snr + 1}[name]
    assert gaussian_loss(schedule, 1, 0.01, "v", name)[0] == pytest.approx(expected, rel=1e-9)
    own = gaussian_loss(schedule, 1, 0.01, "v", lambda at: 7 + 0 * at.alpha)[0]
    assert own == pytest.approx(7e-4, rel=1e-9)


@pytest.mark.parametrize("schedule", [fs.VP.scaled_linear(), fs.VPContinuous()], ids=repr)
def test_the_weights_are_the_errors_of_v_and_the_larger_one_of_x0_and_eps(schedule):
    """Salimans and Ho 2022, Sec. 4, by the quantities themselves."""
    at = fs.nodes(schedule, torch.linspace(schedule.t_min, schedule.t_max, 9, dtype=torch.float64))
    x0, guess, eps = 0.3, 0.8, -1.1
    x = at.alpha * x0 + at.sigma * eps
    guess_eps = (x - at.alpha * guess) / at.sigma
    error_v = (at.alpha * (guess_eps - eps) - at.sigma * (guess - x0)) ** 2
    error = torch.maximum(torch.tensor((guess - x0) ** 2, dtype=torch.float64), (guess_eps - eps) ** 2)
    torch.testing.assert_close(snr_plus_one(at) * (guess - x0) ** 2, error_v)
    torch.testing.assert_close(truncated_snr(at) * (guess - x0) ** 2, error)
    assert truncated_snr(at).min() == 1
    assert truncated_snr(at).max() > 100


def test_every_interval_is_asked_and_only_its_start(toy):
    told = []

    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x, t):
            told.append(t)
            return x * self.weight

    student, teacher = (fs.Denoiser(Told(), fs.VP.scaled_linear(), "v") for _ in range(2))
    method = distill.ProgressiveDistillation(student, teacher, steps=4)
    torch.manual_seed(0)
    loss = method.loss("student", {"x0": torch.rand(4000, 2)}, 0)
    loss.backward()
    assert (student.count.calls, teacher.count.calls) == (1, 2)
    assert teacher.network.weight.grad is None
    times, counts = told[0].unique(return_counts=True)
    assert times.tolist() == pytest.approx([249.75, 499.5, 749.25, 999])  # 999 (1 - i / 4)
    assert counts.min() > 1000 - 5 * math.sqrt(4000 * 0.25 * 0.75)  # five standard deviations
    torch.testing.assert_close(told[1], told[0])
    torch.testing.assert_close(told[2], told[0] - 999 / 8)


def walk(model, steps, labels, seed=5):
    plan = fs.trace(solvers.ddim, fs.grid(model.schedule, steps, fs.uniform_t))
    noise = torch.randn(len(labels), 2, generator=torch.Generator().manual_seed(seed))
    return fs.sample(model, plan, noise, condition={"class_labels": labels})


def rms(a, b):
    return float((a - b).square().mean().sqrt())


@pytest.mark.slow
def test_students_follow_twice_their_steps_of_a_teacher_that_is_guided_or_not(loader, toy):
    """Nearer than the same steps of the teacher, or without guidance, come: paired, from equal noises."""
    labels = torch.arange(512) % 2
    method = distill.Diffusion(toy("v"), drop=0.1, null={"class_labels": 2})
    learned = distill.train(method, loader, steps=400, lr=3e-3, warmup=20, ema=0.98)
    student = distill.progressive(learned, loader, rounds=(4, 2), updates=300, lr=2e-3, ema=0.98)
    far = walk(learned, 8, labels)
    assert rms(walk(student, 2, labels), far) < 0.4 * rms(walk(learned, 2, labels), far)

    guided = fs.Guided(learned, uncond={"class_labels": 2}, scale=2.0)
    options = {"lr": 2e-3, "ema": 0.98}
    student = distill.progressive(guided, loader, rounds=(4,), updates=300, conversion=300, **options)
    assert isinstance(student, fs.Denoiser)
    far = walk(guided, 8, labels)
    assert rms(walk(student, 4, labels), far) < 0.5 * rms(walk(learned, 8, labels), far)
    assert rms(walk(student, 4, labels), far) < 0.5 * rms(walk(guided, 4, labels), far)


def test_the_target_of_a_guided_teacher_is_two_guided_steps(toy):
    guided = fs.Guided(toy(seed=1), uncond={"class_labels": 2}, scale=3.0)
    method = distill.ProgressiveDistillation(toy(), guided, steps=3)
    assert method.frozen == [guided.model]
    x, labels = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    s, m, t = fs.grid(guided.schedule, 6, fs.uniform_t).nodes[2:5]
    with torch.no_grad():
        middle = fs.exponential_step(x, guided.predict(x, s, class_labels=labels), s, m)
        end = fs.exponential_step(middle, guided.predict(middle, m, class_labels=labels), m, t)
    target = method.target(x, torch.full((4,), 1), class_labels=labels)
    torch.testing.assert_close(fs.exponential_step(x, target, s, t), end)


class Told(nn.Module):
    """Remembers what it is asked; says `factor` times the label, and where it is told a scale, plus that."""

    def __init__(self, factor):
        super().__init__()
        self.factor, self.asked = nn.Parameter(torch.tensor(factor, dtype=torch.float64)), []

    def forward(self, x, t, class_labels, guidance=None):
        self.asked.append((x, t, class_labels, guidance))
        told = 0.0 if guidance is None else guidance.double()
        return (self.factor * (class_labels + told))[:, None].expand_as(x)


def told_pair(teacher_factor=0.3):
    schedule = fs.VP.scaled_linear()
    return [fs.Denoiser(Told(factor), schedule, "x0") for factor in (0.0, teacher_factor)]


SCALES = distill.Scales(1.0, 4.0, distill.Plain())


def test_the_guided_teacher_has_a_scale_for_each_sample_and_the_student_is_told_it():
    """With a student that says 0 and a teacher that says 0.3 y, the target is 0.3 (2 + scale (y - 2))."""
    batch = {"x0": torch.zeros(64, 1, dtype=torch.float64), "class_labels": torch.arange(64) % 2}
    student, teacher = told_pair()
    guided = fs.Guided(teacher, uncond={"class_labels": 2}, scale=7.0)
    methods = [
        distill.Conversion(student, guided, scales=SCALES, limit=math.inf),
        distill.ProgressiveDistillation(student, guided, scales=SCALES, steps=1, weight=lambda at: 1 + 0 * at.alpha),
    ]
    for method in methods:
        student.network.asked.clear()
        loss = method.loss("student", batch, 0)
        _, _, labels, scale = student.network.asked[0]
        assert scale.min() >= 1
        assert scale.max() <= 4
        assert len(scale.unique()) == 64
        target = 0.3 * (2 + scale.double() * (labels - 2))  # of every step, as the teacher does not look at x
        assert loss.item() == pytest.approx(target.square().mean().item(), rel=1e-6)  # the scale is told in float32
    assert all(scale is None for *_, scale in teacher.network.asked)


def test_a_teacher_that_takes_scales_is_told_what_the_student_is_told():
    student, teacher = told_pair()
    method = distill.ProgressiveDistillation(student, teacher, scales=SCALES, steps=2)
    method.loss("student", {"x0": torch.zeros(8, 1, dtype=torch.float64), "class_labels": torch.zeros(8)}, 0)
    (_, _, _, scale), (*_, first), (*_, second) = *student.network.asked, *teacher.network.asked
    assert len(scale.unique()) == 8
    assert torch.equal(scale, first)
    assert torch.equal(scale, second)


def test_scales_are_kept_through_the_rounds(loader, tmp_path):
    """Between two scales of guidance a student that is told them comes nearer to the right one."""

    class Scaled(Toy):
        def __init__(self, **options):
            super().__init__(**options)
            with torch.random.fork_rng():
                torch.manual_seed(9)
                self.scaled = nn.Linear(3, 8)

        def forward(self, x, t, class_labels, guidance):
            chosen = nn.functional.one_hot(class_labels, 3) * (guidance[:, None] - 1)
            labels = self.embedding(class_labels) + self.scaled(chosen)
            angles = (t[:, None] / 1000) * (2.0 ** torch.arange(8))
            return self.layers(torch.cat([x, angles.sin(), angles.cos(), labels], 1))

    learned = distill.train(
        distill.Diffusion(fs.Denoiser(Toy(), fs.VP.scaled_linear(), "v"), drop=0.1, null={"class_labels": 2}),
        loader, steps=200, lr=3e-3, warmup=20, ema=0.98,
    )  # fmt: skip
    network = Scaled()
    network.load_state_dict(learned.network.state_dict(), strict=False)
    student = distill.progressive(
        fs.Guided(learned, uncond={"class_labels": 2}, scale=1.0), loader, rounds=(4, 2), updates=100, conversion=150,
        student=fs.Denoiser(network, learned.schedule, "v"), scales=distill.Scales(1.0, 3.0, distill.Plain()),
        lr=2e-3, ema=0.98, out=tmp_path,
    )  # fmt: skip
    labels = torch.arange(512) % 2
    noise = torch.randn(512, 2, generator=torch.Generator().manual_seed(5))
    plans = [fs.trace(solvers.ddim, fs.grid(learned.schedule, steps, fs.uniform_t)) for steps in (2, 8)]
    scales = (1.0, 3.0)
    few, far = [], []
    for scale in scales:
        guidance = torch.full((512,), scale)
        few.append(fs.sample(student, plans[0], noise, condition={"class_labels": labels, "guidance": guidance}))
        guided = fs.Guided(learned, uncond={"class_labels": 2}, scale=scale)
        far.append(fs.sample(guided, plans[1], noise, condition={"class_labels": labels}))
    for i in range(2):
        assert rms(few[i], far[i]) < 0.4 * rms(few[i], far[1 - i])
    line = json.loads((tmp_path / "steps-2" / "step-000100" / "manifest.json").read_text())
    assert line["configuration"]["method"]["scales"] == "1 to 3, as guidance"


def test_scales_without_guidance_or_a_limit_below_zero_are_refused(toy):
    with pytest.raises(TypeError, match=r"need a teacher with guidance, got Denoiser; wrap it: fs\.Guided"):
        distill.Conversion(toy("v"), toy("eps"), scales=SCALES)
    with pytest.raises(TypeError, match=r"need a teacher with guidance"):
        distill.progressive(toy("eps"), [], rounds=(2,), updates=1, scales=SCALES)
    with pytest.raises(ValueError, match=r"limit must be above 0, got 0; math\.inf clips none"):
        distill.Conversion(toy("v"), toy("eps"), limit=0.0)


def test_all_that_a_wrapped_teacher_asks_is_frozen(toy):
    model, weak = toy(seed=1), toy(seed=2)
    teacher = fs.Thresholded(fs.Autoguided(model, scale=2.0, weak=weak))
    assert distill.ProgressiveDistillation(toy(), teacher, steps=2).frozen == [model, weak]
    assert distill.Conversion(toy(), teacher).frozen == [model, weak]
    assert distill.ConsistencyDistillation(toy(), teacher).frozen == [model, weak]


def test_student_and_teacher_are_told_the_same_labels():
    told = []

    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x, t, class_labels):
            told.append(class_labels)
            return x * self.weight

    student, teacher = (fs.Denoiser(Told(), fs.VP.scaled_linear(), "v") for _ in range(2))
    method = distill.ProgressiveDistillation(student, teacher, steps=2, drop=0.5, null={"class_labels": 2})
    method.loss("student", {"x0": torch.rand(64, 2), "class_labels": torch.zeros(64, dtype=torch.long)}, 0)
    assert len(told) == 3
    assert all(torch.equal(labels, told[0]) for labels in told)
    assert set(told[0].tolist()) == {0, 2}
    with pytest.raises(ValueError, match=r"drop = 0\.5 needs the values that mean no condition"):
        distill.ProgressiveDistillation(student, teacher, steps=2, drop=0.5)


ROUNDS = ["conversion", "steps-4", "steps-2", "steps-1"]


def rounds(toy, loader, out=None, *, predicts="eps", weights=3, **options):
    teacher = toy(predicts, seed=weights, dropout=0.1)
    given = {"rounds": (4, 2, 1), "updates": 4, "conversion": 4, "drop": 0.1, "null": {"class_labels": 2}, **options}
    return distill.progressive(teacher, loader, out=out, **given, **({"save_every": 2} if out else {}))


def same(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.network.parameters(), other.network.parameters(), strict=True))


@pytest.mark.parametrize("saves", [1, 2, 5, 6])  # of two in the conversion and in each round: inside and between
def test_rounds_that_are_stopped_go_on_to_the_same_weights(saves, toy, loader, tmp_path, monkeypatch):
    done = []

    def dies(*args, **options):
        save(*args, **options)
        done.append(args)
        if len(done) == saves:
            raise KeyboardInterrupt

    save = checkpoints.save
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            rounds(toy, loader, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(ROUNDS[: (saves + 1) // 2])
    whole = rounds(toy, loader)
    assert not same(whole, toy("v", seed=3))
    assert same(rounds(toy, loader, tmp_path), whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(ROUNDS)


def test_rounds_that_are_done_are_neither_trained_nor_fed_again(toy, ring, tmp_path, monkeypatch):
    class Fed(distill.Batches):
        def __iter__(self):
            for batch in super().__iter__():
                fed.append(1)
                yield batch

    def loss(*args):
        raise AssertionError("trained again")

    fed, loader = [], Fed(ring[0], {"class_labels": ring[1]}, size=64)
    first = rounds(toy, loader, tmp_path)
    monkeypatch.setattr(distill.ProgressiveDistillation, "loss", loss)
    monkeypatch.setattr(distill.Conversion, "loss", loss)
    fed.clear()
    assert same(rounds(toy, loader, tmp_path), first)
    assert len(fed) == len(ROUNDS)  # the look at the first batch


KILLED = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(1)
from conftest import Toy
import fastsample as fs
from fastsample import distill
def slow(self, step):
    time.sleep(0.01)
distill.Conversion.after = distill.ProgressiveDistillation.after = slow
points = torch.linspace(-1, 1, 256).view(128, 2)
teacher = fs.Denoiser(Toy(seed=3, dropout=0.1), fs.VP.scaled_linear(), "eps")
options = {"rounds": (2, 1), "updates": 60, "conversion": 60, "save_every": 1}
distill.progressive(teacher, distill.Batches(points, size=32), out=sys.argv[2], **options)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["conversion", "steps-2", "steps-1"])
def test_rounds_that_are_killed_go_on_to_the_same_weights(where, toy, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(Path(__file__).parent), str(out)], cwd=tmp_path)
    deadline = time.monotonic() + 120
    while not list((out / where).glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < max(int(path.name[5:]) for path in (out / where).glob("step-*")) < 60
    points = torch.linspace(-1, 1, 256).view(128, 2)

    def finish(folder):
        options = {"rounds": (2, 1), "updates": 60, "conversion": 60, **({"save_every": 1} if folder else {})}
        return distill.progressive(
            toy("eps", seed=3, dropout=0.1), distill.Batches(points, size=32), out=folder, **options
        )

    assert same(finish(out), finish(None))


def test_a_round_may_be_added_to_those_that_are_done(toy, loader, tmp_path):
    rounds(toy, loader, tmp_path, rounds=(4, 2))
    assert same(rounds(toy, loader, tmp_path), rounds(toy, loader))


def test_each_round_is_taught_by_the_student_before_and_starts_as_it(toy, loader, tmp_path, monkeypatch):
    met = []

    def watched(method, *args, out, seed, **options):
        weights = [[p.clone() for p in model.network.parameters()] for model in (method.student, *method.frozen)]
        done = train(method, *args, out=out, seed=seed, **options)
        met.append((method.steps, seed, *weights, [p.clone() for p in done.network.parameters()]))
        return done

    train = distill.train
    monkeypatch.setattr(importlib.import_module("fastsample.distill.progressive"), "train", watched)
    saved = []
    student = rounds(toy, loader, tmp_path, predicts="v", updates=[4, 3, 2], save=lambda *given: saved.append(given))
    assert [steps for steps, *_ in met] == [4, 2, 1]
    assert len({seed for _, seed, *_ in met}) == 3
    assert not (tmp_path / "conversion").exists()  # a copy of the teacher says what the teacher says
    for before, now in zip([None, *met], met):
        _, _, start, teacher, end = now
        assert all(torch.equal(a, b) for a, b in zip(start, teacher))
        assert not all(torch.equal(a, b) for a, b in zip(start, end))
        expected = toy(seed=3).network.parameters() if before is None else before[-1]
        assert all(torch.equal(a, b) for a, b in zip(teacher, expected))
    assert all(torch.equal(a, b) for a, b in zip(student.network.parameters(), met[-1][-1]))
    assert [path for _, path in saved] == [tmp_path / f"steps-{steps}" / "model" for steps in (4, 2, 1)]
    assert saved[-1][0] is student
    names = [sorted(path.name for path in (tmp_path / f"steps-{n}").glob("step-*")) for n in (4, 2, 1)]
    assert [folders[-1] for folders in names] == ["step-000004", "step-000003", "step-000002"]


def test_the_student_of_an_eps_teacher_is_converted_to_v_first(toy, loader, tmp_path):
    student = rounds(toy, loader, tmp_path)
    assert student.prediction.name == "v"
    line = json.loads((tmp_path / "conversion" / "step-000004" / "manifest.json").read_text())
    assert line["configuration"]["method"]["name"] == "Conversion"
    rounds(toy, loader, tmp_path / "not", conversion=0)
    assert not (tmp_path / "not" / "conversion").exists()


def test_a_student_that_is_given_is_converted_and_trained(toy, loader, tmp_path):
    given = toy("x0", seed=8)
    student = rounds(toy, loader, tmp_path, predicts="v", student=given)
    assert student.prediction.name == "x0"
    assert (tmp_path / "conversion").exists()


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"updates": 5}, r"steps was 4, now 5"),
        ({"weight": "snr+1"}, r'method\.weight was "truncated_snr", now "snr\+1"'),
        ({"spacing": fs.quadratic_t}, r'method\.spacing was "uniform_t", now "quadratic_t"'),
        ({"seed": 1}, r"training\.seed was 0, now 1"),
        ({"weights": 4}, r'frozen\.0 was "Toy'),
    ],
)
def test_a_round_of_another_configuration_is_refused(options, error, toy, loader, tmp_path):
    rounds(toy, loader, tmp_path, rounds=(2, 1))
    with pytest.raises(ValueError, match=rf"was made with another configuration: .*({error})"):
        rounds(toy, loader, tmp_path, rounds=(2, 1), **options)


def test_another_scale_of_guidance_is_refused(toy, loader, tmp_path):
    def run(scale):
        guided = fs.Guided(toy(seed=1), uncond={"class_labels": 2}, scale=scale)
        return distill.progressive(guided, loader, rounds=(2,), updates=1, conversion=1, out=tmp_path)

    run(2.0)
    with pytest.raises(ValueError, match=r"method\.teacher\.scale was 2\.0, now 3\.0"):
        run(3.0)


def test_a_wrapped_teacher_is_described_by_all_that_it_is_made_of(toy):
    guided = fs.Guided(toy(), uncond={"class_labels": 2}, scale=2.5)
    found = described(fs.Thresholded(guided, limit=0.5))
    assert (found["name"], found["limit"]) == ("Thresholded", 0.5)
    assert (found["model"]["name"], found["model"]["scale"]) == ("Guided", 2.5)
    assert found["model"]["uncond"] == {"class_labels": 2}
    assert found["model"]["model"].startswith("v of Toy, VP(1000 betas")
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"rounds": (16, 8, 4, 3)}, r"halve the steps of the one before, got 3 after 4 in \(16, 8, 4, 3\)"),
        ({"rounds": (6, 3, 1)}, r"got 1 after 3 .*begin with a power of two"),
        ({"rounds": (2, 4)}, r"got 4 after 2"),
        ({"rounds": (4, 4)}, r"got 4 after 4"),
        ({"rounds": ()}, r"rounds is empty"),
        ({"rounds": (0,)}, r"steps must be a whole number of at least 1, got 0"),
        ({"rounds": (2, 1), "updates": (4, 4, 4)}, r"one for each of the 2 rounds, got \(4, 4, 4\)"),
        ({"rounds": (2, 1), "updates": (4, 0)}, r"at least 1 .*got \(4, 0\)"),
        ({"rounds": (4, 2), "spacing": fs.karras}, r"spacing karras places 4 steps at t = .*use uniform_t"),
        ({"rounds": (4, 2), "spacing": fs.default_t}, r"spacing default_t places"),
        ({"rounds": (2, 1), "weight": "snr"}, r"unknown weight 'snr'; choose one of truncated_snr, snr\+1"),
        ({"rounds": (2, 1), "save": print}, r"save needs a folder"),
    ],
)
def test_what_cannot_be_halved_or_placed_is_refused_before_any_training(options, error, toy):
    with pytest.raises(ValueError, match=error):
        distill.progressive(toy(), [], **{"updates": 4, **options})  # an empty loader, which training would refuse


def test_pairs_that_do_not_fit_are_refused(toy):
    make = partial(distill.ProgressiveDistillation, steps=2)
    teacher = toy("v")
    with pytest.raises(ValueError, match="one network; make a copy"):
        make(teacher, teacher)
    with pytest.raises(ValueError, match="one network; make a copy"):
        make(teacher, fs.Guided(teacher, uncond={"class_labels": 2}, scale=2.0))
    with pytest.raises(ValueError, match=r"schedule VP\(1000 betas, 0.0001 .. 0.02\) is not the teacher's"):
        make(fs.Denoiser(toy().network, fs.VP.linear(), "v"), teacher)
    with pytest.raises(ValueError, match=r"remembers earlier evaluations \(Guided\).*reuse=1"):
        make(toy(), fs.Guided(teacher, uncond={"class_labels": 2}, scale=2.0, reuse=2))
    with pytest.raises(TypeError, match=r"a teacher must be an fs\.Denoiser or a wrapper of one"):
        make(toy(), solvers.ddim)
    with pytest.raises(ValueError, match=r"unknown weight 'v'"):
        make(toy(), teacher, weight="v")
    with pytest.raises(ValueError, match=r"spacing karras places 2 steps"):
        make(toy(), teacher, spacing=fs.karras)


def test_eps_is_warned_of_and_refused_where_alpha_is_zero(toy):
    with pytest.warns(UserWarning, match=r"predicts eps.*magnifies its errors by 14\.6.*predicts='v'") as caught:
        distill.ProgressiveDistillation(toy("eps"), toy("v"), steps=2)
    assert caught[0].filename == __file__
    schedule = fs.VP.scaled_linear().zero_terminal_snr()
    eps, v = (fs.Denoiser(toy(seed=seed).network, schedule, name) for seed, name in enumerate(["eps", "v"]))
    with pytest.raises(ValueError, match="the teacher predicts eps, which says nothing of x0 at alpha = 0"):
        distill.ProgressiveDistillation(v, eps, steps=2)
    with pytest.raises(ValueError, match="the teacher predicts eps, which says nothing of x0 at alpha = 0"):
        distill.progressive(fs.Guided(eps, uncond={"class_labels": 2}, scale=2.0), [], rounds=(2,), updates=1)
    with pytest.raises(ValueError, match="the student predicts eps, which says nothing of x0 at alpha = 0"):
        distill.ProgressiveDistillation(eps, v, steps=2)


def test_a_teacher_of_eps_that_starts_near_alpha_zero_is_warned_of(toy):
    """At alpha = 0.006, where DDPM's linear betas end, an error of eps is one of x0 157 times as large."""
    schedule = fs.VP.linear()
    student, teacher, good = (fs.Denoiser(toy(seed=k).network, schedule, p) for k, p in enumerate(["v", "eps", "v"]))
    told = r"teacher predicts eps.*errors by 157 at the first step \(t = 999\).*by Conversion.*make it the teacher"
    for wrapped in (teacher, fs.Guided(teacher, uncond={"class_labels": 2}, scale=2.0)):
        with pytest.warns(UserWarning, match=told) as caught:
            distill.ProgressiveDistillation(student, wrapped, steps=2)
        assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distill.ProgressiveDistillation(student, good, steps=2)
        distill.ProgressiveDistillation(toy("v"), toy("eps", seed=1), steps=2)
