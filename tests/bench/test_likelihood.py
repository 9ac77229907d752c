"""Likelihoods by the flow, against mixtures of Gaussians, whose densities are known at every time."""

import math

import pytest
import torch

import fastsample as fs
from fastsample.bench.likelihood import NegativeLogLikelihood, nll
from fastsample.prediction import PREDICTIONS
from fastsample.zoo.exact import GaussianMixture

NOISE_ONLY = [
    fs.Flow(),
    fs.Flow(shift=3.0),
    fs.VP.linear().zero_terminal_snr(),
]  # alpha = 0 at t_max: no prior mismatch
OTHERS = [fs.VP.linear(), fs.VP.cosine(), fs.VPContinuous(), fs.EDM()]
D = 3


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(schedule):
    weights = torch.tensor([1.0, 2.0, 3.0])
    return GaussianMixture(schedule, weights, normal(3, D), 0.1 + normal(3, D, seed=1).square())


def density(model, x, t):
    """log p of x at time t: each component has the variance alpha^2 v + sigma^2."""
    here = fs.node(model.schedule, t)
    deviations = (here.alpha**2 * model.variances + here.sigma**2).sqrt()
    each = torch.distributions.Normal(here.alpha * model.means, deviations).log_prob(x[:, None]).sum(-1)
    return (each + model.weights.log()).logsumexp(1)


def samples(model, n=20, seed=2):
    """Of the model's data, with the noise of t_min."""
    here = fs.node(model.schedule, model.schedule.t_min)
    return here.alpha * model.sample(n, seed) + here.sigma * normal(n, D, seed=seed)


class Counted:
    """A model that counts its evaluations, row by row."""

    def __init__(self, model):
        self.model, self.schedule, self.rows = model, model.schedule, 0

    def predict(self, x, node, **condition):
        self.rows += len(x)
        return self.model.predict(x, node, **condition)


@pytest.mark.parametrize("schedule", NOISE_ONLY, ids=repr)
def test_it_is_the_density_in_closed_form(schedule):
    model = mixture(schedule)
    x = samples(model)
    found = nll(model, x)
    torch.testing.assert_close(found.nats, -density(model, x, schedule.t_min), atol=1e-4, rtol=0)
    assert found.se is None
    assert found.latent.shape == x.shape


@pytest.mark.parametrize("schedule", OTHERS, ids=repr)
def test_where_some_signal_is_left_at_t_max_it_differs_by_the_prior_alone(schedule):
    """The model's samples start from N(0, sigma^2) and not from noised data: so its likelihood has that prior."""
    model = mixture(schedule)
    x = samples(model)
    found = nll(model, x)
    sigma = float(schedule.sigma(schedule.t_max))
    prior = torch.distributions.Normal(0.0, sigma).log_prob(found.latent).sum(1)
    carried = density(model, found.latent, schedule.t_max) - density(model, x, schedule.t_min)
    torch.testing.assert_close(found.nats, carried - prior, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", PREDICTIONS)
def test_networks_of_any_prediction_give_the_same(name):
    schedule = fs.EDM(sigma_max=20.0) if name == "eps" else fs.Flow()  # of which eps says nothing at alpha = 0
    exact, of = mixture(schedule), PREDICTIONS[name]

    def network(x, t):
        node = fs.node(schedule, float(t[0]))
        p, q = of.output(node.alpha, node.sigma)
        return p * x + q * exact.predict(x, node)

    x = samples(exact, 5)
    # the time goes through the network's own units and back: t itself for both schedules
    found = nll(fs.Denoiser(network, schedule, name), x)
    torch.testing.assert_close(found.nats, nll(exact, x).nats, atol=1e-5, rtol=0)


def test_hutchinsons_guess_is_unbiased_and_says_how_wrong_it_is():
    model = mixture(fs.Flow())
    x = samples(model, 60)
    found = nll(model, x, trace="hutchinson", probes=40, steps=12)
    away = found.nats - nll(model, x, steps=12).nats
    assert abs(float(away.sum())) < 4 * float(found.se.square().sum().sqrt())
    assert 0.4 < float((away / found.se).square().mean()) < 1.7  # chi^2 of 60 over 60: sd of 0.18
    assert float(found.se.mean()) < 0.5 * float(nll(model, x, trace="hutchinson", probes=4, steps=12).se.mean())
    assert nll(model, x[:2], trace="hutchinson", probes=1, steps=1).se is None


def test_probes_belong_to_their_sample_whatever_the_batch():
    model = mixture(fs.Flow())
    x = samples(model, 7)
    options = {"trace": "hutchinson", "probes": 3, "steps": 12}  # even steps: nothing else depends on the batch
    whole = nll(model, x, **options).nats
    torch.testing.assert_close(nll(model, x, batch=2, **options).nats, whole)
    torch.testing.assert_close(nll(model, x[:3], **options).nats, whole[:3])
    assert (nll(model, x, seed=1, **options).nats - whole).abs().max() > 0.01


def test_evaluations_and_products_are_counted():
    model = Counted(mixture(fs.VP.linear()))
    x = samples(model.model, 10)
    found = nll(model, x, batch=4)
    assert int(found.nfe.sum()) == model.rows
    assert len(found.nfe.unique()) > 1 or int(found.nfe[0]) > 50  # each batch has its own steps
    assert found.products.tolist() == (found.nfe * D).tolist()
    even = nll(model, x, steps=10, trace="hutchinson", probes=2)
    assert even.nfe.tolist() == [40] * 10
    assert even.products.tolist() == [80] * 10


def test_even_steps_are_of_order_four():
    model = mixture(fs.Flow())
    x = samples(model)
    exact = nll(model, x, rtol=1e-9).nats
    errors = [float((nll(model, x, steps=steps).nats - exact).abs().mean()) for steps in (30, 60)]
    assert math.log2(errors[0] / errors[1]) > 3.5


def test_a_float32_network_of_images_is_near():
    schedule, network = fs.VP.linear(), torch.nn.Conv2d(1, 1, 3, padding=1)
    model = fs.Denoiser(lambda x, t: 0.1 * network(x), schedule, "v", dtype=torch.float32)
    x = normal(3, 1, 4, 4)
    single = nll(model, x, steps=20)
    double = nll(fs.Denoiser(lambda x, t: 0.1 * network.double()(x), schedule, "v"), x, steps=20)
    torch.testing.assert_close(single.nats, double.nats, atol=1e-3, rtol=0)
    assert single.latent.shape == (3, 1, 4, 4)


def test_bits_per_dim_of_a_gaussian():
    """-log2 p of N(0, 1) at 0 is log2(2 pi) / 2 for each number; a flow with the data's variance 1 at sigma = 0.001."""
    model = GaussianMixture(fs.Flow(), torch.ones(1), torch.zeros(1, 5), torch.ones(1, 5))
    found = nll(model, torch.zeros(2, 5))
    variance = 0.999**2 + 0.001**2
    exact = 0.5 * math.log2(2 * math.pi * variance)
    assert found.bits_per_dim.tolist() == pytest.approx([exact, exact], abs=1e-5)


def test_the_condition_reaches_the_model():
    class Shifted:
        schedule = fs.Flow()

        def predict(self, x, node, *, shift, **condition):
            return mixture(self.schedule).predict(x - node.alpha * shift, node) + shift

    model = mixture(fs.Flow())
    x = samples(model, 3)
    there = float(model.schedule.alpha(model.schedule.t_min)) * 2.0
    found = nll(Shifted(), x + there, condition={"shift": 2.0}).nats
    torch.testing.assert_close(found, nll(model, x).nats, atol=1e-4, rtol=0)


def test_an_eps_network_at_alpha_0_is_refused_before_work_starts():
    calls = []
    model = fs.Denoiser(lambda x, t: calls.append(t) or x, fs.Flow(), "eps")
    with pytest.raises(ValueError, match="says nothing of x0 at alpha = 0"):
        nll(model, normal(2, 2))
    assert calls == []


def test_wrong_arguments_are_refused():
    model = mixture(fs.Flow())
    x = samples(model, 2)
    with pytest.raises(ValueError, match="'exact' or 'hutchinson', got 'trace'"):
        nll(model, x, trace="trace")
    with pytest.raises(ValueError, match="probes must be at least 1, got 0"):
        nll(model, x, probes=0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        nll(model, x, steps=0)
    with pytest.raises(ValueError, match="tolerance between 0 and 1, got 2"):
        nll(model, x, rtol=2.0)
    with pytest.raises(ValueError, match=r"finite samples \[n, ...\], got shape \[3\]"):
        nll(model, torch.zeros(3))
    with pytest.raises(ValueError, match="finite samples"):
        nll(model, x * torch.nan)
    frozen = fs.Denoiser(lambda x, t: torch.zeros_like(x), fs.Flow(), "x0")
    with pytest.raises(ValueError, match="how its x0 depends on x"):
        nll(frozen, x)


def test_as_a_quality_of_samples_it_is_the_entropy_of_their_own_distribution():
    model = GaussianMixture(fs.Flow(), torch.ones(1), torch.zeros(1, 4), torch.full((1, 4), 0.25))
    entropy = 4 * 0.5 * math.log(2 * math.pi * math.e * 0.25)
    exact = torch.distributions.Normal(0.0, 0.5)
    measure = NegativeLogLikelihood(lambda x: exact.log_prob(x).sum(1))
    own = measure(0.5 * normal(5000, 4))
    assert measure.name == "nll"
    assert own.n == 5000
    assert own.se == pytest.approx(math.sqrt(4 / 2 / 5000), rel=0.1)  # var of |z|^2 / 2 is d / 2
    assert abs(own.value - entropy) < 4 * own.se
    assert measure(0.4 * normal(5000, 4)).value < own.value - 4 * own.se  # too near the mode: less is not better
    assert measure(0.5 * normal(5000, 4) + 0.5).value > own.value + 4 * own.se
    x = 0.5 * normal(30, 4)
    by_flow = NegativeLogLikelihood(model)(x)
    assert by_flow.value == pytest.approx(measure(x).value, abs=1e-3)  # the flow's has the noise of t_min
    assert by_flow.se == pytest.approx(measure(x).se, rel=5e-3)


def test_samples_without_a_likelihood_are_refused():
    measure = NegativeLogLikelihood(lambda x: x[:, 0].log())
    with pytest.raises(ValueError, match="1 of 3 samples have no finite likelihood"):
        measure(torch.tensor([[1.0], [0.0], [2.0]]))
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        measure(torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"log p \[3\], one a sample, got \[3, 1\]"):
        NegativeLogLikelihood(lambda x: x.log())(torch.ones(3, 1))
