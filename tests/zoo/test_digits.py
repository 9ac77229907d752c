"""The built-in digits network: whole, small, and made by the recipe that is shipped with it."""

import hashlib
import json
import shutil
import sys

import pytest
import torch

import fastsample as fs
from fastsample import distill, zoo
from fastsample.bench.quality import fd_digits
from fastsample.solvers import ddim
from fastsample.zoo.data import digits
from fastsample.zoo.digits import NULL, WEIGHTS, digits_network

pytest.importorskip("diffusers")
pytest.importorskip("accelerate")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def network():
    return zoo.digits()


def test_the_shipped_files_are_whole_and_small():
    manifest = json.loads((WEIGHTS / "fastsample.json").read_text())
    for name, expected in manifest["sha256"].items():
        assert hashlib.sha256((WEIGHTS / name).read_bytes()).hexdigest() == expected
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) < 1_000_000


def test_the_network_is_as_described(network):
    assert sum(p.numel() for p in network.network.parameters()) == 160_401
    assert network.prediction.name == "eps"
    assert network.schedule == fs.VP.scaled_linear()
    assert not network.network.training
    fresh = digits_network("eps")
    assert fresh.network.null == network.network.null == NULL
    assert [p.shape for p in fresh.network.parameters()] == [p.shape for p in network.network.parameters()]


def test_it_is_finite_and_heeds_its_labels(network):
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    outputs = []
    with torch.no_grad():
        for t in (0.0, 500.0, 999.0):
            node = fs.node(network.schedule, t)
            outputs += [network.predict(x, node, class_labels=torch.full((4,), label)) for label in (0, 9, NULL)]
    assert all(output.isfinite().all() for output in outputs)
    assert not torch.allclose(outputs[3], outputs[4])
    assert not torch.allclose(outputs[4], outputs[5])


def test_a_damaged_file_is_refused(tmp_path, monkeypatch):
    copy = shutil.copytree(WEIGHTS, tmp_path / "digits")
    file = copy / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    monkeypatch.setattr(sys.modules["fastsample.zoo.digits"], "WEIGHTS", copy)  # zoo.digits is the function
    with pytest.raises(ValueError, match="is damaged"):
        zoo.digits()


def test_the_same_seed_makes_the_same_network():
    first, again, other = (digits_network(seed=seed).network.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_the_recipes_repeat_themselves_bit_for_bit(tmp_path):
    """In short: training, then distilling what was trained, and loading what was saved."""

    def make(folder):
        teacher = distill.train_digits(folder / "teacher", steps=3)
        student = distill.distill_digits(teacher, folder / "student", updates=0.002)
        return teacher, student

    first, again = make(tmp_path / "first"), make(tmp_path / "again")
    for one, other in zip(first, again):
        assert all(torch.equal(a, b) for a, b in zip(one.network.parameters(), other.network.parameters()))
    for name, model in zip(("teacher", "student"), first):
        loaded = fs.from_pretrained(tmp_path / "first" / name / "model")
        assert loaded.prediction.name == model.prediction.name
        for a, b in zip(loaded.network.parameters(), model.network.parameters()):
            assert torch.equal(a, b)


@pytest.mark.slow
def test_the_student_beats_its_teacher_in_few_steps(network, tmp_path):
    """A tenth of the teacher's distance at 1 and 2 evaluations, a third at 4."""
    student = distill.distill_digits(network, tmp_path)
    quality = fd_digits(digits("all")[0])

    def distance(model, steps):
        plan = fs.trace(ddim, fs.grid(model.schedule, steps, fs.uniform_t))
        noise = fs.noise((1, 8, 8), seeds=range(2000))
        return quality(fs.sample(model, plan, noise, condition={"class_labels": torch.arange(2000) % 10})).value

    for steps, share in ((1, 1 / 10), (2, 1 / 10), (4, 1 / 3)):
        assert distance(student, steps) < share * distance(network, steps)
