"""Random times, and data made noisy there."""

import math

import pytest
import torch
from scipy import stats

import fastsample as fs
from fastsample import distill
from fastsample.distill import draws
from fastsample.distill.times import DISTRIBUTIONS, distribution, noisy, random_nodes

SCHEDULES = [fs.VP.linear(), fs.VPContinuous(), fs.EDM(), fs.Flow(shift=3.0)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=repr)
def test_random_times_lie_within_the_schedule_and_fill_it(schedule):
    torch.manual_seed(0)
    t = random_nodes(schedule, 4000, torch.device("cpu")).t
    assert t.dtype == torch.float64
    assert schedule.t_min <= t.min() < t.max() <= schedule.t_max
    if isinstance(schedule, fs.EDM):
        assert t.log().mean() == pytest.approx(-1.2, abs=0.1)  # standard error 0.02
        assert t.log().std() == pytest.approx(1.2, abs=0.07)  # five standard errors
    else:
        middle = (schedule.t_min + schedule.t_max) / 2
        assert (t < middle).float().mean() == pytest.approx(0.5, abs=0.04)  # five standard errors
    if isinstance(schedule, fs.VP):
        assert torch.equal(t, t.round())
        assert t.min() == 0
        assert t.max() == 999


FLOW = fs.Flow(t_min=1e-9)
LAWS = [  # times, schedule, the distribution function of t
    (distill.UniformTimes(), fs.VPContinuous(), lambda t: (t - 1e-3) / (1 - 1e-3)),
    (distill.LogNormalTimes(-0.8, 1.6), fs.EDM(1e-9, 1e9), lambda t: stats.norm.cdf(t.log(), -0.8, 1.6)),
    (  # sigma / alpha = 3 t / (1 - t)
        distill.LogNormalTimes(0.3, 0.7),
        fs.Flow(shift=3.0, t_min=1e-9),
        lambda t: stats.norm.cdf((3 * t / (1 - t)).log(), 0.3, 0.7),
    ),
    (distill.LogitNormalTimes(0.5, 0.8), FLOW, lambda t: stats.norm.cdf(t.logit(), 0.5, 0.8)),
    (
        distill.CosMapTimes(),
        FLOW,
        lambda t: 2 / math.pi * torch.atan(t / (1 - t)),
    ),  # density 2 / (pi - 2 pi t + 2 pi t^2)
]


@pytest.mark.parametrize(("times", "schedule", "law"), LAWS, ids=[repr(law[0]) for law in LAWS])
def test_times_follow_their_law(times, schedule, law):
    """Kolmogorov and Smirnov, with a chance of 1e-4 of an error for one seed."""
    torch.manual_seed(0)
    t = times.quantile(schedule, times.shares(5000, torch.device("cpu")))
    assert stats.kstest(law(t), "uniform").pvalue > 1e-4
    assert stats.kstest(law(t) ** 1.2, "uniform").pvalue < 1e-4  # and would find another law


def test_the_law_of_cosmap_is_the_integral_of_its_density():
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    density = 2 / (math.pi - 2 * math.pi * t + 2 * math.pi * t**2)
    found = torch.cumulative_trapezoid(density, t)[[9_999, 49_999, 89_999]]
    torch.testing.assert_close(found, LAWS[-1][2](t[[10_000, 50_000, 90_000]]))


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_times_of_a_table_are_its_indices(name):
    torch.manual_seed(0)
    times, schedule = distribution(name, fs.VP.linear()), fs.VP.linear()
    t = times.quantile(schedule, times.shares(20_000, torch.device("cpu")))
    assert torch.equal(t, t.round())
    assert t.min() >= 0
    assert t.max() <= 999
    ends = times.quantile(schedule, torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64))
    assert 0 <= ends[0] <= ends[1] <= 999
    if name == "uniform":
        assert torch.bincount(t.long()).shape == (1000,)
        assert stats.chisquare(torch.bincount(t.long())).pvalue > 1e-4


def test_without_a_name_the_times_are_those_of_the_default():
    assert distribution(None, fs.EDM()) == distill.LogNormalTimes()
    assert distribution(None, fs.Flow()) == distill.UniformTimes()


def test_stratified_times_fall_into_each_share_of_a_batch_once():
    times = distill.UniformTimes(stratified=True)
    shares = times.shares(64, torch.device("cpu"))
    assert (shares * 64).floor().tolist() == list(range(64))
    assert (shares * 64 % 1).std() > 0.1


@pytest.mark.parametrize("stratified", [False, True])
def test_shares_do_not_depend_on_how_a_batch_is_split(stratified):
    times = distill.UniformTimes(stratified=stratified)

    def drawn(first, count):
        with draws.part(torch.Generator().manual_seed(4), first=first, count=count, total=48):
            return times.shares(count, torch.device("cpu"))

    assert torch.equal(torch.cat([drawn(0, 16), drawn(16, 20), drawn(36, 12)]), drawn(0, 48))


def test_times_that_do_not_fit_are_refused_before_any_training(toy):
    with pytest.raises(ValueError, match=r"unknown times 'normal'; choose one of uniform, lognormal"):
        distill.Diffusion(toy(), times="normal")
    edm = fs.Denoiser(toy().network, fs.EDM(), "x0")
    for name in ("logit_normal", "cosmap"):
        with pytest.raises(ValueError, match=r"times from 0 to 1, .* many orders of magnitude; take distill.LogNormal"):
            distill.Diffusion(edm, times=name)
    with pytest.raises(ValueError, match="a finite mean and a std above 0, got 0 and -1"):
        distill.LogNormalTimes(0.0, -1.0)


def test_noisy_is_alpha_x0_plus_sigma_eps():
    schedule = fs.VP.linear()
    x0, eps = torch.full((3, 2), 2.0), torch.full((3, 2), 1.0)
    t = torch.tensor([-1.0, 300.0, 999.0], dtype=torch.float64)
    expected = [2 * float(schedule.alpha(moment)) + float(schedule.sigma(moment)) for moment in t]
    torch.testing.assert_close(noisy(x0, eps, fs.nodes(schedule, t))[:, 0], torch.tensor(expected))
