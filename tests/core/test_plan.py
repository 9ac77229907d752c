"""Plans: traced exactly, printed, saved, loaded, refused where they are wrong."""

import json
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample.plan import Plan, Row, _digest

from .toys import NOISY, ODE, REGULAR, Toy, adams_eps, churn, ddim, heun, late_noise, renoise, two_step

VP = fs.VP.scaled_linear()
GRID = fs.grid(VP, 6)


def traced(solver=two_step, grid=GRID, **options):
    return fs.trace(solver, grid, **options)


def test_ddim_is_one_row_a_step_with_the_numbers_of_the_formula():
    plan = traced(ddim)
    assert (plan.nfe, plan.memory, plan.stochastic, plan.remembers) == (6, 1, False, "x0")
    for row, (s, t) in zip(plan.rows, GRID.steps()):
        assert row.node is s
        assert (row.p, row.q, row.c) == (0, 1, ())
        assert row.a == t.sigma / s.sigma
        assert row.b == (t.alpha * -math.expm1(s.lam - t.lam),)
    assert plan.rows[-1].a == 0
    assert plan.rows[-1].b == (1,)


def test_a_two_step_solver_remembers_one_older_x0():
    plan = traced(two_step)
    assert plan.memory == 2
    assert [len(row.b) for row in plan.rows] == [1, 2, 2, 2, 2, 1]


def test_a_solver_in_eps_remembers_eps():
    plan = traced(adams_eps, fs.grid(VP, 20, end=0.0))
    assert (plan.remembers, plan.memory) == ("eps", 2)


@pytest.mark.parametrize("schedule", REGULAR.values(), ids=REGULAR.keys())
@pytest.mark.parametrize("solver", [ddim, two_step, heun], ids=lambda f: f.__name__)
def test_no_rounding_residue_keeps_old_evaluations_alive(solver, schedule):
    start = 0.999 * schedule.t_max
    plan = fs.trace(solver, fs.grid(schedule, 100, start=start))
    assert plan.memory == (1 if solver is ddim else 2)


def test_a_thousand_steps_are_traced_within_two_seconds():
    for solver in (two_step, heun):
        grid = fs.grid(VP, 1000)
        begin = time.process_time()
        traced(solver, grid)
        assert time.process_time() - begin < 2


def test_a_solver_that_no_other_memory_can_better_is_run_once():
    """Tracing with eps and flow as well costs several times as much, above all in exact fractions."""
    runs = []

    def counted(model, x, grid):
        runs.append(grid)
        return ddim(model, x, grid)

    assert traced(counted).memory == 1
    assert len(runs) == 1


def test_the_print_names_what_will_be_computed():
    text = str(traced(renoise))
    assert "renoise: 6 network evaluations, remembers 1 x x0, adds noise" in text
    assert "VP(1000 betas, 0.00085 .. 0.012), uniform_lam, from t = 999 to t = -1 (sigma 0)" in text
    assert len(text.splitlines()) == 3 + 6
    assert len(str(traced(churn)).splitlines()) == 3 + 1 + 6  # the entry has a line of its own


def test_options_are_shown():
    def half(model, x, grid, eta=0.0):
        return eta * ddim(model, x, grid)

    assert traced(half, eta=0.5).solver == "half(eta=0.5)"
    assert traced(half).solver == "half"
    with pytest.raises(TypeError, match="unexpected keyword argument 'etta'"):
        traced(half, etta=0.5)


def test_coefficients_may_be_numbers_of_numpy_and_torch():
    def scaled(model, x, grid):
        (s, _), *_ = grid.steps()
        x0 = model.predict(x, s)
        return np.float32(0.5) * x0 + torch.tensor(0.25) * x + x * np.float64(2) - x0 / torch.tensor(4.0)

    (row,) = traced(scaled).rows
    assert (row.a, row.b) == (2.25, (0.25,))


def test_sum_adds_states():
    def summed(model, x, grid):
        (s, _), *_ = grid.steps()
        return sum([x, model.predict(x, s), x])

    (row,) = traced(summed).rows
    assert (row.a, row.b) == (2, (1,))


def test_the_noise_before_the_first_evaluation_is_the_entry():
    plan = traced(churn)
    assert plan.entry == (1, pytest.approx(0.1 * plan.start.sigma))
    assert plan.noises == {-1, 0, 1, 2, 3, 4}
    assert traced(ddim).entry == (1, 0)


def test_a_noise_drawn_early_may_be_used_late():
    plan = traced(late_noise)
    assert plan.entry == (1, 0)
    assert plan.noises == {-1}
    assert [len(row.c) for row in plan.rows] == [2, 3, 4, 5, 6, 0]


def test_an_older_state_is_written_through_the_newest_where_that_is_possible():
    def leaps(model, x, grid):
        before = x
        for s, t in grid.steps():
            x, before = fs.exponential_step(x, model.predict(x, s), s, t) + 0.01 * before, x
        return x

    grid = fs.grid(VP, 4, end=0.0)
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = fs.Denoiser(Toy(), VP)
    ours = fs.sample(model, fs.trace(leaps, grid), noise)
    torch.testing.assert_close(ours, fs.solve(model, leaps, grid, noise), rtol=1e-10, atol=1e-12)


def forgets_then_asks(model, x, grid):
    first, ((s, _), (t, _), *_) = x, grid.steps()
    model.predict(x, s)
    return model.predict(model.noise(), t) + first


def squares(model, x, grid):
    return x * x


def divides(model, x, grid):
    return 1 / model.predict(x, grid.nodes[0])


def ratio(model, x, grid):
    return x / model.predict(x, grid.nodes[0])


def clamps(model, x, grid):
    return model.predict(x, grid.nodes[0]).clamp(-1, 1)


def shifts(model, x, grid):
    return model.predict(x, grid.nodes[0]) + 1.0


def asks(model, x, grid):
    return x if model.predict(x, grid.nodes[0]) > 0 else -x


def calls_torch(model, x, grid):
    return torch.tanh(model.predict(x, grid.nodes[0]))


def never_predicts(model, x, grid):
    return 0.5 * x


def two_noises(model, x, grid):
    x0 = model.predict(x, grid.nodes[0])
    return x0 + model.noise() + model.noise()


def two_early_noises(model, x, grid):
    return model.predict(x + model.noise() + model.noise(), grid.nodes[0])


def returns_a_tensor(model, x, grid):
    model.predict(x, grid.nodes[0])
    return torch.zeros(3)


def returns_nothing(model, x, grid):
    model.predict(x, grid.nodes[0])


def predicts_at_a_tensor(model, x, grid):
    return model.predict(torch.zeros(3), grid.nodes[0])


def predicts_at_the_end(model, x, grid):
    return model.predict(x, grid.nodes[-1])


def divides_by_zero(model, x, grid):
    return model.predict(x, grid.nodes[0]) / grid.nodes[-1].sigma


def steps_to_infinity(model, x, grid):
    return model.predict(x, grid.nodes[0]) * grid.nodes[-1].lam


def not_a_number(model, x, grid):
    return x * float("nan") + model.predict(x, grid.nodes[0])


@pytest.mark.parametrize(
    ("solver", "says"),
    [
        (forgets_then_asks, "evaluation . needs the state of evaluation . itself; run it with fs.solve"),
        (squares, "multiplies two states; .* fs.solve"),
        (divides, "more to a state than sums and multiples .*fs.solve"),
        (ratio, "more to a state than sums and multiples .*fs.solve"),
        (clamps, "more to a state .*no attribute 'clamp'.*fs.solve"),
        (shifts, "more to a state"),
        (asks, "more to a state"),
        (calls_torch, "more to a state"),
        (never_predicts, "never called model.predict"),
        (two_noises, "two noises between two evaluations"),
        (two_early_noises, "two noises between two evaluations"),
        (returns_a_tensor, "moved Tensor, not the state"),
        (returns_nothing, "moved NoneType, not the state"),
        (predicts_at_a_tensor, "moved Tensor, not the state"),
        (predicts_at_the_end, "sigma must be positive"),
        (divides_by_zero, "infinite after the evaluation at t = 999; .*end it where sigma > 0"),
        (steps_to_infinity, "inf after the evaluation"),
        (not_a_number, "nan before it evaluates"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_solver_that_is_no_plan_is_refused_by_its_name(solver, says):
    with pytest.raises(ValueError, match=says) as caught:
        traced(solver)
    assert solver.__name__ in str(caught.value) or solver is predicts_at_the_end


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("ddim", GRID), r"function such as fastsample\.solvers\.dpmpp_2m .*got 'ddim'"),
        ((ddim, VP), r"runs on fs\.grid\(schedule, steps\), got VP"),
    ],
)
def test_what_is_no_solver_or_no_grid_is_refused(given, says):
    with pytest.raises(TypeError, match=says):
        fs.trace(*given)
    with pytest.raises(TypeError, match=says):
        fs.solve(fs.Denoiser(Toy(), VP), *given, torch.ones(2, 3))


def test_faults_of_the_solver_itself_pass_through():
    def faulty(model, x, grid):
        return grid.nothing

    with pytest.raises(AttributeError, match="'Grid' object has no attribute 'nothing'"):
        traced(faulty)


def test_eps_solvers_say_why_they_cannot_start_at_alpha_zero():
    with pytest.raises(ValueError, match=r"adams_eps cannot be written as a plan: .*alpha > 0"):
        fs.trace(adams_eps, fs.grid(fs.Flow(), 4, fs.uniform_t))


# saving and loading


@pytest.mark.parametrize("solver", ODE[:2] + NOISY, ids=lambda f: f.__name__)
def test_a_plan_comes_back_exactly(solver, tmp_path):
    plan = traced(solver)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(str(tmp_path / "plan.json")) == plan
    assert Plan.from_json(plan.to_json()) == plan
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == plan.to_json()


def sealed(**changes):
    """A file whose checksum is right, whatever it holds."""
    text = {"format": "fastsample.plan", "version": 1}
    body = json.loads(json.dumps(saved()["plan"]))
    body.update(changes)
    return {**text, "sha256": _digest(body), "plan": body}


def saved():
    with tempfile.TemporaryDirectory() as folder:
        traced(two_step).save(Path(folder) / "plan.json")
        return json.loads((Path(folder) / "plan.json").read_text())


ROW = json.loads(json.dumps(saved()["plan"]["rows"][0]))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "damaged"),
        ("[1, 2]", "damaged"),
        ('"text"', "damaged"),
        ("null", "damaged"),
        ("[" * 100_000, "damaged"),
        ("{}", "lacks 'format'"),
        ({**saved(), "format": "other"}, "format other"),
        ({**saved(), "version": 2}, "reads version 1|version 2"),
        ({key: value for key, value in saved().items() if key != "sha256"}, "lacks 'sha256'"),
        ({key: value for key, value in saved().items() if key != "plan"}, "lacks 'plan'"),
        ({**saved(), "plan": []}, "checksum"),
        ({**saved(), "sha256": "0" * 64}, "checksum does not match"),
        (sealed(rows=[]), "no rows"),
        (sealed(rows={"0": ROW}), "damaged"),
        (sealed(rows=[{**ROW, "extra": 1}]), "extra"),
        (sealed(rows=[{key: ROW[key] for key in ("node", "p", "q")}]), "lacks 'b'"),
        (sealed(rows=[{**ROW, "a": math.nan}]), "not finite"),
        (sealed(rows=[{**ROW, "b": [math.inf]}]), "not finite"),
        (sealed(rows=[{**ROW, "b": "12"}]), "damaged"),
        (sealed(rows=[{**ROW, "b": [1.0, 1.0]}]), "more than there are yet"),
        (sealed(rows=[{**ROW, "a": 10**400}]), "damaged"),
        (sealed(rows=[{**ROW, "node": {"t": 1.0, "alpha": 1.0, "sigma": 0.0}}]), "sigma must be positive"),
        (sealed(rows=[{**ROW, "node": {"t": 1.0, "alpha": -0.1, "sigma": 1.0}}]), "alpha = -0.1"),
        (sealed(entry=[1.0]), "entry"),
        (sealed(entry=[1.0, math.nan]), "not finite"),
        (sealed(start={"t": 1.0, "alpha": math.inf, "sigma": 1.0}), "not finite"),
        (sealed(surprise=1), "surprise"),
        (sealed(solver=None), "must be text"),
        (sealed(spacing=[1]), "must be text"),
        ('{"format": "fastsample.plan", "version": ' + "1" * 6000 + "}", "damaged"),
        ('{"format": "fastsample.plan", "version": 1, "plan": ' + "[" * 50_000 + "]" * 50_000 + "}", "recursion"),
    ],
)
def test_a_file_that_is_no_sound_plan_is_refused_by_its_name(content, says, tmp_path):
    path = tmp_path / "plan.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=rf"plan\.json is no fastsample plan .*({says})"):
        Plan.load(path)
    with pytest.raises(ValueError, match=rf"this text is no fastsample plan .*({says})"):
        Plan.from_json(path.read_text())


def test_a_file_cut_anywhere_or_with_any_digit_changed_is_refused(tmp_path):
    path = tmp_path / "plan.json"
    traced(ddim, fs.grid(VP, 2)).save(path)
    whole = path.read_text()
    for length in range(0, len(whole) - 2, 17):
        path.write_text(whole[:length])
        with pytest.raises(ValueError, match=r"plan\.json"):
            Plan.load(path)
    for place in [i for i, letter in enumerate(whole) if letter.isdigit()][::5]:
        changed = whole[:place] + str((int(whole[place]) + 1) % 10) + whole[place + 1 :]
        if json.loads(changed) == json.loads(whole):
            continue  # the 17th digit of a number that 16 already tell
        path.write_text(changed)
        with pytest.raises(ValueError, match=r"plan\.json"):
            Plan.load(path)


def test_bytes_that_are_no_text_are_refused(tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"plan\.json"):
        Plan.load(path)


def test_a_file_that_is_not_there_is_an_error_of_the_system(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        Plan.load(tmp_path / "nothing.json")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_plan_with_a_number_that_is_not_finite_cannot_be_made(bad):
    plan = traced(ddim)
    for broken in (replace(plan.rows[1], a=bad), replace(plan.rows[1], b=(bad,)), replace(plan.rows[1], c=(bad,))):
        with pytest.raises(ValueError, match=r"row 1 of the plan .* not finite"):
            replace(plan, rows=(plan.rows[0], broken))
    with pytest.raises(ValueError, match="entry"):
        replace(plan, entry=(1.0, bad))
    with pytest.raises(ValueError, match="start"):
        replace(plan, start=fs.Node(bad, 1.0, 1.0))


def test_a_row_may_not_use_what_is_not_there_yet():
    node = fs.node(VP, 500.0)
    with pytest.raises(ValueError, match="2 memories and 0 noises, more than there are yet"):
        replace(traced(ddim), rows=(Row(node, 0.0, 1.0, 1.0, (1.0, 1.0), ()),))
    with pytest.raises(ValueError, match="1 memories and 3 noises"):
        replace(traced(ddim), rows=(Row(node, 0.0, 1.0, 1.0, (1.0,), (1.0, 1.0, 1.0)),))
