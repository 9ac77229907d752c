"""Schedules: alpha, sigma, lam, time, over their whole range, against each other and against diffusers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastsample as fs

from .toys import REGULAR, SCHEDULES, TABLES

EVERY = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
EVERY_TABLE = pytest.mark.parametrize("schedule", TABLES.values(), ids=TABLES.keys())
share = st.floats(0, 1)
BETAS = {  # ours and the names diffusers has for them
    "linear": (fs.VP.linear, "linear"),
    "scaled_linear": (fs.VP.scaled_linear, "scaled_linear"),
    "cosine": (fs.VP.cosine, "squaredcos_cap_v2"),
    "sigmoid": (fs.VP.sigmoid, "sigmoid"),
}


def time_at(schedule, share):
    return schedule.t_zero + share * (schedule.t_max - schedule.t_zero)


@EVERY
@given(share)
def test_variance_is_preserved(schedule, share):
    if isinstance(schedule, fs.EDM | fs.Flow):
        return
    t = time_at(schedule, share)
    assert float(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2) == pytest.approx(1, abs=1e-15)


@EVERY
@given(share, share)
def test_lam_falls_strictly_with_t(schedule, one, other):
    early, late = sorted((time_at(schedule, one), time_at(schedule, other)))
    if late - early > 1e-9 * (schedule.t_max - schedule.t_zero):
        assert schedule.lam(early) > schedule.lam(late)


@EVERY
@given(share)
def test_time_inverts_lam(schedule, share):
    t = time_at(schedule, share)
    back = float(schedule.time(schedule.lam(t)))
    span = schedule.t_max - schedule.t_zero
    # where lam is flat in t an error of one ulp of lam moves t by more; nowhere in these schedules by 1e4 ulps
    assert back == pytest.approx(t, abs=1e-12 * span)


@pytest.mark.parametrize("schedule", REGULAR.values(), ids=REGULAR.keys())
@given(share)
def test_lam_inverts_time(schedule, share):
    low, high = (float(schedule.lam(t)) for t in (0.999 * schedule.t_max, schedule.t_min + 1e-3))
    lam = low + share * (high - low)
    assert float(schedule.lam(schedule.time(lam))) == pytest.approx(lam, abs=1e-9)  # t - t_zero has lost digits


@EVERY
def test_both_ends_invert_exactly(schedule):
    for t in (schedule.t_max, schedule.t_zero):
        assert float(schedule.time(schedule.lam(t))) == pytest.approx(t, rel=1e-14, abs=1e-14)
    assert float(schedule.sigma(schedule.t_zero)) == 0
    assert float(schedule.alpha(schedule.t_zero)) == 1


@EVERY
def test_numbers_and_tensors_of_times_agree_in_float64(schedule):
    times = torch.linspace(schedule.t_zero, schedule.t_max, 37, dtype=torch.float64)
    lams = schedule.lam(times[1:-1])
    for name, arguments in (("alpha", times), ("sigma", times), ("lam", times), ("time", lams)):
        method = getattr(schedule, name)
        together = method(arguments)
        assert together.dtype == torch.float64
        assert together.shape == arguments.shape
        alone = torch.stack([method(float(number)) for number in arguments])
        assert alone.dtype == torch.float64
        torch.testing.assert_close(together, alone, rtol=1e-14, atol=0)  # vector and scalar exp differ by an ulp
        assert method(arguments.float()).dtype == torch.float64


@EVERY
def test_index_and_unit_keep_the_kind_of_their_argument(schedule):
    if isinstance(schedule, fs.EDM | fs.TrigFlow):
        for method in (schedule.index, schedule.unit):
            with pytest.raises(ValueError, match="another `time=`"):
                method(1.0)
        return
    for method in (schedule.index, schedule.unit):
        t = schedule.t_max / 2
        assert isinstance(method(t), float)
        there = method(torch.tensor([t, schedule.t_max]).int())
        assert there.dtype == torch.float64
        assert float(there[1]) == method(float(int(schedule.t_max)))


def test_the_last_time_of_a_table_is_its_last_index_and_time_one():
    schedule = fs.VP.linear()
    assert (schedule.index(999.0), schedule.unit(999.0), schedule.unit(-1.0)) == (999, 1, 0)
    assert (fs.Flow(3.0).index(1.0), fs.VPContinuous().index(1.0)) == (1000, 999)
    assert fs.Flow(3.0).unit(0.5) == pytest.approx(0.75)  # these networks are told sigma


@EVERY_TABLE
def test_a_table_is_hit_at_its_indices(schedule):
    bar = np.cumprod(1 - np.asarray(schedule.betas))
    t = torch.arange(len(bar), dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t).numpy() ** 2, bar, rtol=1e-12, atol=1e-15)  # 1000 roundings


@EVERY_TABLE
def test_log_alpha_is_linear_between_the_indices(schedule):
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    first, between, second = schedule.log_alpha(t)
    torch.testing.assert_close(between, 0.75 * first + 0.25 * second, rtol=1e-14, atol=0)


def test_alpha_is_linear_where_its_logarithm_is_not_finite():
    schedule = TABLES["zero_terminal_snr"]
    alpha = schedule.alpha(torch.tensor([998.0, 998.25, 999.0]))
    torch.testing.assert_close(alpha[1], 0.75 * alpha[0], rtol=1e-14, atol=0)
    assert (float(alpha[2]), float(schedule.lam(999.0)), float(schedule.sigma(999.0))) == (0, -torch.inf, 1)


@pytest.mark.parametrize("name", BETAS)
@pytest.mark.parametrize("steps", [1000, 100])
def test_tables_are_those_of_diffusers(name, steps):
    schedulers = pytest.importorskip("diffusers.schedulers")
    make, theirs = BETAS[name]
    scheduler = schedulers.DDPMScheduler(
        num_train_timesteps=steps, beta_schedule=theirs, beta_start=1e-3, beta_end=0.02
    )
    schedule = make(steps=steps) if name == "cosine" else make(1e-3, 0.02, steps)
    bar = schedule.alpha(torch.arange(steps)) ** 2
    # float32 keeps 1 - beta to 6e-8, and a thousand of them are multiplied: 6e-5 at worst
    torch.testing.assert_close(bar, scheduler.alphas_cumprod.double(), rtol=6e-5, atol=1e-9)


def test_zero_terminal_snr_is_that_of_diffusers():
    scheduling = pytest.importorskip("diffusers.schedulers.scheduling_ddim")
    schedule = fs.VP.scaled_linear()
    theirs = scheduling.rescale_zero_terminal_snr(torch.tensor(schedule.betas))
    ours = torch.tensor(schedule.zero_terminal_snr().betas)
    # near the end alpha_t / alpha_{t-1} is a ratio of small differences: float32 there has lost three digits
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: fs.VP(()), "at least 2 betas"),
        (lambda: fs.VP((0.1,)), "at least 2 betas, got 1"),
        (lambda: fs.VP((0.1, 0.0, 0.2)), r"\(0, 1\).*got 0"),
        (lambda: fs.VP((0.1, 1.0, 0.2)), "got 1"),
        (lambda: fs.VP((0.1, 1.5)), "got 1.5"),
        (lambda: fs.VP((0.1, float("nan"))), "got nan"),
        (lambda: fs.VPContinuous(20.0, 0.1), "beta_min < beta_max"),
        (lambda: fs.VPContinuous(0.0), "0 < beta_min"),
        (lambda: fs.EDM(80.0, 0.002), "sigma_min < sigma_max"),
        (lambda: fs.EDM(sigma_min=0.0), "0 < sigma_min"),
        (lambda: fs.Flow(0.0), "must be positive and finite, got 0"),
        (lambda: fs.Flow(float("nan")), "must be positive and finite, got nan"),
        (lambda: fs.Flow(float("inf")), "must be positive and finite, got inf"),
        (lambda: fs.Flow(t_max=1.5), "0 < t_min < t_max <= 1, got 0.001 and 1.5"),
        (lambda: fs.Flow(t_min=0.0), "0 < t_min"),
        (lambda: fs.VPContinuous(t_min=2.0), "t_min < t_max <= 1, got 2 and 1"),
        (lambda: fs.VPContinuous(t_min=0.0), "0 < t_min"),
        (lambda: fs.VPContinuous(0.1, float("inf")), "both finite, got 0.1 and inf"),
        (lambda: fs.EDM(0.1, float("inf")), "both finite, got 0.1 and inf"),
        (lambda: fs.TrigFlow(t_min=0.0), r"t_max <= pi/2, got 0 and"),
        (lambda: fs.TrigFlow(t_max=1.6), r"t_max <= pi/2, got 0.001 and 1.6"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_trig_flow_ends_without_data_at_half_pi():
    schedule = fs.TrigFlow(t_max=np.pi / 2)
    assert (float(schedule.alpha(np.pi / 2)), float(schedule.sigma(np.pi / 2))) == (0, 1)
    assert float(schedule.time(-torch.inf)) == np.pi / 2
    t = torch.linspace(0, np.pi / 2, 9, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha(t), t.cos(), rtol=0, atol=1e-15)


def test_schedules_compare_by_value_and_show_themselves_shortly():
    assert fs.VP.linear() == fs.VP.linear()
    assert fs.VP.linear() != fs.VP.linear(end=0.03)
    assert repr(fs.VP.linear()) == "VP(1000 betas, 0.0001 .. 0.02)"
    assert fs.VP(torch.tensor([0.1, 0.2], dtype=torch.float64)) == fs.VP((0.1, 0.2))
