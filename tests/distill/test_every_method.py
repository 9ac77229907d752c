"""Of every method: a run that is stopped goes on bit for bit, and nothing depends on how a batch is split."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastsample import distill
from fastsample.distill import draws

from .conftest import Toy
from .methods import METHODS, loader, maker

pytest.importorskip("accelerate")
HERE = Path(__file__).parent
pytestmark = pytest.mark.filterwarnings("ignore:the student predicts eps")


def stopping(method, at):
    """The method, which stops the run after a step, as a crash would."""

    def after(step):
        kind.after(method, step)
        if step + 1 == at:
            raise KeyboardInterrupt

    kind = type(method)
    object.__setattr__(method, "after", after)
    return method


def everything(folder):
    """All tensors of the newest checkpoint."""
    return load_file(max(folder.glob("step-*")) / "state.safetensors")


@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_is_stopped_goes_on_bit_for_bit(name, tmp_path):
    def run(folder, at=0):
        method = stopping(METHODS[name](maker(Toy, dropout=0.1)), at)
        distill.train(
            method, loader(name), steps=11, out=tmp_path / folder, save_every=4, accumulate=2, ema=(0.5, 0.9), seed=2
        )
        return everything(tmp_path / folder)

    with pytest.raises(KeyboardInterrupt):
        run("stopped", at=7)
    one, other = run("stopped"), run("whole")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    begun = load_file(tmp_path / "whole" / "step-000008" / "state.safetensors")
    assert any(not torch.equal(begun[key], other[key]) for key in other if ".weight." in key)


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_a_batch_is_that_of_its_parts(name):
    dtype = torch.float64
    method = METHODS[name](maker(Toy, dtype))
    method_roles = {name: model.network for name, model in method.roles.items()}
    batch = next(iter(loader(name, size=12, dtype=dtype)))

    def loss(role, edges, step):
        found, grads = 0.0, None
        for low, high in pairwise(edges):
            with draws.part(torch.Generator().manual_seed(1), first=low, count=high - low, total=12):
                part = method.loss(role, {key: value[low:high] for key, value in batch.items()}, step)
            share = (high - low) / 12
            now = torch.autograd.grad(part, list(method_roles[role].parameters()), allow_unused=True)
            now = [share * g if g is not None else None for g in now]
            found += share * part.item()
            grads = (
                now if grads is None else [a if b is None else b if a is None else a + b for a, b in zip(grads, now)]
            )
        return found, grads

    for role in method.roles:
        whole, split = loss(role, (0, 12), 5), loss(role, (0, 3, 8, 12), 5)
        assert whole[0] == pytest.approx(split[0], rel=2e-6)  # losses are float32
        torch.testing.assert_close(whole[1], split[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", METHODS)
def test_its_settings_are_json_and_tell_one_method_from_another(name):
    settings = METHODS[name](maker(Toy)).settings()
    assert json.loads(json.dumps(settings)) == settings
    assert settings == METHODS[name](maker(Toy)).settings()


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_is_killed_goes_on_bit_for_bit(name, tmp_path):
    def start(folder):
        script = [sys.executable, str(HERE / "launched.py"), str(tmp_path / folder), name, "200", "1", "0"]
        return subprocess.Popen(script, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"})

    process = start("killed")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed").glob("step-*")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)  # into the middle of it: with a checkpoint at every step, often while one is written
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert 0 < max(int(path.name[5:]) for path in (tmp_path / "killed").glob("step-*")) < 200
    for folder in ("killed", "whole"):
        assert start(folder).wait() == 0
    one, other = (everything(tmp_path / folder) for folder in ("killed", "whole"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
