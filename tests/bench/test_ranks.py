"""Several processes of one sweep: bit for bit what one process gives, and an end, never a wait, where one fails."""

import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastsample import bench
from fastsample.bench.quality import PIXELS
from fastsample.bench.ranks import Ranks, ranks
from fastsample.bench.record import read_influence

N = 37  # which neither 2, 3, the batch nor the shard divides
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked")


def measured(toys, out, network=lambda x, t: 0.5 * x, **changes):
    model = toys["toy"](network)
    cases = bench.Case.product(model={"m": model}, solver=[toys["heun"], toys["ancestral"]], steps=3)
    reference = bench.Reference.of(0.1 * torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0)), PIXELS)
    given = {"cases": cases, "shape": (1, 4, 4), "n": N, "batch": 4, "shard": 10, "out": out, "keep": 15}
    given |= {"quality": [bench.fd_pixels(reference)], "progress": False}
    given |= {"converged": {"m": bench.Case("m", model, "ddim", toys["ddim"], 6)}}
    return bench.run(**{**given, **changes})


def findings(out):
    body, records = bench.read_run(out)
    kept = {record.name: bench.read_samples(out, record).tolist() for record in records if record.samples}
    moved = {r.name: {name: values.tolist() for name, values in read_influence(out, r).items()} for r in records}
    return body["finished"], [replace(record, timing=None) for record in records], kept, moved


def process(work, rank, world, port, place):
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        told = work(rank)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    (place / f"told-{rank}").write_text(str(told))


def together(work, place, world=2, seconds=60):
    """What work(rank) returns or raises in each process, as text; None of one that ended without a word."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    started = [fork.Process(target=process, args=(work, rank, world, port, place)) for rank in range(world)]
    for one in started:
        one.start()
    for one in started:
        one.join(seconds)
    hanging = [one for one in started if one.is_alive()]
    for one in hanging:
        one.kill()
    assert not hanging, "a process waits for ever"
    return [told.read_text() if (told := place / f"told-{rank}").exists() else None for rank in range(world)]


@pytest.mark.parametrize("world", [2, 3])
def test_two_processes_give_bit_for_bit_what_one_gives(toys, tmp_path, world):
    log = tmp_path / "log"

    def network(x, t):
        with log.open("a") as file:
            file.write(f"{os.environ['RANK']} {len(x)}\n")
        return 0.5 * x

    def work(rank):
        found = measured(toys, tmp_path / "many", network, latency=bench.latency(rounds=1, warmup=0, batch=2))
        return [record.name for record in found]

    first, *others = together(work, tmp_path, world)
    assert others == ["[]"] * (world - 1)
    assert "m/heun/3" in first
    measured(toys, tmp_path / "one", latency=bench.latency(rounds=1, warmup=0, batch=2))
    assert findings(tmp_path / "many") == findings(tmp_path / "one")
    assert findings(tmp_path / "one")[0] is True
    rows = [line.split() for line in log.read_text().splitlines()]
    assert {rank for rank, _ in rows} == set(map(str, range(world)))  # all worked
    clock = (5 + 3) * (1 + 2 + 1) * 2  # first call, one round, memory, of 2 samples: in the first process alone
    assert sum(int(size) for _, size in rows) == N * (6 + 5 + 3) + clock  # no sample twice, none as padding


def test_a_case_that_fails_in_one_process_fails_by_name_and_the_others_go_on(toys, tmp_path):
    def broken(x, t):
        if os.environ["RANK"] == "1":
            raise RuntimeError("no power")
        return 0.5 * x

    def work(rank):
        models = {"bad": toys["toy"](broken), "good": toys["toy"]()}
        cases = bench.Case.product(model=models, solver=toys["heun"], steps=2)
        found = measured(toys, tmp_path / "out", cases=cases, converged=None)
        return [(record.name, record.error) for record in found]

    first, second = together(work, tmp_path)
    assert "('bad/heun/2', 'bad/heun/2: RuntimeError: process 1 failed: RuntimeError: no power')" in first
    assert "('good/heun/2', None)" in first
    assert second == "[]"


def test_a_folder_that_one_process_cannot_write_stops_all_of_them(toys, tmp_path, monkeypatch):
    from fastsample.bench import record as records

    def full(path, fill):
        if os.environ["RANK"] == "1" and "shard" in Path(path).name:
            raise OSError(28, "No space left on device")
        original(path, fill)

    original = records.write
    monkeypatch.setattr(records, "write", full)
    told = together(lambda rank: measured(toys, tmp_path / "out", converged=None), tmp_path)
    for one in told:
        assert one.startswith("Unwritable")
        assert "the results of m/heun/3 cannot be written" in one
    assert "process 1" in told[0]
    monkeypatch.undo()
    measured(toys, tmp_path / "out", converged=None)
    assert findings(tmp_path / "out")[0]


@pytest.mark.parametrize("dies", [0, 1])
def test_where_one_process_dies_the_others_end_and_say_so(toys, tmp_path, dies):
    def network(x, t):
        calls.append(1)
        if os.environ.get("RANK") == str(dies) and len(calls) == 9:
            os._exit(9)
        return 0.5 * x

    calls = []
    told = together(lambda rank: measured(toys, tmp_path / "out", network), tmp_path)
    assert told[dies] is None
    assert told[1 - dies].startswith("Lost: ")
    assert "start all of them again" in told[1 - dies]
    measured(toys, tmp_path / "out", network)
    measured(toys, tmp_path / "one", network)
    assert findings(tmp_path / "out") == findings(tmp_path / "one")


def test_a_measure_that_fails_in_the_first_process_ends_no_other(toys, tmp_path):
    def work(rank):
        def odd(samples):
            raise ValueError("odd")

        return [record.error for record in measured(toys, tmp_path / "out", quality=odd, converged=None)]

    first, second = together(work, tmp_path)
    assert first == "['m/heun/3: ValueError: odd', 'm/ancestral/3: ValueError: odd']"
    assert second == "[]"


def test_processes_that_disagree_are_told_so(toys, tmp_path):
    told = together(lambda rank: measured(toys, tmp_path / "out", n=N + rank), tmp_path)
    assert (
        told
        == ["RuntimeError: the processes do not agree on what to run; give all of them the same cases and settings"] * 2
    )
    assert not (tmp_path / "out").exists()


def test_processes_that_do_not_share_the_folder_are_told_so(toys, tmp_path):
    told = together(lambda rank: measured(toys, tmp_path / str(rank)), tmp_path)
    for one in told:
        assert one.startswith("RuntimeError: process 1 does not see")
        assert "put it on a disk that all of them share" in one


def test_a_folder_that_cannot_be_made_is_an_error_in_all(toys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    first, second = together(lambda rank: measured(toys, tmp_path / "file" / "out"), tmp_path)
    assert first.startswith("OSError: cannot write into")
    assert "process 0 failed: cannot write into" in second


def test_a_group_that_is_there_is_joined_and_left_as_it_is(tmp_path):
    def work(rank):
        torch.distributed.init_process_group("gloo")
        with ranks() as processes:
            told = processes.all(rank * 10)
        total = torch.ones(1)
        torch.distributed.all_reduce(total)
        torch.distributed.destroy_process_group()
        return told, total.item()

    assert together(work, tmp_path) == ["([0, 10], 2.0)"] * 2


def test_every_index_is_counted_once(tmp_path):
    def work(rank):
        with ranks() as processes:
            processes.once(5, [range(3) if rank == 0 else range(3, 5)])
            processes.once(5, [range(3) if rank == 0 else range(2, 4)])

    reason = "RuntimeError: 2 of 5 samples were not made exactly once over 2 processes, such as index 2 (2 times)"
    assert all(told.startswith(reason) for told in together(work, tmp_path))
    Ranks().once(4, [range(4)])
    with pytest.raises(RuntimeError, match=r"1 of 4 samples were not .* such as index 3 \(0 times\)"):
        Ranks().once(4, [range(3)])


SCRIPT = """
import sys, torch
from accelerate import Accelerator
import fastsample as fs
from fastsample import bench

torch.set_num_threads(1)
accelerator = Accelerator(cpu=True)

def ddim(model, x, grid):
    for s, t in grid.steps():
        x = fs.exponential_step(x, model.predict(x, s), s, t)
    return x

model = fs.Denoiser(lambda x, t: 0.5 * x, fs.EDM(sigma_max=3.0), "x0")
reference = 0.1 * torch.randn(60, 1, 4, 4, generator=torch.Generator().manual_seed(0))
records = bench.run(bench.Case.product(model={"m": model}, solver=ddim, steps=[2, 3]), shape=(1, 4, 4), n=37, batch=4,
                    shard=10, quality=bench.fd_pixels(reference), out=sys.argv[1], progress=False)
assert bool(records) == accelerator.is_main_process
"""


@pytest.mark.slow
def test_under_accelerate_launch_the_statistics_are_those_of_one_process(tmp_path):
    pytest.importorskip("accelerate")
    script, environment = tmp_path / "sweep.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    script.write_text(SCRIPT)
    launch = [
        shutil.which("accelerate", path=str(Path(sys.executable).parent)),
        "launch",
        "--num_processes",
        "2",
        "--cpu",
    ]
    subprocess.run(
        [*launch, str(script), str(tmp_path / "many")], check=True, cwd=tmp_path, env=environment, timeout=300
    )
    subprocess.run(
        [sys.executable, str(script), str(tmp_path / "one")], check=True, cwd=tmp_path, env=environment, timeout=300
    )
    assert findings(tmp_path / "many") == findings(tmp_path / "one")
