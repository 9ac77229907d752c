"""Grids and spacings."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch

import fastsample as fs

from .toys import REGULAR, SCHEDULES, TABLES

VP = fs.VP.scaled_linear()
LINEAR = fs.VP.linear()
ANY = [fs.default_t, fs.uniform_lam, fs.uniform_t, fs.quadratic_t, fs.power_t(1.5), fs.karras, fs.exponential, fs.beta]
NEED_LAM = [fs.uniform_lam, fs.karras, fs.exponential]
TABLE = [fs.leading, fs.trailing, fs.linspace]
names = lambda f: getattr(f, "__name__", str(f))  # noqa: E731


def times(grid):
    return [node.t for node in grid.nodes]


@pytest.mark.parametrize("spacing", ANY, ids=names)
@pytest.mark.parametrize("schedule", REGULAR.values(), ids=REGULAR.keys())
@pytest.mark.parametrize("steps", [1, 2, 7, 50])
def test_a_grid_falls_from_start_to_end_in_steps(schedule, spacing, steps):
    start = 0.999 if spacing in NEED_LAM and isinstance(schedule, fs.Flow) else None  # at t = 1 its lam is -inf
    grid = fs.grid(schedule, steps, spacing, start=start)
    assert len(grid) == steps == len(list(grid.steps()))
    late = spacing is fs.default_t and 2 < steps < 12 and not start
    late = late and float(schedule.lam(schedule.t_max)) < float(LINEAR.lam(999 - 1000 / steps))
    assert (grid.nodes[0].t == (start or schedule.t_max)) is not late
    assert (grid.nodes[-1].t, grid.nodes[-1].sigma) == (schedule.t_zero, 0)
    assert all(t.t < s.t and t.lam > s.lam for s, t in grid.steps())
    assert all(s.sigma > 0 for s, _ in grid.steps())


@pytest.mark.parametrize("spacing", ANY, ids=names)
@pytest.mark.parametrize("schedule", REGULAR.values(), ids=REGULAR.keys())
def test_a_grid_starts_and_ends_where_it_is_told(schedule, spacing):
    start, end = (schedule.t_min + share * (schedule.t_max - schedule.t_min) for share in (0.7, 0.2))
    given = times(fs.grid(schedule, 5, spacing, start=start, end=end))
    assert (given[0], given[-1], len(given)) == (start, end, 6)
    assert times(fs.grid(schedule, 1, spacing, start=start, end=end)) == [start, end]
    late = times(fs.grid(schedule, 5, spacing, start=start))
    assert (late[0], late[-1]) == (start, schedule.t_zero)


@pytest.mark.parametrize("spacing", TABLE, ids=names)
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50, 333, 999, 1000])
def test_the_spacings_of_tables_give_trained_indices(spacing, steps):
    given = times(fs.grid(VP, steps, spacing))
    assert len(given) == steps + 1
    assert given[-1] == -1
    assert all(t == int(t) and 0 <= t <= 999 for t in given[:-1])
    assert sorted(given, reverse=True) == given
    assert len(set(given)) == len(given)


@pytest.mark.parametrize("spacing", ANY, ids=names)
@pytest.mark.parametrize("steps", [1000, 1001])
def test_fine_grids_still_fall(spacing, steps):
    assert len(fs.grid(VP, steps, spacing)) == steps


def test_uniform_lam_has_equal_steps_of_lam():
    for schedule in REGULAR.values():
        start = schedule.t_min + 0.9 * (schedule.t_max - schedule.t_min)
        lams = [node.lam for node in fs.grid(schedule, 10, fs.uniform_lam, start=start, end=schedule.t_min).nodes]
        np.testing.assert_allclose(np.diff(lams), (lams[-1] - lams[0]) / 10, rtol=1e-7)  # lam near t_zero, see Flow


def test_uniform_lam_of_a_whole_run_leaves_out_t_min():
    open_, closed = fs.grid(VP, 6, fs.uniform_lam), fs.grid(VP, 6, fs.uniform_lam, end=VP.t_min)
    assert times(open_)[:-1] == times(closed)[:-1]


@pytest.mark.parametrize("rho", [7.0, 3.0])
def test_karras_is_the_formula_of_edm(rho):
    steps = 18
    spacing = fs.karras if rho == 7.0 else partial(fs.karras, rho=rho)
    i = np.arange(steps) / (steps - 1)
    sigmas = (80 ** (1 / rho) + i * (0.002 ** (1 / rho) - 80 ** (1 / rho))) ** rho
    np.testing.assert_allclose(times(fs.grid(fs.EDM(), steps, spacing))[:-1], sigmas, rtol=1e-12)


def test_quadratic_t_is_even_in_the_root_of_t():
    given = np.array(times(fs.grid(fs.VPContinuous(), 5, fs.quadratic_t, end=1e-3)))
    np.testing.assert_allclose(np.diff(given**0.5), np.diff(given**0.5)[0], rtol=1e-12)


def test_powers_of_t_are_the_named_spacings_and_even_in_their_root():
    for schedule in REGULAR.values():
        assert times(fs.grid(schedule, 6, fs.power_t(2))) == pytest.approx(times(fs.grid(schedule, 6, fs.quadratic_t)))
        assert times(fs.grid(schedule, 6, fs.power_t(1))) == pytest.approx(times(fs.grid(schedule, 6, fs.uniform_t)))
    given = np.array(times(fs.grid(fs.VPContinuous(), 5, fs.power_t(1.5), end=1e-3)))
    np.testing.assert_allclose(np.diff(given ** (1 / 1.5)), np.diff(given ** (1 / 1.5))[0], rtol=1e-12)
    assert fs.grid(VP, 3, fs.power_t(1.5)).spacing == "power_t(1.5)"


@pytest.mark.parametrize(("steps", "rho"), [(3, 1.5), (5, 1.5), (6, 1.75), (9, 1.75), (10, 2.0), (11, 2.0), (12, 2.0)])
def test_the_default_spacing_is_a_power_of_the_linear_schedules_time(steps, rho):
    start = 999 - 1000 / steps if steps < 12 else 999.0
    ours = times(fs.grid(LINEAR, steps, fs.default_t))
    assert ours == pytest.approx(times(fs.grid(LINEAR, steps, fs.power_t(rho), start=start)), abs=1e-6)
    told = times(fs.grid(LINEAR, steps, fs.default_t, start=700.0))
    assert told == pytest.approx(times(fs.grid(LINEAR, steps, fs.power_t(rho), start=700.0)), abs=1e-6)


@pytest.mark.parametrize("steps", [5, 20])
def test_the_default_spacing_has_the_same_levels_on_every_schedule(steps):
    lams = [node.lam for node in fs.grid(LINEAR, steps, fs.default_t, start=500.0, end=50.0).nodes]
    for schedule in REGULAR.values():
        start, end = (float(schedule.time(lam)) for lam in (lams[0], lams[-1]))
        grid = fs.grid(schedule, steps, fs.default_t, start=start, end=end)
        np.testing.assert_allclose([node.lam for node in grid.nodes], lams, atol=1e-6)


def test_the_default_spacing_starts_at_alpha_0_with_many_steps_and_below_it_with_few():
    for schedule in (fs.Flow(), TABLES["zero_terminal_snr"]):
        assert fs.grid(schedule, 12, fs.default_t).nodes[0].alpha == 0
        assert fs.grid(schedule, 6, fs.default_t).nodes[0].alpha > 0
        assert fs.grid(schedule, 2, fs.default_t).nodes[0].alpha == 0


@pytest.mark.parametrize("steps", [2, 5, 10])
def test_a_late_spacing_starts_where_leading_does(steps):
    late = fs.grid(LINEAR, steps, fs.late(fs.uniform_t))
    assert late.nodes[0].t == pytest.approx(fs.grid(LINEAR, steps, fs.leading).nodes[0].t, abs=1.01)
    assert times(late) == pytest.approx(times(fs.grid(LINEAR, steps, fs.uniform_t, start=late.nodes[0].t)))
    assert late.spacing == "late uniform_t"


def test_a_schedule_of_less_noise_is_not_begun_late():
    assert times(fs.grid(VP, 6, fs.late(fs.uniform_t))) == times(fs.grid(VP, 6, fs.uniform_t))
    assert fs.grid(VP, 6, fs.default_t).nodes[0].t == 999


def test_one_step_of_a_late_spacing_starts_at_the_noise():
    assert times(fs.grid(LINEAR, 1, fs.late(fs.uniform_t))) == [999, -1]
    assert times(fs.grid(LINEAR, 1, fs.default_t)) == [999, -1]


def test_exponential_is_even_in_the_logarithm_of_the_level_with_both_ends_evaluated():
    levels = [node.sigma for node in fs.grid(fs.EDM(), 7, fs.exponential).nodes]
    np.testing.assert_allclose(levels[:-1], np.geomspace(80, 0.002, 7), rtol=1e-12)
    assert levels[-1] == 0


@pytest.mark.parametrize(("a", "b"), [(0.6, 0.6), (1.0, 1.0), (2.0, 3.0)])
def test_beta_gives_quantiles_of_its_distribution(a, b):
    from scipy.stats import beta

    given = np.array(times(fs.grid(fs.VPContinuous(), 8, partial(fs.beta, a=a, b=b), end=1e-3)))
    np.testing.assert_allclose(beta.cdf((given - 1e-3) / (1 - 1e-3), a, b), np.linspace(1, 0, 9), atol=1e-9)


def test_beta_is_denser_at_both_ends_than_in_the_middle():
    steps = -np.diff(times(fs.grid(fs.VPContinuous(), 9, fs.beta, end=1e-3)))
    assert steps[0] < steps[4] > steps[-1]


@pytest.mark.parametrize(("spacing", "key"), [(fs.ays_sd15, "StableDiffusion"), (fs.ays_sdxl, "StableDiffusionXL")])
def test_the_tables_of_align_your_steps_are_those_published(spacing, key):
    """diffusers keeps them as timesteps; those are the levels, rounded to an index of Stable Diffusion's schedule."""
    module = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    published = module.AysSchedules[f"{key}Timesteps"]
    ours = times(fs.grid(VP, 10, spacing))[:-1]
    np.testing.assert_allclose(ours, published, atol=0.7)  # the levels are published to three digits
    levels = module.AysSchedules[f"{key}Sigmas"]
    found = [node.sigma / node.alpha for node in fs.grid(VP, 10, spacing).nodes[1:-1]]
    np.testing.assert_allclose(found, levels[1:10], rtol=1e-6)


def test_the_table_for_video_is_for_its_own_schedule():
    module = pytest.importorskip("diffusers.schedulers.scheduling_utils")
    grid = fs.grid(fs.EDM(0.002, 700.0), 10, fs.ays_svd)
    np.testing.assert_allclose(
        [node.sigma for node in grid.nodes[:-1]], module.AysSchedules["StableDiffusionVideoSigmas"][:10]
    )
    with pytest.raises(ValueError, match="another model or range"):
        fs.grid(fs.EDM(), 40, fs.ays_svd)


def test_a_table_of_levels_is_interpolated_in_lam():
    spacing = fs.snr_table([10.0, 1.0, 0.1])
    grid = fs.grid(fs.EDM(0.1, 10.0), 4, spacing, end=0.1)
    np.testing.assert_allclose([node.sigma for node in grid.nodes], np.geomspace(10, 0.1, 5))


@pytest.mark.parametrize("levels", [[1.0], [1.0, 2.0], [2.0, 1.0, -1.0], [2.0, 2.0], [math.inf, 1.0]], ids=str)
def test_a_table_that_does_not_fall_is_refused(levels):
    with pytest.raises(ValueError, match="at least 2 positive, decreasing numbers"):
        fs.snr_table(levels)


def test_the_order_falls_over_the_last_steps_where_the_grid_says_so():
    grid = fs.grid(VP, 5, lower_order_final=True)
    assert [grid.order(k, 3) for k in range(5)] == [3, 3, 3, 2, 1]
    assert [fs.grid(VP, 5).order(k, 3) for k in range(5)] == [3] * 5
    assert grid.spacing == "uniform_lam, lower_order_final"


@pytest.mark.parametrize(("strength", "kept"), [(1.0, 10), (0.55, 5), (0.3, 3), (0.1, 1), (0.7, 7)])
def test_strength_keeps_the_last_steps(strength, kept):
    whole = fs.grid(VP, 10, fs.quadratic_t).nodes
    assert fs.grid(VP, 10, fs.quadratic_t, strength=strength).nodes == whole[-kept - 1 :]


def ddim_times(steps, spacing, offset):
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    scheduler.set_timesteps(steps)
    return [float(t) for t in scheduler.timesteps]


@pytest.mark.parametrize("steps", [2, 3, 7, 10, 15, 30, 64, 333, 500, 999])
@pytest.mark.parametrize("spacing", TABLE, ids=names)
def test_indices_are_those_of_ddim_in_diffusers(spacing, steps):
    name = spacing.__name__
    assert times(fs.grid(VP, steps, spacing))[:-1] == ddim_times(steps, name, offset=0)
    if name == "leading":
        ours = times(fs.grid(VP, steps, partial(fs.leading, offset=1)))
        assert ours[:-1] == ddim_times(steps, name, offset=1)


@pytest.mark.parametrize(("steps", "theirs"), [(61, 62), (103, 104)])
def test_trailing_gives_as_many_times_as_steps_where_diffusers_gives_one_more(steps, theirs):
    """np.arange(T, 0, -T / N) reaches a rounding error above 0 there: DDIM then evaluates the index -1."""
    given = ddim_times(steps, "trailing", offset=0)
    assert (len(given), given[-1]) == (theirs, -1)
    assert times(fs.grid(VP, steps, fs.trailing))[:-1] == given[:-1]


def test_one_step_starts_at_the_noise_where_diffusers_linspace_starts_at_the_data():
    assert ddim_times(1, "linspace", offset=0) == [0]
    assert times(fs.grid(VP, 1, fs.linspace)) == [999, -1]
    assert times(fs.grid(VP, 1, fs.trailing)) == [999, -1]
    assert times(fs.grid(VP, 1, fs.leading)) == [0, -1]  # by its definition: the fault that `trailing` mends


def test_given_times_are_taken_as_they_are():
    assert times(fs.grid(VP, 3, fs.at_times([999.0, 500.5, 20]))) == [999, 500.5, 20, -1]
    assert times(fs.grid(VP, 2, fs.at_times([999.0, 500.5, 20]), end=20)) == [999, 500.5, 20]
    assert fs.grid(VP, 1, fs.at_times([999.0])).spacing == "at_times"


def test_rounding_gives_trained_indices():
    given = times(fs.grid(VP, 8, fs.uniform_lam, round_to_index=True))
    assert all(t == int(t) for t in given)
    assert given[0] == 999
    assert times(fs.grid(VP, 3, fs.at_times([998.6, 500.4, 20.7]), round_to_index=True)) == [999, 500, 21, -1]


def test_a_whole_number_of_steps_may_come_from_numpy():
    assert len(fs.grid(VP, np.int64(4))) == 4


def test_a_spacing_of_ones_own_may_be_any_callable():
    class Halves:
        def __call__(self, schedule, steps, start, end):
            return [start / 2**k for k in range(steps)]

    grid = fs.grid(VP, 3, Halves())
    assert (times(grid), grid.spacing) == ([999, 499.5, 249.75, -1], "Halves")


def test_a_node_knows_its_lam_at_both_ends():
    schedule = TABLES["zero_terminal_snr"]
    assert fs.node(schedule, 999).lam == -math.inf
    assert fs.node(schedule, -1).lam == math.inf
    middle = fs.grid(VP, 2).node(0.5)
    assert middle.lam == pytest.approx(0.5, abs=1e-14)


@pytest.mark.parametrize("t", [torch.tensor(3.0), torch.ones(2, 1), [1.0, 2.0], 3.0], ids=str)
def test_times_of_many_samples_that_are_no_vector_are_refused(t):
    with pytest.raises(ValueError, match=r"times must be a tensor \[B\].*for one time use fs\.node"):
        fs.nodes(VP, t)


@pytest.mark.parametrize("schedule", REGULAR.values(), ids=REGULAR.keys())
def test_many_nodes_are_the_single_ones(schedule):
    t = torch.linspace(schedule.t_zero, schedule.t_max, 7)  # float32, as a network's times often are
    many, single = fs.nodes(schedule, t), [fs.node(schedule, float(moment)) for moment in t]
    for name in ("t", "alpha", "sigma", "lam"):
        one = torch.tensor([getattr(node, name) for node in single], dtype=torch.float64)
        torch.testing.assert_close(getattr(many, name), one, rtol=1e-12, atol=1e-14)


def test_spacings_that_need_no_lam_start_at_zero_terminal_snr():
    for spacing in (fs.uniform_t, fs.quadratic_t, *TABLE):
        assert len(fs.grid(TABLES["zero_terminal_snr"], 8, spacing)) == 8
    assert fs.grid(TABLES["zero_terminal_snr"], 8, fs.trailing).nodes[0].alpha == 0


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fs.grid(VP, 0), "at least 1, got 0"),
        (lambda: fs.grid(VP, -1), "at least 1, got -1"),
        (lambda: fs.grid(VP, 2.5), "whole number of at least 1, got 2.5"),
        (lambda: fs.grid(VP, "8"), "whole number of at least 1, got '8'"),
        (lambda: fs.grid(VP, 8, strength=0.0), "above 0 and at most 1, and must leave one, got 0"),
        (lambda: fs.grid(VP, 8, strength=1.5), "got 1.5"),
        (lambda: fs.grid(VP, 8, strength=0.1), "of the 8 steps.*got 0.1"),
        (lambda: fs.grid(VP, 8, fs.late(fs.uniform_t), start=600.0), "chooses its start itself, got start = 600"),
        (lambda: fs.power_t(0.0), "must be positive and finite, got 0"),
        (lambda: fs.power_t(math.inf), "rho of power_t must be positive and finite, got inf"),
        (lambda: fs.grid(VP, 8, partial(fs.karras, rho=0.0)), "rho of karras must be positive and finite, got 0.0"),
        (lambda: fs.grid(VP, 8, partial(fs.beta, a=-1.0)), "a and b of a Beta distribution .* got -1.0 and 0.6"),
        (lambda: fs.grid(SCHEDULES["flow"], 8, fs.exponential), "exponential cannot start at t = 1"),
        (lambda: fs.grid(VP, 8, "karras"), "a function such as fs.uniform_lam .*got 'karras'"),
        (lambda: fs.grid(VP, 8, start=1000.0), "within t = 999 .. -1.*start = 1000"),
        (lambda: fs.grid(VP, 8, start=float("nan")), "start = nan"),
        (lambda: fs.grid(VP, 8, end=-2), "end = -2"),
        (lambda: fs.grid(VP, 8, start=100, end=200), "start = 100, end = 200"),
        (lambda: fs.grid(VP, 8, start=100, end=100), "start = 100, end = 100"),
        (lambda: fs.grid(fs.Flow(), 8, start=2.0), "start = 2"),
        (lambda: fs.grid(VP, 8, fs.uniform_lam, end=-1), "leave end=None"),
        (lambda: fs.grid(fs.EDM(), 8, fs.karras, end=0.0), "leave end=None"),
        (lambda: fs.grid(VP, 8, fs.karras, start=0.0), "do not decrease"),
        (lambda: fs.grid(SCHEDULES["zero_terminal_snr"], 8), "uniform_lam cannot start.*alpha = 0"),
        (lambda: fs.grid(SCHEDULES["flow"], 8, fs.karras), "karras cannot start at t = 1"),
        (lambda: fs.grid(fs.Flow(), 8, fs.trailing), "needs a VP schedule"),
        (lambda: fs.grid(VP, 8, fs.trailing, start=500), "fixed times"),
        (lambda: fs.grid(VP, 8, fs.trailing, end=5), "fixed times"),
        (lambda: fs.grid(VP, 1001, fs.trailing), "only 1000 indices for 1001 steps"),
        (lambda: fs.grid(VP, 1000, partial(fs.leading, offset=1)), "time 1000 lies outside"),
        (lambda: fs.grid(VP, 1001, fs.uniform_t, round_to_index=True), "do not decrease .*no rounding"),
        (lambda: fs.grid(fs.EDM(), 8, round_to_index=True), "table of betas"),
        (lambda: fs.grid(VP, 3, fs.at_times([900, 800])), "gave 2 times for 3 steps, expected 3"),
        (lambda: fs.grid(VP, 2, fs.at_times([800, 900])), r"do not decrease \(800 then 900\)"),
        (lambda: fs.grid(VP, 1, fs.at_times([900, 800]), end=20), "gave 900 .. 800, but the grid was asked for 20"),
        (lambda: fs.grid(VP, 1, fs.at_times([900]), start=500), "but the grid was asked for 500"),
        (lambda: fs.grid(VP, 1, fs.at_times([-1.0])), "do not decrease"),
    ],
)
def test_a_grid_that_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("schedule", [VP, TABLES["zero_terminal_snr"], fs.EDM(), fs.Flow()], ids=repr)
def test_the_exponential_step_is_ddim_and_finite_at_both_ends(schedule):
    x0, eps = torch.tensor([0.3, -0.8]).double(), torch.tensor([1.2, 0.1]).double()
    nodes = fs.grid(schedule, 4, fs.uniform_t).nodes
    for s, t in pairwise(nodes):
        moved = fs.exponential_step(s.alpha * x0 + s.sigma * eps, x0, s, t)
        torch.testing.assert_close(moved, t.alpha * x0 + t.sigma * eps, rtol=1e-12, atol=1e-13)
