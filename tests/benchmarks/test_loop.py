"""The cost of the loop beside the network; measure with `pytest tests/benchmarks --benchmark-enable`."""

import pytest
import torch

pytest.importorskip("diffusers")
from fastsample.bench.overhead import SHAPES, loops


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["fs.sample", "diffusers", "diffusers with set_timesteps"])
def test_the_loop(benchmark, shape, name):
    benchmark.group = f"20 steps of DPM-Solver++(2M), {list(shape)}"
    assert benchmark(loops(shape)[name]).shape == shape


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loops_that_are_compared_compute_the_same(shape):
    ours, theirs, in_full = (loop() for loop in loops(shape).values())
    assert torch.equal(theirs, in_full)
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)  # float32 coefficients in diffusers
