"""Reflow: stationary on straight paths, straighter on others, with the distribution of its pairs."""

import json
import math

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill, solvers
from fastsample.zoo.exact import GaussianMixture

MEAN, STD = 0.2, 0.3  # of the data


class Monotone(nn.Module):
    """The flow of the pairs (z, MEAN + STD z): along straight lines, on which sigma z + (1 - sigma) x0 says z."""

    def __init__(self, error=0.0):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))

    def forward(self, x, t):
        sigma = t[:, None]
        z = (x - (1 - sigma) * MEAN) / (sigma + (1 - sigma) * STD)
        return z - (MEAN + STD * z) + self.error


def monotone(error=0.0, shift=1.0):
    return fs.Denoiser(Monotone(error), fs.Flow(shift=shift), "flow")


def pairs(n=4096):
    noise = torch.randn(n, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return {"x0": MEAN + STD * noise, "noise": noise}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("least", [0.0, 0.5, 1.0])
def test_the_loss_is_zero_on_the_exact_straight_map_and_points_back_to_it(least, shift):
    def gradient(error):
        method = distill.Reflow(monotone(error, shift), least=least)
        loss = method.loss("student", pairs(), 0)
        loss.backward()
        return loss.item(), method.student.network.error.grad.item()

    loss, slope = gradient(0.0)
    assert loss < 1e-24
    assert abs(slope) < 1e-12
    for error in (-0.1, 0.1):  # what is off by a constant costs its square
        loss, slope = gradient(error)
        assert loss == pytest.approx(error**2, rel=1e-9)
        assert slope == pytest.approx(2 * error, rel=1e-9)


def test_reflow_of_a_gaussian_is_stationary():
    """The flow of independent pairs is curved; that of its own pairs is straight, and so is that of theirs."""
    schedule = fs.Flow()
    mixture = GaussianMixture(schedule, torch.ones(1), torch.full((1, 2), MEAN), torch.tensor(STD**2))
    fine = fs.grid(schedule, 400, fs.uniform_t)
    noise = pairs(256)["noise"]
    curved, straight = distill.straightness(mixture, fine, noise), distill.straightness(monotone(), fine, noise)
    assert curved == pytest.approx(gaussian_straightness(noise), rel=1e-2)  # Euler's error at 400 steps
    assert straight < 1e-24
    ends = [fs.sample(model, fs.trace(solvers.ddim, fine), noise) for model in (mixture, monotone())]
    torch.testing.assert_close(*ends, rtol=0, atol=1e-2)  # one map, along two kinds of paths
    one = fs.sample(monotone(), fs.trace(solvers.ddim, fs.grid(schedule, 1, fs.uniform_t)), noise)
    torch.testing.assert_close(one, MEAN + STD * noise)


def gaussian_straightness(noise):
    """Paths (1 - s) MEAN + root(s) z, root^2 = (1 - s)^2 STD^2 + s^2, by quadrature over s."""
    s = torch.linspace(0, 1, 20001, dtype=torch.float64)
    root = ((1 - s) ** 2 * STD**2 + s**2).sqrt()
    slope = (s - (1 - s) * STD**2) / root
    return float(torch.trapezoid((1 - STD - slope) ** 2, s) * noise.square().sum(1).mean())


def test_straightness_is_the_mean_square_from_the_chord():
    """Of a path with two slopes, 1 and 3 along sigma: the chord has 2, from which each is off by 1."""

    class Bent(nn.Module):
        def forward(self, x, t):
            return torch.where(t > 0.5, 3.0, 1.0)[:, None].expand_as(x)

    model = fs.Denoiser(Bent(), fs.Flow(), "flow")
    noise = torch.randn(5, 3, dtype=torch.float64)
    at = fs.at_times([1.0, 0.5])
    assert distill.straightness(model, fs.grid(model.schedule, 2, at), noise) == pytest.approx(3.0)  # 3 numbers
    skew = fs.at_times([1.0, 0.75, 0.5])
    assert distill.straightness(model, fs.grid(model.schedule, 3, skew), noise) == pytest.approx(3.0)
    assert distill.straightness(model, fs.grid(model.schedule, 1, fs.uniform_t), noise) == 0


def test_sigma_is_uniform_from_least_to_one_whatever_the_shift():
    for shift, least in ((1.0, 0.0), (3.0, 0.0), (1.0, 0.4), (1.0, 1.0)):
        told = []

        class Told(nn.Module):
            def forward(self, x, t):
                told.append(t)  # noqa: B023
                return 0 * x

        method = distill.Reflow(fs.Denoiser(Told(), fs.Flow(shift=shift), "flow"), least=least)
        torch.manual_seed(0)
        method.loss("student", pairs(20_000), 0)
        sigma = told[0].sort().values
        even = least + (1 - least) * (torch.arange(20_000) + 0.5) / 20_000
        assert float((sigma - even).abs().max()) < 0.013  # Kolmogorov: 1.8 / sqrt(n)
        assert sigma.min() > 0
        assert sigma.max() <= 1


def test_the_student_is_told_the_conditions_and_not_the_noise():
    told = []

    class Told(nn.Module):
        def forward(self, x, t, **condition):
            told.append(condition)
            return 0 * x

    student = fs.Denoiser(Told(), fs.Flow(), "flow")
    labels = torch.zeros(4096, dtype=torch.long)
    method = distill.Reflow(student, drop=0.5, null={"class_labels": 9})
    method.loss("student", {**pairs(), "class_labels": labels}, 0)
    assert list(told[0]) == ["class_labels"]
    assert set(told[0]["class_labels"].tolist()) == {0, 9}


def test_what_is_no_flow_is_refused_with_the_remedy(toy):
    with pytest.raises(
        ValueError, match=r"those of fs\.Flow, the model's schedule is VP.*fs\.Denoiser\(network, fs\.Fl"
    ):
        distill.Reflow(toy())
    flow = fs.Denoiser(toy().network, fs.Flow(), "x0")
    with pytest.raises(ValueError, match="the student predicts x0; take one that predicts flow"):
        distill.Reflow(flow)
    good = fs.Denoiser(toy().network, fs.Flow(), "flow")
    with pytest.raises(ValueError, match=r"least is a sigma from 0 to 1, got 1\.5"):
        distill.Reflow(good, least=1.5)
    with pytest.raises(ValueError, match=r"the batch has \['class_labels', 'x0'\]; use distill\.Pairs\(folder\)"):
        distill.Reflow(good).loss("student", {"x0": torch.zeros(4, 2), "class_labels": torch.zeros(4)}, 0)
    with pytest.raises(ValueError, match=r"those of fs\.Flow"):
        distill.straightness(toy(), fs.grid(fs.Flow(), 2, fs.uniform_t), torch.randn(4, 2))
    short = fs.grid(good.schedule, 2, fs.uniform_t, start=0.5)
    with pytest.raises(ValueError, match=r"from sigma = 1 to 0, the grid from 0\.5 to 0"):
        distill.straightness(good, short, torch.randn(4, 2))
    assert json.loads(json.dumps(distill.Reflow(good, least=0.5).settings()))["least"] == 0.5


def centres():
    angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4) + math.pi / 8
    return 0.8 * torch.stack([angle.cos(), angle.sin()], 1)


def energy(a, b):
    """The energy distance of two samples, [N, D]: 0 for equal distributions."""
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


@pytest.mark.slow
@pytest.mark.parametrize("schedule", [fs.Flow(), fs.VP.scaled_linear()], ids=repr)
def test_reflow_of_a_mixture_is_straighter_keeps_the_distribution_and_goes_in_one_step(schedule, toy, tmp_path):
    """Of a flow's pairs, and of a VP teacher's, which say as much."""
    pytest.importorskip("accelerate")
    mixture = GaussianMixture(schedule, torch.ones(8), centres(), torch.tensor(0.1**2))
    teacher = fs.Denoiser(lambda x, t: mixture.predict(x, fs.nodes(schedule, t)), schedule, "x0", time="t")
    plan = fs.trace(solvers.ddim, fs.grid(schedule, 100, fs.uniform_t))
    folder = distill.make_pairs(teacher, plan, tmp_path, shape=(2,), count=10_000, batch=2048, seed=10_000)
    student = fs.Denoiser(toy(width=128).network, fs.Flow(), "flow", time="index")
    student = distill.train(distill.Reflow(student), distill.Pairs(folder, size=256), steps=1500, lr=2e-3, ema=0.99)
    flow = GaussianMixture(student.schedule, mixture.weights, mixture.means, mixture.variances)
    noise, real = fs.noise((2,), seeds=range(4000)).draw(0), mixture.sample(4000, seed=1).float()

    def made(model, steps):
        return fs.sample(model, fs.trace(solvers.ddim, fs.grid(model.schedule, steps, fs.uniform_t)), noise)

    fine = fs.grid(student.schedule, 100, fs.uniform_t)
    bent, straight = distill.straightness(flow, fine, noise), distill.straightness(student, fine, noise)
    before, after, whole = (energy(made(m, steps), real) for m, steps in ((flow, 1), (student, 1), (student, 100)))
    floor = energy(mixture.sample(4000, seed=2).float(), real)
    print(f"\n{schedule}: straightness {bent:.4f} to {straight:.4f}; energy distance in one step {before:.4f} to")
    print(f"{after:.4f}, in 100 {whole:.4f}, of real samples {floor:.4f}")
    assert straight < 0.3 * bent
    assert after < 0.2 * before
    assert whole < 0.05 * before
