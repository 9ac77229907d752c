"""The study of solvers beside their peers: the forms against the originals' stored outputs, the counting, the table."""

import csv
import importlib
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample.zoo.problems import get

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "data" / "peers.npz"  # the ends of 16 noises on gmm2 by the original code, made apart


@pytest.fixture(scope="module")
def study():
    """The scripts of bench/studies as a run of them sees each other: by their plain names."""
    folder = str(ROOT / "bench" / "studies")
    sys.path.insert(0, folder)
    try:
        yield importlib.import_module("solver_errors")
    finally:
        sys.path.remove(folder)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


def _run(study, name, golden, nfe, crossed=True):
    (peer,) = [peer for peer in study.peers(crossed) if peer.name == name]
    model = study.Counted(get("gmm2"))
    start = golden["noise"] * math.sqrt(1 + model.level(999.0) ** 2)
    return peer.run(model, start, nfe), model.calls


# in the dtype of the original: UniPC's official code solves for its weights in float32, DEIS of the toolbox integrates
# by a sum of ten thousand rectangles over its own continuous schedule
FORMS = {
    "dpm-solver/++multi2/logSNR": 1e-12,
    "dpm-solver/++multi2/time_uniform": 1e-12,
    "dpm-solver/++multi3/logSNR": 1e-12,
    "dpm-solver/eps-multi2/logSNR": 1e-12,
    "dpm-solver/eps-multi3/logSNR": 1e-12,
    "unipc/x0-bh2-2/logSNR": 1e-7,
    "unipc/x0-bh2-3/logSNR": 1e-7,
    "unipc/x0-bh1-3/logSNR": 1e-7,
    "unipc/eps-bh1-3/logSNR": 1e-7,
    "diff-sampler/ipndm4/polynomial": 1e-12,
    "diff-sampler/ipndm_v3/polynomial": 1e-12,
    "diff-sampler/deis_tab3/polynomial": 1e-3,
    "diff-sampler/dpmpp3/polynomial": 1e-12,
    "diff-sampler/unipc3/polynomial": 1e-12,
}


@pytest.mark.parametrize("nfe", [6, 10, 20])
@pytest.mark.parametrize("name", list(FORMS))
def test_the_forms_end_where_the_original_code_ended(study, golden, name, nfe):
    found, calls = _run(study, name, golden, nfe)
    assert calls == nfe
    key = f"{name.replace('/', '.')}|{nfe}"
    torch.testing.assert_close(found, golden[key], rtol=0, atol=FORMS[name])


# float32 states, tables and, in PNDM, weights
ADAPTED = {
    "diffusers/DPMMulti2/karras": 10,
    "diffusers/DPMMulti3/lu": 10,
    "diffusers/DPMSingle3/linspace": 10,
    "diffusers/UniPC3/linspace": 10,
    "diffusers/DEIS2/linspace": 10,
    "diffusers/EDMMulti2/karras": 10,
    "diffusers/PNDM/trailing": 10,
    "diffusers/LMS/karras": 10,
    "diffusers/Heun/trailing": 9,
    "k-diffusion/lms/karras": 10,
    "k-diffusion/dpm_2/karras": 9,
    "k-diffusion/dpmpp_2m/karras": 10,
    "k-diffusion/dpmpp_2s/karras": 9,
    "k-diffusion/dpm_fast/exp": 10,
}


@pytest.mark.parametrize("name", list(ADAPTED))
def test_peers_from_pypi_end_where_their_own_loop_ended(study, golden, name):
    pytest.importorskip("diffusers" if name.startswith("diffusers") else "torchsde")
    found, calls = _run(study, name, golden, ADAPTED[name])
    assert calls == ADAPTED[name]
    torch.testing.assert_close(found.double(), golden[f"{name.replace('/', '.')}|10"], rtol=0, atol=5e-5)


def test_a_peer_without_a_run_of_this_size_says_so(study, golden):
    pytest.importorskip("diffusers")
    assert _run(study, "diffusers/Heun/trailing", golden, 10) == (None, 0)


def test_names_of_peers_are_their_own(study):
    names = [peer.name for peer in study.peers()]
    assert len(names) == len(set(names))
    assert len(names) > 100


def test_the_jackknife_of_equal_samples_is_nought_and_of_others_the_usual_error(study):
    assert study.jackknife(torch.full((8,), 0.25, dtype=torch.float64)) == pytest.approx((0.5, 0.0))
    squares = torch.rand(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rms, error = study.jackknife(squares)
    assert rms == pytest.approx(float(squares.mean().sqrt()))
    delta = float(squares.std() / math.sqrt(4000)) / (2 * rms)  # of the square root, to first order
    assert error == pytest.approx(delta, rel=1e-2)


def test_the_study_runs_goes_on_and_reports(study, tmp_path, monkeypatch):
    """In short: two sections of one problem; a second run takes everything from the first."""
    few = [peer for peer in study.peers(False) if peer.name.startswith(("unipc/x0-bh2", "dpm-solver/++multi2"))]
    monkeypatch.setitem(study.WORK, "peer", lambda where: study.measure_peers(where, few, "peer"))
    options = ["--problems", "gmm2", "--nfe", "5", "8", "--sections", "peer", "default", "--samples", "16"]
    options += ["--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    results = study.main(options)
    assert {result.nfe for result in results} == {5, 8}
    assert all(math.isfinite(result.rms) and result.samples == 16 for result in results)
    default = study.best(results, "default", 8)
    # straight from the core: the plan on the held-out noises, beside the exact solution
    problem = get("gmm2")
    noise = problem.noise(study.HELD_OUT[:16])
    plan = study.DEFAULT.plan(problem.schedule, 8, end=0.0)
    away = fs.sample(problem.model, plan, noise) - problem.exact(noise)
    assert default.rms == pytest.approx(float(away.square().mean().sqrt() / problem.schedule.alpha(0.0)))

    def never(where):
        raise AssertionError("done already")

    monkeypatch.setitem(study.WORK, "peer", never)
    monkeypatch.setitem(study.WORK, "default", never)
    assert study.main(options) == results
    with (tmp_path / "solver_errors.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [result.method for result in results]
    text = (tmp_path / "solver_errors.md").read_text()
    ratio = study.ratios(results, "default")[8]
    assert f"x {ratio:.2f}" in text
    assert json.loads((tmp_path / "work" / "gmm2-min-08-default.json").read_text())["settings"]["samples"] == 16


def test_a_fault_of_a_peer_is_a_row_and_a_wrong_count_stops_the_study(study, tmp_path):
    where = study.Where(get("gmm2"), "min", 5, 4, tmp_path)

    def dies(model, y, nfe):
        raise ValueError("no steps")

    def lost(model, y, nfe):
        for _ in range(nfe):
            model.denoise(y, 1.0)
        return y * math.nan

    peers = [study.Peer("dies", "min", dies), study.Peer("lost", "min", lost), study.Peer("other", "zero", dies)]
    results = study.measure_peers(where, peers, "peer")
    assert [(result.method, result.fault) for result in results] == [
        ("dies", "ValueError: no steps"),
        ("lost", "NaN or infinity"),
    ]

    def greed(model, y, nfe):
        for _ in range(nfe + 1):
            y = model.denoise(y, 1.0)
        return y

    greedy = study.Peer("greedy", "min", greed)
    with pytest.raises(AssertionError, match="greedy took 6 evaluations where 5 were allowed"):
        study.measure_peers(where, [greedy], "peer")
