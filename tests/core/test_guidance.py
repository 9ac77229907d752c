"""Guidance in all its forms, thresholding, and the forecast of what they cost."""

from itertools import pairwise

import pytest
import torch

import fastsample as fs
from fastsample.denoiser import begin
from fastsample.prediction import PREDICTIONS
from fastsample.zoo import digits

from .toys import ODE, SCHEDULES, ddim, heun, two_step

VP = fs.VP.linear()
NODE = fs.node(VP, 500.0)
COND, UNCOND = {"label": torch.tensor([1.0, 2.0])}, {"label": torch.tensor([0.0, 0.0])}
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


NODES = fs.nodes(VP, torch.tensor([200.0, 700.0], dtype=torch.float64))
GRID = fs.grid(VP, 6)
PLAN = fs.trace(ddim, GRID)


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


def projected(inner=None, scale=5.0, **options):
    return fs.ProjectedGuided(inner or model(), COND, UNCOND, scale=scale, **options)


class Remembers:
    """Somebody's own wrapper that keeps something from one evaluation to the next."""

    schedule = VP

    def begin(self):
        return self

    def predict(self, x, node, **condition):
        return x


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


@pytest.mark.parametrize("batched", [True, False])
def test_one_row_of_uncond_or_a_number_stands_for_every_sample(batched):
    expected = guided(scale=5.0).predict(X, NODE)
    for uncond in (torch.zeros(1), 0.0):
        one = fs.Guided(model(), COND, {"label": uncond}, scale=5.0, batched=batched)
        assert torch.equal(one.predict(X, NODE), expected)
    with pytest.raises(ValueError, match="condition 'label' has 2 and 3 rows for a batch of 2; give one a sample"):
        fs.Guided(model(), COND, {"label": torch.zeros(3)}, scale=5.0).predict(X, NODE)


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


def test_conditions_in_lists_are_doubled_tensor_by_tensor():
    """As the residuals of a ControlNet are given, shared or not."""
    inner, shared = model(), (torch.tensor([3.0, 4.0]), [torch.tensor([5.0, 6.0]), None])
    text = [torch.ones(2), "a"], [torch.zeros(2), "a"]
    wrapped = fs.Guided(inner, {**COND, "text": text[0]}, {**UNCOND, "text": text[1]}, scale=2.0)
    wrapped.predict(X, NODE, residuals=shared)
    *_, other = inner.network.calls[0]
    first, (second, nothing) = other["residuals"]
    assert (first.tolist(), second.tolist(), nothing) == ([3, 4, 3, 4], [5, 6, 5, 6], None)
    assert (other["text"][0].tolist(), other["text"][1]) == ([1, 1, 0, 0], "a")
    assert (type(other["residuals"]), type(other["text"])) == (tuple, list)
    differing = fs.Guided(inner, {**COND, "text": text[0]}, {**UNCOND, "text": [torch.zeros(2), "b"]}, scale=2.0)
    with pytest.raises(TypeError, match=r"condition 'text\[1\]' differs"):
        differing.predict(X, NODE)


@pytest.mark.parametrize(
    ("error", "make", "says"),
    [
        (TypeError, lambda: fs.Guided(model(), torch.ones(2), UNCOND, scale=2.0), "cond must map .* got Tensor"),
        (TypeError, lambda: fs.Guided(model(), COND, None, scale=2.0), "uncond must map"),
        (ValueError, lambda: fs.Guided(model(), COND, {}, scale=2.0), r"\['label'\] and uncond \[\]"),
        (ValueError, lambda: guided(scale=float("nan")), "scale must be a finite number, got nan"),
        (ValueError, lambda: guided(scale=2.0, rescale=1.5), "0 to 1, got 1.5"),
        (ValueError, lambda: guided(scale=2.0, interval=(2.0, 1.0)), r"\(low, high\).*never guide"),
        (ValueError, lambda: guided(scale=lambda node: float("nan")).predict(X, NODE), "scale at t = 500 is nan"),
        (ValueError, lambda: guided(scale=2.0, reuse=0), "1 or more, got 0"),
        (ValueError, lambda: guided(scale=2.0, reuse=1.5), "1 or more, got 1.5"),
        (ValueError, lambda: guided(scale=2.0, reuse=2).predict(X, NODE), "only within a run: use fs.sample"),
        (ValueError, lambda: begin(guided(scale=2.0, reuse=2)).predict(X, NODES), "one time for all samples"),
        (ValueError, lambda: guided(guided(scale=2.0, reuse=2), scale=2.0), "Guided remembers .* around Guided, not"),
        (ValueError, lambda: guided(Remembers(), scale=2.0), "Remembers remembers its evaluations"),
        (ValueError, lambda: projected(eta=float("inf")), "eta must be a finite number, got inf"),
        (ValueError, lambda: projected(threshold=0.0), "positive norm, or None, got 0"),
        (ValueError, lambda: projected(momentum=-1.0), "between -1 and 1 .* got -1"),
        (ValueError, lambda: projected(momentum=0.5).predict(X, NODE), "ProjectedGuided .* only within a run"),
        (ValueError, lambda: fs.Autoguided(model(), model(schedule=fs.VP.cosine()), scale=2.0), "need one schedule"),
        (ValueError, lambda: fs.Autoguided(model(), model(), scale=2.0, rescale=-1.0), "0 to 1, got -1"),
        (ValueError, lambda: fs.cfg_plus_plus(GRID, float("nan")), "finite number, 0 to 1 in its paper, got nan"),
        (ValueError, lambda: fs.cfg_plus_plus(GRID, 0.6)(fs.node(VP, 999.5)), r"from t = 999 to .* at t = 999\.5"),
        (ValueError, lambda: fs.cfg_plus_plus(GRID, 0.6)(NODES), "no value at Nodes"),
        (TypeError, lambda: fs.rows(model(), GRID), "plan must come from fs.trace"),
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


@pytest.mark.parametrize("batched", [True, False])
def test_a_negative_prompt_is_an_uncond(batched):
    positive, negative = {"label": torch.tensor([1.0, 2.0])}, {"label": torch.tensor([-3.0, 4.0])}
    away = fs.Guided(model(), positive, negative, scale=5.0, batched=batched).predict(X, NODE)
    wanted, unwanted = (model().predict(X, NODE, **label) for label in (positive, negative))
    torch.testing.assert_close(away, wanted + 4.0 * (wanted - unwanted))


def test_a_scale_may_follow_the_node_and_costs_one_row_where_it_is_1():
    inner = model()
    wrapped = guided(inner, scale=lambda node: 1.0 if node.t > 600 else 3.0)
    torch.testing.assert_close(wrapped.predict(X, NODE), guided(scale=3.0).predict(X, NODE))
    assert inner.count.rows == 4
    high = fs.node(VP, 700.0)
    torch.testing.assert_close(wrapped.predict(X, high), model().predict(X, high, **COND))
    assert inner.count.rows == 6


@pytest.mark.parametrize("interval", [None, (-1.0, 1.0)])
def test_a_scale_that_follows_the_node_follows_the_times_of_samples(interval):
    def rising(node):
        return 1 + 4 * node.sigma

    together = guided(scale=rising, interval=interval).predict(X, NODES)
    for i in range(2):
        cond, uncond = ({"label": given["label"][i : i + 1]} for given in (COND, UNCOND))
        one = fs.Guided(model(), cond, uncond, scale=rising, interval=interval)
        torch.testing.assert_close(together[i : i + 1], one.predict(X[i : i + 1], fs.node(VP, float(NODES.t[i]))))


# Reuse of uncond


def reused_by_hand(plan_nodes, k, scale):
    """DDIM written out: cond - uncond in eps is evaluated at every k-th step, and between goes on as a line in lam."""
    network, x, known = Labelled(), X * plan_nodes[0].sigma, {}
    for i, (s, t) in enumerate(pairwise(plan_nodes)):
        eps = network(x, None, **COND)
        if i % k == 0:
            known[s.lam] = difference = eps - network(x, None, **UNCOND)
        elif len(known) > 1:
            b, a = list(known)[-2:]
            difference = known[a] + (known[a] - known[b]) * (s.lam - a) / (a - b)
        else:
            difference = known[GRID.nodes[0].lam]
        eps = eps + (scale - 1) * difference
        x = t.alpha * (x - s.sigma * eps) / s.alpha + t.sigma * eps
    return x


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 10])
def test_reuse_extends_the_difference_in_eps_and_saves_its_rows(k, batched):
    inner = model()
    wrapped = guided(inner, scale=3.0, reuse=k, batched=batched)
    torch.testing.assert_close(fs.sample(wrapped, PLAN, X), reused_by_hand(GRID.nodes, k, 3.0))
    full = -(-6 // k)
    assert inner.count.rows == 2 * (6 + full)
    assert inner.count.calls == (6 if batched else 6 + full)


def test_reuse_of_one_is_plain_guidance_bit_for_bit():
    assert torch.equal(fs.sample(guided(scale=3.0, reuse=1), PLAN, X), fs.sample(guided(scale=3.0), PLAN, X))
    assert guided(scale=3.0, reuse=1).predict(X, NODE).isfinite().all()  # it remembers nothing and needs no run


def test_reuse_is_exact_where_the_difference_in_eps_does_not_change():
    def network(x, t, label):
        return x.tanh() + label.view(-1, 1, 1, 1)

    full, half = (
        fs.sample(fs.Guided(fs.Denoiser(network, VP), COND, UNCOND, scale=3.0, reuse=k), PLAN, X) for k in (1, 3)
    )
    torch.testing.assert_close(full, half)


def test_reuse_extends_nothing_after_a_step_back_in_time_and_never_far():
    """Restarts go up in noise, and a grid may widen: a line followed far, or backwards, would blow up."""
    network, wrapped = Labelled(), begin(guided(scale=3.0, reuse=2))
    difference = (network(X, None, **COND) - network(X, None, **UNCOND)).abs().max()
    for t in (500.0, 499.0, 498.0, 300.0, 10.0, 900.0, 899.0, 898.0, 100.0):
        node = fs.node(VP, t)
        eps = (X - node.alpha * wrapped.predict(X, node)) / node.sigma
        assert (eps - network(X, None, **COND)).abs().max() <= 2 * 3 * difference + 1e-9


def test_reuse_begins_at_the_first_guided_evaluation():
    """Steps 0 and 1 lie above the interval: 2 is full, 3 and 4 reuse it, 5 is full again."""
    inner = model()
    wrapped = guided(inner, scale=3.0, reuse=3, interval=(GRID.nodes[2].lam, 100.0))
    fs.sample(wrapped, PLAN, X)
    assert [len(label) for _, label, _ in inner.network.calls] == [2, 2, 4, 2, 2, 4]


def test_the_difference_at_alpha_zero_is_not_kept():
    """There eps is the noise whatever the condition; reuse begins one evaluation later."""
    schedule = SCHEDULES["zero_terminal_snr"]
    inner = model("v", schedule)
    plan = fs.trace(ddim, fs.grid(schedule, 6, spacing=fs.uniform_t))
    wrapped = guided(inner, scale=3.0, reuse=3)
    assert fs.sample(wrapped, plan, X).isfinite().all()
    assert [len(label) for _, label, _ in inner.network.calls] == [4, 4, 2, 2, 4, 2]
    assert fs.rows(wrapped, plan) == 6 + 3


class Keeps:
    """Guidance of the digits that reuses something else: what `keep` makes of an evaluation, for `use`."""

    def __init__(self, inner, k, keep, use):
        self.inner, self.schedule, self.k, self.keep, self.use, self.done = inner, inner.schedule, k, keep, use, 0

    def predict(self, x, node, class_labels):
        cond = self.inner.predict(x, node, class_labels=class_labels)
        if self.done % self.k == 0:
            uncond = self.inner.predict(x, node, class_labels=torch.full_like(class_labels, 10))
            self.kept = self.keep(cond, uncond, x, node)
        self.done += 1
        return cond + 2.0 * (cond - self.use(cond, self.kept, x, node))


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 3, 4])
def test_reuse_stays_closer_to_full_guidance_than_holding_anything_else(k):
    """On the built-in digits at scale 3, 16 steps: the endpoint stays closest to full guidance."""
    pytest.importorskip("diffusers")
    inner = digits()
    plan = fs.trace(two_step, fs.grid(inner.schedule, 16, spacing=fs.quadratic_t))
    noise, condition = fs.noise((1, 8, 8), seeds=range(100)), {"class_labels": torch.arange(100) % 10}
    others = [
        (lambda cond, uncond, x, node: uncond, lambda cond, kept, x, node: kept),
        (
            lambda cond, uncond, x, node: (x - node.alpha * uncond) / node.sigma,
            lambda cond, kept, x, node: (x - node.sigma * kept) / node.alpha,
        ),
        (lambda cond, uncond, x, node: cond - uncond, lambda cond, kept, x, node: cond - kept),
    ]
    models = [fs.Guided(inner, uncond={"class_labels": 10}, scale=3.0, reuse=reuse) for reuse in (1, k)]
    full, ours, *rest = (
        fs.sample(wrapped, plan, noise, condition=condition)
        for wrapped in [*models, *(Keeps(inner, k, keep, use) for keep, use in others)]
    )
    away = [(x0 - full).square().mean().sqrt() for x0 in (ours, *rest)]
    assert 1.3 * away[0] < min(away[1:])  # 1.6 to 2.1 times closer than the next when it was measured


REMEMBERING = [
    lambda inner: guided(inner, scale=3.0, reuse=4),
    lambda inner: projected(inner, momentum=-0.5),
    lambda inner: projected(inner, momentum=-0.5, reuse=2, threshold=1.0),
    lambda inner: fs.Thresholded(guided(inner, scale=3.0, reuse=4), limit=0.9),
    lambda inner: fs.Inpainted(guided(inner, scale=3.0, reuse=4), torch.zeros(1, 3, 4, 4), torch.ones(4, 4)),
    lambda inner: fs.Autoguided(guided(inner, scale=3.0, reuse=4), guided(scale=2.0, reuse=3), scale=2.0),
]


@pytest.mark.parametrize("wrap", REMEMBERING)
def test_nothing_is_kept_between_runs_nor_shared_by_runs_that_interleave(wrap):
    """Six evaluations leave a memory of four half used: what a run left behind would show in the next."""
    wrapped = wrap(model())
    first, other = fs.sample(wrapped, PLAN, X), fs.sample(wrapped, PLAN, X + 1)
    assert torch.equal(first, fs.sample(wrapped, PLAN, X))

    def nested(k, x, x0):
        if k == 3:
            seen.append(fs.sample(wrapped, PLAN, X + 1))

    seen = []
    assert torch.equal(fs.sample(wrapped, PLAN, X, callback=nested), first)
    assert torch.equal(seen[0], other)


@pytest.mark.parametrize("wrap", REMEMBERING)
def test_a_plan_and_its_solver_remember_alike(wrap):
    torch.testing.assert_close(fs.sample(wrap(model()), PLAN, X), fs.solve(wrap(model()), ddim, GRID, X))


@pytest.mark.parametrize("wrap", REMEMBERING)
def test_what_remembers_says_so_through_every_wrapper(wrap):
    assert wrap(model()).remembers
    with pytest.raises(ValueError, match="only within a run"):
        wrap(model()).predict(X, NODE)


def test_a_run_keeps_one_shape():
    running = begin(fs.Guided(model(), uncond={"label": 0.0}, scale=2.0, reuse=2))
    running.predict(X, NODE, label=torch.ones(2))
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 4\] was followed by \[1, 3"):
        running.predict(X[:1], NODE, label=torch.ones(1))


def test_a_run_that_reuses_compiles_to_one_graph():
    torch._dynamo.reset()

    def network(x, t, c):
        return 0.5 * x.tanh() + c[:, None, None, None]

    inner = fs.Guided(fs.Denoiser(network, VP), {"c": torch.ones(2)}, {"c": 0.0}, scale=2.0, reuse=2)
    whole = torch.compile(lambda noise: fs.sample(inner, PLAN, noise), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(whole(X), fs.sample(inner, PLAN, X))


# CFG++


def cfg_plus_plus_by_hand(nodes, scale):
    """Chung et al. 2024, arXiv:2406.08070, Alg. 2, written out in eps: the renoising is unconditional."""
    network, x = Labelled(), X * nodes[0].sigma
    for s, t in pairwise(nodes):
        cond, uncond = network(x, None, **COND), network(x, None, **UNCOND)
        x0 = (x - s.sigma * (uncond + scale * (cond - uncond))) / s.alpha
        x = t.alpha * x0 + t.sigma * uncond
    return x


@pytest.mark.parametrize("end", [None, 50.0])
@pytest.mark.parametrize("scale", [0.0, 0.6, 1.0])
def test_cfg_plus_plus_with_ddim_is_the_loop_of_its_paper(scale, end):
    grid = fs.grid(VP, 6, end=end)
    wrapped = guided(scale=fs.cfg_plus_plus(grid, scale))
    ours = fs.sample(wrapped, fs.trace(ddim, grid), X)
    torch.testing.assert_close(ours, cfg_plus_plus_by_hand(grid.nodes, scale))


def test_cfg_plus_plus_is_plain_guidance_in_the_step_to_the_data():
    assert fs.cfg_plus_plus(GRID, 0.6)(GRID.nodes[-2]) == 0.6


def test_cfg_plus_plus_begins_at_alpha_zero():
    """lam_s is -inf there, and the scale is its own."""
    schedule = SCHEDULES["zero_terminal_snr"]
    assert fs.cfg_plus_plus(fs.grid(schedule, 4, spacing=fs.uniform_t), 0.6)(fs.node(schedule, schedule.t_max)) == 0.6


def test_cfg_plus_plus_between_nodes_has_the_scale_of_the_interval():
    grid = fs.grid(VP, 6, end=50.0)
    scale_at = fs.cfg_plus_plus(grid, 0.6)
    for s, t in grid.steps():
        between = fs.node(VP, (s.t + t.t) / 2)
        assert scale_at(between) == scale_at(s)
    assert scale_at(grid.nodes[-1]) == scale_at(grid.nodes[-2])  # Heun asks there


@pytest.mark.parametrize("solver", ODE)
def test_cfg_plus_plus_runs_with_every_solver(solver):
    grid = fs.grid(VP, 6, end=50.0)
    wrapped = guided(scale=fs.cfg_plus_plus(grid, 0.6))
    assert fs.sample(wrapped, fs.trace(solver, grid), X).isfinite().all()


# Autoguidance


def test_autoguidance_is_what_its_formula_says_and_costs_a_row_of_each():
    strong, weak = model(), fs.Denoiser(lambda x, t, label: 0.5 * x, VP)
    wrapped = fs.Autoguided(strong, weak, scale=2.0)
    one, other = (inner.predict(X, NODE, **COND) for inner in (model(), weak))
    weak.count.rows = 0
    torch.testing.assert_close(wrapped.predict(X, NODE, **COND), other + 2.0 * (one - other))
    assert (strong.count.rows, weak.count.rows) == (2, 2)


def test_autoguidance_outside_its_interval_or_at_scale_one_is_the_model_alone():
    for options in ({"scale": 1.0}, {"scale": 2.0, "interval": (NODE.lam + 0.1, 9.0)}):
        strong, weak = model(), model()
        x0 = fs.Autoguided(strong, weak, **options).predict(X, NODE, **COND)
        assert torch.equal(x0, model().predict(X, NODE, **COND))
        assert (strong.count.rows, weak.count.rows) == (2, 0)


def test_autoguidance_at_the_times_of_samples_is_that_of_each_alone():
    weak = fs.Denoiser(lambda x, t, label: 0.5 * x, VP)
    wrapped = fs.Autoguided(model(), weak, scale=2.0, interval=(-1.0, 9.0), rescale=0.5)
    together = wrapped.predict(X, NODES, **COND)
    for i in range(2):
        alone = wrapped.predict(X[i : i + 1], fs.node(VP, float(NODES.t[i])), label=COND["label"][i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


# Projected guidance


@pytest.mark.parametrize("options", [{}, {"rescale": 0.7}, {"interval": (-1.0, 2.0)}, {"reuse": 2}], ids=str)
def test_projected_guidance_with_all_of_the_parallel_part_is_guidance(options):
    ours = fs.sample(projected(eta=1.0, **options), PLAN, X)
    torch.testing.assert_close(ours, fs.sample(guided(scale=5.0, **options), PLAN, X))


def test_projected_guidance_moves_at_a_right_angle_to_cond():
    cond = model().predict(X, NODE, **COND)
    moved = projected().predict(X, NODE) - cond
    torch.testing.assert_close((moved * cond).flatten(1).sum(1), torch.zeros(2, dtype=torch.float64))
    plain = guided(scale=5.0).predict(X, NODE) - cond
    along = plain - moved  # what was taken away lies along cond
    torch.testing.assert_close(
        (along * cond).flatten(1).sum(1).abs(), along.flatten(1).norm(dim=1) * cond.flatten(1).norm(dim=1)
    )


def test_projected_guidance_shortens_what_is_longer_than_its_threshold():
    cond = model().predict(X, NODE, **COND)
    length = (guided(scale=2.0).predict(X, NODE) - cond).flatten(1).norm(dim=1)  # of cond - uncond
    between = float(length.mean())
    short = (projected(scale=2.0, eta=1.0, threshold=between).predict(X, NODE) - cond).flatten(1).norm(dim=1)
    torch.testing.assert_close(short, length.clamp(max=between))
    assert length.min() < between < length.max()


@pytest.mark.parametrize(
    "options", [{}, {"eta": 0.4}, {"threshold": 1.5}, {"momentum": -0.5, "threshold": 1.5}], ids=str
)
def test_projected_guidance_is_that_of_diffusers(options):
    guiders = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    wrapped, inner = begin(projected(**options)), model()
    buffer = guiders.MomentumBuffer(options["momentum"]) if "momentum" in options else None
    for t in (700.0, 500.0, 300.0):
        node = fs.node(VP, t)
        cond, uncond = (inner.predict(X, node, **label) for label in (COND, UNCOND))
        # its "original formulation" adds scale times the difference to cond, where 0 is no guidance
        theirs = guiders.normalized_guidance(
            cond, uncond, 4.0, buffer, options.get("eta", 0.0), options.get("threshold", 0.0), True
        )
        torch.testing.assert_close(wrapped.predict(X, node), theirs)


def test_projected_guidance_of_nothing_is_nothing():
    """cond = 0 has no direction, cond - uncond = 0 no length."""

    def network(x, t, label):
        return x / NODE.sigma  # which says x0 = 0

    zero = fs.ProjectedGuided(fs.Denoiser(network, VP), COND, UNCOND, scale=5.0, threshold=1.0).predict(X, NODE)
    torch.testing.assert_close(zero, torch.zeros_like(X))


# What it costs

EVERY = {
    "plain": lambda inner: model(),
    "guided": lambda inner: guided(inner, scale=3.0),
    "apart": lambda inner: guided(inner, scale=3.0, batched=False),
    "none": lambda inner: guided(inner, scale=1.0),
    "interval": lambda inner: guided(inner, scale=3.0, interval=(-1.0, 1.5)),
    "reuse": lambda inner: guided(inner, scale=3.0, reuse=3),
    "reuse in an interval": lambda inner: guided(inner, scale=3.0, reuse=2, interval=(-1.0, 1.5)),
    "by the node": lambda inner: guided(inner, scale=lambda node: 3.0 if node.t < 500 else 1.0),
    "cfg++": lambda inner: guided(inner, scale=fs.cfg_plus_plus(GRID, 0.6)),
    "projected": lambda inner: projected(inner, momentum=-0.5, reuse=2),
    "autoguided": lambda inner: fs.Autoguided(inner, inner, scale=2.0, interval=(-1.0, 1.5)),
    "thresholded": lambda inner: fs.Thresholded(guided(inner, scale=3.0, reuse=2)),
    "inpainted": lambda inner: fs.Inpainted(guided(inner, scale=3.0), torch.zeros(1, 3, 4, 4), torch.ones(4, 4)),
    "inpainted within": lambda inner: guided(
        fs.Inpainted(inner, torch.zeros(2, 3, 4, 4), torch.ones(4, 4)), scale=3.0, reuse=3
    ),
    "guided twice": lambda inner: guided(guided(inner, scale=2.0, interval=(-1.0, 1.5)), scale=3.0, batched=False),
    "autoguided and guided": lambda inner: fs.Autoguided(
        guided(inner, scale=2.0, reuse=2), fs.Thresholded(guided(inner, scale=2.0, reuse=3)), scale=2.0
    ),
}


@pytest.mark.parametrize("solver", [ddim, two_step, heun])
@pytest.mark.parametrize("name", EVERY)
def test_the_forecast_of_rows_is_what_the_network_counts(name, solver):
    inner = model()
    wrapped, plan = EVERY[name](inner), fs.trace(solver, GRID)
    wrapped = inner if name == "plain" else wrapped
    fs.sample(wrapped, plan, X, condition=COND)
    assert inner.count.rows == 2 * fs.rows(wrapped, plan)


def test_a_model_of_your_own_may_forecast_its_rows():
    class Twice(Remembers):
        def rows_at(self, nodes):
            return 2 * len(nodes)

    assert fs.rows(Remembers(), PLAN) == 6
    assert fs.rows(fs.Thresholded(Twice()), PLAN) == 12


ALONE = {
    "guided": lambda inner: fs.Guided(inner, uncond={"label": 0.0}, scale=3.0, rescale=0.5),
    "reuse": lambda inner: fs.Guided(inner, uncond={"label": 0.0}, scale=3.0, reuse=3),
    "projected": lambda inner: fs.ProjectedGuided(
        inner, uncond={"label": 0.0}, scale=3.0, momentum=-0.5, threshold=1.0
    ),
    "autoguided": lambda inner: fs.Autoguided(inner, model(), scale=2.0),
}


@pytest.mark.parametrize("name", ALONE)
def test_a_sample_is_the_same_in_a_batch_of_any_size(name):
    """Bit for bit: nothing here sums over the batch, and the network works number by number."""
    x = torch.randn(7, 3, 4, 4, generator=torch.Generator().manual_seed(5))
    labels = torch.linspace(-1, 1, 7)

    def run(rows):
        return fs.sample(ALONE[name](model()), PLAN, x[rows], condition={"label": labels[rows]})

    together = run(slice(0, 7))
    for i in range(7):
        assert torch.equal(run(slice(i, i + 1)), together[i : i + 1])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda inner: fs.Guided(inner, uncond={"label": 0.0}, scale=5.1, interval=(-1.0, 1.0), rescale=0.5),
        lambda inner: fs.ProjectedGuided(
            inner, uncond={"label": 0.0}, scale=lambda node: 1 + node.sigma, threshold=1.0
        ),
        lambda inner: fs.Autoguided(inner, model(), scale=2.0, interval=(-1.0, 1.0)),
    ],
)
def test_a_plan_for_each_sample_is_guided_as_alone(wrap):
    plans = [fs.trace(ddim, fs.grid(VP, 6, spacing=spacing)) for spacing in (fs.uniform_t, fs.quadratic_t)]
    together = fs.sample(wrap(model()), plans, X, condition=COND)
    for i, plan in enumerate(plans):
        alone = fs.sample(wrap(model()), plan, X[i : i + 1], condition={"label": COND["label"][i : i + 1]})
        torch.testing.assert_close(together[i : i + 1], alone)


def test_what_remembers_refuses_a_plan_for_each_sample():
    plans = [fs.trace(ddim, fs.grid(VP, 6, spacing=spacing)) for spacing in (fs.uniform_t, fs.quadratic_t)]
    with pytest.raises(ValueError, match="one time for all samples"):
        fs.sample(guided(scale=2.0, reuse=2), plans, X)


def test_rescaling_leaves_a_constant_prediction_as_it_is():
    """Its standard deviation is 0, and so would divide by it."""
    model = fs.Denoiser(lambda x, t, c: 0 * x + c[:, None], fs.EDM(), "x0")
    c = torch.ones(2)
    x, node = torch.ones(2, 3), fs.node(fs.EDM(), 1.0)
    plain = fs.Guided(model, {"c": c}, {"c": 0 * c}, scale=3.0).predict(x, node)
    rescaled = fs.Guided(model, {"c": c}, {"c": 0 * c}, scale=3.0, rescale=0.7).predict(x, node)
    torch.testing.assert_close(rescaled, plain)
