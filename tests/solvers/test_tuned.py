"""Picking and tuning: what is measured, what is fitted, and that held-out noises decide."""

import csv
import json
import math
from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastsample as fs
from fastsample import solvers
from fastsample.solvers import fit as fitting
from fastsample.solvers.picking import Candidate, candidates, distance
from fastsample.solvers.tuned import Table, Times
from fastsample.zoo.exact import GaussianMixture, gaussian_flow

from .cases import SCHEDULES, gaussian, mixture

SCHEDULE = fs.VP.linear()
END = SCHEDULE.t_min
FAMILY = candidates(
    [(solvers.unipc_2, {}), (solvers.multistep, {"order": 3}), (solvers.ddim, {})], (fs.quadratic_t, fs.uniform_t)
)


@cache
def problem() -> GaussianMixture:
    """Narrow components: the flow has forks, so that hand-made plans of few evaluations miss the end by 0.1."""
    angles = torch.arange(5, dtype=torch.float64) * 2.1
    means = torch.stack([angles.cos(), angles.sin()], 1)
    return GaussianMixture(
        SCHEDULE, torch.arange(1.0, 6), means, torch.tensor([[0.02], [0.05], [0.01], [0.04], [0.03]])
    )


def noise(count, first=0, dtype=torch.float64):
    return fs.noise((2,), range(first, first + count), dtype=dtype)


@cache
def fresh():
    """Noises that neither picking nor tuning saw, and the converged ends under `problem`."""
    drawn = noise(512, 10_000).draw(0)
    return drawn, solvers.converged(problem(), drawn, end=END)


def fresh_rms(plan):
    drawn, reference = fresh()
    return float(distance(fs.sample(problem(), plan, drawn), reference).square().mean().sqrt())


def test_the_converged_solution_is_the_exact_flow_of_a_gaussian():
    model, drawn = gaussian(SCHEDULE), noise(16).draw(0)
    start, end = fs.node(SCHEDULE, SCHEDULE.t_max), fs.node(SCHEDULE, END)
    exact = gaussian_flow(start.sigma * drawn, start, end, model.means[0], model.variances[0])
    found = solvers.converged(model, drawn, end=END)
    assert float(distance(found, exact).max()) < 5e-4  # the tolerance it stops at


def test_a_solution_that_does_not_converge_is_no_reference():
    with pytest.raises(RuntimeError, match=r"raise tolerance="):
        solvers.converged(problem(), noise(4), end=END, tolerance=1e-12, most=200)


def test_errors_are_measured_against_the_reference_and_ranked():
    model, drawn = problem(), noise(64)
    reference = solvers.converged(model, drawn, end=END)
    ranking = solvers.pick(model, 6, drawn, family=FAMILY, end=END, reference=reference)
    assert len(ranking) == len(FAMILY)
    assert [one.score for one in ranking] == sorted(one.score for one in ranking)
    for one in ranking:
        errors = (fs.sample(model, one.plan, drawn) - reference).square().mean(1)
        assert one.rms == pytest.approx(float(errors.mean().sqrt()))
        assert one.median == pytest.approx(float(errors.sqrt().median()))
        assert one.plan.nfe == 6


def test_the_exact_solver_of_a_gaussian_ranks_first():
    def exact(model, x, grid):
        for s, t in grid.steps():
            model.predict(x, s)
            x = x * math.sqrt((0.25 * t.alpha**2 + t.sigma**2) / (0.25 * s.alpha**2 + s.sigma**2))
        return x

    model = GaussianMixture(SCHEDULE, torch.ones(1), torch.zeros(1, 2), torch.full((1, 2), 0.25))
    family = (*FAMILY, Candidate(exact, fs.quadratic_t))
    ranking = solvers.pick(model, 4, noise(8), family=family, end=END)
    assert ranking.best.name == "exact, quadratic_t"
    assert ranking.best.rms < 5e-4  # the tolerance of the reference


def test_a_solver_whose_order_tells_ranks_before_one_of_order_1():
    family = candidates([(solvers.ddim, {}), (solvers.dpmpp_2m, {}), (solvers.unipc_3, {})], (fs.uniform_lam,))
    ranking = solvers.pick(mixture(SCHEDULE), 40, noise(16), family=family, end=END)
    assert [one.plan.solver for one in ranking] == ["unipc_3", "dpmpp_2m", "ddim"]


def test_picking_on_64_noises_holds_on_others():
    model = problem()
    ranking = solvers.pick(model, 6, noise(64), end=END, family=FAMILY)
    best = min(fresh_rms(one.plan) for one in ranking)
    assert fresh_rms(ranking.best.plan) < 1.3 * best  # the standard error of an rms over 64 is about a tenth


def test_every_plan_of_the_family_can_be_written_for_a_vp_schedule():
    ranking = solvers.pick(problem(), 3, noise(2), end=END)
    assert not ranking.left_out
    assert len({one.name for one in ranking}) == len(solvers.FAMILY)


def test_a_solver_of_two_evaluations_a_step_takes_half_the_steps_or_is_left_out():
    family = candidates([(solvers.heun, {}), (solvers.ddim, {})], (fs.uniform_lam,))
    even = solvers.pick(problem(), 8, noise(8), family=family, end=END)
    assert {one.plan.nfe for one in even} == {8}
    odd = solvers.pick(problem(), 7, noise(8), family=family, end=END)
    assert [one.plan.solver for one in odd] == ["ddim"]
    assert "no plan of exactly 7 evaluations" in odd.left_out[0][1]
    assert "left out: 1, such as heun" in str(odd)


def test_a_solver_that_adds_noise_is_left_out_with_the_reason():
    ranking = solvers.pick(
        problem(), 4, noise(8), family=candidates([(solvers.ddpm, {}), (solvers.ddim, {})], (fs.uniform_t,)), end=END
    )
    assert [name for name, _ in ranking.left_out] == ["ddpm, uniform_t"]


def test_a_start_at_alpha_0_leaves_out_what_divides_by_it():
    ranking = solvers.pick(mixture(fs.Flow()), 6, noise(8))
    assert ranking.best.plan.start.alpha == 0
    assert 0 < len(ranking.left_out) < len(solvers.FAMILY)


def test_conditions_are_cut_with_the_batch():
    class Shifted:
        schedule = SCHEDULE

        def predict(self, x, node, *, label):
            assert len(label) == len(x)
            return problem().predict(x, node) + label.view(-1, 1)

    label = torch.arange(10, dtype=torch.float64) / 10
    given = {"family": FAMILY, "end": END, "condition": {"label": label}, "reference": torch.zeros(10, 2)}
    whole, parts = (solvers.pick(Shifted(), 4, noise(10), **given, batch=batch) for batch in (10, 3))
    assert [one.name for one in whole] == [one.name for one in parts]
    assert whole.best.rms == pytest.approx(parts.best.rms)


def test_a_warm_start_from_the_converged_ends_is_worth_evaluations_where_few_are_left():
    drawn = noise(64).draw(0)
    reference = solvers.converged(problem(), drawn, end=END)
    cold = candidates([(solvers.multistep, {"order": 2})], (fs.quadratic_t,))
    warm = solvers.warmed(fs.Gaussian.of(reference), SCHEDULE, cold)
    ranking = solvers.pick(problem(), 4, drawn, family=(*cold, *warm), end=END, reference=reference)
    assert ranking.best.plan.warm is not None
    assert "warm from t" in ranking.best.name
    assert fresh_rms(ranking.best.plan) < fresh_rms(cold[0].plan(SCHEDULE, 4, end=END))


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 500), st.integers(1, 500), st.integers(0, 60))
def test_the_expected_error_is_that_held_out_where_numbers_are_many_and_that_of_all_where_they_are_few(a, b, n, m, p):
    found = fitting.expected(a, b, (n, m), p)
    if n < 2 * p:
        assert found == b
    else:
        assert found >= math.sqrt((n * a**2 + m * b**2) / (n + m)) - 1e-12
        assert found <= math.sqrt(3) * max(a, b) + 1e-12  # (n + p) / (n - p) is 3 at n = 2 p


def fitted(coefficients, nfe=6, warm=None, solver=solvers.multistep):
    """(build, theta, sample) of a fit that is about to begin."""
    model = problem()
    start = None if warm is None else 800.0
    candidate = Candidate(solver, fs.quadratic_t, warm=warm, start=start)
    drawn = noise(12).draw(0)
    reference = torch.zeros_like(drawn)  # a slope is one, whatever the aim
    plan = candidate.plan(SCHEDULE, nfe, end=END)
    times = Times.of(candidate, SCHEDULE, nfe, start=None, end=END)
    sample = fitting.Sample(model, drawn, reference, {}, 5)
    if not coefficients:
        return times.plan, times.theta(), sample, plan
    table = Table(times, len(times.theta()))
    return table.plan, table.theta(times.theta()), sample, plan


WARM = fs.Gaussian(torch.zeros(2), torch.full((2,), 0.5))


@pytest.mark.parametrize("solver", [solvers.multistep, solvers.heun, solvers.dpm_solver_2], ids=lambda f: f.__name__)
@pytest.mark.parametrize("warm", [None, WARM], ids=["cold", "warm"])
@pytest.mark.parametrize("coefficients", [False, True], ids=["times", "coefficients"])
def test_a_fit_begins_at_the_plan_itself(coefficients, warm, solver):
    build, theta, _, plan = fitted(coefficients, warm=warm, solver=solver)
    again = build(theta)
    for old, new in zip(plan.rows, again.rows):
        numbers = [(row.node.t, row.a, *row.b) for row in (old, new)]
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-9, abs=1e-9)
    assert again.end == plan.end


@pytest.mark.parametrize("warm", [None, WARM], ids=["cold", "warm"])
@pytest.mark.parametrize("coefficients", [False, True], ids=["times", "coefficients"])
def test_the_slope_is_that_of_the_squared_error(coefficients, warm):
    build, theta, sample, _ = fitted(coefficients, warm=warm)
    theta = theta + 0.05 * np.cos(np.arange(len(theta)))

    def half_squares(numbers):
        ends = fs.sample(sample.model, build(numbers), sample.noise)
        return 0.5 * float((ends - sample.reference).square().sum())

    _, slope = fitting.normal_equations(build, theta, sample, 1e-6)
    h = 1e-5
    for k, row in enumerate(np.eye(len(theta))):
        central = (half_squares(theta + h * row) - half_squares(theta - h * row)) / (2 * h)
        assert slope[k] == pytest.approx(central, rel=1e-3, abs=1e-5)  # forward differences of 1e-6


def test_a_run_that_begins_at_the_changed_row_ends_where_the_whole_run_does():
    build, theta, sample, _ = fitted(True)
    plan = build(theta)
    _, seen = fitting._watched(sample, plan)
    begun = set()
    for row in 0.1 * np.eye(len(theta)):
        other = build(theta + row)
        first = fitting._changed(plan, other)
        begun.add(first)
        torch.testing.assert_close(
            fitting._from(sample, other, first, seen), fs.sample(sample.model, other, sample.noise), rtol=0, atol=1e-12
        )
    assert begun == set(range(plan.nfe))


@given(
    st.sampled_from(sorted(SCHEDULES)),
    st.lists(st.floats(-6, 6), min_size=4, max_size=4),
    st.booleans(),
    st.booleans(),
)
def test_fitted_times_stay_in_order(name, theta, ends, warm):
    schedule = SCHEDULES[name]
    candidate = Candidate(solvers.ddim, fs.uniform_t, warm=WARM if warm else None, start=schedule.t_max / 2)
    end = schedule.t_min if ends else None
    times = Times.of(candidate, schedule, 5 - warm, start=None, end=end)
    plan = times.plan(np.array(theta))
    found = [*(row.node.t for row in plan.rows), plan.end.t]
    assert all(t < s for s, t in pairwise(found))
    assert len(plan.rows) == 5 - warm


def test_tuned_times_beat_the_picked_plan_on_fresh_noises():
    model = problem()
    tuned = solvers.tune(model, 5, noise(256), family=FAMILY, end=END, starts=1)
    assert tuned.won
    assert fresh_rms(tuned.plan) < fresh_rms(tuned.picked.plan) / 1.15
    assert tuned.report.best.plan == tuned.plan
    assert {"times"} == {one.name.split()[1] for one in tuned.report if one.name.startswith("tuned")}


@pytest.mark.slow
def test_tuned_coefficients_beat_tuned_times_on_fresh_noises():
    model = problem()
    tuned = solvers.tune(model, 5, noise(512), coefficients=True, family=FAMILY, end=END, starts=1)
    times = next(one for one in tuned.report if one.name.startswith("tuned times of"))
    assert "coefficients" in tuned.plan.solver
    assert fresh_rms(tuned.plan) < fresh_rms(times.plan) / 1.3
    assert fresh_rms(tuned.plan) < fresh_rms(tuned.picked.plan) / 1.5


def test_what_does_not_win_on_the_held_out_noises_is_not_returned():
    few = noise(1, 1).draw(0).repeat(6, 1)  # one noise to train on, learned by heart at once
    drawn = torch.cat([few, noise(32, 50).draw(0)])
    settings = {"family": FAMILY[:2], "end": END, "starts": 1, "held_out": 32 / 38, "coefficients": True}
    lines: list[str] = []
    tuned = solvers.tune(problem(), 6, drawn, **settings, iterations=5, patience=5, say=lines.append)
    first, last = (float(line.split("rms ")[1].split(",")[0]) for line in (lines[1], lines[-1]))
    assert last < 0.1 * first
    assert not tuned.won
    assert tuned.plan == tuned.picked.plan
    assert "did not win" in str(tuned)
    held = {one.name: one.rms for one in tuned.report}
    assert all(held[name] > 0.999 * tuned.picked.rms for name in held if name.startswith("tuned"))


def test_a_killed_run_goes_on_to_the_same_plan(tmp_path):
    model, settings = problem(), {"family": FAMILY, "end": END, "starts": 1, "coefficients": True, "iterations": 3}
    settings["reference"] = solvers.converged(model, noise(48), end=END)
    whole = solvers.tune(model, 4, noise(48), out=tmp_path / "whole", **settings)
    lines: list[str] = []

    def kill(line):
        lines.append(line)
        if "coefficients" in line and "update 2" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        solvers.tune(model, 4, noise(48), out=tmp_path / "cut", say=kill, **settings)
    assert not (tmp_path / "cut" / "plan.json").exists()
    after: list[str] = []
    again = solvers.tune(model, 4, noise(48), out=tmp_path / "cut", say=after.append, **settings)
    assert not any("tuned times of" in line or "update 2" in line for line in after)
    assert again.plan == whole.plan
    assert (tmp_path / "cut" / "report.json").read_text() == (tmp_path / "whole" / "report.json").read_text()


def test_the_folder_holds_the_plan_and_the_report(tmp_path):
    tuned = solvers.tune(problem(), 4, noise(48), family=FAMILY, end=END, starts=1, iterations=3, out=tmp_path)
    assert fs.Plan.load(tmp_path / "plan.json") == tuned.plan
    body = json.loads((tmp_path / "report.json").read_text())
    with (tmp_path / "report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [one["name"] for one in body["plans"]] == [one.name for one in tuned.report]
    assert float(rows[0]["rms"]) == tuned.report.best.rms
    assert body["held_out"] == 12


def test_a_folder_of_another_run_is_refused(tmp_path):
    settings = {"family": FAMILY, "end": END, "starts": 1, "iterations": 1}
    solvers.tune(problem(), 4, noise(16), out=tmp_path, **settings)
    with pytest.raises(ValueError, match="other settings or noises"):
        solvers.tune(problem(), 5, noise(16), out=tmp_path, **settings)
    with pytest.raises(ValueError, match="other settings or noises"):
        solvers.tune(problem(), 4, noise(16, 1), out=tmp_path, **settings)
    with pytest.raises(ValueError, match="another model"):
        solvers.tune(mixture(SCHEDULE), 4, noise(16), out=tmp_path, **settings)
    solvers.tune(mixture(SCHEDULE), 4, noise(16), out=tmp_path, resume=False, **settings)
    (tmp_path / "work.json").write_text("{")
    with pytest.raises(ValueError, match=r"damaged .*resume=False"):
        solvers.tune(mixture(SCHEDULE), 4, noise(16), out=tmp_path, **settings)


def network(predicts, schedule=SCHEDULE):
    """`problem` as a network that predicts something else."""
    pair = fs.prediction(predicts)

    def output(x, t):
        node = fs.node(schedule, float(t[0]))
        p, q = pair.output(node.alpha, node.sigma)
        return p * x + q * problem().predict(x, node)

    return fs.Denoiser(output, schedule, predicts=predicts)


def test_a_tuned_plan_is_for_its_prediction_and_schedule_alone():
    drawn = noise(64)
    tuned = solvers.tune(network("eps"), 4, drawn, family=FAMILY[:2], end=END, starts=1, iterations=5)
    assert tuned.won
    assert tuned.plan.predicts == "eps"
    fs.sample(network("eps"), tuned.plan, drawn)
    with pytest.raises(ValueError, match="tuned for networks that predict eps"):
        fs.sample(network("v"), tuned.plan, drawn)
    with pytest.raises(ValueError, match="does not fit"):
        fs.sample(network("eps", fs.VP.cosine()), tuned.plan, drawn)


def test_a_model_that_remembers_its_run_is_run_from_the_start_each_time():
    class Remembering:
        """Its answer depends on how often it was asked in this run."""

        schedule = SCHEDULE

        def __init__(self):
            self.asked = 0

        def begin(self):
            return Remembering()

        def predict(self, x, node):
            self.asked += 1
            return problem().predict(x, node) * (1 + 0.1 * (self.asked % 2))

    build, theta, sample, _ = fitted(True, nfe=4)
    sample = fitting.Sample(Remembering(), sample.noise, sample.reference, {}, 5)
    _, slope = fitting.normal_equations(build, theta, sample, 1e-6)

    def half_squares(numbers):
        return 0.5 * float((fs.sample(Remembering(), build(numbers), sample.noise) - sample.reference).square().sum())

    for k in (0, len(theta) // 2, len(theta) - 1):
        row = 1e-5 * np.eye(len(theta))[k]
        central = (half_squares(theta + row) - half_squares(theta - row)) / 2e-5
        assert slope[k] == pytest.approx(central, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"noise": torch.zeros(1, 2)}, "leaves 1 to train on"),
        ({"held_out": 1.0}, "leaves 0 to train on"),
        ({"starts": 0}, "at least 1"),
        ({"family": ()}, "empty"),
        ({"reference": torch.zeros(3, 2)}, "reference has shape"),
    ],
    ids=["one noise", "none to train on", "no start", "no family", "reference of others"],
)
def test_wrong_settings_are_refused_before_work_starts(arguments, said):
    given = {"noise": noise(8), "family": FAMILY, **arguments}
    with pytest.raises(ValueError, match=said):
        solvers.tune(problem(), 4, given.pop("noise"), end=END, **given)


@pytest.mark.parametrize("schedule", [fs.EDM(), fs.Flow()], ids=repr)
@pytest.mark.parametrize("nfe", [1, 4])
def test_every_schedule_can_be_tuned_down_to_sigma_0(schedule, nfe):
    model = mixture(schedule)
    family = candidates([(solvers.dpmpp_2m, {})], (fs.uniform_t,))
    tuned = solvers.tune(model, nfe, noise(64), family=family, coefficients=True, iterations=8)
    assert tuned.won
    assert tuned.plan.nfe == nfe
    assert tuned.plan.end.sigma == 0


def test_float32_noises_are_enough():
    model = problem()
    tuned = solvers.tune(model, 5, noise(64, dtype=torch.float32), family=FAMILY[:3], end=END, starts=1)
    assert tuned.won
    assert math.isfinite(tuned.report.best.standard_error)
