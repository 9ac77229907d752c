import json
import math
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastsample.bench import comparable
from fastsample.bench.compare import Tolerance, compare
from fastsample.bench.latency import Ratio, Times, Timing
from fastsample.bench.measure import Features, Score
from fastsample.bench.quality import FrechetTo
from fastsample.bench.record import Record, write_influence, write_record, write_run
from fastsample.bench.reference import Reference
from fastsample.bench.significance import Estimate, holm, paired, ratio

N = 400
FID = {"extractor": "inception", "sha256": "ab", "resize": "tf1", "dataset": "cifar10", "n_reference": 50_000}
MACHINE = {"cpu": "Fast 9000", "cores": "8", "threads": "1", "torch": "2.13"}
MS = [0.001 * (1 + 0.01 * math.sin(i)) for i in range(20)]  # a quiet machine: about 1 ms, within one percent


def record(name="teacher/ddim/8", scores=None, **changes):
    """One cell by hand. Its quality key is its name, so that it may keep influences of its own."""
    model, solver, steps = name.split("/")
    key = name.replace("/", "-")
    one = Record(key, name, model, solver, int(steps), "default", {}, N, nfe=int(steps), rows=float(steps), quality=key)
    return replace(one, scores=scores or {}, **changes)


def timing(samples=MS, **changes):
    return replace(Timing(batch=8, steady=Times(tuple(samples))), **changes)


@pytest.fixture
def make(tmp_path):
    """Writes a run of records, with the influences of some, and a configuration with some changes; gives its folder."""

    def write(name, *records, influence=None, environment=MACHINE, finished=True, **changes):
        folder = tmp_path / name
        configuration = {"n": N, "shape": [3, 8, 8], "quality": {"fid": FID}, "latency": {"threads": 1}, **changes}
        environments = environment if isinstance(environment, list) else [environment]
        body = {"cases": [one.key for one in records], "configuration": configuration, "hash": "0"}
        write_run(folder, {**body, "environments": environments, "finished": finished})
        for one in records:
            write_record(folder, one)
        for cell, kept in (influence or {}).items():
            write_influence(folder, cell.replace("/", "-"), kept)
        return folder

    return write


def only(comparison, kind="quality"):
    [row] = [row for row in comparison.rows if row.kind == kind]
    return row


def scored(value, se=None, **changes):
    return record(scores={"fid": Score(value, se, n=N, **changes)})


# Holm's correction and the estimates


def by_closed_testing(p_values, i):
    """The adjusted p-value as the closure of Bonferroni tests gives it: the worst of all sets of hypotheses with i."""
    m = len(p_values)
    sets = [chosen for size in range(1, m + 1) for chosen in combinations(range(m), size) if i in chosen]
    return max(min(1.0, len(chosen) * min(p_values[j] for j in chosen)) for chosen in sets)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(p_values):
    for i, decision in enumerate(holm(p_values, 0.05)):
        assert decision.p == pytest.approx(by_closed_testing(p_values, i), abs=1e-15)
        if abs(decision.p - 0.05) > 1e-12:
            assert decision.rejected == (decision.p < 0.05)


def test_holm_on_a_worked_example():
    found = holm([0.01, 0.04, 0.03, 0.005], 0.05)
    assert [decision.p for decision in found] == pytest.approx([0.03, 0.06, 0.06, 0.02])  # 3 x .01, 2 x .03, 4 x .005
    assert [decision.rejected for decision in found] == [True, False, False, True]
    assert [decision.level for decision in found] == pytest.approx([0.05 / 3, 0.05 / 2, 0.05 / 2, 0.05 / 4])


@given(
    st.floats(-5, 5), st.floats(0.1, 2), st.none() | st.floats(2, 100), st.floats(0, 1), st.sampled_from([0.05, 0.001])
)
def test_an_interval_leaves_out_zero_exactly_where_p_is_below_its_level(effect, se, df, margin, level):
    estimate = Estimate(effect, se, df, margin)
    low, high = estimate.interval(level)
    if abs(estimate.p - level) > 1e-9:
        assert (estimate.p < level) == (low > 0 or high < 0)


def test_an_estimate_agrees_with_students_tables():
    # 97.5% points: t(4) = 2.776, t(30) = 2.042, normal 1.960; Student's t of 4 degrees at 2.776 has p = 0.05
    for df, point in ((4, 2.776), (30, 2.042), (None, 1.960)):
        assert Estimate(0.0, 1.0, df).interval(0.05) == pytest.approx((-point, point), abs=6e-4)
        assert Estimate(point, 1.0, df).p == pytest.approx(0.05, abs=1e-4)


def test_pairs_have_the_error_of_a_paired_t_test():
    stats = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 30, dtype=torch.float64, generator=generator)
    estimate = paired(float(b.mean() - a.mean()), a - a.mean(), b - b.mean())
    known = stats.ttest_rel(b.numpy(), a.numpy())
    assert estimate.p == pytest.approx(known.pvalue, rel=1e-9)
    assert estimate.interval(0.05) == pytest.approx(tuple(known.confidence_interval(0.95)), rel=1e-9)


def test_a_ratio_of_independent_medians_is_seldom_called_a_difference():
    """20 times a side, with a heavy tail, 400 repeats; at 5% at most 20 + 3 sd of 4.4 would be called one."""
    generator = torch.Generator().manual_seed(1)

    def times():
        late = torch.rand(20, generator=generator) < 0.15
        return (1 + 0.02 * torch.rand(20, generator=generator) + late * torch.rand(20, generator=generator)).tolist()

    assert sum(ratio(times(), times()).p < 0.05 for _ in range(400)) <= 33


def test_a_machine_that_slows_down_for_a_while_makes_the_interval_wider():
    """Times whose logs follow their neighbours (an AR(1) of 0.8), against the same times in another order."""
    generator = torch.Generator().manual_seed(4)
    wider = []
    for _ in range(50):
        logs = torch.randn(40, generator=generator)
        for i in range(1, 40):
            logs[i] = 0.8 * logs[i - 1] + 0.6 * logs[i]
        times = (0.1 * logs).exp()
        mixed = times[torch.randperm(40, generator=generator)]
        wider.append(ratio(times.tolist(), times.tolist()).se / ratio(mixed.tolist(), mixed.tolist()).se)
    assert min(wider) > 0.5
    assert sum(wider) / 50 > 1.2  # the mean of 40 such times has 3 times the error; 6 blocks see a part of that


def test_the_error_of_a_median_sees_both_its_spread_and_its_drift():
    spread = [1.0, 1.1, 1.2] * 12  # every block of 6 has the same median
    drifting = [1 + 0.1 * (i // 6) for i in range(36)]  # blocks of one time each
    gap = math.log(1.2 / 1.0) * 6 / (2 * (36 - 2 * 12 + 1))  # the 12th and the 25th value, and all between
    assert ratio(spread, spread).se == pytest.approx(math.sqrt(2) * gap)
    levels = torch.tensor([math.log(1 + 0.1 * i) for i in range(6)], dtype=torch.float64)
    assert ratio(drifting, drifting).se == pytest.approx(math.sqrt(2 / 6) * float(levels.std()))


# Verdicts of quality


def test_a_run_compared_with_itself_is_unchanged(make):
    folder = make("a", record(scores={"fid": Score(3.0, 0.1, n=N)}, timing=timing()))
    comparison = compare(folder, folder)
    assert comparison.verdicts == {"teacher/ddim/8": "unchanged"}
    assert not comparison.failed
    assert comparison.tests == 0
    assert only(comparison).how == "identical to the last bit"


@pytest.mark.parametrize(
    ("better", "up", "down"), [("less", "regressed", "improved"), ("more", "improved", "regressed")]
)
def test_which_direction_is_worse_follows_the_measure(make, better, up, down):
    a = make("a", scored(3.0, 0.1, better=better))
    assert only(compare(a, make("b", scored(4.0, 0.1, better=better)))).verdict == up
    assert only(compare(a, make("c", scored(2.0, 0.1, better=better)))).verdict == down


def test_a_difference_within_its_interval_is_inconclusive(make):
    row = only(compare(make("a", scored(3.0, 0.1)), make("b", scored(3.2, 0.1))))
    assert row.verdict == "inconclusive"
    assert row.effect == pytest.approx(0.2)
    assert row.interval == pytest.approx((0.2 - 0.278, 0.2 + 0.278), abs=1e-3)  # t(399) = 1.966 times sqrt(2) x 0.1
    assert "no influence" in row.how


def test_the_debiased_numbers_are_compared(make):
    row = only(compare(make("a", scored(3.0, 0.1, debiased=2.5)), make("b", scored(3.1, 0.1, debiased=2.9))))
    assert (row.before, row.after) == (2.5, 2.9)


def test_without_standard_errors_there_is_no_verdict(make):
    row = only(compare(make("a", scored(3.0)), make("b", scored(30.0, 0.1))))
    assert row.verdict == "inconclusive"
    assert row.p is None
    assert "no standard error" in row.how


def test_pairs_of_samples_narrow_the_interval(make):
    """With a correlation of 0.99 by a factor of 10: sqrt(2 sd^2 (1 - 0.99)) instead of sqrt(2 sd^2)."""
    shared, own_a, own_b = torch.randn(3, N, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    kept = [math.sqrt(0.99) * shared + 0.1 * own for own in (own_a, own_b)]
    se = [float(one.std()) / math.sqrt(N) for one in kept]
    records = [scored(1.0, se[0]), scored(1.03, se[1])]
    loose = only(compare(*(make(f"loose{i}", one) for i, one in enumerate(records))))
    influences = [{"teacher/ddim/8": {"fid": one}} for one in kept]
    close = only(compare(*(make(f"close{i}", one, influence=influences[i]) for i, one in enumerate(records))))
    narrower = (loose.interval[1] - loose.interval[0]) / (close.interval[1] - close.interval[0])
    assert narrower == pytest.approx(10, rel=0.15)  # two standard deviations of 400 samples: 2 / sqrt(800), and of rho
    assert (loose.verdict, close.verdict) == ("inconclusive", "regressed")
    assert close.how == "in pairs of samples"


def test_influences_on_one_side_alone_are_not_used(make):
    kept = {"teacher/ddim/8": {"fid": torch.ones(N)}}
    assert "no influence" in only(compare(make("a", scored(3.0, 0.1), influence=kept), make("b", scored(3.1, 0.1)))).how


def test_equal_scores_of_other_samples_are_not_called_identical(make):
    kept = [{"teacher/ddim/8": {"fid": torch.randn(N, generator=torch.Generator().manual_seed(i))}} for i in (0, 1)]
    a, b = (make(name, scored(3.0, 0.1), influence=kept[i]) for i, name in enumerate("ab"))
    row = only(compare(a, b))
    assert (row.verdict, row.p) == ("inconclusive", 1.0)


def test_rounding_about_a_distance_of_zero_is_no_regression(make):
    """The converged case of two machines: 7e-10 and 3e-9, certain to a hundredth of that, beside cases at 0.5."""
    sides = []
    for i, value in enumerate((7e-10, 3e-9)):
        kept = 1e-10 * torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(i))
        records = scored(value, 1e-11), record("teacher/ddim/2", {"fid": Score(0.5, 0.01, n=N)})
        sides.append(make("ab"[i], *records, influence={"teacher/ddim/8": {"fid": kept}}))
    comparison = compare(*sides)
    assert comparison.verdicts["teacher/ddim/8"] == "inconclusive"
    assert not comparison.failed
    alone = [make(f"alone-{i}", scored(value, 1e-11)) for i, value in enumerate((7e-10, 3e-9))]
    assert only(compare(*alone)).verdict == "regressed"  # where all are that small, it is no rounding


def test_a_damaged_influence_is_named(make):
    kept = {"teacher/ddim/8": {"fid": torch.ones(7)}}
    a, b = (make(name, scored(3.0 + i, 0.1), influence=kept) for i, name in enumerate("ab"))
    with pytest.raises(ValueError, match=r"shape \[7\] for fid of teacher/ddim/8, where 400 finite"):
        compare(a, b)


# Tolerance


def test_a_certain_but_small_regression_does_not_count(make):
    a, b = make("a", scored(100.0, 0.001)), make("b", scored(100.5, 0.001))
    small = only(compare(a, b))
    assert small.verdict == "unchanged"
    assert small.how.endswith("within the tolerance")
    for tolerance in (0.001, Tolerance(absolute=0.1), {"fid": 0.001}, {"fid": Tolerance(0.004, 0.2)}):
        assert only(compare(a, b, tolerance=tolerance)).verdict == "regressed"
    for tolerance in (Tolerance(absolute=0.6), {"fid": Tolerance(0.001, 0.6)}, {"latency": 0.0}):
        assert only(compare(a, b, tolerance=tolerance)).verdict == "unchanged"


def test_a_large_but_uncertain_regression_does_not_count(make):
    comparison = compare(make("a", scored(1.0, 0.5)), make("b", scored(2.0, 0.5)))
    assert only(comparison).verdict == "inconclusive"
    assert not comparison.failed


def test_neither_beyond_nor_within_the_tolerance_is_inconclusive(make):
    """+1 +- 0.3 of 100, at a tolerance of 1.1: it is a difference, yet perhaps one that does not count."""
    row = only(compare(make("a", scored(100, 0.1)), make("b", scored(101, 0.1)), tolerance=Tolerance(absolute=1.1)))
    assert row.interval[0] > 0
    assert row.verdict == "inconclusive"


def test_wrong_tolerances_are_refused(make):
    a, b = make("a", scored(1.0, 0.1)), make("b", scored(1.1, 0.1))
    with pytest.raises(ValueError, match="a tolerance for 'kid', which is not compared; that is fid, latency"):
        compare(a, b, tolerance={"kid": 0.1})
    with pytest.raises(ValueError, match=r"relative tolerance must be at least 0 and finite, got -0\.1"):
        compare(a, b, tolerance=-0.1)
    with pytest.raises(ValueError, match="level must lie between 0 and 1, got 5"):
        compare(a, b, level=5)
    with pytest.raises(ValueError, match="drift must be at least 0 and finite, got -1"):
        compare(a, b, drift=-1)


# Windows


@pytest.mark.parametrize(
    ("value", "verdict"), [(23.5, "inside"), (24.5, "broken"), (22.5, "broken"), (24.0, "inconclusive")]
)
def test_a_window_is_broken_on_either_side_beyond_the_interval(make, value, verdict):
    a, b = make("a", scored(23.5, 0.05)), make("b", scored(value, 0.05))
    comparison = compare(a, b, windows={"fid": (23.01, 23.95)}, tolerance=1.0)
    row = only(comparison, "window")
    assert row.verdict == verdict
    assert row.interval[0] < value - 1.96 * 0.05
    assert row.interval == pytest.approx((value - 0.112, value + 0.112), abs=0.015)  # of the number; two tests at most
    assert [row.kind for row in comparison.failed] == (["window"] if verdict == "broken" else [])


def test_a_window_holds_for_the_number_as_reported_and_without_standard_error_too(make):
    a, b = make("a", scored(23.5, debiased=20.0)), make("b", scored(23.96, debiased=23.5))
    row = only(compare(a, b, windows={"fid": (23.01, 23.95)}), "window")
    assert row.verdict == "broken"
    assert row.effect == pytest.approx(0.01)


def test_a_window_for_one_cell_goes_before_one_for_all(make):
    cells = [replace(scored(v, 0.01), name=f"teacher/ddim/{v:g}", key=f"k{v:g}") for v in (2.0, 8.0)]
    folder = make("a", *cells)
    comparison = compare(folder, folder, windows={"fid": (1, 3), ("teacher/ddim/8", "fid"): (7, 9)})
    assert [row.verdict for row in comparison.rows if row.kind == "window"] == ["inside", "inside"]


def test_a_window_over_a_failed_cell_is_broken(make):
    folder = make("a", scored(2.0, 0.1), record("teacher/ddim/4", error="teacher/ddim/4: ValueError: NaN"))
    [_, failed] = [row for row in compare(folder, folder, windows={"fid": (1, 3)}).rows if row.kind == "window"]
    assert (failed.cell, failed.verdict) == ("teacher/ddim/4", "broken")
    assert failed.how.endswith("but was not measured")


def test_wrong_windows_are_refused(make):
    a = make("a", scored(1.0, 0.1))
    with pytest.raises(ValueError, match="a window for 'kid', which no cell has; there is fid"):
        compare(a, a, windows={"kid": (0, 1)})
    with pytest.raises(
        ValueError, match="a window for the cell 'x', which is not on both sides; there is teacher/ddim/8"
    ):
        compare(a, a, windows={("x", "fid"): (0, 1)})
    with pytest.raises(ValueError, match="window of fid reaches from 2 to 1; give the lower bound first"):
        compare(a, a, windows={"fid": (2, 1)})


# What is refused, and what is said


@pytest.mark.parametrize(
    ("part", "other", "remedy"),
    [
        ("extractor", "dino", "measure both with the same one"),
        ("sha256", "cd", "measure both with the same file"),
        ("resize", "pil", "measure both with the same one"),
        ("dataset", "cifar100", "measure both against the same one"),
        ("n_reference", 10_000, "measure both against the same one"),
    ],
)
def test_other_extractors_and_references_are_refused_with_both_values(make, part, other, remedy):
    a = make("a", scored(1.0, 0.1))
    b = make("b", scored(1.0, 0.1), quality={"fid": {**FID, part: other}})
    with pytest.raises(ValueError, match=f"^{part} of fid: {FID[part]!r} in .*a, {other!r} in .*b; .*{remedy}"):
        compare(a, b)


def test_other_numbers_and_shapes_of_samples_are_refused(make):
    a = make("a", scored(1.0, 0.1))
    with pytest.raises(ValueError, match=r"samples of each case: 400 in .*, 50 in .*; .* run both with the same n"):
        compare(a, make("b", scored(1.0, 0.1), n=50))
    with pytest.raises(ValueError, match=r"shape of a sample: \[3, 8, 8\] in .*, \[1, 8, 8\] in .*the same shape"):
        compare(a, make("c", scored(1.0, 0.1), shape=[1, 8, 8]))


def test_another_converged_solution_is_refused(make):
    one = record(scores={"endpoint_rms": Score(0.1, 0.01, n=N)})
    a, b = (make(name, one, converged={"teacher": f"teacher/heun/{steps}"}) for name, steps in (("a", 100), ("b", 50)))
    with pytest.raises(
        ValueError, match=r"converged solutions: {'teacher': 'teacher/heun/100'} in .*give both the same"
    ):
        compare(a, b)


def test_a_reference_that_is_not_compared_may_differ(make):
    one = record(scores={"fid": Score(1.0, 0.1, n=N), "kid": Score(0.1, 0.01, n=N)})
    a = make("a", one, quality={"fid": FID, "kid": FID})
    b = make("b", one, quality={"fid": FID, "kid": {**FID, "dataset": "other"}})
    assert compare(a, b, measures=["fid"]).verdicts == {"teacher/ddim/8": "unchanged"}
    with pytest.raises(ValueError, match="dataset of kid"):
        compare(a, b)
    with pytest.raises(ValueError, match="no cell has the measure 'is'; there is fid, kid"):
        compare(a, b, measures=["is"])


def test_a_measure_that_tells_nothing_of_its_reference_is_said_to(make):
    a = make("a", scored(1.0, 0.1), quality={"fid": {}})
    assert any("fid says nothing of its extractor" in note for note in compare(a, a).notes)


def test_cells_and_measures_of_one_side_alone_are_named(make):
    a = make("a", scored(1.0, 0.1), record("teacher/heun/4"))
    b = make("b", record(scores={"fid": Score(1.0, 0.1, n=N), "kid": Score(1.0, n=N)}), record("student/ddim/1"))
    notes = compare(a, b).notes
    assert any("teacher/heun/4" in note and "a alone" in note for note in notes)
    assert any("student/ddim/1" in note and "b alone" in note for note in notes)
    assert any("b alone" in note and note.endswith("kid") for note in notes)
    with pytest.raises(ValueError, match=r"no cell of .* matched by name"):
        compare(make("c", record("x/ddim/1")), make("d", record("y/ddim/1")))


def test_a_score_that_one_cell_lacks_has_no_verdict(make):
    other = record("teacher/ddim/4", {"fid": Score(1.0, 0.1, n=N)})
    a, b = make("a", scored(2.0, 0.1), other), make("b", record(), other)
    row = next(row for row in compare(a, b).rows if row.cell == "teacher/ddim/8")
    assert (row.verdict, row.before, row.after, row.how) == ("inconclusive", 2.0, None, "only before has it")


def test_a_measure_that_turned_round_is_refused(make):
    a, b = make("a", scored(1.0, 0.1)), make("b", scored(1.0, 0.1, better="more"))
    with pytest.raises(ValueError, match="fid is better when less before, when more after"):
        compare(a, b)


def test_other_versions_are_named(make):
    a, b = make("a", scored(1.0)), make("b", scored(1.0), environment={**MACHINE, "torch": "2.14", "date": "now"})
    assert compare(a, b).notes == ("what else differs: torch 2.13 -> 2.14",)


def test_an_unfinished_run_is_said_to_be_so(make, tmp_path):
    a, b = make("a", scored(1.0, 0.1), record("t/d/2")), make("b", scored(1.0, 0.1), record("t/d/2"), finished=False)
    (b / "cells" / "t-d-2.json").unlink()
    assert any("b is not finished: 1 of its 2 cells are there" in note for note in compare(a, b).notes)


def test_a_floor_is_no_cell(make):
    floor = replace(scored(0.1, 0.01), kind="floor", name="floor", key="floor")
    a, b = make("a", floor, scored(1.0, 0.1)), make("b", floor, scored(1.0, 0.1))
    assert list(compare(a, b).verdicts) == ["teacher/ddim/8"]


def test_a_cell_that_fails_now_is_a_regression_and_one_that_works_again_an_improvement(make):
    well, ill = scored(1.0, 0.1), record(error="teacher/ddim/8: FloatingPointError: NaN")
    a, b = make("a", well), make("b", ill)
    worse = compare(a, b)
    assert [(row.cell, row.kind) for row in worse.failed] == [("teacher/ddim/8", "failure")]
    assert "failed after: teacher/ddim/8: FloatingPointError: NaN" in worse.table()
    assert compare(b, a).verdicts == {"teacher/ddim/8": "improved"}
    assert compare(b, b).verdicts == {"teacher/ddim/8": "inconclusive"}


def test_evaluations_that_changed_are_reported_exactly_and_do_not_fail(make):
    a, b = make("a", scored(1.0, 0.1)), make("b", replace(scored(1.0, 0.1), nfe=15, rows=30.0))
    comparison = compare(a, b)
    costs = {row.measure: (row.before, row.after, row.effect) for row in comparison.rows if row.kind == "cost"}
    assert costs == {"nfe": (8, 15, 7), "rows": (8.0, 30.0, 22.0)}
    assert not comparison.failed


# Latency


def timed(factor=1.0, **changes):
    return record(timing=timing([factor * ms for ms in MS], **changes))


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.3, "regressed"), (0.75, "improved"), (1.07, "inconclusive"), (0.95, "inconclusive")]
)
def test_two_processes_differ_only_beyond_their_drift(make, factor, verdict):
    row = only(compare(make("a", timed()), make("b", timed(factor))), "latency")
    assert row.verdict == verdict
    assert row.effect == pytest.approx(factor)
    assert row.interval[0] < row.effect / 1.1
    assert row.interval[1] > row.effect * 1.1
    assert "may drift by 10%" in row.how


def test_a_smaller_drift_finds_smaller_differences(make):
    a, b = make("a", timed()), make("b", timed(1.07))
    assert only(compare(a, b, drift=0.02), "latency").verdict == "regressed"
    assert only(compare(a, b, drift=0.02, tolerance={"latency": 0.08}), "latency").verdict == "inconclusive"
    assert not compare(a, b, latency=False, drift=0.02).failed


def test_ratios_to_the_same_baseline_need_no_drift(make):
    """The machine was 40% slower after; beside its baseline the case is 5% faster."""

    def against(factor, ratio, baseline="teacher/heun/8"):
        ratios = tuple(ratio * ms / 0.001 for ms in MS)
        return timed(factor, ratio=Ratio(ratio, 0.9 * ratio, 1.1 * ratio, ratios), baseline=baseline)

    a = make("a", against(1.0, 0.80))
    row = only(compare(a, make("b", against(1.4, 0.76))), "latency")
    assert (row.verdict, row.before, row.after) == ("improved", 0.80, 0.76)
    assert row.how == "times that of teacher/heun/8, timed beside it"
    other = only(compare(a, make("c", against(1.4, 0.76, "student/ddim/1"))), "latency")
    assert (other.verdict, other.effect) == ("regressed", pytest.approx(1.4))
    itself = [make(name, against(factor, 1.0, "teacher/ddim/8")) for name, factor in (("d", 1.0), ("e", 1.4))]
    assert only(compare(*itself), "latency").verdict == "regressed"  # the baseline's own ratio says nothing


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"environment": {**MACHINE, "cpu": "Slow 1"}}, "cpu Fast 9000 against Slow 1"),
        ({"environment": {**MACHINE, "gpu": "H200"}}, "gpu None against H200"),
        ({"environment": {**MACHINE, "threads": "4"}}, "threads 1 against 4"),
        ({"environment": [MACHINE, {**MACHINE, "cpu": "Slow 1"}]}, "was measured on 2 machines"),
        ({"environment": {"torch": "2.13"}}, "does not say on which machine"),
        ({"latency": {"threads": None}}, "timed with threads = 1 against None"),
    ],
)
def test_times_of_other_machines_are_not_comparable(make, changes, said):
    comparison = compare(make("a", timed()), make("b", timed(3.0), **changes))
    row = only(comparison, "latency")
    assert row.verdict == "not comparable"
    assert any(note.startswith("latencies are not comparable") and said in note for note in comparison.notes)
    assert row.effect is None
    assert not comparison.failed


def test_other_versions_on_one_machine_are_compared(make):
    b = make("b", timed(3.0), environment=[{**MACHINE, "torch": "2.14"}, {**MACHINE, "torch": "2.14"}])
    assert only(compare(make("a", timed()), b), "latency").verdict == "regressed"


def test_times_of_other_batches_and_few_times_have_no_verdict(make):
    a = make("a", timed())
    assert only(compare(a, make("b", timed(2.0, batch=16))), "latency").how == "ms; batches of 8 and 16"
    few = only(compare(a, make("c", record(timing=timing([0.002] * 5)))), "latency")
    assert few.verdict == "inconclusive"
    assert "5 times, 6 at least make an interval" in few.how


def test_runs_that_hold_times_alone_are_compared(make):
    """What an import of other benchmarks makes: no quality, no number of samples, nothing but times and a machine."""
    configuration = {"n": None, "shape": None, "quality": None, "latency": None}
    cells = [record(f"pytest-benchmark/test_loop/{i}", nfe=None, rows=None, timing=timing()) for i in range(3)]
    slower = [replace(cells[0], timing=timing([1.5 * ms for ms in MS])), *cells[1:]]
    a, b = make("a", *cells, **configuration), make("b", *slower, **configuration)
    assert list(compare(a, b).verdicts.values()) == ["regressed", "unchanged", "unchanged"]


def test_a_clock_that_is_too_coarse_is_said_to_be(make):
    a, b = make("a", timed()), make("b", record(timing=timing([0.0, *MS])))
    assert "the clock is too coarse" in only(compare(a, b), "latency").how
    assert "the clock is too coarse" in only(compare(b, a), "latency").how
    c = make("c", record(timing=timing([0.0] * 6)))
    assert only(compare(c, a), "latency").verdict == "inconclusive"


# The whole


def test_what_a_comparison_prints(make):
    cells = [record(f"teacher/ddim/{i}", {"fid": Score(3.0, 0.01, n=N)}, timing=timing()) for i in (2, 4)]
    worse = replace(cells[1], scores={"fid": Score(4.0, 0.01, n=N)}, timing=timing([2 * ms for ms in MS]))
    comparison = compare(make("a", *cells), make("b", cells[0], worse))
    table, page, body = comparison.table(), comparison.markdown(), json.loads(json.dumps(comparison.as_dict()))
    assert "FAILED: teacher/ddim/4 (fid: regressed), teacher/ddim/4 (latency: regressed)" in table
    assert "2 cells: 1 unchanged, 1 regressed (2 tests, Holm's correction at 0.05)" in table
    [line] = [line for line in table.splitlines() if line.startswith("teacher/ddim/4  fid")]
    assert "+1 [+0.968, +1.03]" in line  # 2.25 (t of 399 at 0.05 / 2) times sqrt(2) x 0.01 = 0.032
    [line] = [line for line in page.splitlines() if line.startswith("| teacher/ddim/4 | latency |")]
    assert "x2.000 [" in line
    assert len({row.count("|") for row in page.splitlines() if row.startswith("|")}) == 1
    assert body["failed"] == ["teacher/ddim/4: fid", "teacher/ddim/4: latency"]
    assert body["rows"][0]["verdict"] == "unchanged"
    assert body["verdicts"] == {"teacher/ddim/2": "unchanged", "teacher/ddim/4": "regressed"}


@pytest.fixture
def in_memory(monkeypatch):
    """Compares records and influences that were never written, for thousands of runs."""

    def run(sides):
        bodies = {}
        for name, (records, influences) in zip("ab", sides):
            body = {"cases": [one.key for one in records], "environments": [MACHINE], "finished": True, "hash": "0"}
            configuration = {"n": N, "shape": [1], "quality": {}, "latency": None}
            bodies[name] = {**body, "configuration": configuration}, records, influences
        monkeypatch.setattr(comparable, "read_run", lambda folder: bodies[folder][:2])
        monkeypatch.setitem(compare.__globals__, "read_influence", lambda folder, one: bodies[folder][2][one.name])
        return compare("a", "b", tolerance=0.0)

    return run


def means(values):
    """Records of cells whose measures are means of values [cells, 2, N], and the influences of these."""
    influences = {}
    records = []
    for k, cell in enumerate(values):
        one = {f"mean{i}": Score(float(x.mean()), float(x.std()) / math.sqrt(N), n=N) for i, x in enumerate(cell)}
        records.append(record(f"t/d/{k}", one))
        influences[f"t/d/{k}"] = {f"mean{i}": x - x.mean() for i, x in enumerate(cell)}
    return records, influences


def draws(repeats, cells, shift=0.0, rho=0.8):
    """Pairs of runs whose samples share part of their noise, the second one shifted."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(repeats):
        shared, a, b = torch.randn(3, cells, 2, N, dtype=torch.float64, generator=generator)
        x, y = (math.sqrt(rho) * shared + math.sqrt(1 - rho) * own for own in (a, b))
        yield means(x), means(y + shift)


def test_where_nothing_changed_five_percent_of_comparisons_find_anything(in_memory):
    """10 independent tests each, all true: the chance that Holm's rejects any is 1 - (1 - 0.05 / 10)^10 = 4.9%.

    Of 600 that is 29 with a standard deviation of 5.3; three of these on both sides. Without correction it were 240.
    """
    found = sum(
        any(row.verdict in ("regressed", "improved") for row in in_memory(sides).rows) for sides in draws(600, 5)
    )
    assert 13 <= found <= 45


def test_a_true_regression_is_found_as_often_as_theory_says(in_memory):
    """Two independent tests of a shift of 3.5 standard errors of the paired difference. Each is found beyond 2.24, the
    point of Holm's level of 2.5%, or, where the other one is, beyond 1.96, that of 5%."""
    repeats, rho = 300, 0.8
    shift = 3.5 * math.sqrt(2 * (1 - rho) / N)
    found = sum(row.verdict == "regressed" for sides in draws(repeats, 1, shift, rho) for row in in_memory(sides).rows)
    first, second = (0.5 * math.erfc((z - 3.5) / math.sqrt(2)) for z in (2.241, 1.960))  # of 2.5% and of 5%
    expected = first + first * (second - first)
    assert found / (2 * repeats) == pytest.approx(
        expected, abs=3 * math.sqrt(expected * (1 - expected) / (2 * repeats))
    )


def test_the_interval_of_a_difference_of_frechet_distances_covers_the_truth():
    """Gaussian features of the same noises, made by two maps, against a reference known exactly: FD in closed form.

    120 repeats: 95% is 114 with a standard deviation of 2.4, three of these below and two above.
    """
    d, n, repeats = 4, 500, 120
    generator = torch.Generator().manual_seed(3)
    reference = Reference(plain(d), torch.zeros(d).double(), torch.eye(d).double(), 10**6, "a unit Gaussian")
    measure = FrechetTo("fd", plain(d), reference)
    scales, shifts = (1.3, 1.38), (0.20, 0.15)
    truth = [d * (shift**2 + (scale - 1) ** 2) for scale, shift in zip(scales, shifts)]
    hits, narrower = 0, []
    for _ in range(repeats):
        z = torch.randn(n, d, dtype=torch.float64, generator=generator)
        own = torch.randn(n, d, dtype=torch.float64, generator=generator)
        sides = [scales[0] * z + shifts[0], scales[1] * (0.9 * z + math.sqrt(0.19) * own) + shifts[1]]
        a, b = (measure.score(side) for side in sides)
        estimate = paired(b.centre - a.centre, *(measure.influence(side) for side in sides))
        low, high = estimate.interval(0.05)
        hits += low <= truth[1] - truth[0] <= high
        narrower.append(estimate.se / math.hypot(a.se, b.se))
    assert 107 <= hits <= 119
    assert (
        sum(narrower) / repeats < 0.6
    )  # a correlation of 0.9 leaves sqrt(1 - 0.9) = 0.32 of the linear part, 0.44 of squares


def plain(d):
    return Features(f"plain{d}", lambda x: x, shape=(d,))


@pytest.mark.parametrize("load", ["7.10 6.00 5.00", "1.90 7.00 7.00"])
def test_times_of_a_busy_machine_are_compared_by_their_baseline_alone(make, load):
    busy = {**MACHINE, "cores": "2", "load average": load}
    base = {
        "baseline": "teacher/ddim/2",
        "ratio": Ratio(2.0, 1.9, 2.1, tuple(2 + 0.01 * math.sin(i) for i in range(20))),
    }
    slow = [2 * seconds for seconds in MS]
    for settings, verdict in (({}, "not comparable" if load[0] == "7" else "regressed"), (base, "unchanged")):
        a = make(f"a{len(settings)}", record(timing=timing(**settings)), environment=busy)
        b = make(f"b{len(settings)}", record(timing=timing(slow, **settings)), environment=busy)
        compared = compare(a, b)
        assert only(compared, "latency").verdict == verdict
        assert any("busy (load average 7.10 on 2 cores)" in note for note in compared.notes) == (load[0] == "7")


def test_runs_of_other_conditions_are_refused(make):
    a, b = (make(name, scored(1.0, 0.1), condition=name) for name in ("a", "b"))
    with pytest.raises(ValueError, match="condition"):
        compare(a, b)
