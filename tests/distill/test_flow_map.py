"""MeanFlow: exact on a Gaussian, whose mean velocity is known."""

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill, solvers
from fastsample.distill import draws

pytest.importorskip("accelerate")
VARIANCE = 0.09


def variance(t):
    return (1 - t) ** 2 * VARIANCE + t**2


class Exact(nn.Module):
    """The mean velocity of data N(0, VARIANCE): x_r = x_t sqrt(V(r) / V(t)); `error` spoils it."""

    def __init__(self, error=0.0):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def forward(self, x, t, r):
        t, r = t[:, None].double(), r[:, None].double()
        near = (t - r).abs() < 1e-9
        gap = torch.where(near, 1.0, t - r)
        mean = (1 - (variance(r) / variance(t)).sqrt()) / gap
        here = (t - (1 - t) * VARIANCE) / variance(t)
        return x * torch.where(near, here, mean) * (1 + self.error)


class Denoising(nn.Module):
    """The x0 of that data, at any schedule."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x, t):
        alpha, sigma = (f(t.double())[:, None] for f in (self.schedule.alpha, self.schedule.sigma))
        return alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * x


class Net(nn.Module):
    def __init__(self, width=64, deep=1):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            middle = [layer for _ in range(deep) for layer in (nn.Linear(width, width), nn.SiLU())]
            self.layers = nn.Sequential(nn.Linear(2 + 16, width), nn.SiLU(), *middle, nn.Linear(width, 2))
            self.classes = nn.Embedding(3, 2)

    def forward(self, x, t, r, class_labels=None):
        angles = torch.stack([t, t - r], 1)[:, :, None] * 2.0 ** torch.arange(4, device=x.device)
        x = x if class_labels is None else x + 0.1 * self.classes(class_labels)
        return self.layers(torch.cat([x, angles.sin().flatten(1), angles.cos().flatten(1)], 1))


def exact(schedule=None, error=0.0):
    schedule = schedule or fs.Flow()
    return distill.FlowMap(Exact(error), schedule, time="unit", dtype=torch.float64)


def told(schedule=None):
    schedule = schedule or fs.VP.scaled_linear()
    return fs.Denoiser(Denoising(schedule), schedule, "x0", time="t", dtype=torch.float64)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_jumps_land_on_the_path_whatever_the_grid(shift):
    schedule = fs.Flow(shift=shift)
    noise = torch.randn(16, 1, dtype=torch.float64)
    for steps in (1, 2, 5):
        x0 = distill.sample_flow_map(exact(schedule), noise, fs.grid(schedule, steps, fs.uniform_t))
        torch.testing.assert_close(x0, 0.3 * noise, rtol=1e-10, atol=1e-12)
    plan = fs.trace(solvers.consistency, fs.grid(schedule, 1, fs.uniform_t))
    torch.testing.assert_close(fs.sample(exact(schedule), plan, noise).double(), 0.3 * noise, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_target_at_the_exact_mean_velocity_is_that_velocity(shift):
    model = exact(fs.Flow(shift=shift))
    method = distill.MeanFlow(model)
    t, r = torch.tensor([[0.9, 0.6, 0.3, 0.99], [0.1, 0.5, 0.0, 0.0]], dtype=torch.float64)
    x = torch.randn(4, 1, dtype=torch.float64)
    velocity = model.network(x, t, t).detach()
    target = method.target(x, t, r, velocity, {})
    torch.testing.assert_close(target, model.network(x, t, r).detach(), rtol=1e-10, atol=1e-12)


def test_the_derivative_in_the_target_is_that_of_finite_differences():
    model = distill.FlowMap(Net().double(), fs.Flow(shift=2.0), time="unit")
    method = distill.MeanFlow(model)
    t, r = torch.tensor([[0.9, 0.6, 0.3], [0.1, 0.5, 0.3]], dtype=torch.float64)
    x, velocity = torch.randn(2, 3, 2, dtype=torch.float64)
    h = 1e-6
    change = (model.network(x + h * velocity, t + h, r) - model.network(x - h * velocity, t - h, r)) / (2 * h)
    target = method.target(x, t, r, velocity, {})
    expected = (velocity - (t - r)[:, None] * change).detach()
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-7)
    assert torch.equal(target[2], velocity[2])


@pytest.mark.parametrize("schedule", [fs.Flow(), fs.VP.scaled_linear(), fs.EDM()], ids=repr)
@pytest.mark.parametrize("equal", [0.0, 0.75])
def test_the_exact_student_is_at_rest_and_others_are_drawn_to_it(schedule, equal):
    teacher, slopes = told(schedule), []
    for error in (-0.1, 0.0, 0.1):
        method = distill.MeanFlow(exact(error=error), teacher, equal=equal, p=0.0)
        torch.manual_seed(0)
        method.loss("student", {"x0": 0.3 * torch.randn(512, 1, dtype=torch.float64)}, 0).backward()
        slopes.append(float(method.student.network.error.grad))
    assert slopes[0] < 0 < slopes[2]
    assert abs(slopes[1]) < 1e-4 * slopes[2]  # VP is not asked beyond its least and largest sigma / alpha


def test_three_quarters_of_the_times_are_equal_and_the_rest_ordered(monkeypatch):
    seen = []
    method = distill.MeanFlow(exact())
    monkeypatch.setattr(
        distill.MeanFlow, "target", lambda self, x, t, r, velocity, condition: seen.extend([t, r]) or velocity
    )
    torch.manual_seed(0)
    method.loss("student", {"x0": torch.randn(4000, 1, dtype=torch.float64)}, 0)
    t, r = seen
    assert bool((r <= t).all())
    assert float((r == t).double().mean()) == pytest.approx(0.75, abs=0.03)  # 4 sigma
    # the larger of two normals lies 1 / sqrt(pi) above their mean
    assert float(torch.logit(t).mean()) == pytest.approx(-0.4 + 0.5642, abs=0.06)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_the_weight_is_a_power_of_the_whole_error_of_a_sample(p, monkeypatch):
    method = distill.MeanFlow(exact(), p=p)
    far = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
    monkeypatch.setattr(distill.MeanFlow, "target", lambda self, *_: far)
    monkeypatch.setattr(distill.FlowMap, "velocity", lambda self, x, *_, **__: 0 * x)
    loss = method.loss("student", {"x0": torch.zeros(1, 2, dtype=torch.float64)}, 0)
    assert float(loss) == pytest.approx(25 / (25 + 1e-3) ** p)


def test_guidance_mixes_the_unconditional_velocity_into_the_target():
    model = distill.FlowMap(Net().double())
    method = distill.MeanFlow(model, scale=2.0, null={"class_labels": 2})
    x, drawn = torch.randn(2, 4, 2, dtype=torch.float64)
    t, labels = torch.full((4,), 0.4, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    found = method._velocity(x, t, drawn, {"class_labels": labels})
    uncond = model.network(x, t, t, torch.full((4,), 2))
    torch.testing.assert_close(found, 2 * drawn - uncond)


def test_a_flow_map_is_saved_with_its_two_times(tmp_path):
    model = distill.FlowMap(Net(), fs.Flow(shift=2.0))
    fs.save_pretrained(model, tmp_path)
    empty = Net()
    for value in empty.parameters():
        value.data.zero_()
    loaded = fs.from_pretrained(tmp_path, network=empty)
    assert isinstance(loaded, distill.FlowMap)
    assert loaded.schedule == model.schedule
    noise, grid = fs.noise((2,), seeds=range(4)), fs.grid(model.schedule, 3, fs.uniform_t)
    found, expected = (distill.sample_flow_map(one, noise, grid) for one in (loaded, model))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(expected, distill.sample_flow_map(model, noise.draw(0), grid), rtol=0, atol=0)


def test_a_teacher_is_not_asked_beyond_its_noisiest_time():
    """At a level far beyond, the velocity is still that of the path, by the teacher's last answer."""
    schedule = fs.VP.scaled_linear()
    network, seen = Denoising(schedule), []
    teacher = fs.Denoiser(lambda x, t: seen.append((x, t)) or network(x, t), schedule, "x0", time="t")
    method = distill.MeanFlow(exact(), teacher)
    t = torch.tensor([0.5, 0.99, 0.99999], dtype=torch.float64)
    x = torch.randn(3, 1, dtype=torch.float64)
    velocity = method._velocity(x, t, x, {})
    ((asked, times),) = seen
    assert float(times.max()) <= schedule.t_max + 1e-6
    assert bool((asked.abs() <= 1.01 * x.abs() / variance(t)[:, None].sqrt()).all())  # of unit variance, and no more
    torch.testing.assert_close(velocity, method.student.network(x, t, t).detach(), rtol=0.01, atol=0)


@pytest.mark.parametrize("sizes", [(8,), (3, 5)])
def test_the_loss_of_a_batch_is_the_mean_of_its_parts(sizes):
    method = distill.MeanFlow(distill.FlowMap(Net()))
    data = torch.randn(8, 2)
    generator = torch.Generator()

    def loss(first, count):
        generator.manual_seed(5)
        with draws.part(generator, first=first, count=count, total=8):
            return count / 8 * method.loss("student", {"x0": data[first : first + count]}, 3)

    parts = sum(loss(sum(sizes[:k]), count) for k, count in enumerate(sizes))
    torch.testing.assert_close(parts, loss(0, 8))


@pytest.mark.parametrize(
    ("kind", "make", "says"),
    [
        (TypeError, lambda: distill.MeanFlow(fs.Denoiser(Net(), fs.Flow(), "flow")), "two times, distill.FlowMap"),
        (
            ValueError,
            lambda: distill.MeanFlow(exact(), fs.Guided(told(), uncond={"y": 0}, scale=2.0, reuse=2)),
            "remembers earlier evaluations",
        ),
        (ValueError, lambda: distill.FlowMap(Net(), fs.EDM()), "straight paths, fs.Flow"),
        (ValueError, lambda: distill.MeanFlow(exact(), equal=1.5), "got equal = 1.5"),
        (ValueError, lambda: distill.MeanFlow(exact(), c=0.0), "c = 0"),
        (ValueError, lambda: distill.MeanFlow(exact(), scale=2.0), "scale = 2 needs null"),
        (
            ValueError,
            lambda: distill.sample_flow_map(exact(), torch.zeros(1, 1), fs.grid(fs.EDM(), 2)),
            "the grid is of EDM",
        ),
        (
            ValueError,
            lambda: distill.FlowMap(lambda x, t, r: x[:, :1]).predict(torch.zeros(1, 2), fs.node(fs.Flow(), 1.0)),
            r"returned shape \(1, 1\)",
        ),
    ],
)
def test_a_wrong_argument_is_named(kind, make, says):
    with pytest.raises(kind, match=says):
        make()


def energy_distance(one, other):
    """Szekely's, 0 for equal distributions."""
    return float(2 * torch.cdist(one, other).mean() - torch.cdist(one, one).mean() - torch.cdist(other, other).mean())


@pytest.mark.parametrize(
    ("network", "steps", "lr", "size", "share"),
    [
        ({"width": 96}, 400, 4e-3, 128, 0.3),
        pytest.param({"width": 128, "deep": 2}, 2000, 2e-3, 256, 0.1, marks=pytest.mark.slow),
    ],
    ids=["quick", "long"],
)
def test_the_ring_is_learned_from_data(network, steps, lr, size, share, ring):
    """One step of the exact flow, of velocity x - mean at sigma = 1, ends in the mean of the data."""
    student = distill.FlowMap(Net(**network))
    points, noise = ring[0], fs.noise((2,), seeds=range(1024))
    method = distill.MeanFlow(student, equal=0.5)
    loader = distill.Batches(points, size=size)
    student = distill.train(method, loader, steps=steps, lr=lr, ema=0.98 if steps < 1000 else 0.99, progress=False)
    blind = energy_distance(points.mean(0).expand(1024, 2), points)
    one, two = (
        energy_distance(distill.sample_flow_map(student, noise, fs.grid(student.schedule, count, fs.uniform_t)), points)
        for count in (1, 2)
    )
    print(f"\nenergy distance {one:.4f}, {two:.4f} in 1 and 2 jumps; one step of the exact flow {blind:.4f}")
    assert one < share * blind
    assert two < share * blind
