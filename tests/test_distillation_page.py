"""The command that measures students of the digits: what it keeps, and where it writes."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import bench, solvers, zoo
from fastsample.zoo.data import digits

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
SCRIPT = Path(__file__).parents[1] / "docs" / "distillation_page.py"


@pytest.fixture(scope="module")
def page():
    spec = importlib.util.spec_from_file_location("distillation_page", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_tables_stand_between_their_marks_however_often_they_are_written(page):
    text = "# Distillation\n\nWhat it is.\n"
    once = page.placed(text, "| old |\n")
    assert once.startswith(text)
    assert page.placed(once, "| old |\n") == once
    after = once + "\n## After\n"
    twice = page.placed(after, "| new |\n")
    assert twice == after.replace("| old |", "| new |")
    with pytest.raises(ValueError, match=r"has <!-- measured.*and no <!-- end of measured"):
        page.placed(f"# Distillation\n{page.BEGIN}\n", "| new |\n")


def test_students_of_other_settings_are_refused(page, tmp_path):
    for name in page.METHODS:
        folder = tmp_path / name
        folder.mkdir()
        assert not page.is_done(folder, name, 1.0)
        (folder / page.DONE).write_text(json.dumps(page.settings(name, 1.0)))
        assert page.is_done(folder, name, 1.0)
        with pytest.raises(ValueError, match=r"was trained by other settings.*take another --out"):
            page.is_done(folder, name, 0.5)


def test_cpu_time_adds_up_over_calls_that_were_interrupted(page, tmp_path):
    def work():
        with page.cpu_seconds(tmp_path / "seconds.json"):
            deadline = page.time.process_time() + 0.2
            while page.time.process_time() < deadline:
                pass
            raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            work()
    assert 0.35 < json.loads((tmp_path / "seconds.json").read_text()) < 2


def test_scores_are_those_of_the_bench_and_the_error_of_a_multiple_is_that_of_shared_noises(page, tmp_path):
    teacher, n = zoo.digits(), 160
    measured = page.Measurement(tmp_path, n, teacher)
    found = measured.cell("teacher", lambda: teacher, page.TEACHER, 2)
    plan = fs.trace(solvers.ddim, fs.grid(teacher.schedule, 2, fs.uniform_t))
    condition = {"class_labels": torch.arange(n) % 10}
    images = fs.sample(teacher, plan, fs.noise((1, 8, 8), seeds=range(n)), condition=condition)
    score = bench.fd_digits(digits("all")[0])(images)
    assert found["fd"] == pytest.approx(score.debiased, rel=1e-4)
    assert found["se"] == pytest.approx(score.se, rel=1e-4)
    kept = np.load(tmp_path / "teacher-DDIM-uniform_t-2.npy", allow_pickle=False)
    np.testing.assert_allclose(kept, images[: page.SHOWN].numpy(), atol=1e-5)
    same = measured.scores(measured.unit)
    assert (same["ratio"], same["ratio_se"], same["rms"]) == (1, 0, 0)

    def never():
        raise AssertionError("made again")

    assert measured.cell("teacher", never, page.TEACHER, 2) == found


def test_the_recipes_have_the_settings_that_are_measured(page):
    tomllib = pytest.importorskip("tomllib")
    configs = SCRIPT.parents[1] / "distill" / "configs"
    recipes = {name: tomllib.loads((configs / f"digits-{name}.toml").read_text()) for name in page.METHODS}
    for name, recipe in recipes.items():
        conversion = recipe["stage"]["conversion"]
        assert {key: conversion[key] for key in ("updates", "lr", "warmup")} == {
            "updates": page.CONVERSION["steps"], "lr": page.CONVERSION["lr"], "warmup": page.CONVERSION["warmup"],
        }  # fmt: skip
        assert {key: recipe["stages"][key] for key in page.DROP} == page.DROP
        (own,) = (stage for key, stage in recipe["stage"].items() if key != "conversion")
        assert own["method"] == name
        assert own["spacing"] == {"name": "power_t", "rho": 1.5}
    assert page.SPACING.__name__ == "power_t(1.5)"
    halving, consistency = recipes["progressive"]["stage"]["halving"], recipes["consistency"]["stage"]["consistency"]
    assert dict(zip(halving["rounds"], halving["updates"])) == page.ROUNDS
    assert {key: halving[key] for key in page.PROGRESSIVE} == page.PROGRESSIVE
    assert {**page.CONSISTENCY, "steps": consistency["updates"]} == page.CONSISTENCY
    assert all(consistency[key] == value for key, value in page.CONSISTENCY.items() if key != "steps")
