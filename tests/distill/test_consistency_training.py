"""Consistency training and easy consistency tuning: their discrete optimum, their limit, and their papers' formulas."""

import math

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill
from fastsample.distill import draws

pytest.importorskip("accelerate")
STD = 0.3
SCHEDULES = [fs.EDM(), fs.VP.scaled_linear(), fs.VPContinuous()]


class Gains(nn.Module):
    """f(x, t) = gain x, one gain for each node of a grid (a free number: any linear student)."""

    def __init__(self, times):
        super().__init__()
        self.register_buffer("times", torch.tensor(times, dtype=torch.float64))
        self.gains = nn.Parameter(torch.ones(len(times), dtype=torch.float64))

    def forward(self, x, t):
        return self.gains[(t[:, None].double() - self.times).abs().argmin(1)][:, None] * x


class Function(nn.Module):
    """A function of x and t, and an error sigma."""

    def __init__(self, function, schedule, error=0.0):
        super().__init__()
        self.function, self.schedule = function, schedule
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def forward(self, x, t):
        alpha, sigma = (f(t.double())[:, None] for f in (self.schedule.alpha, self.schedule.sigma))
        return self.function(x, alpha, sigma) + self.error * sigma


def told(network, schedule):
    return fs.Denoiser(network, schedule, "x0", time="t", dtype=torch.float64)


def half(schedule):
    """A student that says x / 2."""
    return told(Function(lambda x, alpha, sigma: 0.5 * x, schedule), schedule)


def moments(count=64):
    """x0 and eps whose sample variances are STD^2 and 1, and whose covariance is 0, to the last digit."""
    generator = torch.Generator().manual_seed(0)
    pair = torch.linalg.qr(torch.randn(count, 2, generator=generator, dtype=torch.float64)).Q * math.sqrt(count)
    return STD * pair[:, :1], pair[:, 1:]


def fixed(monkeypatch, i, eps):
    monkeypatch.setattr(draws, "randint", lambda high, size, device=None: i)
    monkeypatch.setattr(draws, "randn_like", lambda x: eps)


def discrete_gains(grid):
    """The best f(x_s) = gain x_s, where f(x_t) is known: the regression of f(x_t) on x_s, from the clean end up.

    gain_s = gain_t Cov(x_t, x_s) / Var(x_s).
    """
    gains = [1.0]
    for s, t in reversed(list(grid.steps())):
        covariance = s.alpha * t.alpha * STD**2 + s.sigma * t.sigma
        gains.insert(0, gains[0] * covariance / (s.alpha**2 * STD**2 + s.sigma**2))
    return gains[:-1]


@pytest.mark.parametrize("weight", ["interval", "uniform"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_gradient_vanishes_at_the_discrete_optimum_alone(schedule, weight, monkeypatch):
    """With finitely many times training on data is not solved by the probability-flow map, but by these regressions."""
    grid = fs.grid(schedule, 6, fs.karras)
    student = told(Gains([node.t for node in grid.nodes[:-1]]), schedule)
    gains = student.network.gains
    method = distill.ConsistencyTraining(student, times=6, sampling="uniform", distance="l2", weight=weight)
    exact = torch.tensor(discrete_gains(grid), dtype=torch.float64)
    x0, eps = moments()
    for k in range(6):
        fixed(monkeypatch, torch.full((64,), k), eps)

        def gradient(change, k=k):
            with torch.no_grad():
                gains.copy_(exact)
                gains[k] *= 1 + change
            gains.grad = None
            method.loss("student", {"x0": x0}, 0).backward()
            return gains.grad.clone()

        low, zero, high = (gradient(change) for change in (-0.1, 0.0, 0.1))
        assert low[k] < 0 < high[k]
        assert zero.abs().max() < 1e-9 * high[k]
        assert torch.equal(high[torch.arange(6) != k], torch.zeros(5, dtype=torch.float64))  # none to the target


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_the_discrete_optimum_goes_to_the_probability_flow_map_as_the_times_grow(schedule):
    """By their first order: four times as many, a quarter of the error. This is what a curriculum is for."""
    first, last = (fs.node(schedule, t) for t in (schedule.t_max, schedule.t_min))
    roots = [math.hypot(node.alpha * STD, node.sigma) for node in (first, last)]
    few, more = (
        abs(discrete_gains(fs.grid(schedule, n, fs.karras, end=last.t))[0] * roots[0] / roots[1] - 1)
        for n in (200, 800)
    )
    assert more < 0.05
    assert few / more == pytest.approx(4, rel=0.2)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_in_the_limit_the_gradient_points_to_the_probability_flow_map(schedule):
    def gradient(error):
        def end(x, alpha, sigma):
            return STD * x / (alpha**2 * STD**2 + sigma**2).sqrt()

        method = distill.ConsistencyTraining(told(Function(end, schedule, error), schedule), times=640)
        torch.manual_seed(0)
        method.loss("student", {"x0": STD * torch.randn(40_000, 1, dtype=torch.float64)}, 0).backward()
        return float(method.student.network.error.grad)

    assert gradient(-0.1) < 0 < gradient(0.1)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        *((name, schedule) for name in ("training", "original", "tuning") for schedule in SCHEDULES),
        ("tuning", fs.Flow()),  # where karras times cannot start
    ],
    ids=repr,
)
def test_the_loss_of_one_image_is_zero_at_its_denoiser_and_its_gradient_points_there(name, schedule):
    """With a single image there is but one path to each state: f* is the image, and nothing is lost by the times."""

    def run(error):
        student = told(Function(lambda x, alpha, sigma: 0 * x + 0.4, schedule, error), schedule)
        method = {
            "training": lambda: distill.ConsistencyTraining(student, times=20),
            "original": lambda: distill.ConsistencyTraining.original(student, over=100),
            "tuning": lambda: distill.EasyConsistencyTuning(student, every=10),
        }[name]()
        torch.manual_seed(0)
        loss = method.loss("student", {"x0": torch.full((500, 1), 0.4, dtype=torch.float64)}, 35)
        loss.backward()
        return loss.item(), float(student.network.error.grad)

    (low, down), (zero, _), (high, up) = (run(error) for error in (-0.1, 0.0, 0.1))
    assert abs(zero) < 1e-12
    assert min(low, high) > 1e-7  # 1e-2 (sigma_s - sigma_t)^2 at the least
    assert down < 0 < up


def test_both_sides_have_the_same_noise(monkeypatch, toy):
    """x_t is x_s with less of it: (x_s - alpha_s x0) / sigma_s = (x_t - alpha_t x0) / sigma_t."""
    for method in (
        distill.ConsistencyTraining(toy(), times=6),
        distill.EasyConsistencyTuning(toy(), every=1),
    ):
        asked = []
        predict = method.student.predict
        method.student.predict = lambda x, at, asked=asked, predict=predict: asked.append((x, at)) or predict(x, at)
        x0 = torch.rand(64, 2)
        method.loss("student", {"x0": x0}, 5)
        (x_t, t), (x_s, s) = asked
        one, other = ((x - at.alpha[:, None] * x0) / at.sigma[:, None] for x, at in ((x_t, t), (x_s, s)))
        between = t.t < s.t  # else t is sigma = 0, where the network is not asked for anything
        assert between.sum() > 16
        torch.testing.assert_close(one[between], other[between], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["training", "tuning"])
def test_both_passes_meet_the_same_dropout_mask_and_no_gradient_reaches_the_target(name, toy):
    masks, student = [], toy(dropout=0.5)
    student.network.layers[2].register_forward_hook(lambda module, args, out: masks.append((out == 0, out.grad_fn)))
    options = {"times": 6} if name == "training" else {"every": 1}
    kind = distill.ConsistencyTraining if name == "training" else distill.EasyConsistencyTuning
    method = kind(student, **options)
    student.network.train()
    method.loss("student", {"x0": torch.rand(64, 2)}, 0).backward()
    (first, no_gradient), (second, gradient) = masks
    assert torch.equal(first, second)
    assert no_gradient is None
    assert gradient is not None
    method.loss("student", {"x0": torch.rand(64, 2)}, 0)
    assert not torch.equal(first, masks[2][0])


def test_improved_training_is_the_loss_of_its_paper(monkeypatch):
    """An EDM network with c_skip and c_out moved by sigma_min: written out again, for one batch."""

    class F(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3).double()

        def forward(self, x, t):
            return self.layer(x) * (1 + t[:, None])

    network, sd, least = F(), 0.5, 0.002
    method = distill.ConsistencyTraining(distill.edm_model(network, boundary="edm"), times=10)
    generator = torch.Generator().manual_seed(0)
    x0, z = (torch.randn(30, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    k = torch.arange(30) % 10
    monkeypatch.setattr(draws, "randn_like", lambda x: z)
    object.__setattr__(method._path(10), "reached", None)  # the intervals are given
    monkeypatch.setattr(draws, "randint", lambda high, size, device=None: k)

    def f(x, t):
        t = t[:, None]
        said = network(x / (t**2 + sd**2).sqrt(), t.flatten().log() / 4)
        return sd**2 / ((t - least) ** 2 + sd**2) * x + sd * (t - least) / (sd**2 + t**2).sqrt() * said

    levels = torch.tensor([(80 ** (1 / 7) + i / 10 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(11)])
    levels = levels.double()
    high, low = levels[k], levels[k + 1]
    with torch.no_grad():
        aim = f(x0 + low[:, None] * z, low)
    square = (f(x0 + high[:, None] * z, high) - aim).square().sum(1)
    c = 0.00054 * math.sqrt(3)
    expected = (((square + c**2).sqrt() - c) / (high - low)).mean()
    ours = method.loss("student", {"x0": x0}, 0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)  # the levels above are rounded to float32
    parameters = list(network.parameters())
    for one, other in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(expected, parameters)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_a_vp_network_is_trained_as_the_edm_network_it_is(monkeypatch):
    """The same function of (x / alpha, sigma / alpha) has the same loss on both schedules."""
    vp = fs.VPContinuous()
    levels = [float(vp.sigma(t) / vp.alpha(t)) for t in (0.9, 0.5, 0.2, 0.05)]

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2).double()

        def forward(self, y, level):
            return self.layer(y / (1 + level[:, None]))

    network = Seen()

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, x, t):
            return self.network(x / vp.alpha(t.double())[:, None], (vp.sigma(t.double()) / vp.alpha(t.double())))

    one = distill.ConsistencyTraining(
        told(Scaled(), vp), times=4, sampling="uniform", spacing=fs.at_times([0.9, 0.5, 0.2, 0.05])
    )
    other = distill.ConsistencyTraining(
        fs.Denoiser(network, fs.EDM(), "x0", dtype=torch.float64),
        times=4, sampling="uniform", spacing=fs.at_times(levels),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    x0, z = (torch.randn(40, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    fixed(monkeypatch, torch.arange(40) % 4, z)
    batch = {"x0": x0}
    torch.testing.assert_close(
        one.loss("student", batch, 0), other.loss("student", batch, 0), rtol=1e-5, atol=0
    )  # t is told in float64, levels of it are rounded on the way through time


def test_the_original_training_has_the_curriculum_and_the_average_of_its_paper(toy):
    method = distill.ConsistencyTraining.original(toy(), over=1000)
    assert [len(method.grid_at(step)) for step in (0, 1000)] == [1, 150]
    assert method.target(0) == pytest.approx(0.9)
    assert method.target(1000) == pytest.approx(math.exp(2 * math.log(0.9) / 151))
    assert list(method.kept) == ["target"]
    assert (method.weight, method.sampling) == ("uniform", "uniform")


def test_improved_training_has_no_average_and_draws_lognormal_intervals(toy):
    method = distill.ConsistencyTraining(toy(), times=8)
    assert method.kept == {}
    torch.manual_seed(0)
    way = method._path(8)
    found = torch.bincount(way.random(100_000, torch.device("cpu")), minlength=8).double() / 100_000
    expected = torch.tensor(distill.Lognormal(-1.1, 2.0)(method.grid_at(0))).double()
    torch.testing.assert_close(found, expected, atol=8e-3, rtol=0)  # five standard errors


def test_easy_tuning_has_the_levels_of_its_paper():
    method = distill.EasyConsistencyTuning(half(fs.EDM()), every=100, q=2.0, stages=4)
    t = torch.tensor([0.01, 0.5, 3.0, 40.0], dtype=torch.float64)
    for step, stage in ((0, 0), (99, 0), (100, 1), (399, 3), (10_000, 3)):
        assert method.stage(step) == stage
        n = [1 + 8 / (1 + math.exp(float(x))) for x in t]
        expected = [max(0.0, float(x) * (1 - m / 2 ** (stage + 1))) for x, m in zip(t, n)]
        torch.testing.assert_close(method.smaller(t, step), torch.tensor(expected, dtype=torch.float64))
    assert method.smaller(t, 0)[0] == 0  # the first stage is diffusion where there is little noise
    short = distill.EasyConsistencyTuning(half(fs.EDM()), every=100, q=256.0, stages=1)
    assert (short.smaller(t, 0) / t > 0.97).all()


@pytest.mark.parametrize("schedule", [*SCHEDULES, fs.Flow(), fs.VP.scaled_linear().zero_terminal_snr()], ids=repr)
@pytest.mark.parametrize("bounded", [False, True])
def test_easy_tuning_places_its_pairs_on_every_schedule(schedule, bounded):
    model = half(schedule)
    method = distill.EasyConsistencyTuning(distill.bounded(model, "edm") if bounded else model, every=10, mean=0.0)
    least = float(torch.exp(-schedule.lam(schedule.t_min)))
    for step in (0, 30, 1000):
        level = torch.logspace(-4, 3, 50, dtype=torch.float64)
        s, t = method.pair(level, step)
        assert (t.t <= s.t).all()
        assert bool((t.sigma == 0).any()) == (step == 0 and not bounded)
        found, r = s.sigma / s.alpha, t.sigma / t.alpha
        most = float(torch.exp(-schedule.lam(schedule.t_max)))
        torch.testing.assert_close(found, level.clamp(least, most), rtol=1e-6, atol=0)
        asked = method.smaller(found, step)
        torch.testing.assert_close(r, asked.clamp(min=least) if bounded else asked, rtol=1e-5, atol=1e-9)
    x0 = torch.rand(2000, 1, dtype=torch.float64)
    assert method.loss("student", {"x0": x0}, 0).isfinite()


def test_easy_tuning_weighs_by_the_distance_of_the_levels(toy):
    method = distill.EasyConsistencyTuning(
        toy(), every=1, stages=1, q=16.0, distance=lambda a, b: (a - b).sum(1) * 0 + 1
    )
    seen = []
    pair = method.pair
    object.__setattr__(method, "pair", lambda level, step: seen.append(pair(level, step)) or seen[-1])
    loss = method.loss("student", {"x0": torch.rand(100, 2)}, 0)
    ((s, t),) = seen
    expected = (1 / (s.sigma / s.alpha - t.sigma / t.alpha)).mean()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_wrong_arguments_are_refused(toy):
    with pytest.raises(ValueError, match=r"at least 1 \(N = 2 times\), got 0"):
        distill.ConsistencyTraining(toy(), times=0)
    with pytest.raises(ValueError, match="unknown weight 'iCT'"):
        distill.ConsistencyTraining(toy(), weight="iCT")
    with pytest.raises(ValueError, match="unknown distance 'huber'"):
        distill.ConsistencyTraining(toy(), distance="huber")
    with pytest.raises(ValueError, match="below 1, got 1"):
        distill.EasyConsistencyTuning(toy(), every=1, target=1.0)
    with pytest.raises(ValueError, match="every must be a whole number of at least 1, got 0"):
        distill.EasyConsistencyTuning(toy(), every=0)
    with pytest.raises(ValueError, match="stages must be a whole number of at least 1, got 0"):
        distill.EasyConsistencyTuning(toy(), every=1, stages=0)
    with pytest.raises(ValueError, match=r"need q > 1, .* got q = 1, k = 8"):
        distill.EasyConsistencyTuning(toy(), every=1, q=1.0)


def test_an_eps_student_is_warned_of_or_refused_where_alpha_is_zero(toy):
    schedule = fs.VP.scaled_linear().zero_terminal_snr()
    eps = fs.Denoiser(toy().network, schedule, "eps")
    with pytest.raises(ValueError, match="the student predicts eps, which says nothing of x0 at alpha = 0"):
        distill.ConsistencyTraining(eps, times=4, spacing=fs.uniform_t)
    with pytest.raises(ValueError, match="the student predicts eps, which says nothing of x0 at alpha = 0"):
        distill.EasyConsistencyTuning(eps, every=1)
    for make in (
        lambda: distill.ConsistencyTraining(toy("eps"), times=4),
        lambda: distill.EasyConsistencyTuning(toy("eps"), every=1),
    ):
        with pytest.warns(UserWarning, match=r"predicts eps.*magnifies its errors by 14\.6") as caught:
            make()
        assert caught[0].filename == __file__
