"""What every benchmark shares: one thread of the CPU, rounds that are counted beforehand, the GPU waited for.

    pytest tests/benchmarks --benchmark-enable --benchmark-json=times.json

Without --benchmark-enable each runs once, as a test. `fastsample.bench.imported` makes a run folder of the JSON.
"""

import pytest
import torch

from fastsample.bench.environment import environment


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastsample"] = environment("cuda" if torch.cuda.is_available() else "cpu")
    machine_info.pop("node", None)  # the name of the machine says whose it is, and nothing of its speed


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def measure(benchmark):
    """measure(call, rounds): its times, each of `iterations` calls, after a warm-up; returns what the call does."""

    def run(call, rounds=20, *, warmup=3, iterations=1, device="cpu"):
        def finished():
            made = call()
            torch.cuda.synchronize()
            return made

        target = finished if device == "cuda" else call
        return benchmark.pedantic(target, rounds=rounds, warmup_rounds=warmup, iterations=iterations)

    return run
