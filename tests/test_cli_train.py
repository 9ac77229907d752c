"""`fastsample train` and `fastsample distill` as a user types them."""

import importlib.metadata
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import cli, cli_train, solvers, zoo
from fastsample.distill.recipe import read_recipe

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

RECIPE = """
title = "A short one"
cost = "seconds"
reaches = "nothing"
threads = 1
[teacher]
from = "digits"
[student]
predicts = "v"
[data]
from = "digits"
size = 16
[stages]
save_every = 1
[stage.conversion]
method = "conversion"
updates = 2
[stage.halving]
method = "progressive"
rounds = [2, 1]
updates = 1
[plan]
solver = "ddim"
steps = 1
"""


@pytest.fixture
def command(monkeypatch, capsys):
    """Run `fastsample ...` in this process; returns (exit status, stdout, stderr)."""

    def run(*words: object):
        monkeypatch.setattr(sys, "argv", ["fastsample", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out = capsys.readouterr()
        return status, out.out, " ".join(out.err.replace("│", " ").split())  # typer draws a box that breaks lines

    return run


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "short.toml"
    path.write_text(RECIPE)
    return path


def test_a_dry_run_prints_the_recipe_and_its_cost_and_writes_nothing(command, recipe, tmp_path):
    status, out, _ = command("distill", recipe, "--dry-run", "--set", "stage.conversion.updates=7")
    assert status == 0
    for line in ("A short one", "cost: seconds", "reaches: nothing", 'solver = "ddim"'):
        assert line in out or line.startswith("solver")
    assert (
        "conversion: 7 updates of 16, 112 images; for each image 1 evaluation of what is trained, 1 of the teacher"
        in out
    )
    assert "halving/steps-2: 1 updates of 16, 16 images; for each image 1 evaluation of what is trained, 2 of" in out
    assert f"in all {2 * 112 + 2 * 3 * 16} evaluations of networks of 160,401 parameters" in out
    assert [path.name for path in tmp_path.iterdir()] == ["short.toml"]


def test_distilling_ends_with_a_student_and_the_command_that_samples_it(command, recipe, tmp_path):
    words = ["distill", recipe, "--out", tmp_path / "run", "--evaluate-every", 1, "--set", "evaluate.n=70"]
    measure = ["--set", "evaluate.measure=fd_pixels", "--set", "evaluate.reference=digits"]
    status, out, _ = command(*words, *measure)
    assert status == 0
    assert "conversion: 2 updates, loss" not in out  # the log has a line for every ten updates
    assert "halving/steps-1: 1 updates, fd_pixels" in out
    pictures = sorted((tmp_path / "run").rglob("*.png"))
    assert [path.relative_to(tmp_path / "run").as_posix() for path in pictures] == [
        "conversion/samples/step-000001.png",
        "conversion/samples/step-000002.png",
        "halving/steps-1/samples/step-000001.png",
        "halving/steps-2/samples/step-000001.png",
    ]
    log = [json.loads(line) for line in (tmp_path / "run/conversion/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "fd_pixels" in line.get("evaluation", {})] == [1, 2]
    said = next(line for line in out.splitlines() if line.startswith("sample it with: fastsample "))
    again = said.removeprefix("sample it with: fastsample ").split()
    status, out, _ = command(*again, "--count", 2, "--out", tmp_path / "x.png")
    assert status == 0
    assert "2 samples of 1 network evaluation" in out
    with np.load(tmp_path / "x.npz", allow_pickle=False) as found:
        assert found["images"].shape == (2, 1, 8, 8)
    assert "by the plan of the model: ddim, 1 network evaluation\n" in out
    _, out, _ = command(*again, "--count", 1, "--steps", 8, "--out", tmp_path / "y.png")  # as it is told
    assert "1 sample of 8 network evaluations" in out
    assert "by the plan" not in out
    student = fs.from_pretrained(tmp_path / "run" / "model")
    noise = fs.noise((1, 8, 8), seeds=range(2))
    images = fs.sample(student, student.plan, noise, condition={"class_labels": torch.arange(2)})
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "x.npz")["images"]), images, rtol=0, atol=1e-6)


def test_a_student_that_is_told_its_scale_is_evaluated_at_that_of_its_teacher():
    asked = read_recipe("sd15-lcm-lora", solvers=solvers.SOLVERS, changes=["stage.lcm.scales.embed={name='Plain'}"])
    told = cli_train._told(asked, asked.stages[0], 3)
    assert told["guidance"].tolist() == [7.5, 7.5, 7.5]
    untold = read_recipe("sd15-lcm-lora", solvers=solvers.SOLVERS)
    assert cli_train._told(untold, untold.stages[0], 3) == {}


def test_help_names_the_recipes_that_are_built_in(command):
    out = " ".join(command("distill", "--help")[1].split())
    assert "digits-consistency, digits-progressive" in out


def test_a_teacher_is_trained_and_then_distilled(command, recipe, tmp_path):
    short = ["--set", "stage.teacher.updates=2", "--set", "data.size=16"]
    status, out, _ = command("train", "digits-teacher", "--seed", 3, "--out", tmp_path / "teacher", *short)
    assert status == 0
    assert f"fastsample sample --model {tmp_path / 'teacher' / 'model'}" in out
    assert fs.from_pretrained(tmp_path / "teacher" / "model").prediction.name == "v"
    words = ["--teacher", tmp_path / "teacher" / "model", "--out", tmp_path / "student"]
    assert command("distill", recipe, *words)[0] == 0
    status, _, err = command("distill", recipe, "--out", tmp_path / "student")  # the same folder, another teacher
    assert status == 1
    assert "holds the work of another recipe: teacher.from was" in err


def test_the_same_command_again_is_done_at_once_and_changes_nothing(command, recipe, tmp_path):
    words = ["distill", recipe, "--out", tmp_path / "run"]
    assert command(*words)[0] == 0
    weights = tmp_path / "run" / "model" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    assert command(*words)[0] == 0
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["distill", "digits-consistent"], "did you mean 'digits-consistency'"),
        (["distill", "digits-teacher"], "run fastsample train digits-teacher"),
        (["train", "digits-consistency"], "run fastsample distill digits-consistency"),
        (["train", "digits-teacher", "--steps", "3"], "--set stage.NAME.updates=NUMBER"),
        (["train", "digits", "--dry-run"], "train digits-teacher"),
        (["train", "digits-teacher", "--teacher", "x"], "--teacher"),
        (["distill", "digits-consistency", "--set", "stage.consistency.tims=3"], "did you mean 'times'"),
        (["distill", "digits-consistency", "--set", "updates"], "key=value"),
        (["distill", "digits-consistency", "--evaluate-every", "0"], "evaluate-every"),
        (["distill", "digits-consistency", "--dry-run", "--set", "evaluate.measure=fd"], "did you mean"),
        (["distill", "digits-consistency", "--dry-run", "--set", "evaluate={measure='kernel_distance'}"], "reference"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_wrong_use_exits_with_2_and_names_the_remedy(command, tmp_path, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    status, _, err = command(*words)
    assert status == 2
    assert said in err
    assert not list(tmp_path.iterdir())


def test_a_recipe_without_a_folder_or_a_plan_asks_for_one(command, recipe):
    status, _, err = command("distill", recipe)
    assert (status, "give --out" in err) == (2, True)
    recipe.write_text(RECIPE[: RECIPE.index("[plan]")])
    status, _, err = command("distill", recipe, "--out", "x", "--evaluate-every", 3)
    assert (status, "add [plan]" in err) == (2, True)


def test_a_file_that_is_no_toml_exits_with_2_and_its_line(command, recipe):
    recipe.write_text("title = 'x'\nseed 1\n")
    status, _, err = command("distill", recipe)
    assert status == 2
    assert "no TOML" in err
    assert "line 2" in err


@pytest.mark.parametrize("place", ["--teacher", "--out"])
def test_what_is_not_there_or_cannot_be_written_fails_before_work_starts(command, recipe, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    words = {
        "--teacher": ["--teacher", tmp_path / "no", "--out", tmp_path / "run"],
        "--out": ["--out", tmp_path / "file/x"],
    }
    status, _, err = command("distill", recipe, *words[place])
    assert status == 1
    assert {"--teacher": "there is no teacher", "--out": "cannot write into"}[place] in err
    assert not list(tmp_path.rglob("step-*"))


def test_a_damaged_teacher_is_refused_by_its_file(command, recipe, tmp_path):
    fs.save_pretrained(zoo.digits(), tmp_path / "teacher")
    weights = tmp_path / "teacher" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    status, _, err = command("distill", recipe, "--teacher", tmp_path / "teacher", "--out", tmp_path / "run")
    assert status == 1
    assert "is damaged" in err


def test_missing_packages_are_named_before_work_starts(command, recipe, tmp_path, monkeypatch):
    there = importlib.metadata.version

    def version(package):
        if package in ("accelerate", "scikit-learn"):
            raise importlib.metadata.PackageNotFoundError(package)
        return there(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    status, _, err = command("distill", recipe, "--out", tmp_path / "run")
    assert status == 1
    assert "pip install 'fastsample[train,demo]'" in err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_write_the_student_once_and_speak_once(recipe, tmp_path):
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "2",
        "--cpu",
        "--num_machines",
        "1",
    ]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    words = ["-m", "fastsample.cli", "distill", recipe, "--out", tmp_path / "run"]
    done = subprocess.run([*launch, *words], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("sample it with:") == 1
    student = fs.from_pretrained(tmp_path / "run" / "model")
    assert student.plan.nfe == 1
