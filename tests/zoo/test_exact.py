"""Exact denoisers, against the score of torch's own distributions, against each other and against samples."""

import math

import pytest
import torch
from torch import distributions

import fastsample as fs
from fastsample.zoo.exact import Empirical, GaussianMixture, gaussian_flow

SCHEDULES = [fs.VPContinuous(), fs.EDM(), fs.Flow(shift=3.0)]
by_type = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: type(schedule).__name__)


def mixture(schedule, shape=(3,)):
    g = torch.Generator().manual_seed(0)
    return GaussianMixture(
        schedule,
        torch.tensor([1.0, 3.0, 2.0, 2.0]),
        torch.randn((4, *shape), generator=g, dtype=torch.float64),
        torch.rand((4, *shape), generator=g, dtype=torch.float64) + 0.02,
    )


def draw(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@by_type
@pytest.mark.parametrize("lam", [-4.0, -0.5, 3.0])
def test_the_mixture_obeys_tweedies_formula(schedule, lam):
    """E[x0 | x] = (x + sigma^2 grad log p(x)) / alpha, with p from torch.distributions."""
    model, node = mixture(schedule), fs.node(schedule, float(schedule.time(lam)))
    x = (2 * draw(16, 3)).requires_grad_()
    parts = distributions.Normal(node.alpha * model.means, (node.alpha**2 * model.variances + node.sigma**2).sqrt())
    p = distributions.MixtureSameFamily(distributions.Categorical(model.weights), distributions.Independent(parts, 1))
    (score,) = torch.autograd.grad(p.log_prob(x).sum(), x)
    expected = (x + node.sigma**2 * score) / node.alpha
    # at lam = -4 the difference of x and sigma^2 score cancels two digits of float64
    torch.testing.assert_close(model.predict(x, node), expected, rtol=1e-9, atol=1e-9)


def test_a_mixture_knows_only_its_mean_at_alpha_0():
    model = mixture(fs.Flow())
    mean = (model.weights[:, None] * model.means).sum(0)
    torch.testing.assert_close(model.predict(draw(5, 3), fs.node(fs.Flow(), 1.0)), mean.expand(5, 3))


def test_a_mixture_of_images_is_that_of_their_pixels():
    images, vectors = mixture(fs.EDM(), (3, 4, 5)), mixture(fs.EDM(), (60,))
    x, node = draw(7, 3, 4, 5), fs.node(fs.EDM(), 0.7)
    torch.testing.assert_close(images.predict(x, node), vectors.predict(x.flatten(1), node).view_as(x))


def test_denoisers_compute_in_the_dtype_of_x():
    data = draw(50, 3)
    for model in (mixture(fs.EDM()), Empirical(fs.EDM(), data)):
        x, node = draw(4, 3), fs.node(fs.EDM(), 0.3)
        single = model.predict(x.float(), node)
        assert single.dtype == torch.float32
        torch.testing.assert_close(single.double(), model.predict(x, node), rtol=1e-4, atol=1e-5)  # float32


def test_samples_have_the_mean_and_the_variance_of_the_mixture():
    model, n = mixture(fs.EDM()), 100_000
    x = model.sample(n, seed=0)
    w = model.weights[:, None]
    mean = (w * model.means).sum(0)
    variance = (w * (model.variances + model.means**2)).sum(0) - mean**2
    assert ((x.mean(0) - mean).abs() < 4 * (variance / n).sqrt()).all()
    torch.testing.assert_close(x.var(0), variance, rtol=0.03, atol=0)  # about 4 sqrt(2 / n), more for heavy tails
    assert torch.equal(x, model.sample(n, seed=0))
    assert not torch.equal(x, model.sample(n, seed=1))


@by_type
def test_the_gaussian_flow_composes_and_undoes(schedule):
    start = float(schedule.time(-3.0))
    s, t, end = (fs.node(schedule, u) for u in (start, float(schedule.time(0.5)), schedule.t_zero))
    x, mean, variance = draw(6, 2), torch.tensor([0.3, -1.0]), torch.tensor([0.5, 0.04])
    there = gaussian_flow(x, s, t, mean, variance)
    torch.testing.assert_close(gaussian_flow(there, t, s, mean, variance), x)
    direct = gaussian_flow(x, s, end, mean, variance)
    torch.testing.assert_close(gaussian_flow(there, t, end, mean, variance), direct)
    # at sigma = 0 each coordinate is as many standard deviations from its mean as it was
    before = (x - s.alpha * mean) / (s.alpha**2 * variance + s.sigma**2).sqrt()
    torch.testing.assert_close((direct - mean) / variance.double().sqrt(), before, rtol=1e-6, atol=1e-6)  # float32 mean


@by_type
def test_the_gaussian_flow_has_the_velocity_of_the_denoiser(schedule):
    """d(x / alpha) / d(sigma / alpha) = eps, by a central difference."""
    mean, variance = torch.tensor([0.3, -1.0]).double(), torch.tensor([0.5, 0.04]).double()
    model = GaussianMixture(schedule, torch.ones(1), mean[None], variance[None])
    s, before, after = (fs.node(schedule, float(schedule.time(1.0 + d))) for d in (0, -1e-4, 1e-4))
    x = draw(6, 2)
    ends = [gaussian_flow(x, s, t, mean, variance) / t.alpha for t in (before, after)]
    slope = (ends[1] - ends[0]) / (after.sigma / after.alpha - before.sigma / before.alpha)
    eps = (x - s.alpha * model.predict(x, s)) / s.sigma
    torch.testing.assert_close(slope, eps, rtol=1e-6, atol=1e-6)  # the square of 1e-4, a rounding of 1e-12


def test_the_gaussian_flow_is_finite_from_alpha_0_to_sigma_0():
    s, t = fs.node(fs.Flow(), 1.0), fs.node(fs.Flow(), 0.0)
    x = draw(6, 2)
    torch.testing.assert_close(gaussian_flow(x, s, t, 0.5, 0.25), 0.5 + 0.5 * x)


@by_type
@pytest.mark.parametrize("lam", [-4.0, 0.0, 2.0])
def test_the_denoiser_of_a_data_set_is_that_of_its_points(schedule, lam):
    data, x = draw(30, 3), draw(8, 3, seed=2)
    points = GaussianMixture(schedule, torch.ones(30), data, torch.zeros(30, 1))
    node = fs.node(schedule, float(schedule.time(lam)))
    torch.testing.assert_close(Empirical(schedule, data).predict(x, node), points.predict(x, node))


def test_the_size_of_the_pieces_does_not_matter():
    data, x, node = draw(100, 3, 2), draw(17, 3, 2, seed=2), fs.node(fs.EDM(), 0.5)
    whole = Empirical(fs.EDM(), data).predict(x, node)
    for limit in (1, 250, 100 * 17):
        torch.testing.assert_close(Empirical(fs.EDM(), data, limit=limit).predict(x, node), whole)


def test_the_nearest_point_wins_at_small_sigma_also_in_float32():
    data = draw(200, 64).float()
    x = data[:20] + 1e-4 * draw(20, 64, seed=2).float()
    x0 = Empirical(fs.EDM(), data).predict(x, fs.node(fs.EDM(), 1e-3))
    torch.testing.assert_close(x0, data[:20])


def test_wrong_shapes_and_numbers_are_named():
    one = torch.ones(1)
    with pytest.raises(ValueError, match=r"weights must be \[K\] and means \[K, ...\], got shapes \(1,\) and \(2, 3\)"):
        GaussianMixture(fs.EDM(), one, torch.zeros(2, 3), one)
    with pytest.raises(ValueError, match="weights must be positive"):
        GaussianMixture(fs.EDM(), -one, torch.zeros(1, 3), one)
    with pytest.raises(ValueError, match="variances must not be negative, got -1"):
        GaussianMixture(fs.EDM(), one, torch.zeros(1, 3), -one)
    with pytest.raises(ValueError, match=r"data must be \[N, ...\]"):
        Empirical(fs.EDM(), torch.zeros(3))


def test_an_exact_denoiser_samples_its_distribution():
    model = mixture(fs.EDM())
    noise = fs.noise((3,), seeds=range(2000))
    plan = fs.trace(_euler, fs.grid(fs.EDM(), 40))
    x = fs.sample(model, plan, noise)
    mean = (model.weights[:, None] * model.means).sum(0)
    assert ((x.double().mean(0) - mean).abs() < 4 * x.double().std(0) / math.sqrt(2000) + 0.02).all()


def _euler(model, x, grid):
    for s, t in grid.steps():
        x = fs.exponential_step(x, model.predict(x, s), s, t)
    return x


@pytest.mark.parametrize("kind", ["mixture", "empirical"])
def test_samples_at_their_own_times_are_each_as_alone(kind):
    schedule, data = fs.VP.linear(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = {
        "mixture": lambda: GaussianMixture(schedule, torch.ones(5), data, torch.full((5, 1), 0.1)),
        "empirical": lambda: Empirical(schedule, data),
    }
    model, x, t = made[kind](), torch.ones(3, 3, dtype=torch.float64), torch.tensor([10.0, 500.0, 900.0])
    alone = [model.predict(x[:1], fs.node(schedule, float(moment))) for moment in t]
    torch.testing.assert_close(model.predict(x, fs.nodes(schedule, t)), torch.cat(alone))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@by_type
def test_a_blurred_data_set_is_a_mixture_around_its_points(schedule, dtype):
    data, x = draw(30, 3), draw(8, 3, seed=2).to(dtype)
    mixture = GaussianMixture(schedule, torch.ones(30), data, torch.full((30, 1), 0.2**2, dtype=torch.float64))
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5  # rounding, which 1 / sigma^2 makes larger
    for lam in (-4.0, 0.0, 2.0):
        node = fs.node(schedule, float(schedule.time(lam)))
        blurred = Empirical(schedule, data, blur=0.2).predict(x, node)
        torch.testing.assert_close(blurred, mixture.predict(x, node), rtol=tolerance, atol=tolerance)


def test_both_ways_to_the_distances_agree_where_sigma_is_small():
    """float64 takes them from products, which cancel; float32 from differences."""
    data = draw(200, 64)
    x = data[:20] + 0.02 * draw(20, 64, seed=2)
    node = fs.node(fs.EDM(), 0.01)
    single = Empirical(fs.EDM(), data).predict(x.float(), node)
    torch.testing.assert_close(Empirical(fs.EDM(), data).predict(x, node), single.double(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [fs.node, fs.nodes])
def test_an_empty_batch_has_an_empty_answer(kind):
    model, x = Empirical(fs.VP.linear(), draw(5, 3)), torch.empty(0, 3)
    node = kind(model.schedule, 10.0 if kind is fs.node else torch.empty(0))
    assert model.predict(x, node).shape == (0, 3)


def test_autocast_changes_nothing():
    data, x = draw(30, 3), draw(8, 3, seed=2).float()
    model, node = Empirical(fs.VP.linear(), data), fs.node(fs.VP.linear(), 300.0)
    plain = model.predict(x, node)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(model.predict(x, node), plain)


def test_a_negative_blur_is_named():
    with pytest.raises(ValueError, match="blur is a standard deviation, at least 0, got -1"):
        Empirical(fs.EDM(), torch.zeros(2, 3), blur=-1.0)
