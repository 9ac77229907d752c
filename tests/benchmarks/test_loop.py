"""The cost of the loop beside the network; measure with `pytest tests/benchmarks --benchmark-enable`."""

import pytest
import torch

pytest.importorskip("diffusers")
from torch.utils._python_dispatch import TorchDispatchMode

from fastsample.bench.overhead import SHAPES, loops


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["fs.sample", "bare arithmetic", "diffusers", "diffusers with set_timesteps"])
def test_the_loop(measure, benchmark, shape, name):
    benchmark.group = f"20 steps of DPM-Solver++(2M), {list(shape)}"
    assert measure(loops(shape)[name], 50).shape == shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loops_that_are_compared_compute_the_same(shape):
    ours, bare, theirs, in_full = (loop() for loop in loops(shape).values())
    assert torch.equal(theirs, in_full)
    assert torch.equal(ours, bare)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # float32 coefficients in diffusers


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_is_the_bare_arithmetic_and_the_time_of_the_network():
    """Counted, not timed: a busy machine cannot change it."""
    counts = {}
    for name in ("fs.sample", "bare arithmetic"):
        for steps in (10, 20):
            loop = loops(SHAPES[0], steps)[name]
            with Calls() as calls:
                loop()
            counts[name, steps] = len(calls.names)
    assert counts["bare arithmetic", 20] - counts["bare arithmetic", 10] == 5 * 10
    assert counts["fs.sample", 20] - counts["fs.sample", 10] == (5 + 1) * 10
