"""Every kind of consistency training learns the ring in the plane: one step where its network needed many."""

from functools import cache, partial

import pytest
import torch

import fastsample as fs
from fastsample import distill, solvers

pytest.importorskip("accelerate")


@pytest.fixture
def teacher(toy, loader):
    return partial(trained, toy, loader)


@cache
def _weights():
    return {}


def trained(toy, loader):
    """A v network trained by diffusion, once for this file; a fresh copy each time."""
    model = toy("v", width=128)
    if not _weights():
        method = distill.Diffusion(model, drop=0.1, null={"class_labels": 2})
        distill.train(method, loader, steps=1000, lr=3e-3, warmup=20, ema=0.99, progress=False)
        _weights().update({key: value.clone() for key, value in model.network.state_dict().items()})
    model.network.load_state_dict(_weights())
    return model


def walk(model, steps, solver=solvers.consistency, n=512):
    plan = fs.trace(solver, fs.grid(model.schedule, steps, fs.uniform_t))
    labels = torch.arange(n) % 2
    return fs.sample(model, plan, fs.noise((2,), seeds=range(n)), condition={"class_labels": labels}), labels


def energy_distance(one, other):
    """Szekely's energy distance, the label as a third coordinate; 0 for equal distributions."""
    a, b = (torch.cat([x, labels[:, None].float()], 1) for x, labels in (one, other))
    return float(2 * torch.cdist(a, b).mean() - torch.cdist(a, a).mean() - torch.cdist(b, b).mean())


METHODS = {
    "distillation by heun, average target": lambda student, teacher: distill.ConsistencyDistillation(
        student, teacher, solver=solvers.heun, target=0.9, distance="l2"
    ),
    "distillation with the boundary of EDM": lambda student, teacher: distill.ConsistencyDistillation(
        distill.bounded(student, "edm"), teacher, times=distill.Doubling(4, 16, over=400)
    ),
    "training": lambda student, teacher: distill.ConsistencyTraining(
        distill.bounded(student, "edm"), times=distill.Doubling(8, 64, over=600)
    ),
    "original training": lambda student, teacher: distill.ConsistencyTraining.original(student, over=600, s0=10, s1=40),
    "tuning": lambda student, teacher: distill.EasyConsistencyTuning(student, every=150, stages=4),
}


QUICK = ("training",)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_the_ring_is_learned_in_one_step(name, teacher, loader, ring):
    model = teacher()
    blind = energy_distance(walk(model, 1), ring)
    method = METHODS[name](distill.student_of(model), model)
    student = distill.train(method, loader, steps=600, lr=1e-3, ema=0.98, progress=False)
    one, two = (energy_distance(walk(student, steps), ring) for steps in (1, 2))
    assert one < 0.2 * blind
    assert two < 0.2 * blind
