"""The training of a teacher: under every weight and law of times the exact denoiser is best; runs go on exactly."""

import math

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill
from fastsample.distill.weights import WEIGHTS

pytest.importorskip("accelerate")
STD, MEAN = 0.3, 0.2  # of the Gaussian data


class Gaussian(nn.Module):
    """What a network of data N(MEAN, STD^2) must say, and `error` times sigma more in its x0."""

    def __init__(self, error, predicts, schedule):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error))
        self.predicts, self.schedule = predicts, schedule

    def forward(self, x, t):
        alpha, sigma = (f(t.double())[:, None] for f in (self.schedule.alpha, self.schedule.sigma))
        x0 = MEAN + alpha * STD**2 * (x.double() - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        p, q = fs.prediction(self.predicts).output(alpha, sigma)
        return (p * x + q * (x0 + self.error * sigma)).to(x.dtype)


def gradient(error, predicts, schedule, **options):
    torch.manual_seed(0)
    model = fs.Denoiser(Gaussian(error, predicts, schedule), schedule, predicts, time="t")
    method = distill.Diffusion(model, **options)
    if method.memory:
        bins = torch.arange(len(method.memory.seen))
        for step in range(10):
            method.memory.hear(step, bins, 1.0 + bins / len(bins))
            method.after(step)
    method.loss("model", {"x0": MEAN + STD * torch.randn(100_000, 1)}, 0).backward()
    return float(model.network.error.grad)


OPTIONS = [
    *({"weight": name} for name in WEIGHTS),
    *({"times": name} for name in ("lognormal", "logit_normal", "cosmap")),
    {"times": distill.UniformTimes(stratified=True)},
    {"importance": True},
    {"weight": "min_snr", "times": "lognormal", "importance": distill.Importance(bins=50)},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("predicts", ["eps", "x0", "v", "flow"])
def test_the_gradient_vanishes_at_the_exact_denoiser_alone(predicts, options):
    schedule = fs.VPContinuous()
    low, exact, high = (gradient(error, predicts, schedule, **options) for error in (-0.1, 0.0, 0.1))
    assert low < 0 < high
    assert abs(exact) < 0.1 * min(-low, high)  # noise of a hundred thousand samples


@pytest.mark.parametrize("weight", ["min_snr", "truncated_snr"])
def test_the_loss_is_the_weighted_error_of_x0(weight):
    """Of a network that says x0 = 0 always, for data of one value, in closed form."""

    class Silent(nn.Module):
        def forward(self, x, t):
            return torch.zeros_like(x)

    schedule = fs.VP.scaled_linear(steps=50)
    method = distill.Diffusion(fs.Denoiser(Silent(), schedule, "x0"), weight=weight)
    torch.manual_seed(0)
    loss = method.loss("model", {"x0": torch.full((400_000, 1), 0.5)}, 0).item()
    ratios = [float(schedule.alpha(t) / schedule.sigma(t)) ** 2 for t in range(50)]
    weights = [min(ratio, 5.0) if weight == "min_snr" else max(ratio, 1.0) for ratio in ratios]
    rel = 5 * torch.tensor(weights).std().item() / (sum(weights) / 50) / math.sqrt(400_000)  # five standard errors
    assert loss == pytest.approx(0.25 * sum(weights) / 50, rel=rel)


def test_a_weight_by_name_by_numbers_and_by_function_are_one(toy):
    batch = {"x0": torch.rand(32, 2)}
    losses = []
    for weight in ("min_snr", distill.MinSNR(5.0), lambda at: (at.alpha / at.sigma).square().clamp(max=5)):
        torch.manual_seed(0)
        losses.append(distill.Diffusion(toy(), weight=weight).loss("model", batch, 0).item())
    assert losses[0] == losses[1] == losses[2]
    torch.manual_seed(0)
    assert distill.Diffusion(toy()).loss("model", batch, 0).item() != losses[0]


def run(toy, loader, out=None, stop=-1, **options):
    class Stopping(distill.Diffusion):
        def after(self, step):
            super().after(step)
            if step == stop:
                raise KeyboardInterrupt

    Stopping.__name__ = "Diffusion"  # it is the same method to a checkpoint
    importance = distill.Importance(bins=8, history=4)
    method = Stopping(toy(dropout=0.1), **{"weight": "min_snr", "importance": importance, **options})
    distill.train(method, loader, steps=24, out=out, save_every=5, progress=False)
    return method


@pytest.mark.parametrize("at", [3, 12, 18])
def test_a_run_with_importance_sampling_goes_on_to_the_same_weights(at, toy, loader, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(toy, loader, tmp_path, stop=at)
    again, whole = run(toy, loader, tmp_path), run(toy, loader)
    assert all(torch.equal(a, b) for a, b in zip(again.model.network.parameters(), whole.model.network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(again.memory.buffers(), whole.memory.buffers()))
    assert (whole.memory.seen >= 4).all()
    assert whole.memory.chances.std() > 0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": distill.MinSNR(1.0)}, r"method\.weight was \"min_snr\", now .*\"gamma\": 1\.0"),
        ({"importance": distill.Importance(bins=8, history=5)}, r"method\.importance\.history was .*, now 5"),
        ({"times": distill.UniformTimes(stratified=True)}, r"method\.times"),
    ],
)
def test_a_run_of_other_numbers_is_not_gone_on_with(changed, message, toy, loader, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(toy, loader, tmp_path, stop=12)
    with pytest.raises(ValueError, match=message):
        run(toy, loader, tmp_path, **changed)


def test_an_edm_teacher_is_trained_as_in_its_paper():
    """Karras et al. 2022: c_out^2 lambda = 1, so the loss is the plain squared error of the network's own output."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x, t):
            return self.layer(x)

    torch.manual_seed(1)
    model = distill.edm_model(Own(), sigma_data=0.5)
    batch = {"x0": torch.rand(64, 2)}
    losses = []
    for weight in (None, "edm"):
        torch.manual_seed(0)
        losses.append(distill.Diffusion(model, weight=weight).loss("model", batch, 0).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32
