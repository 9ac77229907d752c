"""Restart: forward noise between runs of another solver."""

import math
from itertools import pairwise

import pytest
import torch

import fastsample as fs
from fastsample import solvers
from fastsample.solvers import Interval

from .cases import SCHEDULES, Toy, mixture
from .test_stochastic import MEAN, VARIANCE, Drawn

NOISE = fs.noise((2,), seeds=range(4), dtype=torch.float64)
ONE = (Interval(0.3, 2.0, repeats=2, steps=3),)
TWO = (Interval(0.1, 0.6, repeats=1, steps=2), Interval(0.5, 3.0, repeats=2, steps=4))
BASES = [solvers.heun, solvers.ddim, solvers.dpmpp_2m, solvers.dpmpp_2s, solvers.unipc_3]


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("vp_zero_snr", "flow", "flow_shift")])
@pytest.mark.parametrize("base", BASES, ids=lambda base: base.__name__)
def test_a_plan_equals_the_direct_run(base, name):
    schedule = SCHEDULES[name]
    for end in (None, schedule.t_min):
        grid = fs.grid(schedule, 12, fs.karras, start=0.98 * schedule.t_max, end=end)
        for intervals in (ONE, TWO):
            plan = fs.trace(solvers.restart, grid, intervals=intervals, base=base)
            direct = fs.solve(mixture(schedule), solvers.restart, grid, NOISE, intervals=intervals, base=base)
            torch.testing.assert_close(fs.sample(mixture(schedule), plan, NOISE), direct, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vp_zero_snr", "flow", "flow_shift"])
def test_the_run_may_start_at_alpha_0_where_its_base_can(name):
    schedule = SCHEDULES[name]
    grid = fs.grid(schedule, 8, fs.uniform_t)
    assert grid.nodes[0].alpha == 0
    plan = fs.trace(solvers.restart, grid, intervals=ONE, base=solvers.dpmpp_2m)
    direct = fs.solve(mixture(schedule), solvers.restart, grid, NOISE, intervals=ONE, base=solvers.dpmpp_2m)
    torch.testing.assert_close(fs.sample(mixture(schedule), plan, NOISE), direct, rtol=1e-9, atol=1e-9)


def test_the_plan_counts_every_evaluation_of_the_restarts():
    grid = fs.grid(fs.EDM(), 6, fs.karras)
    for intervals, more in ((ONE, 2 * 2 * 3), (TWO, 2 * 2 + 2 * 2 * 4)):
        model = Toy(fs.EDM())
        fs.solve(model, solvers.restart, grid, NOISE, intervals=intervals)
        plan = fs.trace(solvers.restart, grid, intervals=intervals)
        assert plan.nfe == len(model.calls) == 2 * 6 - 1 + more
        assert [row.node for row in plan.rows] == model.calls
        assert len(plan.noises) == sum(interval.repeats for interval in intervals)


@pytest.mark.parametrize("s_noise", [1.0, 1.003])
@pytest.mark.parametrize("name", ["vp_linear", "edm", "flow"])
def test_it_is_the_algorithm_of_the_paper_in_the_frame_x_over_alpha(name, s_noise):
    schedule, denoiser, evaluations = SCHEDULES[name], mixture(fs.EDM()), 0
    grid = fs.grid(schedule, 6, fs.karras, start=0.98 * schedule.t_max)
    levels = [node.sigma / node.alpha for node in grid.nodes]
    (interval,) = ONE
    low = min(levels[1:-1], key=lambda level: abs(math.log(level / interval.low)))

    def heun(x, levels):
        nonlocal evaluations
        for t, t_next in pairwise(levels):
            d = (x - denoiser.predict(x, fs.Node(t, 1.0, t))) / t
            x_next, evaluations = x + (t_next - t) * d, evaluations + 1
            if t_next > 0:
                d_next = (x_next - denoiser.predict(x_next, fs.Node(t_next, 1.0, t_next))) / t_next
                x_next, evaluations = x + (t_next - t) * (d + d_next) / 2, evaluations + 1
            x = x_next
        return x

    ends = [(interval.high ** (1 / 7)), low ** (1 / 7)]
    again = [(ends[0] + i / interval.steps * (ends[1] - ends[0])) ** 7 for i in range(interval.steps + 1)]
    k = levels.index(low)
    x = heun(NOISE.draw(0) * levels[0], levels[: k + 1])
    for _ in range(interval.repeats):
        x = x + s_noise * math.sqrt(interval.high**2 - low**2) * NOISE.draw(evaluations + 1)
        x = heun(x, again)
    x = heun(x, levels[k:])
    ours = fs.solve(mixture(schedule), solvers.restart, grid, NOISE, intervals=ONE, s_noise=s_noise)
    torch.testing.assert_close(ours, x, rtol=1e-9, atol=1e-9)


def variance_at_the_end(steps, intervals, off=1.0):
    """Of a run whose start has `off` times the variance that it should have."""
    schedule = fs.EDM()
    start, end = (float(schedule.time(lam)) for lam in (-3.0, 3.0))
    grid = fs.grid(schedule, steps, fs.uniform_lam, start=start, end=end)
    model = Drawn(schedule, 8)
    x = model.mean + math.sqrt(off * (VARIANCE + start**2)) * model.noise()
    x = solvers.restart(model, x, grid, intervals=intervals)
    assert float(x[0]) == pytest.approx(MEAN, rel=1e-9)
    return float(x[1:].square().sum()) / (VARIANCE + end**2)


def test_the_distribution_converges_with_the_order_of_the_base():
    coarse, fine = (abs(variance_at_the_end(n, (Interval(0.3, 2.0, 3, n),)) - 1) for n in (40, 80))
    assert 1.9 < math.log2(coarse / fine) < 2.1


def test_restarts_shrink_the_error_that_a_run_has_made():
    """What the paper restarts for: noise forgets where the state was. Heun alone keeps an error of the start."""
    errors = [abs(variance_at_the_end(80, (Interval(0.3, 2.0, repeats, 80),), off=1.5) - 1) for repeats in (1, 2, 3)]
    # of an error at 0.3 the share v + 0.3^2 over v + 2^2 is left, each time: 0.08; Heun's own error is 1e-3 here
    assert errors[0] == pytest.approx(0.5 * (VARIANCE + 0.3**2) / (VARIANCE + 2.0**2), rel=0.05)
    assert errors[1] < 0.15 * errors[0]
    assert errors[2] < 0.01


@pytest.mark.parametrize(
    ("intervals", "cause"),
    [
        ([(0.3, 2.0)], r"intervals of restart must be a list of solvers.Interval\(low, high\), got \[\(0.3, 2.0\)\]"),
        (Interval(0.3, 2.0), r"must be a list of solvers.Interval\(low, high\), got Interval\(low=0.3, high=2.0"),
        ((), r"at least one interval and a grid of at least 2 steps, got 0 and 6"),
        ((Interval(0.3, 100.0),), r"begins at the grid's nearest level 0.\d+, .* above whose start 80"),
        ((Interval(0.02, 0.025),), r"begins at the grid's nearest level 0.08\d+, below which"),
        ((Interval(0.3, 2.0), Interval(0.31, 4.0)), r"two intervals begin at the same node"),
    ],
)
def test_intervals_that_do_not_fit_the_grid_are_refused(intervals, cause):
    grid = fs.grid(fs.EDM(), 6, fs.karras)
    with pytest.raises(ValueError, match=cause):
        fs.trace(solvers.restart, grid, intervals=intervals)


def test_intervals_are_checked_when_they_are_made():
    with pytest.raises(ValueError, match=r"goes up from low to high, two levels sigma / alpha, got 2 to 0.3"):
        Interval(2.0, 0.3)
    for wrong in (0, 1.5, "2"):
        with pytest.raises(ValueError, match=r"whole numbers of at least 1, got .* and 4"):
            Interval(0.3, 2.0, repeats=wrong)


def test_without_intervals_it_restarts_once_from_near_a_tenth_to_twenty_times_its_level():
    grid = fs.grid(fs.EDM(), 30, fs.karras)
    levels = [node.sigma for node in grid.nodes]
    low = min(levels[1:-1], key=lambda level: abs(math.log(level / 0.1)))
    assert 0.08 < low < 0.125
    share = ((20 * low) ** (1 / 7) - low ** (1 / 7)) / (80 ** (1 / 7) - 0.002 ** (1 / 7))
    steps = int(29 * share)  # as many as the grid has there, of its 29 to level 0.002
    by_name = fs.solve(mixture(fs.EDM()), solvers.get("restart"), grid, NOISE)
    said = fs.solve(mixture(fs.EDM()), solvers.restart, grid, NOISE, intervals=[Interval(low, 20 * low, steps=steps)])
    assert torch.equal(by_name, said)


def test_without_intervals_any_grid_will_do():
    for schedule in SCHEDULES.values():
        start = 0.98 * schedule.t_max
        one = fs.grid(schedule, 1, start=start)  # no level to restart from
        heun = fs.solve(mixture(schedule), solvers.heun, one, NOISE)
        assert torch.equal(fs.solve(mixture(schedule), solvers.restart, one, NOISE), heun)
        for steps in (2, 3, 50):
            for end in (None, schedule.t_min):
                for base in (solvers.heun, solvers.dpmpp_2m):
                    grid = fs.grid(schedule, steps, fs.quadratic_t, start if base is solvers.heun else None, end)
                    x = fs.solve(mixture(schedule), solvers.restart, grid, NOISE, base=base)
                    assert x.isfinite().all()
                    assert len(fs.trace(solvers.restart, grid, base=base).noises) == 1


@pytest.mark.parametrize("name", ["vp_linear", "vp_cosine", "edm", "vp_continuous"])
def test_a_restart_may_go_up_to_the_start_of_the_schedule(name):
    schedule = SCHEDULES[name]
    for start in (schedule.t_max, 0.9 * schedule.t_max):
        grid = fs.grid(schedule, 6, fs.uniform_t, start=start)
        low, top = math.exp(-grid.nodes[3].lam), math.exp(-grid.nodes[0].lam)
        plan = fs.trace(solvers.restart, grid, intervals=[Interval(low, top)], base=solvers.dpmpp_2m)
        assert plan.nfe == 6 + 4


def test_a_base_that_ends_with_noise_is_refused():
    with pytest.raises(ValueError, match=r"base of restart must be a solver such as solvers.heun, got 'heun'"):
        fs.trace(solvers.restart, fs.grid(fs.EDM(), 6, fs.karras), intervals=ONE, base="heun")
    with pytest.raises(ValueError, match="restart draws two noises between two evaluations"):
        fs.trace(solvers.restart, fs.grid(fs.EDM(), 6, fs.karras), intervals=ONE, base=solvers.euler_ancestral)
