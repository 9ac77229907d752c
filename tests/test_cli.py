"""The command line as a user types it: what it prints, what it writes, and its exit status."""

import importlib.metadata
import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest

import fastsample as fs
from fastsample import cli, demo, solvers, zoo

pytest.importorskip("diffusers")


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
        return status, out.out, out.err

    return run


def test_the_installed_script_prints_its_commands():
    script = Path(sysconfig.get_path("scripts")) / "fastsample"
    done = subprocess.run([script, "--help"], capture_output=True, text=True, check=True)
    for name in ("demo", "sample", "plan", "tune", "train", "doctor"):
        assert name in done.stdout


@pytest.mark.parametrize("solver", solvers.SOLVERS)
def test_plan_prints_a_table_for_every_solver(command, solver):
    status, out, _ = command("plan", "--solver", solver, "--steps", 5)
    assert status == 0
    assert "network evaluations" in out


def test_a_saved_plan_gives_the_same_samples(command, tmp_path):
    status, *_ = command("plan", "--solver", "ddim", "--steps", 3, "--save", tmp_path / "p.json")
    assert status == 0
    command("sample", "--plan", tmp_path / "p.json", "--count", 4, "--out", tmp_path / "a.png")
    command("sample", "--solver", "ddim", "--steps", 3, "--count", 4, "--out", tmp_path / "b.png")
    a, b = (np.load(tmp_path / name, allow_pickle=False)["images"] for name in ("a.npz", "b.npz"))
    assert a.shape == (4, 1, 8, 8)
    np.testing.assert_array_equal(a, b)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_solver_takes_its_options_from_the_command_line(command, tmp_path):
    words = ["--solver", "multistep", "--option", "order=2", "--option", "variable=lam", "--steps", 3]
    status, *_ = command("plan", *words, "--end", 5, "--lower-order-final", "--save", tmp_path / "p.json")
    assert status == 0
    grid = fs.grid(zoo.digits().schedule, 3, fs.default_t, end=5.0, lower_order_final=True)
    assert fs.Plan.load(tmp_path / "p.json") == fs.trace(solvers.multistep, grid, order=2, variable="lam")


def test_picking_saves_the_best_of_each_number_of_evaluations(command, tmp_path):
    words = ["plan", "pick", "--steps", 1, "--steps", 2, "--count", 4, "--end", 0]
    status, out, _ = command(*words, "--out", tmp_path / "best.json")
    assert status == 0
    for nfe in (1, 2):
        plan = fs.Plan.load(tmp_path / f"best-{nfe}.json")
        assert plan.nfe == nfe
        assert plan.end == fs.node(zoo.digits().schedule, 0)
        assert f"of {nfe} evaluation" in out
    assert "converged solution" in out


def test_tuning_writes_a_plan_that_sample_runs_and_goes_on_when_it_is_run_again(command, tmp_path):
    words = ["tune", "--steps", 2, "--count", 8, "--label", 3, "--scale", 2, "--out", tmp_path / "tune"]
    status, out, said = command(*words)
    assert status == 0
    assert "update 1" in said
    first = (tmp_path / "tune" / "plan.json").read_text()
    status, again, said = command(*words)
    assert status == 0
    assert "update" not in said
    assert again == out
    assert (tmp_path / "tune" / "plan.json").read_text() == first
    status, *_ = command("sample", "--plan", tmp_path / "tune" / "plan.json", "--count", 1, "--out", tmp_path / "x.png")
    assert status == 0
    assert fs.Plan.load(tmp_path / "tune" / "plan.json").nfe == 2


def test_guidance_changes_the_samples_and_scale_1_does_not(command, tmp_path):
    for name, scale in (("none", 1.0), ("three", 3.0)):
        words = ["sample", "--steps", 3, "--count", 4, "--label", 7, "--scale", scale]
        status, *_ = command(*words, "--out", tmp_path / f"{name}.png")
        assert status == 0
    none, three = (np.load(tmp_path / f"{name}.npz", allow_pickle=False)["images"] for name in ("none", "three"))
    assert np.abs(none - three).max() > 0.01


@pytest.mark.parametrize("label", [[], ["--label", 2]], ids=["in turns", "of one class"])
def test_a_seed_means_the_same_sample_whatever_the_count(command, tmp_path, label):
    command("sample", "--steps", 3, "--count", 6, *label, "--out", tmp_path / "six.png")
    command("sample", "--steps", 3, "--count", 1, *label, "--seed", 4, "--out", tmp_path / "one.png")
    six, one = (np.load(tmp_path / f"{name}.npz", allow_pickle=False)["images"] for name in ("six", "one"))
    np.testing.assert_allclose(six[4], one[0], atol=1e-5)  # convolutions round differently in other batch sizes


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["plan", "--solver", "dpm9"], "dpmpp_2m"),
        (["plan", "--spacing", "cubic"], "uniform_lam"),
        (["plan", "--steps", "0"], "steps"),
        (["plan", "--option", "order"], "order=3"),
        (["plan", "pick", "--steps", "0"], "steps"),
        (["plan", "pick", "--count", "1"], "count"),
        (["tune", "--steps", "many"], "--steps"),
        (["tune", "--label", "11"], "0 to 10"),
        (["plan", "--steps", "many"], "--steps"),
        (["train", "faces"], "digits"),
        (["sample", "--count", "0"], "count"),
        (["sample", "--label", "11"], "0 to 10"),
        (["sample", "--plan", "nowhere.json"], "nowhere.json"),
        (["walk"], "walk"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_wrong_use_exits_with_2_and_names_the_remedy(command, words, said):
    status, _, err = command(*words)
    assert status == 2
    assert said in err


@pytest.mark.parametrize("name", ["x", "x.npz", "x.jpg", "x.8steps"])
def test_a_picture_that_is_no_png_is_refused_before_its_numbers_overwrite_it(command, tmp_path, name):
    status, _, err = command("sample", "--steps", 1, "--count", 1, "--out", tmp_path / name)
    assert status == 2
    assert "end it in .png" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["sample", "--out"], ["plan", "--save"], ["plan", "pick", "--out"]], ids=" ".join)
def test_a_folder_in_the_place_of_a_file_is_refused_before_work_starts(command, tmp_path, words):
    (tmp_path / "there.png").mkdir()
    status, _, err = command(*words, tmp_path / "there.png")
    assert status == 2
    assert "there.png" in err


def test_more_samples_than_fit_on_a_picture_are_all_written_down(command, tmp_path):
    status, out, _ = command("sample", "--steps", 1, "--count", cli.MOST_SHOWN + 1, "--out", tmp_path / "x.png")
    assert status == 0
    assert f"the first {cli.MOST_SHOWN} samples" in out
    assert len(np.load(tmp_path / "x.npz", allow_pickle=False)["images"]) == cli.MOST_SHOWN + 1


@pytest.mark.parametrize(
    ("words", "lacking", "said"),
    [
        (["demo"], ["accelerate", "matplotlib", "scikit-learn"], "pip install 'fastsample[train,bench,demo]'"),
        (["sample"], ["diffusers", "matplotlib"], "pip install 'fastsample[diffusers,bench]'"),
        (["plan"], ["diffusers"], "pip install 'fastsample[diffusers]'"),
        (["plan", "pick"], ["diffusers"], "pip install 'fastsample[diffusers]'"),
        (["tune"], ["diffusers"], "pip install 'fastsample[diffusers]'"),
        (["train", "digits"], ["scikit-learn"], "pip install 'fastsample[demo]'"),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else "",
)
def test_missing_packages_are_named_together_before_work_starts(command, tmp_path, monkeypatch, words, lacking, said):
    there = importlib.metadata.version

    def version(package):
        if package in lacking:
            raise importlib.metadata.PackageNotFoundError(package)
        return there(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.chdir(tmp_path)
    status, out, err = command(*words)
    assert status == 1
    assert ", ".join(lacking) in err
    assert said in err
    assert not out
    assert not list(tmp_path.iterdir())


def test_a_damaged_plan_exits_with_1_and_writes_nothing(command, tmp_path):
    command("plan", "--save", tmp_path / "p.json")
    text = (tmp_path / "p.json").read_text()
    (tmp_path / "p.json").write_text(text[: len(text) // 2])
    status, _, err = command("sample", "--plan", tmp_path / "p.json", "--out", tmp_path / "x.png")
    assert status == 1
    assert "p.json" in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("x.*"))


def test_a_plan_of_another_schedule_is_refused(command, tmp_path):
    fs.trace(solvers.ddim, fs.grid(fs.VP.cosine(), 4)).save(tmp_path / "p.json")
    status, _, err = command("sample", "--plan", tmp_path / "p.json", "--out", tmp_path / "x.png")
    assert status == 1
    assert "does not fit" in err


def test_a_model_that_is_not_there_exits_with_1(command):
    status, _, err = command("plan", "--model", "cats")
    assert status == 1
    assert "no model 'cats'" in err


@pytest.mark.parametrize("words", [["sample", "--out"], ["demo", "--quick", "--out"], ["tune", "--out"]], ids=" ".join)
def test_a_folder_that_cannot_be_written_fails_before_work_starts(command, tmp_path, words):
    (tmp_path / "file").write_text("in the way")
    status, _, err = command(*words, tmp_path / "file" / "below" / "x.png")
    assert status == 1
    assert "cannot write" in err


def test_ctrl_c_says_how_to_go_on(command, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", stopped)
    status, _, err = command("demo", "--out", tmp_path)
    assert status == 130
    assert "run again" in err


def test_doctor_lists_versions_and_remedies(command):
    status, out, _ = command("doctor")
    assert status == 0
    assert "torch" in out
    assert "digits network: whole" in out


def test_guiding_a_model_from_a_folder_needs_the_label_that_means_none(command, tmp_path):
    model = zoo.digits()
    words = ["sample", "--model", tmp_path / "model", "--steps", 2, "--count", 3, "--scale", 2.0]
    fs.save_pretrained(model, tmp_path / "model")  # it knows its own
    assert command(*words, "--out", tmp_path / "a.png")[0] == 0
    model.network.null = None
    fs.save_pretrained(model, tmp_path / "model")
    status, _, err = command(*words, "--out", tmp_path / "a.png")
    assert (status, "needs --null" in err) == (2, True)
    assert command(*words, "--null", 10, "--out", tmp_path / "a.png")[0] == 0
    command("sample", "--steps", 2, "--count", 3, "--scale", 2.0, "--out", tmp_path / "b.png")
    a, b = (np.load(tmp_path / name, allow_pickle=False)["images"] for name in ("a.npz", "b.npz"))
    np.testing.assert_array_equal(a, b)
