"""A sweep that is killed, at any moment, and run again: it gives what an undisturbed one gives, but for the times."""

import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsample import bench, files
from fastsample.bench import record as records_module
from fastsample.bench.neighbours import Neighbours
from fastsample.bench.quality import PIXELS
from fastsample.bench.record import read_influence

pytestmark = pytest.mark.usefixtures("quick")
N, BATCH, SHARD = 40, 8, 16
REFERENCE = bench.Reference.of(0.1 * torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)), PIXELS)


class Killed(BaseException):
    pass


def level(samples):
    return float(samples.abs().mean())


def measured(toys, out, network=lambda x, t: 0.5 * x, **changes):
    """A sweep with all that is kept between processes: shards, a truth, influence functions, rounds."""
    model = toys["toy"](network)
    cases = bench.Case.product(model={"m": model}, solver=[toys["heun"], toys["ancestral"]], steps=3)
    given = {"cases": cases, "shape": (1, 4, 4), "n": N, "batch": BATCH, "shard": SHARD, "out": out, "keep": 20}
    given |= {"quality": [bench.FrechetTo("fd", PIXELS, REFERENCE), Neighbours("near", PIXELS, REFERENCE), level]}
    given |= {"latency": bench.latency(rounds=2, warmup=0, batch=4), "progress": False}
    given |= {"converged": {"m": bench.Case("m", model, "ddim", toys["ddim"], 12)}}
    return bench.run(**{**given, **changes})


def findings(out):
    """All that a run wrote down of its cases but their times: records, samples, influence functions."""
    body, records = bench.read_run(out)
    assert body["finished"]
    kept = {record.name: bench.read_samples(out, record).tolist() for record in records if record.samples}
    moved = {
        record.name: {name: values.tolist() for name, values in read_influence(out, record).items()}
        for record in records
    }
    return [replace(record, timing=None) for record in records], kept, moved


def rounds_of(out):
    return {record.name: len(record.timing.steady.samples_s) for record in bench.read_run(out)[1] if record.timing}


def left_over(out):
    """What only a run that is under way needs."""
    return [path.name for path in Path(out).rglob("*") if "shard" in path.name or path.name.startswith(".")] + [
        path.name for path in (Path(out) / "samples").glob("converged*")
    ]


@pytest.fixture(scope="module")
def undisturbed(toys, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    measured(toys, out)
    torch.set_num_threads(threads)
    return findings(out)


def after_write(monkeypatch, k, error):
    """files.write raises once its k-th call is done; the list that is returned holds the paths written."""

    def write(path, fill):
        original(path, fill)
        written.append(Path(path))
        if len(written) == k:
            raise error

    original, written = files.write, []
    monkeypatch.setattr(files, "write", write)
    monkeypatch.setattr(records_module, "write", write)
    return written


def test_an_undisturbed_run_keeps_what_was_asked_for_and_leaves_nothing_over(toys, undisturbed, tmp_path):
    measured(toys, tmp_path / "out")
    assert findings(tmp_path / "out") == undisturbed
    assert left_over(tmp_path / "out") == []
    (floor, heun, noisy), kept, moved = undisturbed
    assert floor.kind == "floor"
    assert set(heun.scores) - set(noisy.scores) == {"endpoint_rms"}
    assert {"fd", "fd_converged", "near_recall", "level"} <= set(heun.scores)
    assert {len(values) for values in moved[heun.name].values()} == {N}
    assert {"fd", "fd_converged", "near_recall"} <= set(moved[heun.name])
    assert {name: len(samples) for name, samples in kept.items()} == {heun.name: 20, noisy.name: 20}


def test_stopped_after_any_of_its_writes_a_run_goes_on_to_the_same_records(toys, undisturbed, tmp_path, monkeypatch):
    k = 0
    while k := k + 1:
        out = tmp_path / str(k)
        with monkeypatch.context() as patch:
            written = after_write(patch, k, Killed)
            try:
                measured(toys, out)
            except Killed:
                bench.read_run(out)  # what is there can be read at any time
            else:
                break
        measured(toys, out)
        assert findings(out) == undisturbed, written[-1]
        assert left_over(out) == [], written[-1]
        assert set(rounds_of(out).values()) == {4}, written[-1]
    assert k > 25  # it was stopped at every file: run, floor, shards, samples, influence, scores, records, rounds


def killed(toys, out, log, at, changes):
    """The sweep in a process that kills itself within the network's evaluation number `at`; all are logged."""
    torch.set_num_threads(1)
    calls = []

    def network(x, t):
        calls.append(len(x))
        with open(log, "a") as file:
            file.write("x")
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return 0.5 * x

    measured(toys, out, network, **changes)


def in_a_process(toys, out, log, at, **changes):
    process = multiprocessing.get_context("fork").Process(target=killed, args=(toys, out, log, at, changes))
    process.start()
    process.join(60)
    return process.exitcode


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")
# Evaluations of the network by this sweep: the truth's 12 in 6 batches (of 8, 8 in each shard), then 5 and 3 for the
# solvers' cases; then the clock: first call, 2 rounds of 2, memory.
SAMPLING, SHARD_CALLS = (12 + 5 + 3) * 5, 12 * 2
CLOCK = (5 + 3) * (1 + 4 + 1)


@needs_fork
@pytest.mark.parametrize("seed", range(4))
def test_killed_twice_by_sigkill_a_run_goes_on_to_the_same_records(toys, undisturbed, tmp_path, seed):
    draw, out, log = random.Random(seed), tmp_path / "out", tmp_path / "log"
    first = draw.randrange(1, SAMPLING)
    assert in_a_process(toys, out, log, first) == -signal.SIGKILL
    left = SAMPLING - first
    second = draw.randrange(1, left + 1) if seed % 2 else left + draw.randrange(8, CLOCK)  # the latter on the clock
    assert in_a_process(toys, out, log, second) == -signal.SIGKILL
    assert in_a_process(toys, out, log, None) == 0
    assert findings(out) == undisturbed
    assert left_over(out) == []
    assert set(rounds_of(out).values()) == {4}


@needs_fork
@pytest.mark.parametrize("seed", range(4))
def test_a_killed_run_samples_at_most_one_shard_again(toys, tmp_path, seed):
    out, log, changes = tmp_path / "out", tmp_path / "log", {"latency": None}
    at = random.Random(seed).randrange(2, SAMPLING)
    assert in_a_process(toys, out, log, at, **changes) == -signal.SIGKILL
    assert in_a_process(toys, out, log, None, **changes) == 0
    assert SAMPLING <= len(log.read_text()) <= SAMPLING + SHARD_CALLS


def test_a_finished_run_that_is_run_again_calls_nothing_and_keeps_its_records(toys, tmp_path):
    def network(x, t):
        calls.append(1)
        return 0.5 * x

    calls, out = [], tmp_path / "out"
    first = measured(toys, out, network)
    body, count = bench.read_run(out)[0], len(calls)
    assert count == SAMPLING + CLOCK
    assert measured(toys, out, network) == first == bench.read_run(out)[1]
    assert len(calls) == count
    assert bench.read_run(out)[0] == body


DAMAGES = {
    "a shard": ("samples/*/shard-00000016.npz", 12),
    "the truth's shard": ("samples/converged-*/shard-00000000.npz", 8),
    "the scores": ("samples/*/scores.json", 13),
    "the kept samples": ("samples/*/samples.npz", 13),
    "the influence": ("samples/*/influence.npz", 13),
    "a record": ("cells/*.json", 15),
    "the floor": ("cells/floor.json", 9),
}


@pytest.mark.parametrize("what", DAMAGES)
@pytest.mark.parametrize("share", [0.0, 0.4, 0.97])
def test_a_damaged_file_is_never_taken_for_good(toys, undisturbed, tmp_path, monkeypatch, what, share):
    pattern, k = DAMAGES[what]
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        after_write(patch, k, Killed)
        with pytest.raises(Killed):
            measured(toys, out)
    found = list(out.glob(pattern))
    assert found
    for path in found:
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    measured(toys, out)
    assert findings(out) == undisturbed


def test_a_shard_of_the_right_size_with_one_wrong_byte_is_made_again(toys, undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        written = after_write(patch, 7, Killed)
        with pytest.raises(Killed):
            measured(toys, out)
    whole = bytearray(written[-1].read_bytes())
    assert written[-1].name.startswith("shard")
    whole[len(whole) // 2] ^= 1  # in an array's data, which has a checksum
    written[-1].write_bytes(whole)
    measured(toys, out)
    assert findings(out) == undisturbed


@pytest.mark.parametrize("name", ["round-000.json", "round-001.json", "started.json", "needs.json"])
def test_damaged_times_are_measured_again(toys, tmp_path, name):
    out = tmp_path / "out"
    measured(toys, out)
    path = out / "latency" / name
    path.write_text(path.read_text()[:20])
    measured(toys, out)
    body, records = bench.read_run(out)
    assert body["finished"]
    assert set(rounds_of(out).values()) == {4}
    assert all(record.timing.memory for record in records if record.kind == "case")


def test_a_damaged_run_json_is_refused_with_the_remedy_and_nothing_is_lost(toys, tmp_path):
    out = tmp_path / "out"
    measured(toys, out)
    path = out / "run.json"
    whole = path.read_text()
    path.write_text(whole[:-30])
    with pytest.raises(ValueError, match=r"run\.json is not a bench run.*damaged.*resume=False, which replaces it"):
        measured(toys, out)
    path.write_text(whole)
    assert len(bench.read_run(out)[1]) == 3


def test_a_case_that_failed_is_tried_again_and_the_others_are_not(toys, undisturbed, tmp_path):
    def network(x, t):
        calls.append(len(x))
        if broken and len(calls) > (12 + 5) * 5:  # after the truth and the first case
            raise RuntimeError("no power")
        return 0.5 * x

    out, calls, broken = tmp_path / "out", [], True
    with pytest.warns(UserWarning, match="1 of 2 cases failed"):
        _, good, bad = measured(toys, out, network, latency=None)
    assert good.error is None
    assert "RuntimeError: no power" in bad.error
    assert 'raise RuntimeError("no power")' in bad.traceback
    broken = False
    calls.clear()
    measured(toys, out, network, latency=None)
    assert len(calls) == (12 + 3) * 5  # the truth, whose shards were removed, and the case
    records, kept, moved = findings(out)
    assert (records, kept, moved) == undisturbed


@pytest.mark.parametrize("baseline", [None, "m/heun/3", "m/ancestral/3"])
@pytest.mark.parametrize("after", [0, 12, 26])
def test_a_case_that_failed_on_the_clock_makes_up_for_its_rounds(toys, tmp_path, baseline, after):
    """after: evaluations on the clock before it fails: in its first call, in the first round, in the second."""

    def network(x, t):
        nonlocal calls
        calls += clock and len(x) == 4
        if broken and calls > after:
            raise RuntimeError("no power")
        return 0.5 * x

    clock, broken, calls, out = True, True, 0, tmp_path / "out"
    how = bench.latency(rounds=2, warmup=0, batch=4, baseline=baseline)
    with pytest.warns(UserWarning, match="no power"):
        found = measured(toys, out, network, latency=how)
    failed = [record for record in found if record.error]
    assert failed
    for record in failed:
        assert record.error == f"{record.name}: RuntimeError: no power"
        assert record.scores
        assert record.timing is None
    broken = False
    _, *records = measured(toys, out, network, latency=how)
    for record in records:
        assert record.error is None
        assert len(record.timing.steady.samples_s) >= 4
        assert record.timing.baseline == baseline
        paired = baseline is not None and record.name != baseline
        assert (record.timing.ratio is not None and len(record.timing.ratio.ratios) >= 4) is paired


@pytest.mark.parametrize("baseline", [None, "good/ddim/2", "bad/ddim/2"])
def test_where_one_case_failed_on_the_clock_it_alone_makes_up_for_its_rounds(toys, tmp_path, baseline):
    def network(x, t):
        if broken and len(x) == 4:
            raise RuntimeError("no power")
        return 0.5 * x

    broken, out = True, tmp_path / "out"
    models = {"good": toys["toy"](), "bad": toys["toy"](network)}
    cases = bench.Case.product(model=models, solver=toys["ddim"], steps=2)
    changes = {"cases": cases, "converged": None, "latency": bench.latency(rounds=3, batch=4, baseline=baseline)}
    with pytest.warns(UserWarning, match="1 of 2 cases failed"):
        _, good, bad = measured(toys, out, **changes)
    assert (good.error, bad.timing) == (None, None)
    broken = False
    _, now, late = measured(toys, out, **changes)
    assert len(late.timing.steady.samples_s) == 6
    assert now.timing.steady.samples_s[:6] == good.timing.steady.samples_s  # the times it had are kept
    for record in (now, late):
        paired = baseline not in (None, record.name)
        assert (record.timing.ratio is not None and len(record.timing.ratio.ratios) == 6) is paired


def test_kept_samples_that_are_too_few_are_made_again(toys, undisturbed, tmp_path):
    out = tmp_path / "out"
    measured(toys, out)
    quality = bench.read_run(out)[1][1].quality
    records_module.write_samples(out, quality, torch.zeros(3, 1, 4, 4))
    measured(toys, out)
    assert findings(out) == undisturbed


def test_an_unfinished_run_can_be_reported(toys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        written = after_write(patch, 12, Killed)
        with pytest.raises(Killed):
            measured(toys, out)
    assert written[-1].parent.name == "cells"
    assert not bench.read_run(out)[0]["finished"]
    assert "heun" in bench.report(out).read_text(encoding="utf-8")


def test_what_a_killed_run_left_half_written_is_removed(toys, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        after_write(patch, 12, Killed)
        with pytest.raises(Killed):
            measured(toys, out)
    cell = next(path for path in (out / "samples").iterdir() if not path.name.startswith("converged"))
    for path in (
        cell / ".shard-00000016.npz.abcd.npz",
        out / "cells" / ".floor.json.abcd.json",
        out / ".run.json.a.json",
    ):
        path.write_bytes(b"half")
    (out / ".mine").write_text("the user's own")
    measured(toys, out)
    assert left_over(out) == [".mine"]


SCRIPT = """
import sys, time, torch
import fastsample as fs
from fastsample import bench, solvers, zoo
from fastsample.zoo.data import digits

torch.set_num_threads(1)
model = zoo.digits()
bench.run(
    bench.Case.product(model={"digits": model}, solver=[solvers.ddim, solvers.dpmpp_2m], steps=[2, 4]),
    shape=(1, 8, 8), n=200, batch=50, shard=50, out=sys.argv[1],
    quality=[bench.fd_digits(digits("all")[0]), bench.fd_pixels(digits("all")[0])],
    latency=bench.latency(rounds=8, batch=10),
    converged={"digits": bench.Case("digits", model, "dpmpp_2m", solvers.dpmpp_2m, 30)},
    condition=lambda i: {"class_labels": i % 10}, progress=False,
)
"""


@pytest.mark.slow
def test_the_sweep_of_digits_killed_from_outside_equals_the_undisturbed_one(tmp_path):
    pytest.importorskip("diffusers")
    script, draw = tmp_path / "sweep.py", random.Random(0)
    script.write_text(SCRIPT)

    def begin(out):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, str(script), str(out)], cwd=tmp_path, env=environment)

    def killed_at(pattern, count):
        """Once so many files are there, or some moments later."""
        process = begin(tmp_path / "killed")
        while process.poll() is None and len(list((tmp_path / "killed").glob(pattern))) < count:
            time.sleep(0.005)
        try:
            process.wait(timeout=draw.random() / 10)
        except subprocess.TimeoutExpired:
            process.kill()
        assert process.wait() == -signal.SIGKILL

    assert begin(tmp_path / "whole").wait() == 0
    killed_at("samples/*/s*", draw.randrange(1, 12))
    killed_at("latency/round-*", draw.randrange(1, 5))
    assert begin(tmp_path / "killed").wait() == 0
    assert findings(tmp_path / "killed") == findings(tmp_path / "whole")
    assert set(rounds_of(tmp_path / "killed").values()) == {16}
    assert len(bench.read_run(tmp_path / "killed")[0]["environments"]) == 3
