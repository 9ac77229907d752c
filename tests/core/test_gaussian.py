"""Data known by its mean and covariance, and the warm start made of it."""

import json
from dataclasses import replace

import pytest
import torch

import fastsample as fs
from fastsample import solvers
from fastsample.gaussian import Warm
from fastsample.zoo.exact import GaussianMixture

VP = fs.VP.linear()
FLOW = fs.Flow()
MEAN = torch.tensor([0.3, -0.2, 0.7], dtype=torch.float64)
FACTOR = torch.tensor([[0.9, 0.0, 0.0], [0.4, 0.3, 0.0], [-0.2, 0.5, 0.1]], dtype=torch.float64)
FULL = fs.Gaussian(MEAN, covariance=FACTOR @ FACTOR.T)
DIAGONAL = fs.Gaussian(MEAN, torch.tensor([0.25, 0.04, 0.0]))
NOISE = fs.noise((3,), seeds=range(6), dtype=torch.float64)


class Correlated:
    """The exact denoiser of a Gaussian with a covariance: C alpha (alpha^2 C + sigma^2)^-1 (x - alpha m) + m."""

    def __init__(self, schedule, gaussian):
        self.schedule, self.gaussian = schedule, gaussian

    def predict(self, x, node, **condition):
        c, m = self.gaussian.covariance.to(x), self.gaussian.mean.to(x)
        total = node.alpha**2 * c + node.sigma**2 * torch.eye(len(c)).to(x)
        return m + node.alpha * (x - node.alpha * m) @ torch.linalg.solve(total, c)


@pytest.mark.parametrize("schedule", [VP, fs.EDM(), FLOW], ids=repr)
def test_a_move_is_where_the_ode_of_a_gaussian_goes(schedule):
    start = fs.node(schedule, 0.9 * schedule.t_max)
    grid = fs.grid(schedule, 400, start=start.t, end=schedule.t_min)
    x = NOISE.draw(0) * start.sigma
    walked = fs.solve(Correlated(schedule, FULL), solvers.unipc_3, grid, NOISE)
    torch.testing.assert_close(FULL.move(x, start, grid.nodes[-1]), walked, rtol=0, atol=1e-6)  # 400 steps of order 4


def test_a_covariance_of_independent_coordinates_is_the_variance():
    s, t = fs.node(VP, 999), fs.node(VP, 400)
    full = fs.Gaussian(MEAN, covariance=torch.diag(DIAGONAL.variance))
    torch.testing.assert_close(full.move(NOISE.draw(0), s, t), DIAGONAL.move(NOISE.draw(0), s, t))


def test_one_variance_serves_samples_of_any_shape():
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    s, t = fs.node(VP, 999), fs.node(VP, 500)
    whole = fs.Gaussian(torch.full((3, 4, 4), 0.5), torch.full((3, 4, 4), 0.25)).move(x, s, t)
    torch.testing.assert_close(fs.Gaussian(torch.tensor(0.5), torch.tensor(0.25)).move(x, s, t), whole)


def test_a_move_is_finite_from_alpha_0_to_sigma_0():
    s, t = fs.node(FLOW, 1.0), fs.node(FLOW, 0.0)
    torch.testing.assert_close(FULL.move(NOISE.draw(0), s, t) - MEAN, NOISE.draw(0) @ _root(FULL.covariance))


def _root(matrix):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.T


def test_statistics_are_measured_on_samples():
    samples = MEAN + NOISE.draw(0) @ FACTOR.T
    centred = samples - samples.mean(0)
    full = fs.Gaussian.of(samples, full=True)
    torch.testing.assert_close(full.covariance, centred.T @ centred / 5)
    torch.testing.assert_close(fs.Gaussian.of(samples).variance, full.covariance.diagonal())
    torch.testing.assert_close(fs.Gaussian.of(samples, scalar=True).variance, full.covariance.diagonal().mean())
    images = samples.view(6, 1, 3)
    torch.testing.assert_close(fs.Gaussian.of(images, full=True).covariance, full.covariance)


def warm_grid(gaussian, steps=4, start=600.0):
    return fs.grid(VP, steps, fs.uniform_t, start=start, warm=gaussian)


def test_a_warm_start_is_exact_on_a_gaussian_at_no_evaluation():
    model = Correlated(VP, FULL)
    end = FULL.move(NOISE.draw(0) * fs.node(VP, 999).sigma, fs.node(VP, 999), fs.node(VP, 20))
    grid = fs.grid(VP, 2, fs.at_times([21.0, 20.5, 20.0]), end=20.0, start=21.0, warm=FULL)
    plan = fs.trace(solvers.unipc_3, grid)
    assert plan.nfe == 2
    torch.testing.assert_close(fs.sample(model, plan, NOISE), end, rtol=0, atol=1e-5)  # two short steps
    torch.testing.assert_close(fs.solve(model, solvers.unipc_3, grid, NOISE), fs.sample(model, plan, NOISE))


def test_a_warm_start_lowers_the_error_on_a_mixture():
    mixture = GaussianMixture(
        VP, torch.ones(2), torch.tensor([[0.5, 0.2, 0.1], [-0.4, 0.6, 0.0]]), torch.tensor([[0.05], [0.1]])
    )
    gaussian = fs.Gaussian.of(mixture.sample(4000, seed=1), full=True)
    fine = fs.solve(mixture, solvers.unipc_3, fs.grid(VP, 400, fs.uniform_lam), NOISE)
    cold = fs.solve(mixture, solvers.dpmpp_2m, fs.grid(VP, 6, fs.uniform_t), NOISE)
    warm = fs.solve(mixture, solvers.dpmpp_2m, warm_grid(gaussian, 6, 700.0), NOISE)
    assert (warm - fine).square().mean() < (cold - fine).square().mean()


@pytest.mark.parametrize("gaussian", [FULL, DIAGONAL, fs.Gaussian(torch.tensor(0.1), torch.tensor(0.3))], ids=str)
def test_a_plan_keeps_the_statistics_of_its_warm_start(gaussian, tmp_path):
    plan = fs.trace(solvers.dpmpp_2m, warm_grid(gaussian))
    assert "as if the data were Gaussian" in str(plan)
    plan.save(tmp_path / "plan.json")
    loaded = fs.Plan.load(tmp_path / "plan.json")
    assert loaded.warm.start == plan.warm.start == fs.node(VP, 999)
    for name in ("mean", "variance", "covariance"):
        one, other = getattr(loaded.warm.gaussian, name), getattr(gaussian, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    model = GaussianMixture(VP, torch.ones(1), MEAN[None], torch.full((1, 3), 0.1))
    assert torch.equal(fs.sample(model, loaded, NOISE), fs.sample(model, plan, NOISE))


def test_statistics_changed_in_the_file_are_noticed(tmp_path):
    path = tmp_path / "plan.json"
    fs.trace(solvers.dpmpp_2m, warm_grid(DIAGONAL)).save(path)
    text = json.loads(path.read_text())
    numbers = text["plan"]["warm"]["gaussian"]["mean"]
    numbers["float64"] = DIAGONAL.to_json()["variance"]["float64"]
    path.write_text(json.dumps(text))
    with pytest.raises(ValueError, match="checksum"):
        fs.Plan.load(path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fs.Gaussian(MEAN), "either a variance or a covariance"),
        (lambda: fs.Gaussian(MEAN, torch.ones(3), torch.eye(3)), "either a variance or a covariance"),
        (lambda: fs.Gaussian(MEAN, -torch.ones(3)), "must not be negative, got -1"),
        (lambda: fs.Gaussian(MEAN, torch.tensor(float("nan"))), "variance of a Gaussian must be finite"),
        (lambda: fs.Gaussian(MEAN, covariance=torch.eye(2)), r"\[3, 3\] for a mean of 3 numbers, got \[2, 2\]"),
        (lambda: fs.Gaussian(MEAN, covariance=-torch.eye(3)), "negative eigenvalue -1"),
        (lambda: fs.Gaussian.of(torch.ones(1, 3)), r"N of at least 2, got shape \[1, 3\]"),
        (lambda: FULL.move(torch.ones(2, 4), fs.node(VP, 9), fs.node(VP, 1)), r"of shape \[3\], these have \[4\]"),
        (lambda: DIAGONAL.move(torch.ones(2, 4), fs.node(VP, 9), fs.node(VP, 1)), r"of shape \[3\], these have \[4\]"),
        (lambda: fs.grid(VP, 4, fs.uniform_t, warm=DIAGONAL), "a start below it, got start = 999"),
        (lambda: fs.grid(VP, 4, fs.uniform_t, start=500, strength=0.5, warm=DIAGONAL), "strength 0.5"),
        (lambda: fs.solve(None_, solvers.ddim, warm_grid(DIAGONAL), NOISE, init=NOISE.draw(0)), "takes no init"),
    ],
)
def test_statistics_that_do_not_fit_are_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


None_ = GaussianMixture(VP, torch.ones(1), MEAN[None], torch.ones(1, 3))


def test_a_covariance_that_is_not_symmetric_is_refused():
    """eigh reads one half alone, in silence."""
    with pytest.raises(ValueError, match="covariance must be symmetric, its two halves differ by 2"):
        fs.Gaussian(torch.zeros(2), covariance=torch.tensor([[3.0, 2.0], [0.0, 3.0]]))
    root = torch.randn(40, 40, generator=torch.Generator().manual_seed(0))
    fs.Gaussian(torch.zeros(40), covariance=root @ root.T)  # to float32's rounding it is


def test_a_warm_start_of_another_kind_is_refused():
    with pytest.raises(TypeError, match=r"must be an fs\.Gaussian of the data, got float"):
        fs.grid(VP, 4, fs.uniform_t, start=500, warm=0.5)
    plan = fs.trace(solvers.ddim, warm_grid(DIAGONAL))
    with pytest.raises(ValueError, match="warm and predicts of a plan must be"):
        replace(plan, warm=DIAGONAL)
    assert isinstance(plan.warm, Warm)
