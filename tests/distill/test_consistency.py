"""Consistency distillation: exact where the best student is known, and equal to its authors' formula."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill, solvers
from fastsample.distill import draws
from fastsample.distill.consistency import WEIGHTS, same_dropout
from fastsample.distill.curriculum import Doubling, Lognormal, SquareRoot
from fastsample.distill.teacher_step import teacher_steps

pytest.importorskip("accelerate")
VARIANCE = 0.09


class Gains(nn.Module):
    """f(x, t) = gain x, one gain for each node of a grid (a free number: any linear student)."""

    def __init__(self, times):
        super().__init__()
        self.register_buffer("times", torch.tensor(times, dtype=torch.float64))
        self.gains = nn.Parameter(torch.ones(len(times), dtype=torch.float64))

    def forward(self, x, t):
        return self.gains[(t[:, None].double() - self.times).abs().argmin(1)][:, None] * x


class Exact(nn.Module):
    """The x0 of data N(0, VARIANCE): linear in x."""

    def __init__(self, schedule):
        super().__init__()
        self.schedule = schedule

    def forward(self, x, t):
        alpha, sigma = (f(t.double())[:, None] for f in (self.schedule.alpha, self.schedule.sigma))
        return alpha * VARIANCE / (alpha**2 * VARIANCE + sigma**2) * x


def told(network, schedule):
    return fs.Denoiser(network, schedule, "x0", time="t", dtype=torch.float64)


def gains_on(grid):
    student = told(Gains([node.t for node in grid.nodes[:-1]]), grid.schedule)
    return student, student.network.gains


def slope(node):
    return node.alpha * VARIANCE / (node.alpha**2 * VARIANCE + node.sigma**2)


def ddim_factor(s, t):
    return t.sigma / s.sigma + (t.alpha - s.alpha * t.sigma / s.sigma) * slope(s)


def heun_factor(s, t):
    """In y = x / alpha over the level r: y' = (y - x0) / r, an Euler step and then the mean of two slopes."""
    rs, rt = s.sigma / s.alpha, t.sigma / t.alpha
    first = (1 - s.alpha * slope(s)) / rs
    moved = 1 + (rt - rs) * first
    if rt > 0:
        moved = 1 + (rt - rs) * 0.5 * (first + moved * (1 - t.alpha * slope(t)) / rt)
    return t.alpha / s.alpha * moved


def fixed(monkeypatch, i, eps):
    """The losses below draw these."""
    monkeypatch.setattr(draws, "randint", lambda high, size, device=None: i)
    monkeypatch.setattr(draws, "randn_like", lambda x: eps)


@pytest.mark.parametrize("schedule", [fs.VP.scaled_linear(), fs.EDM(), fs.Flow(), fs.VPContinuous()], ids=repr)
@pytest.mark.parametrize(("solver", "factor"), [("ddim", ddim_factor), ("heun", heun_factor)])
@pytest.mark.parametrize("distance", ["pseudo_huber", "l2", "l1"])
def test_the_loss_is_zero_at_the_exact_student_and_its_gradient_points_there(
    schedule, solver, factor, distance, monkeypatch
):
    """Of Gaussian data the steps of the teacher are factors, and the student's gains their products."""
    if solver == "heun" and isinstance(schedule, fs.Flow):
        spacing = fs.at_times([0.95, 0.7, 0.4, 0.2, 0.05])  # heun cannot start at alpha = 0
    else:
        spacing = fs.uniform_t
    grid = fs.grid(schedule, 5, spacing)
    student, gains = gains_on(grid)
    method = distill.ConsistencyDistillation(
        student, told(Exact(schedule), schedule), times=5, spacing=spacing, solver=solvers.get(solver),
        distance=distance, weight="uniform",
    )  # fmt: skip
    product = 1.0
    with torch.no_grad():
        for k, (s, t) in reversed(list(enumerate(grid.steps()))):
            product *= factor(s, t)
            gains[k] = product
    batch = {"x0": 0.3 * torch.randn(64, 1, dtype=torch.float64)}
    scale = float(gains.detach().abs().max())
    for k in range(5):
        fixed(monkeypatch, torch.full((64,), k), torch.randn(64, 1, dtype=torch.float64))

        def gradient(change, k=k):
            with torch.no_grad():
                gains[k] += change
            gains.grad = None
            loss = method.loss("student", batch, 0)
            loss.backward()
            with torch.no_grad():
                gains[k] -= change
            return loss.item(), gains.grad.clone()

        loss, _ = gradient(0.0)
        assert loss < 1e-9 * scale
        low, high = (gradient(change)[1] for change in (-0.01 * scale, 0.01 * scale))
        assert low[k] < 0 < high[k]
        others = torch.arange(5) != k
        assert torch.equal(high[others], torch.zeros(4, dtype=torch.float64))  # none to the target


class Mixture:
    """Two Gaussians at +-0.6, exactly: x0, and the end of the probability-flow path, which keeps quantiles in 1-d."""

    centre, std = 0.6, 0.12

    def __init__(self, schedule):
        self.schedule = schedule

    def _at(self, t):
        alpha, sigma = (f(t.double())[:, None] for f in (self.schedule.alpha, self.schedule.sigma))
        return alpha, sigma, (alpha**2 * self.std**2 + sigma**2).sqrt()

    def cdf(self, x, alpha, root):
        return sum(torch.special.ndtr((x - sign * alpha * self.centre) / root) for sign in (-1, 1)) / 2

    def x0(self, x, t):
        alpha, sigma, root = self._at(t)
        share = torch.tanh(alpha * self.centre * x / root**2)  # of +centre less that of -centre
        return (share * self.centre * sigma**2 + alpha * self.std**2 * x) / root**2

    def end(self, x, t):
        alpha, _, root = self._at(t)
        p = self.cdf(-x.abs(), alpha, root)  # in the lower half, where a CDF is exact
        low, high = torch.full_like(x, -2.0), torch.zeros_like(x)
        for _ in range(60):
            middle = (low + high) / 2
            below = self.cdf(middle, 1.0, self.std) < p
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return -middle * x.sign()

    def data(self, n):
        generator = torch.Generator().manual_seed(3)
        signs = 2.0 * torch.randint(2, (n, 1), generator=generator) - 1
        return signs * self.centre + self.std * torch.randn(n, 1, generator=generator, dtype=torch.float64)


class Off(nn.Module):
    """f* of the mixture, and an error sigma."""

    def __init__(self, mixture, error):
        super().__init__()
        self.mixture = mixture
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def forward(self, x, t):
        return self.mixture.end(x, t) + self.error * self.mixture._at(t)[1]


class Says(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, t):
        return self.function(x, t)


def mixture_loss(times, solver, error=0.0, batch=4000, **options):
    mixture = Mixture(fs.VP.scaled_linear())
    method = distill.ConsistencyDistillation(
        told(Off(mixture, error), mixture.schedule), told(Says(mixture.x0), mixture.schedule),
        times=times, solver=solver, weight="uniform", distance="l1", **options,
    )  # fmt: skip
    torch.manual_seed(4)
    loss = method.loss("student", {"x0": mixture.data(batch)}, 0)
    loss.backward()
    return loss.item(), float(method.student.network.error.grad)


def test_on_a_mixture_the_loss_of_the_exact_function_falls_by_the_order_of_the_step():
    """It is the error of one step, of order 2 by DDIM and 3 by Heun: it falls by 4 and 8 when the times double."""

    def without_the_last(grid):  # to sigma = 0 both are DDIM
        return [1.0] * (len(grid) - 1) + [0.0]

    losses = {}
    for solver, least in ((solvers.ddim, 3.3), (solvers.heun, 6.0)):
        losses[solver] = [
            mixture_loss(times, solver, sampling=without_the_last, spacing=fs.karras)[0] for times in (40, 80)
        ]
        assert losses[solver][0] / losses[solver][1] > least
    assert losses[solvers.heun][0] < 0.2 * losses[solvers.ddim][0]


@pytest.mark.parametrize("solver", [solvers.ddim, solvers.heun], ids=lambda f: f.__name__)
def test_on_a_mixture_the_gradient_points_to_the_exact_function(solver):
    (low, down), (exact, _), (high, up) = (mixture_loss(64, solver, error) for error in (-0.1, 0.0, 0.1))
    assert down < 0 < up
    assert exact < 0.5 * min(low, high)


class MLP(nn.Module):
    """F of an EDM network on 4 numbers, told c_noise."""

    def __init__(self, seed):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.layers = nn.Sequential(nn.Linear(5, 16), nn.SiLU(), nn.Linear(16, 4)).double()

    def forward(self, x, t):
        flat = self.layers(torch.cat([x.flatten(1), t[:, None].to(x) / 1000], 1))
        return flat.view_as(x)


def authors_loss(student, target, teacher, x0, z, indices, count=18, sd=0.5, least=0.002, most=80.0, rho=7.0):
    """Consistency distillation as openai/consistency_models computes it, from its formulas: Karras times, a Heun step
    of the plain EDM denoiser, both sides by c_skip and c_out moved by sigma_min, mean squares, weight 1.
    """

    def denoised(network, x, t, shift):
        t = t.view(-1, 1, 1, 1)
        skip = sd**2 / ((t - shift) ** 2 + sd**2)
        out = sd * (t - shift) / (t**2 + sd**2).sqrt()
        return skip * x + out * network(x / (t**2 + sd**2).sqrt(), 250 * t.flatten().log())

    def time(k):
        high, low = most ** (1 / rho), least ** (1 / rho)
        return (high + k.double() / (count - 1) * (low - high)) ** rho

    t, t2 = time(indices), time(indices + 1)
    wide, wide2 = t.view(-1, 1, 1, 1), t2.view(-1, 1, 1, 1)
    x = x0 + z * wide
    with torch.no_grad():
        d = (x - denoised(teacher, x, t, 0.0)) / wide
        euler = x + d * (wide2 - wide)
        d2 = (euler - denoised(teacher, euler, t2, 0.0)) / wide2
        x2 = x + (d + d2) * (wide2 - wide) / 2
        aim = denoised(target, x2, t2, least)
    return ((denoised(student, x, t, least) - aim) ** 2).flatten(1).mean(1).mean()


def test_the_loss_is_that_of_openai_consistency_models(monkeypatch):
    """On the same networks, batch, noises and intervals, with its gradient; the last interval is among them."""
    student, teacher = (MLP(seed) for seed in (1, 2))
    method = distill.ConsistencyDistillation(
        distill.edm_model(student, noise_scale=1000.0, boundary="edm"),
        distill.edm_model(teacher, noise_scale=1000.0),
        times=17, spacing=fs.karras, solver=solvers.heun, distance="l2", weight="uniform", target=0.9,
    )  # fmt: skip
    target = method.kept["target"].network
    with torch.no_grad():
        for value in target.parameters():
            value.mul_(1.3)
    generator = torch.Generator().manual_seed(0)
    x0, z = (torch.randn(34, 1, 2, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    indices = torch.arange(34) % 17
    fixed(monkeypatch, indices, z)
    ours = method.loss("student", {"x0": x0}, 0)
    theirs = authors_loss(student, target, teacher, x0, z, indices)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    parameters = list(student.parameters())
    for one, other in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(theirs, parameters)):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "solver",
    [solvers.ddim, solvers.euler, solvers.heun, solvers.dpm_solver_2, solvers.dpmpp_3s, solvers.dpmpp_2m, solvers.plms],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("schedule", [fs.VP.scaled_linear(), fs.EDM()], ids=repr)
def test_a_batch_of_intervals_walks_as_each_of_them_by_itself(solver, schedule):
    """Against `solve` on the interval alone; some take fewer evaluations to sigma = 0."""
    teacher = told(Says(Mixture(schedule).x0), schedule)
    grid = fs.grid(schedule, 6, fs.karras)
    steps = teacher_steps(solver, grid)
    x = torch.randn(12, 1, dtype=torch.float64)
    i = torch.arange(12) % 6
    walked = steps.walk(teacher, x, i, {})
    for k in range(12):
        s, t = list(grid.steps())[i[k]]
        alone = solver(Predicts(teacher), x[k : k + 1], fs.Grid(schedule, (s, t)))
        torch.testing.assert_close(walked[k : k + 1], alone, rtol=1e-9, atol=1e-9)


class Predicts:
    def __init__(self, model):
        self.predict = model.predict


def test_heun_asks_the_teacher_twice_and_ddim_once(toy):
    for solver, calls in ((None, 1), (solvers.ddim, 1), (solvers.heun, 2)):
        teacher = toy(seed=1)
        options = {} if solver is None else {"solver": solver}
        method = distill.ConsistencyDistillation(toy(), teacher, **options)
        method.loss("student", {"x0": torch.rand(16, 2)}, 0)
        assert teacher.count.calls == calls


def test_a_guided_teacher_walks_by_heun(toy):
    teacher = toy(seed=1)
    guided = fs.Guided(teacher, uncond={"class_labels": 2}, scale=3.0)
    labels = torch.arange(16) % 2
    batch = {"x0": torch.rand(16, 2), "class_labels": labels}
    method = distill.ConsistencyDistillation(toy(), guided, solver=solvers.heun)
    torch.manual_seed(0)
    with_guidance = method.loss("student", batch, 0)
    torch.manual_seed(0)
    without = distill.ConsistencyDistillation(toy(), teacher, solver=solvers.heun).loss("student", batch, 0)
    assert with_guidance.isfinite()
    assert abs(with_guidance.item() - without.item()) > 1e-3


@pytest.mark.parametrize(
    ("solver", "cause"),
    [
        (solvers.euler_ancestral, "euler_ancestral adds noise from t = 999 to t = .* a teacher's step must follow"),
        (partial(solvers.heun, s_churn=1.0), r"heun\(s_churn=1\.0\) adds noise"),
        (solvers.rk45, "rk45 cannot walk one interval of the teacher, .* chooses its steps"),
        (lambda model, x, grid: [*grid.steps()][1] and x, "cannot walk one interval of the teacher, from t = 999"),
    ],
    ids=["noise", "churn", "adaptive", "two intervals"],
)
def test_a_solver_that_cannot_be_the_step_of_a_teacher_is_refused(solver, cause, toy):
    with pytest.raises(ValueError, match=cause):
        distill.ConsistencyDistillation(toy(), toy(), solver=solver)


def test_a_bounded_student_is_trained_down_to_its_boundary(toy):
    schedule = fs.VP.scaled_linear()
    free = distill.ConsistencyDistillation(toy(), toy(seed=1), times=4)
    bounded = distill.ConsistencyDistillation(distill.bounded(toy(), "edm"), toy(seed=1), times=4)
    assert free.grid.nodes[-1].sigma == 0
    assert bounded.grid.nodes[-1].t == schedule.t_min
    assert len(free.grid) == len(bounded.grid) == 4
    assert bounded.loss("student", {"x0": torch.rand(16, 2)}, 0).isfinite()
    assert bounded.settings()["boundary"] == {"name": "edm", "sigma_data": 0.5, "t_min": None}


def test_the_target_of_the_last_interval_is_the_state_itself(monkeypatch, toy):
    """With the boundary of EDM and without: the teacher's step, not f of the network there."""
    teacher = toy(seed=1)
    for student in (toy(), distill.bounded(toy(), distill.EDMBoundary()), distill.bounded(toy(), "lcm")):
        seen = []

        def distance(a, b, seen=seen):
            seen.append(b)
            return (a - b).square().mean(1)

        method = distill.ConsistencyDistillation(student, teacher, times=3, distance=distance)
        x0, eps = torch.rand(8, 2), torch.randn(8, 2)
        fixed(monkeypatch, torch.full((8,), 2), eps)
        method.loss("student", {"x0": x0}, 0)
        s, t = method.grid.nodes[-2:]
        with torch.no_grad():
            x = s.alpha * x0 + s.sigma * eps
            expected = fs.exponential_step(x, teacher.predict(x, s), s, t)
        scale = t.alpha if isinstance(student, distill.Bounded) and student.boundary.name == "edm" else 1.0
        torch.testing.assert_close(seen[0], expected / scale, rtol=1e-4, atol=1e-5)


def test_a_moving_average_is_the_target_and_follows_the_student(toy):
    method = distill.ConsistencyDistillation(toy(), toy(seed=1), target=0.75)
    average, student = method.kept["target"], method.student.network
    before = [value.clone() for value in average.parameters()]
    assert all(not value.requires_grad for value in average.parameters())
    with torch.no_grad():
        for value in student.parameters():
            value.add_(1.0)
    method.after(0)
    for old, new in zip(before, average.parameters()):
        torch.testing.assert_close(new, old + 0.25)


def test_a_rate_of_zero_is_the_student_itself_and_a_schedule_is_asked_for_each_step(toy):
    steps = []
    method = distill.ConsistencyDistillation(toy(), toy(seed=1), target=lambda step: steps.append(step) or 0.0)
    average = method.kept["target"]
    with torch.no_grad():
        for value in method.student.network.parameters():
            value.mul_(1.7)
    method.after(7)
    assert steps[-1] == 7
    for a, b in zip(average.parameters(), method.student.network.parameters()):
        assert torch.equal(a, b)
    torch.manual_seed(0)
    with_average = method.loss("student", {"x0": torch.rand(16, 2)}, 0)
    torch.manual_seed(0)
    plain = distill.ConsistencyDistillation(method.student, toy(seed=1)).loss("student", {"x0": torch.rand(16, 2)}, 0)
    assert torch.equal(with_average, plain)


def test_no_gradient_reaches_the_moving_average_and_the_student_is_asked_once(toy):
    method = distill.ConsistencyDistillation(toy(), toy(seed=1), target=0.9)
    method.loss("student", {"x0": torch.rand(16, 2)}, 0).backward()
    assert method.student.count.calls == 1
    assert all(value.grad is None for value in method.kept["target"].parameters())


def test_a_half_precision_student_has_a_float32_average_and_a_float32_loss(toy):
    """In bfloat16 a step of 0.001 of the average would be rounded away."""
    student = fs.Denoiser(HalfNetwork(), fs.VP.scaled_linear(), "v")
    method = distill.ConsistencyDistillation(student, toy(seed=1), target=0.999)
    average = method.kept["target"]
    assert {value.dtype for value in average.parameters()} == {torch.float32}
    before = average.layer.weight.clone()
    with torch.no_grad():
        student.network.layer.weight.add_(1.0)
    method.after(0)
    moved = (average.layer.weight - before) / (student.network.layer.weight.float() - before)
    torch.testing.assert_close(moved, torch.full_like(moved, 0.001), rtol=1e-2, atol=0)
    loss = method.loss("student", {"x0": torch.rand(16, 2)}, 0)
    assert loss.dtype == torch.float32
    loss.backward()
    assert student.network.layer.weight.grad.isfinite().all()


class HalfNetwork(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2).to(torch.bfloat16)

    def forward(self, x, t):
        return self.layer(x)


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "xpu:0"])
def test_the_generator_of_the_device_is_kept_for_the_second_pass(device, monkeypatch):
    """A known fault: masks differ on a GPU where the generator of the CPU alone is restored."""
    asked = {}
    real = torch.random.fork_rng

    def fork(devices=None, enabled=True, device_type="cuda"):
        asked.update(devices=devices, device_type=device_type)
        return real(devices=[])

    monkeypatch.setattr(torch.random, "fork_rng", fork)
    with same_dropout(torch.device(device)):
        inside = torch.rand(3)
    assert torch.equal(torch.rand(3), inside)
    if device != "cpu":
        assert asked == {"devices": [torch.device(device)], "device_type": device.split(":")[0]}
    else:
        assert asked["devices"] == []


def test_the_number_of_times_depends_on_the_step_alone(toy, monkeypatch):
    method = distill.ConsistencyDistillation(toy(), toy(seed=1), times=Doubling(2, 16, over=40))
    assert [len(method.grid_at(step)) for step in (0, 9, 10, 20, 30, 39, 1000)] == [2, 2, 4, 8, 16, 16, 16]
    highs = []

    def randint(high, size, device=None):
        highs.append(high)
        return torch.zeros(size, dtype=torch.long)

    monkeypatch.setattr(draws, "randint", randint)
    for step in (30, 0, 10):
        method.loss("student", {"x0": torch.rand(16, 2)}, step)
    assert highs == [16, 2, 4]


def test_intervals_are_drawn_as_often_as_the_sampling_says(toy):
    method = distill.ConsistencyDistillation(toy(), toy(seed=1), times=8, sampling=Lognormal(0.0, 1.0))
    way = method._path(8)
    torch.manual_seed(0)
    counts = torch.bincount(way.random(200_000, torch.device("cpu")), minlength=8).double() / 200_000
    torch.testing.assert_close(counts, torch.tensor(Lognormal(0.0, 1.0)(method.grid)).double(), atol=5.6e-3, rtol=0)
    only = distill.ConsistencyDistillation(toy(), toy(), times=3, sampling=lambda grid: [0, 1, 0])._path(3)
    assert set(only.random(1000, torch.device("cpu")).tolist()) == {1}


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("uniform", lambda s, t: 1.0),
        ("snr", lambda s, t: (s.alpha / s.sigma) ** 2),
        ("snr+1", lambda s, t: (s.alpha / s.sigma) ** 2 + 1),
        ("truncated_snr", lambda s, t: max((s.alpha / s.sigma) ** 2, 1.0)),
        ("interval", lambda s, t: 1 / (s.sigma / s.alpha - t.sigma / t.alpha)),
    ],
)
def test_each_distance_has_the_weight_of_its_interval(name, weight, toy, monkeypatch):
    method = distill.ConsistencyDistillation(
        toy(), toy(seed=1), times=5, weight=name, distance=lambda a, b: (a - b).sum(1) * 0 + 1
    )
    fixed(monkeypatch, torch.arange(10) % 5, torch.randn(10, 2))
    expected = sum(weight(s, t) for s, t in method.grid.steps()) / 5
    assert method.loss("student", {"x0": torch.rand(10, 2)}, 0).item() == pytest.approx(expected, rel=1e-6)
    assert name in WEIGHTS


def test_a_weight_of_the_user_is_given_the_nodes(toy):
    method = distill.ConsistencyDistillation(
        toy(), toy(seed=1), weight=lambda s: 0 * s.sigma + 3, distance=lambda a, b: (a - b).sum(1) * 0 + 1
    )
    assert method.loss("student", {"x0": torch.rand(10, 2)}, 0).item() == pytest.approx(3)


def test_settings_say_all_that_a_checkpoint_compares(toy):
    import json

    method = distill.ConsistencyDistillation(
        toy(), toy(seed=1), times=Doubling(2, 8, over=10), solver=partial(solvers.heun, s_noise=1.0),
        distance=distill.PseudoHuber(0.1), sampling="lognormal", target=distill.Matched(SquareRoot(over=9)),
    )  # fmt: skip
    found = json.loads(json.dumps(method.settings()))
    assert found["times"] == {"name": "Doubling", "first": 2, "last": 8, "over": 10}
    assert found["distance"] == {"name": "PseudoHuber", "c": 0.1}
    assert found["solver"] == "heun(s_noise=1.0)"
    times = {"name": "SquareRoot", "s0": 2, "s1": 150, "over": 9}
    assert found["target"] == {"name": "Matched", "times": times, "mu0": 0.9, "s0": 2}
    guided = fs.Guided(toy(), uncond={"class_labels": 2}, scale=3.0)
    assert distill.ConsistencyDistillation(toy(), guided).settings()["teacher"]["scale"] == 3.0


def test_wrong_arguments_are_refused(toy):
    make = partial(distill.ConsistencyDistillation, toy(), toy(seed=1))
    for options, message in (
        ({"distance": "lpips"}, "unknown distance 'lpips'"),
        ({"weight": "karras"}, "unknown weight 'karras'; choose one of uniform, snr"),
        ({"sampling": "karras"}, "unknown sampling 'karras'"),
        ({"sampling": lambda grid: [1.0]}, "sampling must give 16 shares for 16 intervals"),
        ({"sampling": lambda grid: [-1.0] + 15 * [1.0]}, "none negative"),
        ({"target": "ema"}, "unknown target 'ema'; choose 'student', or the rate"),
        ({"target": 1.0}, "at least 0 and below 1, got 1"),
        ({"target": -0.5}, "at least 0 and below 1, got -0.5"),
        ({"times": 0}, r"at least 1 \(N = 2 times\), got 0"),
        ({"times": "many"}, "times must be a number of intervals or a function of the step, got 'many'"),
        ({"times": lambda step: 0}, "times gave 0 intervals at step 0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(**options)


def test_a_run_with_an_average_and_a_curriculum_goes_on_bit_for_bit(toy, loader, tmp_path, weights):
    """Stopped in the middle of a stage, by an error; the average is in the checkpoints."""

    def method():
        times = SquareRoot(2, 8, over=8)
        return distill.ConsistencyDistillation(
            toy(dropout=0.1), toy(seed=1), times=times, target=distill.Matched(times), solver=solvers.heun
        )

    class Stopped(Exception):
        pass

    def train(method, out):
        return distill.train(method, loader, steps=8, out=tmp_path / out, save_every=3, progress=False)

    whole = method()
    expected = weights(train(whole, "whole"))
    broken = method()
    after = broken.after

    def stop(step):
        after(step)
        if step == 4:
            raise Stopped

    object.__setattr__(broken, "after", stop)
    with pytest.raises(Stopped):
        train(broken, "broken")
    again = method()
    found = weights(train(again, "broken"))
    for key, value in expected.items():
        assert torch.equal(found[key], value)
    for a, b in zip(whole.kept["target"].parameters(), again.kept["target"].parameters()):
        assert torch.equal(a, b)
    assert not math.isclose(float(a.detach().sum()), float(toy().network.layers[-1].bias.detach().sum()))
