"""sCM: exact where the best student is known, and its derivatives those of finite differences."""

import math
from functools import cache

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill, solvers
from fastsample.distill import draws
from fastsample.distill.continuous import LARGEST, derivative, trig_network, x0_at

pytest.importorskip("accelerate")
VARIANCE = 0.09
SCHEDULES = [fs.VP.scaled_linear(), fs.VPContinuous(), fs.EDM(), fs.Flow(shift=3.0), fs.TrigFlow()]
EVERY = pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)


class Power(nn.Module):
    """x0 of data N(0, VARIANCE) by (VARIANCE / v)^((1 + bend) / 2) with v the variance of x / alpha.

    bend = 0 is the exact consistency function, 1 the exact denoiser; at sigma = 0 all are x.
    """

    def __init__(self, schedule, bend=0.0):
        super().__init__()
        self.schedule = schedule
        self.bend = nn.Parameter(torch.tensor(bend, dtype=torch.float64))

    def forward(self, x, t):
        alpha, sigma = (f(t.double())[:, None] for f in (self.schedule.alpha, self.schedule.sigma))
        return x / alpha * (VARIANCE / (VARIANCE + (sigma / alpha) ** 2)) ** ((1 + self.bend) / 2)


class Wave(nn.Module):
    """A smooth network [B, d] -> [B, d], not linear in anything."""

    def __init__(self, wide=3):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Linear(wide + 1, 8).double(), nn.Linear(8, wide).double()

    def forward(self, x, t):
        return self.last(self.first(torch.cat([x, t[:, None].to(x) / 1000], 1)).tanh())


def told(network, schedule, predicts="x0", **options):
    return fs.Denoiser(network, schedule, predicts, time="t", dtype=torch.float64, **options)


def gaussian(schedule, bend, **options):
    options = {"sigma_data": 0.4, "weight": "uniform", "warmup": 0, **options}
    teacher = told(Power(schedule, 1.0), schedule)
    return distill.ContinuousConsistency(told(Power(schedule, bend), schedule), teacher, **options)


def some_times(method, size=16):
    return method.times(torch.linspace(-2, 2, size, dtype=torch.float64))


@EVERY
def test_the_tangent_vanishes_at_the_exact_consistency_function(schedule):
    method = gaussian(schedule, 0.0, c=None)
    t = some_times(method)
    x = torch.randn(16, 1, dtype=torch.float64)
    g = method.tangents(x, t, method.velocity(x, t, {}), 1.0, {})
    assert float(g.detach().abs().max()) < 1e-9  # VP tables lose digits of t by searching
    bent = gaussian(schedule, 0.3, c=None)
    assert float(bent.tangents(x, t, method.velocity(x, t, {}), 1.0, {}).detach().abs().median()) > 1e-3


@EVERY
@pytest.mark.parametrize("c", [None, 0.1])
def test_the_gradient_points_to_the_exact_consistency_function(schedule, c):
    slopes = []
    for bend in (-0.2, 0.0, 0.2):
        method = gaussian(schedule, bend, c=c)
        torch.manual_seed(0)
        method.loss("student", {"x0": 0.3 * torch.randn(256, 1, dtype=torch.float64)}, 0).backward()
        slopes.append(float(method.student.network.bend.grad))
    assert slopes[0] < 0 < slopes[2]
    assert abs(slopes[1]) < 1e-7 * slopes[2]


@pytest.mark.parametrize("predicts", ["v", "x0", "flow"])
@EVERY
def test_the_tangent_is_the_cosine_times_the_derivative_of_f_along_the_path(schedule, predicts):
    """Independent of F: f is asked at both sides of t, and moved by the teacher's velocity."""
    student = told(Wave(), schedule, predicts)
    method = distill.ContinuousConsistency(student, sigma_data=0.7, c=None, mean=0.0, std=0.7)
    t = some_times(method)
    t = t + 1e-4  # off the indices of a table, where its slope jumps
    x, velocity = torch.randn(2, 16, 3, dtype=torch.float64)
    h = 1e-6

    def f(x, t):
        return x0_at(student, x, t.cos(), 0.7 * t.tan(), {})

    slope = (f(x + h * velocity, t + h) - f(x - h * velocity, t - h)) / (2 * h)
    g = method.tangents(x, t, velocity, 1.0, {})
    torch.testing.assert_close(g, t.cos()[:, None] * slope, rtol=1e-5, atol=1e-6)  # h^2, and rounding over h
    without = method.tangents(x, t, velocity, 0.0, {})
    network = trig_network(student, x, t, 0.7, {})
    torch.testing.assert_close(without, -(t.cos()[:, None] ** 2) * (0.7 * network - velocity))


def test_finite_differences_agree_with_the_exact_tangent():
    student = told(Wave(), fs.VPContinuous(), "v")
    exact, near = (distill.ContinuousConsistency(student, tangent=how) for how in ("jvp", "finite_difference"))
    t = some_times(exact)
    x, velocity = torch.randn(2, 16, 3, dtype=torch.float64)
    a, b = (method.tangents(x, t, velocity, 1.0, {}) for method in (exact, near))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)  # far above the square of difference = 3e-4
    assert not torch.equal(a, b)


@EVERY
def test_a_change_of_time_keeps_x0(schedule):
    """x0 by F of TrigFlow is the student's own x0 at the node of equal sigma / alpha, and the way back is exact."""
    student = told(Wave(), schedule, "v")
    t = torch.linspace(0.1, 1.3, 9, dtype=torch.float64)
    level = 0.5 * t.tan()
    at = fs.nodes(schedule, schedule.time(-level.log()))
    torch.testing.assert_close((at.sigma / at.alpha / 0.5).atan(), t, rtol=0, atol=1e-12)
    x = torch.randn(9, 3, dtype=torch.float64)
    network = trig_network(student, x, t, 0.5, {})
    ours = t.cos()[:, None] * x - t.sin()[:, None] * 0.5 * network
    own = student.predict((at.alpha / t.cos())[:, None] * x, at)
    torch.testing.assert_close(ours, own, rtol=1e-12, atol=1e-12)


def test_f_of_a_v_network_on_a_variance_preserving_schedule_is_the_network_where_sigma_data_is_one():
    student = told(Wave(), fs.TrigFlow(), "v")
    t = torch.linspace(0.1, 1.3, 9, dtype=torch.float64)
    x = torch.randn(9, 3, dtype=torch.float64)
    torch.testing.assert_close(trig_network(student, x, t, 1.0, {}), student.network(x, t), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("predicts", ["v", "flow"])
def test_at_no_noise_f_is_the_state(predicts):
    student = told(Wave(), fs.TrigFlow(), predicts)
    x = torch.randn(4, 3, dtype=torch.float64)
    for small in (1e-4, 1e-8):
        t = torch.full((4,), small, dtype=torch.float64)
        assert float((x0_at(student, x, t.cos(), 0.5 * t.tan(), {}) - x).detach().abs().max()) < 10 * small
    assert torch.equal(student.predict(x, fs.node(fs.TrigFlow(), 0.0)), x)


def test_times_are_lognormal_levels_within_the_schedule():
    method = distill.ContinuousConsistency(told(Wave(), fs.EDM(), "x0"), sigma_data=0.5)
    levels = 0.5 * method.times(torch.tensor([-50.0, -1.0, 0.0, 2.0, 50.0], dtype=torch.float64)).tan()
    expected = torch.tensor([0.002, math.exp(-2.4), math.exp(-1), math.exp(1.8), 80.0], dtype=torch.float64)
    torch.testing.assert_close(levels, expected, rtol=1e-12, atol=0)
    flow = distill.ContinuousConsistency(told(Wave(), fs.Flow(), "flow"))
    assert float(flow.times(torch.tensor([50.0], dtype=torch.float64)).tan()) == pytest.approx(LARGEST / 0.5, rel=1e-9)


def test_a_teacher_is_not_asked_beyond_its_noisiest_time():
    """A student whose schedule reaches farther learns there from the teacher's last answer."""
    schedule = fs.VP.scaled_linear()
    network, seen = Power(schedule, 1.0), []
    teacher = fs.Denoiser(lambda x, t: seen.append((x, t)) or network(x, t), schedule, "x0", time="t")
    method = distill.ContinuousConsistency(told(Wave(1), fs.TrigFlow(), "v"), teacher, sigma_data=0.3)
    t = method.times(torch.tensor([-50.0, 0.0, 3.0, 50.0], dtype=torch.float64))
    x = 0.3 * torch.randn(4, 1, dtype=torch.float64)
    velocity = method.velocity(x, t, {}).detach()
    ((asked, times),) = seen
    assert float(t.tan().max()) == pytest.approx(160 / 0.3, rel=1e-9)
    assert schedule.t_min - 1e-6 < float(times.min())
    assert float(times.max()) < schedule.t_max + 1e-6
    assert bool((asked.abs() <= 3.4 * x.abs()).all())  # of unit variance, as the teacher's states are
    torch.testing.assert_close(velocity, 0 * x, rtol=0, atol=0.05)  # such data stand still


def test_a_tangent_is_normalised_over_its_whole_sample():
    student = fs.Denoiser(nn.Identity(), fs.TrigFlow(), "v", dtype=torch.float64)
    student.network = lambda x, t: x.square()
    raw, method = (distill.ContinuousConsistency(student, c=c) for c in (None, 0.1))
    t = some_times(raw, 4)
    x, velocity = torch.randn(2, 4, 1, 5, 5, dtype=torch.float64)
    g, h = (one.tangents(x, t, velocity, 1.0, {}) for one in (raw, method))
    size = g.flatten(1).square().sum(1).sqrt()
    torch.testing.assert_close(h.flatten(1).norm(dim=1), size / (size + 0.1))
    torch.testing.assert_close(h * (size + 0.1)[:, None, None, None], g)


@pytest.mark.parametrize("sizes", [(8,), (3, 5)])
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(sizes, toy):
    method = distill.ContinuousConsistency(toy(), toy("v", seed=1), warmup=0)
    with torch.no_grad():
        method.adaptive.out.bias.fill_(0.3)
    data = torch.randn(8, 2)
    generator = torch.Generator()

    def loss(first, count):
        generator.manual_seed(5)
        with draws.part(generator, first=first, count=count, total=8):
            return count / 8 * method.loss("student", {"x0": data[first : first + count]}, 3)

    parts = sum(loss(sum(sizes[:k]), count) for k, count in enumerate(sizes))
    torch.testing.assert_close(parts, loss(0, 8))


class Wrapped(nn.Module):
    """As torch.compile and DDP do: gradients must pass through the wrapper, or processes would not average them."""

    def __init__(self, network):
        super().__init__()
        self._orig_mod, self.with_gradient = network, 0

    def forward(self, *arguments, **condition):
        self.with_gradient += torch.is_grad_enabled()
        return self._orig_mod(*arguments, **condition)


def test_gradients_flow_through_the_wrapped_network_and_tangents_do_not(toy):
    method = distill.ContinuousConsistency(toy(), toy("v", seed=1), warmup=0)
    plain = method.student.network
    method.student.network = Wrapped(plain)
    method.loss("student", {"x0": torch.randn(8, 2)}, 0).backward()
    assert method.student.network.with_gradient == 1
    assert all(value.grad is not None for value in plain.layers.parameters())


def test_the_tangent_meets_the_dropout_of_the_forward(toy):
    student = toy(dropout=0.5)
    method = distill.ContinuousConsistency(student, warmup=0)
    t, (x, velocity) = some_times(method, 8), torch.randn(2, 8, 2)
    torch.manual_seed(3)
    first = method.tangents(x, t, velocity, 1.0, {})
    assert torch.equal(first, method.tangents(x, t, velocity, 1.0, {}))
    torch.manual_seed(4)
    assert not torch.equal(first, method.tangents(x, t, velocity, 1.0, {}))


def test_the_adaptive_weight_is_at_rest_where_it_is_minus_the_logarithm_of_the_error(toy):
    method = distill.ContinuousConsistency(toy(), toy("v", seed=1), warmup=0, std=1e-6)  # one time
    uniform = distill.ContinuousConsistency(toy(), toy("v", seed=1), warmup=0, std=1e-6, weight="uniform")
    batch = {"x0": torch.randn(64, 2)}
    torch.manual_seed(0)
    error = float(uniform.loss("student", batch, 0).detach())
    with torch.no_grad():
        method.adaptive.out.bias.fill_(-math.log(error))
    torch.manual_seed(0)
    loss = method.loss("student", batch, 0)
    assert float(loss.detach()) == pytest.approx(1 + math.log(error), rel=1e-5)
    loss.backward()
    assert abs(float(method.adaptive.out.bias.grad)) < 1e-5
    assert list(method.helpers) == ["student"]
    assert not uniform.helpers


@pytest.mark.parametrize("attention", [False, True])
def test_networks_of_diffusers_have_exact_tangents(attention):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    down, up = ("AttnDownBlock2D", "AttnUpBlock2D") if attention else ("DownBlock2D", "UpBlock2D")
    network = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("DownBlock2D", down), up_block_types=(up, "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    network = network.double()
    scheduler = diffusers.DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    student = fs.from_diffusers(network.eval(), scheduler)
    x, velocity = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64)
    t = torch.tensor([0.4, 1.1], dtype=torch.float64) + 1e-4
    exact = distill.ContinuousConsistency(student, c=None)
    near = distill.ContinuousConsistency(student, c=None, tangent="finite_difference")
    a, b = (method.tangents(x, t, velocity, 1.0, {}) for method in (exact, near))
    torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(a.abs().max()))  # the embedding of t is float32


class Rigid(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, slope):
        return 2 * slope


def test_a_network_without_forward_derivatives_is_refused_with_the_remedy():
    class Net(nn.Module):
        def forward(self, x, t):
            return Rigid.apply(x)

    network = Net()
    method = distill.ContinuousConsistency(told(network, fs.TrigFlow(), "v"))
    t, (x, velocity) = some_times(method, 4), torch.randn(2, 4, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"Net has no forward-mode derivative .*tangent='finite_difference'"):
        method.tangents(x, t, velocity, 1.0, {})

    def broken(x):
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        derivative(broken, (x,), (x,), network)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"sigma_data": 0.0}, "sigma_data must be positive and finite, got 0"),
        ({"std": -1.0}, "std must be positive and finite, got -1"),
        ({"difference": 0.0}, "difference must be positive"),
        ({"c": 0.0}, "c must be positive and finite, got 0; None"),
        ({"warmup": -1}, "got warmup = -1"),
        ({"weight": "snr"}, "unknown weight 'snr'; choose one of adaptive, uniform"),
        ({"tangent": "reverse"}, "unknown tangent 'reverse'"),
    ],
)
def test_a_wrong_option_is_named(options, says, toy):
    with pytest.raises(ValueError, match=says):
        distill.ContinuousConsistency(toy(), toy("v", seed=1), **options)


def test_a_wrong_student_is_named(toy):
    student = toy()
    with pytest.raises(ValueError, match="one network; make a copy"):
        distill.ContinuousConsistency(student, student)
    with pytest.raises(ValueError, match="has a boundary, which sCM does not need"):
        distill.ContinuousConsistency(distill.bounded(student, "edm"))
    with pytest.raises(ValueError, match="remembers earlier evaluations"):
        distill.ContinuousConsistency(
            student, fs.Guided(toy("v", seed=1), uncond={"class_labels": 2}, scale=2.0, reuse=2)
        )
    with pytest.warns(UserWarning, match="predicts eps"):
        distill.ContinuousConsistency(toy("eps"))


def test_a_resumed_run_has_the_weights_of_an_uninterrupted_one(toy, ring, loader, tmp_path, weights):
    def method():
        return distill.ContinuousConsistency(toy(), toy("v", seed=1), warmup=4)

    options = {"lr": 1e-2, "progress": False, "save_every": 3}
    whole, broken = method(), method()
    distill.train(whole, loader, steps=6, out=tmp_path / "whole", **options)
    distill.train(broken, loader, steps=6, out=tmp_path / "broken", **options)
    for path in (tmp_path / "broken").glob("step-*6"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    again = method()
    distill.train(again, loader, steps=6, out=tmp_path / "broken", **options)
    for key, value in weights(whole.student).items():
        assert torch.equal(weights(again.student)[key], value)
    assert bool(whole.adaptive.out.weight.any())
    assert torch.equal(whole.adaptive.out.weight, again.adaptive.out.weight)


class Smooth(nn.Module):
    """No sine of t is faster than t itself: the toy's, of 128 t / 1000, make derivatives that drown what is learned."""

    def __init__(self, width=64):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(
                nn.Linear(2 + 4, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
            )  # fmt: skip

    def forward(self, x, t):
        t = t[:, None]
        return self.layers(torch.cat([x, t.sin(), t.cos(), (2 * t).sin(), (2 * t).cos()], 1))


def angle(schedule, node):
    return torch.as_tensor(node.sigma / node.alpha).atan()


def ring_points():
    """Eight Gaussians on a circle, as `ring` has, but more of them."""
    which = torch.arange(4096) % 8 * (math.pi / 4)
    generator = torch.Generator().manual_seed(1)
    return 0.8 * torch.stack([which.cos(), which.sin()], 1) + 0.04 * torch.randn(4096, 2, generator=generator)


@cache
def ring_teacher(steps):
    """Trained by diffusion, once for this file."""
    teacher = fs.Denoiser(Smooth(), fs.VP.scaled_linear(), "v", time=angle)
    points = distill.Batches(ring_points().clamp(-1, 1))
    return distill.train(distill.Diffusion(teacher), points, steps=steps, lr=4e-3, ema=0.99, progress=False)


def energy_distance(one, other):
    """Szekely's, 0 for equal distributions."""
    return float(2 * torch.cdist(one, other).mean() - torch.cdist(one, one).mean() - torch.cdist(other, other).mean())


PLAIN = {"c": None, "weight": "uniform"}


@pytest.mark.parametrize(
    ("distilled", "options", "steps"),
    [
        (True, PLAIN, 300),
        pytest.param(True, PLAIN, 1200, marks=pytest.mark.slow),
        pytest.param(True, {}, 1200, marks=pytest.mark.slow),
        pytest.param(False, PLAIN, 1200, marks=pytest.mark.slow),
        pytest.param(False, {}, 1200, marks=pytest.mark.slow),
    ],
)
def test_the_ring_is_learned_in_one_step(distilled, options, steps):
    quick = steps < 1000
    teacher = ring_teacher(500 if quick else 1200)
    method = distill.ContinuousConsistency(
        distill.student_of(teacher), teacher if distilled else None, sigma_data=0.57, warmup=100, **options
    )
    points = ring_points().clamp(-1, 1)
    student = distill.train(method, distill.Batches(points), steps=steps, lr=2e-3, ema=0.98, progress=False)
    real, noise = points[:2000], fs.noise((2,), seeds=range(2000))

    def distance(model, nodes, solver=solvers.consistency):
        plan = fs.trace(solver, fs.grid(model.schedule, nodes, fs.uniform_t))
        return energy_distance(fs.sample(model, plan, noise), real)

    blind, many = distance(teacher, 1), distance(teacher, 50, solvers.ddim)
    one, two = distance(student, 1), distance(student, 2)
    print(f"\nenergy distance {one:.4f}, {two:.4f} in 1, 2 steps; the teacher's DDIM in 1, 50 {blind:.4f}, {many:.4f}")
    assert one < (0.2 if quick else 0.1) * blind
    assert two < (0.2 if quick else 0.1) * blind
