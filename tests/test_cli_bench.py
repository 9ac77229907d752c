"""`fastsample bench` as a user types it: what it prints, what it writes, and its exit status."""

import csv
import json
import os
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import bench, cli, cli_bench, distill, zoo
from fastsample.bench import weights

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
SCRIPT = Path(sysconfig.get_path("scripts")) / "fastsample"
SMALL = """
n = 12
out = "run"
batch = 6
shard = 6
threads = 1
[model.teacher]
from = "digits"
[cases]
solver = ["ddim", "dpmpp_2m"]
steps = [1, 2]
[quality.fd_pixels]
reference = "real.npz"
"""


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run `fastsample bench ...` in this process and in tmp_path; returns (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    real = torch.randn(90, 1, 8, 8, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    np.savez("real.npz", images=real.numpy())

    def run(*words: object):
        monkeypatch.setattr(sys, "argv", ["fastsample", "bench", *map(str, words)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = stop.code or 0
        out = capsys.readouterr()
        return status, out.out, out.err

    return run


@pytest.fixture
def small(tmp_path):
    """Write SMALL, changed, as sweep.toml."""

    def write(text=SMALL, **changes):
        for old, new in changes.items():
            text = text.replace(old, new)
        (tmp_path / "sweep.toml").write_text(text)
        return tmp_path / "sweep.toml"

    return write


def scores(folder, measure="fd_pixels"):
    _, records = bench.read_run(folder)
    return {record.name: record.scores[measure].value for record in records if record.kind == "case"}


def test_a_sweep_measures_its_cases_and_ends_with_a_page(command, small):
    status, out, err = command("run", small())
    assert status == 0, err
    assert "4 cases, 0 failed" in out
    assert out.rstrip().endswith(f"Open {Path('run/index.html').resolve()}")
    body, records = bench.read_run("run")
    assert [record.name for record in records if record.kind == "case"] == [
        f"teacher/{solver}/{steps}" for solver in ("ddim", "dpmpp_2m") for steps in (1, 2)
    ]
    assert body["finished"]
    rows = list(csv.DictReader(Path("run/report.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == len(records)
    for record in records:
        assert record.name in out


def test_the_numbers_are_those_of_the_same_run_in_python(command, small):
    from fastsample import solvers

    assert command("run", small(), "--no-report")[0] == 0
    real = torch.from_numpy(np.load("real.npz")["images"])
    cases = bench.Case.product(model={"teacher": zoo.digits()}, solver=[solvers.ddim, solvers.dpmpp_2m], steps=[1, 2])
    records = bench.run(
        cases, shape=(1, 8, 8), n=12, batch=6, shard=6, quality=bench.fd_pixels(real), out="python", floor=False,
        condition=lambda i: {"class_labels": i % 10}, progress=False,
    )  # fmt: skip
    assert scores("run") == pytest.approx({one.name: one.scores["fd_pixels"].value for one in records}, rel=1e-9)


def test_a_run_goes_on_where_it_was_and_replace_begins_anew(command, small, tmp_path):
    assert command("run", small(), "--no-report")[0] == 0
    written = {path: path.stat().st_mtime_ns for path in Path("run/samples").rglob("scores.json")}
    assert len(written) == 4
    before = scores("run")
    assert command("run", tmp_path / "sweep.toml", "--no-report")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert command("run", tmp_path / "sweep.toml", "--replace", "--no-report")[0] == 0
    assert all(path.stat().st_mtime_ns != when for path, when in written.items())
    assert scores("run") == before


def test_another_sweep_does_not_go_into_the_folder_of_the_first(command, small):
    assert command("run", small(), "--no-report")[0] == 0
    status, _, err = command("run", small(**{"n = 12": "n = 13"}))
    assert status == 1
    assert "run holds another run (its n differ)" in err
    assert command("run", small(**{"n = 12": "n = 13"}), "--replace", "--no-report")[0] == 0


def test_listing_prints_the_cases_and_writes_nothing(command, small, tmp_path):
    before = sorted(tmp_path.iterdir())
    path = small(**{"[cases]": "[cases]\nspacing = 'karras'"})
    status, out, _ = command("run", path, "--list")
    assert status == 0
    assert out.splitlines()[-1] == "teacher/dpmpp_2m/2/karras  NFE 2"
    assert sorted(tmp_path.iterdir()) == sorted([*before, path])


def test_a_failed_case_is_named_and_the_others_are_measured(command, small):
    """A solver that does not know its option stands for any failure."""
    extra = '[[include]]\nsolver = "ddim"\nsteps = 3\noptions = { nonsense = 1 }\n'
    status, out, err = command("run", small(SMALL + extra), "--no-report")
    assert status == 1
    assert "5 cases, 1 failed" in out
    assert "failed: teacher/ddim/3/nonsense=1: TypeError" in err
    assert "Traceback" not in err
    assert "UserWarning" not in err
    failed = [record for record in bench.read_run("run")[1] if record.error]
    assert len(failed) == 1
    assert len(failed[0].traceback.splitlines()) > 3


@pytest.mark.parametrize(
    ("changes", "words", "said"),
    [
        ({"solver": "solvr"}, [], "unknown key 'solvr' in [cases]; did you mean 'solver'"),
        ({"ddim": "dim"}, [], "'dim'; did you mean 'ddim'"),
        ({"n = 12": "n = 0"}, [], "at least 1, got 0"),
        ({"[quality": "[[exclude]]\nsteps = 3\n[quality"}, [], "removes no case"),
        ({'out = "run"': ""}, [], "give --out"),
        ({}, ["--device", "gpu"], "no device 'gpu'"),
    ],
)
def test_a_file_that_cannot_be_meant_exits_with_2(command, small, changes, words, said):
    status, _, err = command("run", small(**changes), *words)
    assert status == 2
    assert said in " ".join(err.split())
    assert not Path("run").exists()


def test_a_file_that_is_not_there_exits_with_2(command):
    status, _, err = command("run", "nowhere.toml")
    assert (status, "nowhere.toml" in err) == (2, True)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({'from = "digits"': 'from = "cats"'}, "no model 'cats'"),
        ({"real.npz": "fake.npz"}, "no reference fake.npz"),
        (
            {"[cases]": "guidance = 2\nnull = 11\n[cases]"},
            "null of teacher must be one of its 11 labels, counted from 0, got 11",
        ),
        ({"threads = 1": "labels = [3, 12]"}, "labels has 12, which the model does not know"),
        ({"[model.teacher]": 'device = "cuda:9"\n[model.teacher]'}, "device cuda:9"),
    ],
)
def test_what_is_missing_is_told_in_one_line_before_work_starts(command, small, changes, said):
    if "cuda" in said and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    status, _, err = command("run", small(**changes))
    assert status == 1
    assert err.startswith("error: ")
    assert said in err
    assert err.count("\n") == 1
    assert not Path("run").exists()


def test_missing_weights_of_inception_stop_the_run_before_it_samples(command, small, monkeypatch):
    monkeypatch.setenv("FASTSAMPLE_INCEPTION", "nowhere.pth")
    status, _, err = command("run", small(SMALL + '[quality.fid]\nreference = "real.npz"\n'))
    assert status == 1
    for part in ("nowhere.pth", "https://github.com/mseitzer/pytorch-fid/", "6726825d0af5f729", "--allow-download"):
        assert part in err
    assert not Path("run").exists()


def test_guidance_needs_no_more_than_its_scale_and_counts_its_rows(command, small):
    changes = {"[cases]": "[cases]\nguidance = [1, 3]", "[1, 2]": "2", '"ddim", ': ""}
    status, out, err = command("run", small(**changes), "--no-report")
    assert status == 0, err
    assert out.rstrip().endswith("fastsample bench report run")
    _, records = bench.read_run("run")
    rows = {record.settings["guidance"]: record.rows for record in records if record.kind == "case"}
    assert rows == {"1": 2.0, "3": 4.0}
    found = scores("run")
    assert found["teacher/dpmpp_2m/2/guidance=1"] != found["teacher/dpmpp_2m/2/guidance=3"]


def test_labels_choose_the_classes_that_take_turns(command, small):
    assert command("run", small(**{"threads = 1": "labels = [7]"}), "--no-report")[0] == 0
    record = bench.read_run("run")[1][-1]
    kept = bench.read_samples("run", record)
    plan = fs.trace(*(lambda model: (cli.solvers.dpmpp_2m, fs.grid(model.schedule, 2)))(zoo.digits()))
    same = fs.sample(
        zoo.digits(), plan, fs.noise((1, 8, 8), range(12)), condition={"class_labels": torch.full((12,), 7)}
    )
    torch.testing.assert_close(kept, same, rtol=0, atol=1e-5)  # convolutions round differently in other batch sizes


def test_a_student_is_distilled_once_and_then_loaded(command, small, monkeypatch):
    made = []

    def distilled(teacher, out, *, updates):
        made.append(updates)
        fs.save_pretrained(teacher, Path(out) / "model")

    monkeypatch.setattr(distill, "distill_digits", distilled)
    text = SMALL + '[model.student]\nfrom = "student"\nteacher = "teacher"\nupdates = 0.01\n'
    status, out, _ = command("run", small(text), "--list")
    assert (status, "student/ddim/2  NFE 2" in out, made) == (0, True, [])
    status, out, _ = command("run", small(text), "--no-report")
    assert (status, made) == (0, [0.01])
    assert "distilling the student into student" in out
    assert command("run", small(text), "--no-report")[0] == 0
    assert made == [0.01]
    found = scores("run")
    assert found["student/ddim/2"] == found["teacher/ddim/2"]  # this student is its teacher


def test_pixels_of_another_shape_than_the_references_are_refused_before_sampling(command, small):
    np.savez("coloured.npz", images=np.zeros((30, 12, 20, 3), np.uint8))
    status, _, err = command("run", small(**{"real.npz": "coloured.npz"}))
    assert (status, Path("run/run.json").exists()) == (1, False)
    assert "makes 64 features of 1 x 8 x 8, and its reference has 720; give real images of that shape" in err


def test_a_sweep_in_which_every_case_fails_at_its_plan_has_a_page(command, small):
    status, out, err = command("run", small(steps="options = { order = 9 }\nsteps"))
    assert (status, "4 cases, 4 failed" in out, "index.html" in out) == (1, True, True)
    assert "failed: teacher/ddim/1/order=9: " in err


def test_loading_is_a_phase_of_its_own(command, small):
    assert command("run", small(SMALL + "[latency]\nrounds = 2\nbatch = 2\n"), "--no-report")[0] == 0
    for record in bench.read_run("run")[1]:
        if record.kind == "case":
            assert record.timing.load_s > 0
            assert record.timing.batch == 2
            assert len(record.timing.steady.samples_s) == 4


@pytest.fixture
def two(command, small):
    """Two runs of one sweep."""
    for name in ("a", "b"):
        assert command("run", small(), "--out", name, "--no-report")[0] == 0
    return command


def shifted(folder, by):
    """The run with every score worse by so much: as if its samples were."""
    for path in Path(folder, "cells").glob("*.json"):
        body = json.loads(path.read_text())
        if body["record"]["kind"] == "case":
            score = body["record"]["scores"]["fd_pixels"]
            score["value"] += by
            assert score["debiased"] is None  # of so few samples there is none
            path.write_text(json.dumps(body))


def test_a_run_compared_with_itself_is_unchanged_and_passes_the_gate(two):
    status, out, _ = two("compare", "a", "b", "--gate", "--json", "c.json")
    assert status == 0
    assert "4 unchanged" in out
    assert json.loads(Path("c.json").read_text())["failed"] == []


def test_the_gate_stops_for_a_regression_and_only_the_gate(two):
    shifted("b", 500.0)
    status, out, _ = two("compare", "a", "b")
    assert status == 0
    assert "FAILED" in out
    status, out, _ = two("compare", "a", "b", "--gate", "--markdown", "--json", "c.json")
    assert status == 1
    assert out.count("| regressed |") == 4
    assert len(json.loads(Path("c.json").read_text())["failed"]) == 4
    assert two("compare", "b", "a", "--gate")[0] == 0  # an improvement


def test_a_window_stops_a_sudden_improvement_too(two):
    shifted("b", -500.0)
    assert two("compare", "a", "b", "--gate")[0] == 0
    assert two("compare", "a", "b", "--gate", "--window", "fd_pixels=0:100000")[0] == 1
    inside = "fd_pixels@teacher/ddim/2=-1e6:1e6"
    status, out, _ = two("compare", "a", "b", "--gate", "--window", inside)
    assert (status, out.count("(window)")) == (0, 1)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--window", "fid"], "MEASURE=LOW:HIGH"),
        (["--window", "fid=3"], "MEASURE=LOW:HIGH"),
        (["--window", "fid=a:b"], "MEASURE=LOW:HIGH"),
        (["--window", "fid@=1:2"], "MEASURE=LOW:HIGH"),
        (["--window", "x=1:2", "--window", "x=2:3"], "same name twice"),
        (["--tolerance", "some"], "NAME=NUMBER"),
        (["--tolerance", "0.1", "--tolerance", "fid=0.2"], "one number for all"),
    ],
)
def test_bounds_that_cannot_be_read_exit_with_2(command, words, said):
    status, _, err = command("compare", "a", "b", *words)
    assert status == 2
    assert said in " ".join(err.split())


@pytest.mark.parametrize(
    ("words", "given"),
    [(["0.2"], 0.2), (["latency=0.05", "fid=0.01"], {"latency": 0.05, "fid": 0.01})],
)
def test_a_tolerance_is_of_all_or_by_name(words, given):
    assert cli_bench._tolerance(words) == given


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["compare", "nowhere", "b"], "nowhere holds no run.json"),
        (["report", "nowhere"], "nowhere holds no run.json"),
        (["import", "real.npz", "--out", "x"], "is no JSON"),
    ],
)
def test_what_cannot_be_read_is_told_in_one_line(command, words, said):
    status, _, err = command(*words)
    assert status == 1
    assert said in err
    assert "Traceback" not in err


def test_a_report_is_written_anew_with_its_title(command, small):
    assert command("run", small(), "--no-report")[0] == 0
    assert not Path("run/index.html").exists()
    status, out, _ = command("report", "run", "--title", "Tiny digits", "--measure", "fd_pixels")
    assert status == 0
    assert "Tiny digits" in Path("run/index.html").read_text()
    assert str(Path("run/index.html").resolve()) in out
    status, _, err = command("report", "run", "--measure", "fid")
    assert (status, "no measure 'fid'" in err) == (1, True)


def test_statistics_of_images_are_a_reference_of_a_sweep(command, small):
    status, out, _ = command("stats", "real.npz", "--extractor", "pixels", "--out", "stats.npz")
    assert status == 0
    assert "90 images, 64 features of pixels: stats.npz" in out
    assert command("run", small(), "--no-report", "--out", "images")[0] == 0
    assert command("run", small(**{"real.npz": "stats.npz"}), "--no-report", "--out", "stats")[0] == 0
    assert scores("stats") == pytest.approx(scores("images"), rel=1e-9)


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["real.npz", "--extractor", "dino"], 2, "choose one of digits, pixels, inception"),
        (["real.npz", "--extractor", "pixels", "--out", "x.pkl"], 2, "end it in .npz"),
        (["nowhere", "--extractor", "pixels"], 2, "nowhere"),
        (["real.npz", "--extractor", "pixels", "--channels", 2], 1, "channels must be 1, 3 or None"),
    ],
)
def test_statistics_that_cannot_be_made_are_told(command, words, status, said):
    found, _, err = command("stats", *words)
    assert found == status
    assert said in " ".join(err.split())
    assert not list(Path().glob("x*"))


def test_pytests_benchmarks_become_a_run_that_can_be_compared(command):
    one = {"fullname": "t.py::test_speed", "name": "test_speed", "stats": {"data": [0.1, 0.11, 0.1, 0.12, 0.1, 0.1]}}
    Path("b.json").write_text(json.dumps({"benchmarks": [one], "machine_info": {}, "commit_info": {}}))
    status, out, _ = command("import", "b.json", "--out", "imported")
    assert status == 0
    assert "1 benchmarks: imported" in out
    assert [record.name for record in bench.read_run("imported")[1]] == ["t.py::test_speed"]


@pytest.mark.parametrize("there", [True, False])
def test_doctor_says_where_the_weights_of_inception_are_or_how_to_get_them(there, monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "cache_folder", lambda: tmp_path)
    monkeypatch.delenv("FASTSAMPLE_INCEPTION", raising=False)
    if there:
        monkeypatch.setattr(weights.Weights, "find", lambda self: tmp_path / self.file)
    said = cli_bench.inception()
    assert ("whole, " in said) == there
    assert "\n" not in said
    assert "pt_inception-2015-12-05-6726825d.pth" in said
    assert ("https://" in said) != there


def test_every_process_takes_the_gpu_that_its_launcher_gave_it_under_one_name(monkeypatch):
    taken = []
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    assert (cli_bench._device("cuda"), cli_bench._device("cuda:1"), cli_bench._device("cpu")) == (
        "cuda", "cuda:1", "cpu",
    )  # fmt: skip
    assert taken == [3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_fault_in_the_file_is_told_by_one_process(command, small, monkeypatch, rank):
    monkeypatch.setenv("RANK", str(rank))
    status, out, err = command("run", small(solver="solvr"))
    assert (status, out, bool(err)) == (2, "", rank == 0)


@pytest.mark.slow
def test_of_several_processes_the_first_alone_speaks(small, command, tmp_path):
    """Two gloo processes, as torchrun starts them; the scores are those of one."""
    path = small()
    assert command("run", path, "--out", "alone", "--no-report")[0] == 0
    base = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        base["MASTER_PORT"] = str(free.getsockname()[1])
    processes = [
        subprocess.Popen(
            [SCRIPT, "bench", "run", path, "--out", "together", "--no-report"],
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    (first, said), (second, silent) = (process.communicate(timeout=120) for process in processes)
    assert [process.returncode for process in processes] == [0, 0], said + silent
    assert "4 cases, 0 failed" in first
    assert second == ""
    assert scores(tmp_path / "together") == scores("alone")


@pytest.mark.slow
def test_a_sweep_that_was_killed_twice_reports_what_one_in_peace_reports(command, small, tmp_path):
    """By SIGKILL, as soon as a shard, then as soon as a cell, has been written."""
    path = small(
        **{"n = 12": "n = 96", "[1, 2]": "[2, 8]", "[quality": "[converged]\nsolver='ddim'\nsteps=20\n[quality"}
    )
    assert command("run", path, "--out", "peace")[0] == 0

    def killed_once(pattern, more_than):
        words = [SCRIPT, "bench", "run", path, "--out", "killed"]
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        while process.poll() is None and len(list(tmp_path.glob(pattern))) <= more_than:
            time.sleep(0.01)
        process.kill()
        process.communicate()
        assert process.returncode == -9, "it was done before it was killed"

    killed_once("killed/samples/*/shard-*.npz", 2)
    cells = len(list(tmp_path.glob("killed/samples/*/scores.json")))
    killed_once("killed/samples/*/scores.json", cells)
    done = {path: path.stat().st_mtime_ns for path in Path("killed/samples").glob("*/scores.json")}
    assert 0 < len(done) < 4
    assert command("run", path, "--out", "killed")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    for name in ("report.md", "report.csv"):
        assert Path("killed", name).read_text() == Path("peace", name).read_text()


@pytest.mark.slow
def test_the_digits_sweep_of_the_examples_takes_less_than_five_minutes(tmp_path):
    """4 solvers x 5 numbers of evaluations x teacher and student, the distilling included.

    Of processor time, on one thread: on an idle machine that is what passes.
    """
    pytest.importorskip("sklearn")
    pytest.importorskip("accelerate")
    import resource

    def spent():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    before = spent()
    words = [SCRIPT, "bench", "run", ROOT / "examples" / "sweep.toml"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "40 cases, 0 failed" in done.stdout
    _, records = bench.read_run(tmp_path / "runs" / "digits-sweep")
    cases = [record for record in records if record.kind == "case"]
    assert len(cases) == 40
    assert {(record.model, record.nfe) for record in cases} == {
        (model, nfe) for model in ("teacher", "student") for nfe in (1, 2, 4, 8, 16)
    }
    assert all({"fd_digits", "fd_pixels", "endpoint_rms"} <= record.scores.keys() for record in cases)
    assert all(record.timing for record in cases)
    assert (tmp_path / "runs" / "digits-sweep" / "index.html").stat().st_size > 100_000
    assert spent() - before < 300
