"""A toy to measure: the model x0 = x / 2, whose every number is known, and the DDIM step as solver."""

import gc
import os
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import fastsample as fs
from fastsample import bench


def ddim(model, x, grid):
    for s, t in grid.steps():
        x = fs.exponential_step(x, model.predict(x, s), s, t)
    return x


def heun(model, x, grid):
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        y = fs.exponential_step(x, x0, s, t)
        if t.sigma > 0:
            y = fs.exponential_step(x, (x0 + model.predict(y, t)) * 0.5, s, t)
        x = y
    return x


def ancestral(model, x, grid):
    for s, t in grid.steps():
        x = fs.exponential_step(x, model.predict(x, s), s, t)
        if t.sigma > 0:
            x = x + 0.1 * t.sigma * model.noise()
    return x


def toy(network=lambda x, t, **condition: 0.5 * x):
    return fs.Denoiser(network, fs.EDM(sigma_max=3.0), "x0")  # so that even one step ends in the range of images


@pytest.fixture(autouse=True)
def one_thread():
    """Small matrices on a busy machine: with more threads these tests take ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick(monkeypatch):
    """For many small runs: a process that dies, unlike a machine, needs no fsync; the rest changes nothing here."""
    monkeypatch.setattr(sys.modules["fastsample.bench.run"], "environment", lambda device: {"device": str(device)})
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(gc, "collect", lambda: 0)


def sweep_into(folder, /, **changes):
    """bench.run on the toy, its arguments filled in; `cases` and others may be replaced."""
    cases = bench.Case.product(model={"teacher": toy()}, solver=[ddim, heun], steps=[2, 4])
    reference = 0.1 * torch.randn(100, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    given = {"shape": (1, 4, 4), "n": 40, "batch": 16, "quality": bench.fd_pixels(reference), "out": folder} | changes
    return bench.run(given.pop("cases", cases), progress=False, **given)


@pytest.fixture
def model():
    return toy()


@pytest.fixture(scope="session")
def toys():
    """The parts, for tests that make their own models and cases."""
    return {"toy": toy, "ddim": ddim, "heun": heun, "ancestral": ancestral, "sweep_into": sweep_into}


@pytest.fixture
def sweep(tmp_path):
    return partial(sweep_into, tmp_path / "out")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights for the network of the FID, in the layout of the published file."""
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(runpy.run_path(str(Path(__file__).parent / "inception_peer.py"))["random_weights"](), path)
    return path
