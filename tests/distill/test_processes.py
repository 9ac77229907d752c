"""Several processes: the same losses and weights as one with the whole batch, and checkpoints that any number reads."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("accelerate")
HERE = Path(__file__).parent
FSDP = (
    "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "SIZE_BASED_WRAP",
    "--fsdp_min_num_params", "1000", "--fsdp_cpu_ram_efficient_loading", "false",
)  # fmt: skip
QUICK = ("ddp", "distribution_adversarial")  # two roles, a head, several turns
METHODS = ("diffusion_importance", "conversion", "consistency", "progressive", "distribution_adversarial")


def launched(out, method, *kind, steps=12, precise=1):
    """Two processes on this machine, by gloo, as `accelerate launch` starts them; alone where no kind is given."""
    return started([str(HERE / "launched.py"), str(out), method, str(steps), "5", str(precise)], *kind, at=out.parent)


def started(script, *kind, at, fails=False):
    options = ["--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch = ["-m", "accelerate.commands.launch", *kind, *options, "--main_process_port", "0"]
    done = subprocess.run(
        [sys.executable, *(launch if kind else ()), *script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=at,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert (done.returncode != 0) == fails, done.stderr[-3000:]
    return done.stderr


def losses(out):
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"][key] for line in lines for key in sorted(line["loss"])], dtype=torch.float64)


def equal(one, other, tolerance):
    torch.testing.assert_close(losses(one), losses(other), rtol=tolerance, atol=tolerance)
    states = [load_file(out / "step-000012" / "state.safetensors") for out in (one, other)]
    assert any(".average.0.99." in key for key in states[0])
    torch.testing.assert_close(*states, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        *(load_file(out / "weights-0.safetensors") for out in (one, other)), rtol=0, atol=tolerance
    )


KINDS = {"ddp": ("--multi_gpu",), "fsdp": FSDP}
CASES = [
    pytest.param(kind, method, id=f"{name}-{method}", marks=[] if (name, method) == QUICK else pytest.mark.slow)
    for name, kind in KINDS.items()
    for method in METHODS
]


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_two_processes_do_what_one_does_with_the_whole_batch(kind, method, tmp_path):
    launched(tmp_path / "one", method)
    launched(tmp_path / "two", method, *kind)
    # in float64 only the order of sums differs; a discriminator's head reads float32
    equal(tmp_path / "one", tmp_path / "two", 1e-6 if method == "distribution_adversarial" else 1e-8)
    for name in ("weights-1.safetensors", "weights-0.safetensors"):
        both = load_file(tmp_path / "two" / name), load_file(tmp_path / "two" / "weights-0.safetensors")
        torch.testing.assert_close(*both, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_run_of_two_processes_goes_on_in_one_and_the_other_way_round(kind, tmp_path):
    launched(tmp_path / "one", "consistency")
    for name in ("two", "back"):
        shutil.copytree(tmp_path / "one", tmp_path / name)
    shutil.rmtree(tmp_path / "two" / "step-000012")
    told = launched(tmp_path / "two", "consistency", *kind)
    assert 'processes was "1", now "2"' in told
    equal(tmp_path / "one", tmp_path / "two", 1e-8)

    for name in ("step-000010", "step-000012"):
        shutil.rmtree(tmp_path / "back" / name)
    shutil.rmtree(tmp_path / "two")
    launched(tmp_path / "two", "consistency", *kind)
    shutil.copytree(tmp_path / "two" / "step-000010", tmp_path / "back" / "step-000010")
    assert 'processes was "2", now "1"' in launched(tmp_path / "back", "consistency")
    equal(tmp_path / "one", tmp_path / "back", 1e-8)


@pytest.mark.slow
def test_processes_that_begin_apart_are_one_or_refused_by_name(tmp_path):
    told = started([str(HERE / "apart.py"), str(tmp_path)], "--multi_gpu", at=tmp_path, fails=True)
    both = [load_file(tmp_path / f"apart-{rank}.safetensors") for rank in (0, 1)]
    torch.testing.assert_close(*both, rtol=0, atol=0)
    for rank in (0, 1):
        unused = (tmp_path / f"unused-{rank}.txt").read_text()
        assert "the loss of role 'model' does not use unused.weight, unused.bias" in unused
    assert "process 1 has another run than the first: training.seed was 0, now 1" in told


def test_processes_that_accelerate_does_not_join_are_refused(toy, monkeypatch):
    from fastsample import distill

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"2 processes were started \(WORLD_SIZE\), accelerate joins 1: each would"):
        distill.train(distill.Diffusion(toy()), [{"x0": torch.zeros(4, 2)}], steps=1)
