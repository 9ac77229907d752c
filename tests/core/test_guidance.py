"""Guidance and thresholding."""

import pytest
import torch

import fastsample as fs
from fastsample.prediction import PREDICTIONS

from .toys import SCHEDULES, ddim

VP = fs.VP.linear()
NODE = fs.node(VP, 500.0)
COND, UNCOND = {"label": torch.tensor([1.0, 2.0])}, {"label": torch.tensor([0.0, 0.0])}
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Labelled(torch.nn.Module):
    """Its output bends with the label of each sample."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x, t, label, **other):
        self.calls.append((x, label, other))
        return torch.sin(x + label.view(-1, *[1] * (x.dim() - 1)))


def model(predicts="eps", schedule=VP):
    return fs.Denoiser(Labelled(), schedule, predicts)


def guided(inner=None, **options):
    return fs.Guided(inner or model(), COND, UNCOND, **options)


def test_scale_one_is_no_guidance_and_costs_one_row():
    inner = model()
    torch.testing.assert_close(guided(inner, scale=1.0).predict(X, NODE), model().predict(X, NODE, **COND))
    assert (inner.count.calls, inner.count.rows) == (1, 2)


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_one_doubled_batch_equals_two_calls(rescale):
    one, two = model(), model()
    together = guided(one, scale=5.0, rescale=rescale).predict(X, NODE)
    apart = guided(two, scale=5.0, rescale=rescale, batched=False).predict(X, NODE)
    assert torch.equal(together, apart)
    assert (one.count.calls, one.count.rows, two.count.calls, two.count.rows) == (1, 4, 2, 4)


def test_guidance_in_x0_is_guidance_in_eps():
    network = Labelled()
    cond, uncond = network(X, None, **COND), network(X, None, **UNCOND)
    eps = uncond + 5.0 * (cond - uncond)
    x0 = (X - NODE.sigma * eps) / NODE.alpha
    torch.testing.assert_close(guided(scale=5.0).predict(X, NODE), x0)


@pytest.mark.parametrize("scale", [0.0, 2.5, -1.0])
def test_any_scale_extrapolates(scale):
    cond, uncond = (model().predict(X, NODE, **label) for label in (COND, UNCOND))
    torch.testing.assert_close(guided(scale=scale).predict(X, NODE), uncond + scale * (cond - uncond))


@pytest.mark.parametrize("batched", [True, False])
def test_conditions_given_to_sample_are_guided_batch_by_batch(batched):
    later = fs.Guided(model(), uncond={"label": 0.0}, scale=5.0, batched=batched)
    torch.testing.assert_close(later.predict(X, NODE, **COND), guided(scale=5.0).predict(X, NODE))


def test_a_condition_that_never_came_is_asked_for():
    with pytest.raises(ValueError, match=r"lack \['label'\]; pass fs\.sample"):
        fs.Guided(model(), uncond={"label": 0.0}, scale=5.0).predict(X, NODE)


@pytest.mark.parametrize(
    "options",
    [{}, {"rescale": 0.7}, {"interval": (-1.0, 1.0)}, {"interval": (-4.0, -1.0)}, {"batched": False}],
    ids=str,
)
@pytest.mark.parametrize("predicts", ["eps", "v"])
def test_samples_at_their_own_times_are_guided_each_as_alone(options, predicts):
    t = torch.tensor([200.0, 700.0], dtype=torch.float64)
    alone = []
    for i in range(2):
        cond, uncond = ({"label": given["label"][i : i + 1]} for given in (COND, UNCOND))
        one = fs.Guided(model(predicts), cond, uncond, scale=5.0, **options)
        alone.append(one.predict(X[i : i + 1], fs.node(VP, float(t[i]))))
    together = guided(model(predicts), scale=5.0, **options).predict(X, fs.nodes(VP, t))
    torch.testing.assert_close(together, torch.cat(alone))


def test_outside_its_interval_guidance_is_none_and_costs_one_row():
    inner = model()
    within = guided(inner, scale=5.0, interval=(NODE.lam, NODE.lam + 1))
    torch.testing.assert_close(within.predict(X, NODE), guided(scale=5.0).predict(X, NODE))
    assert inner.count.rows == 4
    outside = guided(inner, scale=5.0, interval=(NODE.lam + 0.1, NODE.lam + 1))
    torch.testing.assert_close(outside.predict(X, NODE), model().predict(X, NODE, **COND))
    assert inner.count.rows == 6


@pytest.mark.parametrize("predicts", PREDICTIONS)
def test_rescaling_gives_the_networks_own_prediction_the_deviation_of_cond(predicts):
    rescaled = guided(model(predicts), scale=5.0, rescale=1.0).predict(X, NODE)
    p, q = PREDICTIONS[predicts].output(NODE.alpha, NODE.sigma)
    cond = Labelled()(X, None, **COND)
    torch.testing.assert_close((p * X + q * rescaled).flatten(1).std(1), cond.flatten(1).std(1))
    none = guided(model(predicts), scale=5.0, rescale=0.0).predict(X, NODE)
    torch.testing.assert_close(none, guided(model(predicts), scale=5.0).predict(X, NODE))
    half = guided(model(predicts), scale=5.0, rescale=0.5).predict(X, NODE)
    torch.testing.assert_close(half, (none + rescaled) / 2)  # Eq. 16 is linear in the share


def test_rescaling_looks_through_thresholding_and_works_at_alpha_zero():
    schedule = SCHEDULES["zero_terminal_snr"]
    node = fs.node(schedule, schedule.t_max)
    inner = fs.Thresholded(model("v", schedule), limit=100.0)
    direct = guided(model("v", schedule), scale=5.0, rescale=0.7).predict(X, node)
    torch.testing.assert_close(guided(inner, scale=5.0, rescale=0.7).predict(X, node), direct)
    assert direct.isfinite().all()


def test_shared_conditions_are_doubled_and_nested_ones_too():
    inner, mask = model(), torch.tensor([3.0, 4.0])
    text = {"text": torch.ones(2, 5), "size": 64}, {"text": torch.zeros(2, 5), "size": 64}
    wrapped = fs.Guided(inner, {**COND, "added": text[0]}, {**UNCOND, "added": text[1]}, scale=2.0)
    wrapped.predict(X, NODE, mask=mask, mode="a")
    x, label, other = inner.network.calls[0]
    assert torch.equal(x, torch.cat([X, X]))
    assert label.tolist() == [1, 2, 0, 0]
    assert other["mask"].tolist() == [3, 4, 3, 4]
    assert other["mode"] == "a"
    assert other["added"]["text"].mean(1).tolist() == [1, 1, 0, 0]
    assert other["added"]["size"] == 64


@pytest.mark.parametrize(
    ("error", "make", "says"),
    [
        (TypeError, lambda: fs.Guided(model(), torch.ones(2), UNCOND, scale=2.0), "cond must map .* got Tensor"),
        (TypeError, lambda: fs.Guided(model(), COND, None, scale=2.0), "uncond must map"),
        (ValueError, lambda: fs.Guided(model(), COND, {}, scale=2.0), r"\['label'\] and uncond \[\]"),
        (ValueError, lambda: guided(scale=float("nan")), "scale must be a finite number, got nan"),
        (ValueError, lambda: guided(scale=2.0, rescale=1.5), "0 to 1, got 1.5"),
        (ValueError, lambda: guided(scale=2.0, interval=(2.0, 1.0)), r"\(low, high\).*never guide"),
        (ValueError, lambda: guided(scale=2.0).predict(X[:1], NODE), "2 and 2 rows for a batch of 1"),
        (TypeError, lambda: fs.Guided(model(), {"label": "a"}, {"label": "b"}, scale=2.0).predict(X, NODE),
         "'label' differs .* no tensor"),
        (ValueError, lambda: fs.Thresholded(model(), limit=0.0), "positive, got 0"),
        (ValueError, lambda: fs.Thresholded(model(), dynamic=1.5), r"quantile in \(0, 1\], got 1.5"),
    ],
)  # fmt: skip
def test_wrappers_that_cannot_work_are_refused(error, make, says):
    with pytest.raises(error, match=says):
        make()


def test_guidance_and_thresholding_nest_in_a_run():
    plan = fs.trace(ddim, fs.grid(VP, 4))
    inner = model()
    wrapped = fs.Thresholded(guided(inner, scale=3.0), limit=0.5)
    x0 = fs.sample(wrapped, plan, X)
    assert x0.abs().max() <= 0.5 + 1e-12  # the last step of the plan returns x0
    assert (inner.count.calls, inner.count.rows) == (4, 16)


class Known:
    """A model that says what it is told."""

    schedule = VP

    def __init__(self, x0):
        self.x0 = x0

    def predict(self, x, node, **condition):
        return self.x0


def test_static_thresholding_clips():
    x0 = torch.tensor([[-3.0, 0.2], [1.5, -0.7]])
    assert fs.Thresholded(Known(x0)).predict(x0, NODE).tolist() == x0.clamp(-1, 1).tolist()
    assert fs.Thresholded(Known(x0), limit=2.0).predict(x0, NODE).tolist() == x0.clamp(-2, 2).tolist()


@pytest.mark.parametrize("share", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_thresholding_is_that_of_diffusers(share):
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.DDPMScheduler(dynamic_thresholding_ratio=share, sample_max_value=1e6)
    x0 = 3 * torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    ours = fs.Thresholded(Known(x0), dynamic=share).predict(x0, NODE)
    torch.testing.assert_close(ours, scheduler._threshold_sample(x0), rtol=1e-6, atol=1e-6)
    assert ours.abs().max() <= 1 + 1e-6


def test_dynamic_thresholding_leaves_small_samples_alone_and_scales_to_the_limit():
    x0 = torch.tensor([[0.5, -0.2, 0.1], [4.0, -2.0, 1.0]])
    assert torch.equal(fs.Thresholded(Known(x0), dynamic=1.0).predict(x0, NODE)[0], x0[0])
    scaled = fs.Thresholded(Known(x0), dynamic=1.0, limit=2.0).predict(x0, NODE)
    torch.testing.assert_close(scaled[1], x0[1] / 2)


@pytest.mark.parametrize("shape", [(5,), (0, 3), (0,)])
def test_dynamic_thresholding_takes_any_batch(shape):
    x0 = torch.full(shape, 3.0)
    assert torch.equal(fs.Thresholded(Known(x0), dynamic=0.9).predict(x0, NODE), torch.ones(shape))


@pytest.mark.slow
def test_dynamic_thresholding_takes_more_than_16_million_numbers():
    """torch.quantile refused them for years."""
    x0 = torch.full((2, 9_000_000), 3.0)
    assert (fs.Thresholded(Known(x0), dynamic=0.9).predict(x0, NODE) == 1).all()
