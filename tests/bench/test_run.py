"""Cases and the sweep: honest counts, the same noises for all, failures that stay in their case."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import bench
from fastsample.bench.case import Counted, cost, counting


def test_the_product_has_every_combination_and_each_its_own_file(toys, model):
    cases = bench.Case.product(
        model={"teacher": model, "student": model},
        solver={"one": toys["ddim"], "two": toys["heun"]},
        steps=[1, 2, 4],
        spacing=[None, fs.karras],
    )
    assert len(cases) == len({case.key for case in cases}) == len({case.name for case in cases}) == 24
    assert cases[0].name == "teacher/one/1"
    assert cases[-1].name == "student/two/4/karras"
    assert cases[-1].plan.nfe == 7
    assert cases[-1].plan.spacing == "karras"


def test_options_start_and_end_reach_the_plan_and_the_name(toys, model):
    def half(model, x, grid, share):
        return toys["ddim"](model, x, grid) * share

    (case,) = bench.Case.product(model={"m": model}, solver=half, steps=2, start=2.0, end=1.0, options={"share": 0.5})
    assert case.name == "m/half/2/start=2.0/end=1.0/share=0.5"
    assert (case.plan.start.t, case.plan.end.t) == (2.0, 1.0)


@pytest.mark.parametrize("solver", ["ddim", ["ddim"], {"ddim": "ddim"}])
def test_a_solver_given_by_name_is_refused_with_the_remedy(model, solver):
    with pytest.raises(TypeError, match=r"such as solvers.ddim, got 'ddim'"):
        bench.Case.product(model={"m": model}, solver=solver, steps=2)


def test_two_solvers_of_one_name_and_two_equal_cases_are_refused(toys, model, sweep):
    with pytest.raises(ValueError, match="two solvers have the same name"):
        bench.Case.product(model={"m": model}, solver=[toys["ddim"], toys["ddim"]], steps=2)
    cases = bench.Case.product(model={"m": model}, solver=toys["ddim"], steps=2)
    with pytest.raises(ValueError, match="two cases are named m/ddim/2"):
        sweep(cases=cases + cases)


def test_records_hold_what_was_asked_for(sweep, tmp_path):
    floor, *records = sweep(latency=bench.latency(rounds=2, batch=4))
    assert [record.name for record in records] == [f"teacher/{s}/{n}" for s in ("ddim", "heun") for n in (2, 4)]
    assert [record.nfe for record in records] == [2, 4, 3, 7]
    assert [record.rows for record in records] == [2, 4, 3, 7]
    for record in records:
        assert record.error is None
        assert record.scores["fd_pixels"].se > 0
        assert len(record.timing.steady.samples_s) == 4
        assert record.ms_per_image[0] == pytest.approx(record.ms_per_batch[0] / 4)
        assert record.timing.first_s > 0
        assert record.quality
        assert record.kind == "case"
    body, read = bench.read_run(tmp_path / "out")
    assert read == [floor, *records]
    assert body["finished"]
    assert body["configuration"]["shape"] == [1, 4, 4]
    (environment,) = body["environments"]
    assert {"torch", "cpu", "threads", "load average"} <= environment.keys()


def test_the_floor_is_what_the_reference_scores_against_itself(sweep, tmp_path):
    floor, *_ = sweep()
    assert (floor.kind, floor.name, floor.nfe, floor.timing) == ("floor", "real images", None, None)
    assert floor.scores["fd_pixels"].value > 0
    assert floor.n == 50  # half of the images
    (tmp_path / "out" / "cells" / "floor.json").unlink()
    assert sweep()[0] == floor
    assert all(record.kind == "case" for record in sweep(floor=False, resume=False))
    assert all(record.kind == "case" for record in sweep(quality={"level": lambda samples: 1.0}, resume=False))


def test_the_samples_kept_are_those_of_the_first_seeds(sweep, toys, model, tmp_path):
    record = sweep(keep=5)[-1]
    with np.load(tmp_path / "out" / "samples" / record.quality / "samples.npz", allow_pickle=False) as file:
        assert file["seeds"].tolist() == [0, 1, 2, 3, 4]
    plan = fs.trace(toys["heun"], fs.grid(model.schedule, 4))
    expected = fs.sample(model, plan, fs.noise((1, 4, 4), seeds=range(5)))
    torch.testing.assert_close(bench.read_samples(tmp_path / "out", record), expected)


def test_a_folder_is_used_again_and_holds_nothing_of_the_run_before(sweep, toys, model, tmp_path):
    first = sweep(n=30)[-1]
    cells = tmp_path / "out" / "cells"
    (cells / f".{first.key}.json.abc.json").write_text("left by a run that was killed")
    (cells / "notes.txt").write_text("the user's own")
    cases = bench.Case.product(model={"teacher": model}, solver=toys["ddim"], steps=2)
    floor, record = sweep(cases=cases, keep=0, resume=False)
    assert {path.name for path in cells.iterdir()} == {"floor.json", f"{record.key}.json", "notes.txt"}
    assert [path.name for path in (tmp_path / "out" / "samples").iterdir()] == [record.quality]
    assert bench.read_run(tmp_path / "out")[1] == [floor, record]


def test_a_folder_of_another_run_is_refused_with_what_differs_and_left_as_it_is(sweep, tmp_path):
    records = sweep(n=30)
    with pytest.raises(
        ValueError, match=r"holds another run \(its n differ\): choose another out, or pass resume=False"
    ):
        sweep(n=40)
    reference = torch.zeros(9, 1, 4, 4) - 0.1 * torch.eye(4)
    with pytest.raises(ValueError, match=r"its keep, quality differ|its quality, keep differ"):
        sweep(n=30, keep=7, quality=bench.fd_pixels(reference))
    assert bench.read_run(tmp_path / "out")[1] == records


def test_a_run_that_is_stopped_leaves_its_own_records_alone(sweep, toys, model, tmp_path):
    def stops(samples):
        seen.append(samples)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return 1.0

    seen = []
    sweep(n=30)
    with pytest.raises(KeyboardInterrupt):
        sweep(n=40, quality={"seen": stops}, resume=False)
    body, records = bench.read_run(tmp_path / "out")
    assert not body["finished"]
    assert [(record.n, set(record.scores)) for record in records] == [(40, {"seen"})] * 2


def test_a_run_that_is_stopped_while_it_clears_the_folder_leaves_no_run(sweep, tmp_path, monkeypatch):
    def stops(path, missing_ok=False):
        unlink(path, missing_ok)
        if path.parent.name == "cells":
            raise KeyboardInterrupt

    unlink = Path.unlink
    sweep()
    monkeypatch.setattr(Path, "unlink", stops)
    with pytest.raises(KeyboardInterrupt):
        sweep(resume=False)
    monkeypatch.undo()
    assert len(list((tmp_path / "out" / "cells").iterdir())) == 4  # of 4 records and a floor
    with pytest.raises(FileNotFoundError, match=r"holds no run\.json"):
        bench.read_run(tmp_path / "out")


def test_the_starting_noise_is_in_no_latency(sweep, toys, model, monkeypatch):
    drawn = []

    def draw(self, k):
        drawn.append(k)
        return original(self, k)

    original = fs.noise((1,), [0]).__class__.draw
    monkeypatch.setattr(fs.noise((1,), [0]).__class__, "draw", draw)
    cases = bench.Case.product(model={"m": model}, solver=[toys["ancestral"], toys["ddim"]], steps=3)
    sweep(cases=cases, batch=40, quality=(), latency=bench.latency(rounds=5))
    assert drawn.count(0) == 2 + 2  # once for the samples of each case, once for its latency
    assert drawn.count(2) == 1 + 1 + 1 + 10 + 1  # that of a step: samples, first call, warm-up, rounds, memory


def test_scores_do_not_depend_on_the_batch(sweep):
    first, second = (
        [record.scores["fd_pixels"].value for record in sweep(batch=batch, resume=False)] for batch in (7, 40)
    )
    assert first == pytest.approx(second, rel=1e-5)


def test_the_endpoint_error_shrinks_with_the_order_and_is_zero_for_the_truth_itself(sweep, toys, model):
    accurate = bench.Case("teacher", model, "heun", toys["heun"], 200)
    cases = bench.Case.product(model={"teacher": model}, solver=[toys["heun"]], steps=[8, 32, 200])
    _, *records = sweep(cases=cases, converged={"teacher": accurate})
    eight, many, truth = (record.scores["endpoint_rms"] for record in records)
    assert truth.value == 0
    assert many.value < eight.value / 4
    assert eight.se > 0
    eight, many, truth = (record.scores["fd_pixels_converged"].value for record in records)
    assert abs(truth) < 1e-9  # of the sums over 40 samples of numbers near 1
    assert truth < many < eight


def test_a_stochastic_case_has_no_endpoint_error_and_is_no_truth(sweep, toys, model):
    cases = bench.Case.product(model={"m": model}, solver=[toys["ancestral"], toys["ddim"]], steps=4)
    _, noisy, plain = sweep(cases=cases, converged={"m": bench.Case("m", model, "ddim", toys["ddim"], 50)})
    assert noisy.stochastic
    assert "endpoint_rms" not in noisy.scores
    assert "endpoint_rms" in plain.scores
    assert "fd_pixels_converged" in noisy.scores
    with pytest.raises(ValueError, match="adds noise"):
        sweep(cases=cases, converged={"m": cases[0]})
    with pytest.raises(ValueError, match="'teacher', which no case has"):
        sweep(cases=cases, converged={"teacher": cases[1]})


def test_conditions_follow_the_sample_and_not_the_batch(sweep, toys):
    def network(x, t, label):
        return 0.0 * x + label.view(-1, 1, 1, 1)

    cases = bench.Case.product(model={"m": toys["toy"](network)}, solver=toys["ddim"], steps=2)
    got, asked = [], []
    sweep(
        cases=cases,
        condition=lambda i: asked.append(i) or {"label": i.float()},
        quality={"seen": lambda samples: got.append(samples) or 0.0},
        latency=bench.latency(rounds=1, batch=64),  # more than n: the samples are used again
    )
    torch.testing.assert_close(got[0][:, 0, 0, 0], torch.arange(40.0))
    assert asked[-1].tolist() == [*range(40), *range(24)]


def test_a_network_evaluated_more_often_than_promised_fails_its_case_and_no_other(sweep, toys, model):
    class Twice(fs.Denoiser):
        def predict(self, x, node, **condition):
            return 0.5 * (super().predict(x, node) + self.network(x, torch.zeros(len(x))))

    greedy = Twice(lambda x, t: 0.5 * x, model.schedule, "x0")
    cases = bench.Case.product(model={"greedy": greedy, "honest": model}, solver=toys["ddim"], steps=4)
    with pytest.warns(UserWarning, match="1 of 2 cases failed"):
        _, bad, good = sweep(cases=cases, latency=bench.latency(rounds=1))
    assert (
        "greedy/ddim/4: ValueError: the plan promises nfe = 4, 4 rows of the network for each sample, but it saw 8"
        in bad.error
    )
    assert bad.timing is None
    assert "in cost" in bad.traceback
    assert good.error is None
    assert good.timing is not None


def test_a_wrapper_that_hides_an_evaluation_from_the_plan_is_caught(sweep, toys, model):
    class Skips:
        schedule = model.schedule

        def __init__(self):
            self.model, self.last = model, None

        def predict(self, x, node, **condition):
            self.last = model.predict(x, node) if self.last is None else self.last
            return self.last

    cases = bench.Case.product(model={"lazy": Skips()}, solver=toys["ddim"], steps=4)
    with pytest.warns(UserWarning, match="it saw 1 in 1 calls"):
        sweep(cases=cases)


@pytest.mark.parametrize("batched", [True, False])
def test_guidance_costs_two_rows_an_evaluation(sweep, toys, batched):
    def network(x, t, shift):
        return 0.5 * x + shift

    guided = fs.Guided(toys["toy"](network), {"shift": 0.1}, {"shift": 0.0}, scale=2.0, batched=batched)
    if batched:
        guided = fs.Guided(toys["toy"](network), {"shift": 0.1}, {"shift": 0.1}, scale=2.0)
    _, record = sweep(cases=bench.Case.product(model={"g": guided}, solver=toys["ddim"], steps=4))
    assert (record.nfe, record.rows, record.calls) == (4, 8, 4 if batched else 8)


def test_guidance_that_remembers_starts_anew_with_every_batch(sweep, toys):
    def network(x, t, shift):
        return 0.5 * x + shift

    kept = fs.Guided(toys["toy"](network), {"shift": 0.1}, {"shift": 0.0}, scale=2.0, batched=False, reuse=2)
    _, record = sweep(cases=bench.Case.product(model={"g": kept}, solver=toys["ddim"], steps=4))
    assert record.error is None
    assert (record.nfe, record.rows) == (4, 6)


def test_a_count_of_evaluations_unlike_the_plan_is_an_error(toys, model):
    (case,) = bench.Case.product(model={"m": model}, solver=toys["heun"], steps=2)
    counted = Counted(model)
    with pytest.raises(ValueError, match="promises nfe = 3, but the model was evaluated 0 times"):
        cost(case, counted, 10)
    counted.evaluations = 3
    assert cost(case, counted, 10) == bench.Cost(3, None, None)  # no network known, none counted


def test_counting_leaves_the_model_as_it_was(model):
    network = model.network
    with counting(fs.Thresholded(model)) as counted:
        counted.predict(torch.zeros(3, 2), fs.node(model.schedule, 1.0))
        assert (counted.evaluations, counted.network.calls, counted.network.rows) == (1, 1, 3)
    assert model.network is network


def test_nan_fails_the_case_by_name_and_the_sweep_goes_on(sweep, toys, model, tmp_path):
    broken = toys["toy"](lambda x, t: x * math.nan)
    cases = bench.Case.product(model={"broken": broken, "whole": model}, solver=toys["ddim"], steps=2)
    with pytest.warns(UserWarning, match="broken/ddim/2: FloatingPointError"):
        _, bad, good = sweep(cases=cases)
    assert "NaN" in bad.error
    assert good.error is None
    assert json.loads((tmp_path / "out" / "cells" / f"{bad.key}.json").read_text())["record"]["error"] == bad.error


def test_a_measure_that_gives_nan_fails_the_case(sweep):
    with pytest.warns(UserWarning, match="odd of the samples is nan"):
        sweep(quality={"odd": lambda samples: math.nan})
    with pytest.warns(UserWarning, match="se of odd of the samples is inf"):
        sweep(quality={"odd": lambda samples: bench.Score(1.0, math.inf)}, resume=False)


def test_a_measure_may_give_the_numbers_of_numpy_and_torch(sweep, tmp_path):
    quality = {"a": lambda samples: bench.Score(np.float32(0.5), torch.tensor(0.25)), "b": lambda s: torch.tensor(2.0)}
    scores = sweep(quality=quality)[0].scores
    assert scores == {"a": bench.Score(0.5, 0.25), "b": bench.Score(2.0, n=40)}
    assert bench.read_run(tmp_path / "out")[1][0].scores == scores


def test_a_converged_case_that_fails_is_named(sweep, toys):
    broken = bench.Case("teacher", toys["toy"](lambda x, t: x * math.nan), "heun", toys["heun"], 9)
    with pytest.raises(RuntimeError, match=r"the converged case failed: teacher/heun/9: FloatingPointError"):
        sweep(converged={"teacher": broken})


def test_a_plan_that_cannot_be_traced_fails_its_case_alone(sweep, toys, model):
    def squares(model, x, grid):
        return x * model.predict(x, grid.nodes[0])

    cases = bench.Case.product(model={"m": model}, solver=[squares, toys["ddim"]], steps=2)
    with pytest.warns(UserWarning, match="m/squares/2: ValueError"):
        _, bad, good = sweep(cases=cases)
    assert bad.nfe is None
    assert good.scores


def test_a_folder_that_cannot_be_written_fails_before_anything_is_sampled(sweep, toys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    called = []
    model = toys["toy"](lambda x, t: called.append(1) or 0.5 * x)
    with pytest.raises(OSError, match="cannot write into"):
        sweep(cases=bench.Case.product(model={"m": model}, solver=toys["ddim"], steps=2), out=tmp_path / "file" / "out")
    assert not called


@pytest.mark.parametrize("wrong", [{"n": 0}, {"batch": 0}, {"shard": 0}, {"cases": []}, {"keep": -1}])
def test_nothing_to_measure_is_an_error(sweep, wrong):
    with pytest.raises(ValueError, match=rf"{next(iter(wrong))} must be at least|no cases"):
        sweep(**wrong)


def test_quality_may_be_one_several_or_named_but_not_two_of_one_name(sweep):
    def level(samples):
        return float(samples.abs().mean())

    assert sweep(quality=level)[0].scores["level"].n == 40
    assert set(sweep(quality={"a": level, "b": level}, resume=False)[0].scores) == {"a", "b"}
    with pytest.raises(ValueError, match="share a name"):
        sweep(quality=[level, level])


def test_a_damaged_or_foreign_folder_is_named(sweep, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run\.json"):
        bench.read_run(tmp_path)
    record = sweep()[0]
    cell, run = tmp_path / "out" / "cells" / f"{record.key}.json", tmp_path / "out" / "run.json"
    whole = cell.read_text()
    for text, says in (
        (whole[:-9], "damaged"),
        (whole.replace('"nfe"', '"net"'), "damaged"),
        (whole.replace('"version": 2', '"version": 3'), r"fastsample\.bench\.record of version 3; run the sweep again"),
    ):
        cell.write_text(text)
        with pytest.raises(ValueError, match=rf"{cell.name} is not a bench record of version 2: {says}"):
            bench.read_run(tmp_path / "out")
    for text in ("{", run.read_text().replace('"cases"', '"cells"')):
        run.write_text(text)
        with pytest.raises(ValueError, match=r"run\.json is not a bench run of version 2: damaged"):
            bench.read_run(tmp_path / "out")


def test_the_environment_has_no_host_name():
    import platform

    assert platform.node() not in " ".join(bench.environment().values())


@pytest.mark.gpu
def test_a_sweep_runs_on_a_gpu(sweep, toys):
    cases = bench.Case.product(model={"m": toys["toy"]()}, solver=[toys["ddim"], toys["ancestral"]], steps=4)
    records = sweep(cases=cases, device="cuda", latency=bench.latency(rounds=2))
    assert all(record.error is None and record.ms_per_image for record in records)
