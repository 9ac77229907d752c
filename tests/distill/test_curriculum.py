"""Curricula: the papers' formulas, written again here, as functions of the step alone."""

import math
from itertools import pairwise

import pytest
import torch

import fastsample as fs
from fastsample.distill.curriculum import Doubling, Lognormal, Matched, SquareRoot, intervals, rate, sampling, uniform


@pytest.mark.parametrize(("s0", "s1", "over"), [(2, 150, 800_000), (2, 150, 1000), (10, 20, 7), (1, 5, 100)])
def test_the_square_root_is_the_formula_of_song_et_al(s0, s1, over):
    times = SquareRoot(s0, s1, over=over)
    for k in [0, 1, over // 3, over // 2, over - 1, over]:
        n = math.ceil(math.sqrt(k / over * ((s1 + 1) ** 2 - s0**2) + s0**2) - 1) + 1
        assert times(k) == max(n - 1, 1)  # N counts the times, the grid its intervals
    assert times(10 * over) == s1


@pytest.mark.parametrize(("s0", "s1", "over"), [(10, 1280, 400_000), (10, 1280, 800), (4, 16, 10), (3, 10, 100)])
def test_doubling_is_the_formula_of_song_and_dhariwal(s0, s1, over):
    times = Doubling(s0, s1, over=over)
    each = math.floor(over / (math.log2(math.floor(s1 / s0)) + 1))
    for k in [0, 1, each - 1, each, over // 2, over - 1, over, 100 * over]:
        assert times(k) == min(s0 * 2 ** (k // each), s1)
    assert times.counts() == sorted({times(k) for k in range(0, 2 * over, max(1, each // 4))})


def test_eight_stages_take_ten_intervals_to_1280():
    times = Doubling(over=400_000)
    assert [times(k * 50_000) for k in range(9)] == [10, 20, 40, 80, 160, 320, 640, 1280, 1280]


def test_curricula_depend_on_the_step_alone():
    """A known fault: N(k) counted up in a variable of one process, and lost at a resume."""
    times = Doubling(10, 1280, over=80)
    forward = [times(k) for k in range(100)]
    assert [times(k) for k in reversed(range(100))] == forward[::-1]
    assert [Doubling(10, 1280, over=80)(k) for k in range(100)] == forward


def test_the_rate_of_the_average_goes_with_the_number_of_times():
    times = SquareRoot(2, 150, over=1000)
    mu = Matched(times, 0.9)
    assert mu(0) == pytest.approx(0.9)  # N = s0
    assert mu(1000) == pytest.approx(math.exp(2 * math.log(0.9) / 151))
    assert all(mu(k) <= mu(k + 50) for k in range(0, 1000, 50))


@pytest.mark.parametrize("schedule", [fs.EDM(), fs.VP.scaled_linear()], ids=repr)
def test_lognormal_intervals_have_the_mass_of_the_lognormal_distribution(schedule):
    """Checked by drawing levels from it, without the error function."""
    grid = fs.grid(schedule, 12, fs.karras)
    z = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    levels = (-1.1 + 2.0 * z).exp()
    ends = torch.tensor([math.exp(-node.lam) for node in grid.nodes], dtype=torch.float64)
    masses = torch.stack([((levels <= a) & (levels > b)).double().mean() for a, b in pairwise(ends)])
    found = torch.tensor(Lognormal()(grid))
    assert float(found.sum()) == pytest.approx(1)
    torch.testing.assert_close(found.double(), masses / masses.sum(), atol=4e-3, rtol=0)  # five standard errors


def test_lognormal_takes_grids_from_alpha_zero_to_sigma_zero():
    grid = fs.grid(fs.Flow(), 4, fs.at_times([1.0, 0.75, 0.5, 0.25]))
    shares = Lognormal(0.0, 1.0)(grid)
    assert sum(shares) == pytest.approx(1)
    assert shares == pytest.approx(shares[::-1])  # Flow is even in lam about t = 1/2


def test_uniform_takes_every_interval_alike():
    assert uniform(fs.grid(fs.EDM(), 4, fs.karras)) == [0.25] * 4


def test_wrong_curricula_are_refused():
    with pytest.raises(ValueError, match="from at least 1 to no less, got 0 to 10"):
        Doubling(0, 10, over=5)
    with pytest.raises(ValueError, match="from at least 1 to no less, got 20 to 10"):
        SquareRoot(20, 10, over=5)
    with pytest.raises(ValueError, match="at least 1 step, got over = 0"):
        Doubling(over=0)
    with pytest.raises(ValueError, match="mu0 must lie between 0 and 1, got 1"):
        Matched(Doubling(over=10), 1.0)
    with pytest.raises(ValueError, match="positive std, got mean = 0, std = 0"):
        Lognormal(0.0, 0.0)
    with pytest.raises(ValueError, match="no probability between"):
        Lognormal(1000.0, 0.1)(fs.grid(fs.EDM(), 4, fs.karras, end=0.002))
    with pytest.raises(ValueError, match="unknown sampling 'karras'; choose one of uniform, lognormal"):
        sampling("karras")
    with pytest.raises(ValueError, match=r"times gave 2\.5 intervals at step 7"):
        intervals(lambda step: 2.5, 7)
    for mu in (1.0, -0.1, lambda step: 2.0):
        with pytest.raises(ValueError, match=r"at least 0 and below 1, got"):
            rate(mu, 0)
