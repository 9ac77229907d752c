"""Memory and energy: what a call needs beyond what was there, on devices that are here and on ones that are faked."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from fastsample.bench import memory
from fastsample.bench.energy import energy_j
from fastsample.bench.memory import peak_memory

MB = 2**20
linux = pytest.mark.skipif(not memory.CLEAR.exists(), reason="needs /proc/self/clear_refs, which Linux alone has")


@linux
def test_the_peak_of_a_call_is_what_it_needed_and_not_what_it_left():
    made = []
    call = partial(torch.ones, 100 * MB, dtype=torch.uint8)
    found = peak_memory(lambda: made.append(len(call())))
    # The kernel counts in pages, and lets a thread be some dozens of pages late.
    assert 96 * MB < found["rss_above"] < 120 * MB
    assert found["rss"] > found["rss_above"]
    assert made == [100 * MB]


@linux
def test_the_peak_is_of_this_case_alone():
    peak_memory(lambda: torch.ones(200 * MB, dtype=torch.uint8))
    assert peak_memory(lambda: torch.ones(20 * MB, dtype=torch.uint8))["rss_above"] < 40 * MB


def test_where_the_peak_cannot_be_reset_it_is_called_the_peak_ever(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "missing" / "clear_refs")
    ran = []
    found = peak_memory(lambda: ran.append(1))
    assert list(found) == ["rss_ever"]
    assert 50 * MB < found["rss_ever"] < 2**40  # bytes, not KiB: torch alone is some hundred MB
    assert ran == [1]


def test_a_kernel_without_the_peak_in_its_status_is_no_error(monkeypatch, tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\n")
    monkeypatch.setattr(memory, "STATUS", status)
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "clear_refs")
    assert list(peak_memory(lambda: None)) == ["rss_ever"]


def test_what_is_not_known_is_left_out(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "missing" / "clear_refs")
    monkeypatch.setitem(sys.modules, "resource", None)
    assert peak_memory(lambda: None) == {}
    assert peak_memory(lambda: None, device="mps") == {}


def test_on_a_gpu_caches_are_emptied_and_peaks_reset_before_the_call(monkeypatch):
    notes = []
    counts = {"memory_allocated": 100, "memory_reserved": 200, "max_memory_allocated": 700, "max_memory_reserved": 900}
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: notes.append(name))
    for name, count in counts.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, name=name, count=count: (notes.append(name), count)[1])
    found = peak_memory(lambda: notes.append("call"), device="cuda")
    assert found == {"allocated": 700, "allocated_above": 600, "reserved": 900, "reserved_above": 700}
    at = notes.index("call")
    assert notes[:at] == [
        "synchronize",
        "empty_cache",
        "reset_peak_memory_stats",
        "memory_allocated",
        "memory_reserved",
    ]
    assert notes[at + 1] == "synchronize"


class FakeNvml:
    """200 W, whatever runs; the counter has millijoules."""

    class NVMLError(Exception):
        pass

    def __init__(self, *, counts=True):
        self.counts, self.s, self.open, self.uuid = counts, 1000.0, 0, None

    def nvmlInit(self):
        self.open += 1

    def nvmlShutdown(self):
        self.open -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.uuid = uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if not self.counts:
            raise self.NVMLError("Not Supported")
        return round(200_000 * self.s)


@pytest.fixture
def nvml(monkeypatch):
    """A GPU of the second UUID, whose clock is the one that the energy is measured by."""

    def install(fake):
        monkeypatch.setitem(sys.modules, "pynvml", fake)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234-abcd"))
        monkeypatch.setattr("fastsample.bench.energy.time.perf_counter", lambda: fake.s)
        return fake

    return install


def test_energy_is_joules_a_call_over_calls_enough_for_the_counter(nvml):
    fake = nvml(FakeNvml())
    calls = []

    def call():
        calls.append(1)
        fake.s += 0.0625

    assert energy_j(call, device="cuda", least_s=2.0) == pytest.approx(200 * 0.0625, rel=1e-3)
    assert len(calls) == 1 + 32
    assert fake.uuid == "GPU-1234-abcd"
    assert fake.open == 0


def test_a_gpu_without_the_counter_has_no_energy_and_is_not_called(nvml):
    fake = nvml(FakeNvml(counts=False))
    assert energy_j(lambda: 1 / 0, device="cuda") is None
    assert fake.open == 0


def test_without_the_library_or_a_gpu_no_energy_is_made_up(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert energy_j(lambda: 1 / 0, device="cuda") is None
    assert energy_j(lambda: 1 / 0, device="cpu") is None


def test_the_least_time_of_an_energy_is_above_zero():
    with pytest.raises(ValueError, match="least_s of an energy must be above 0, got 0"):
        energy_j(lambda: None, least_s=0)


@pytest.mark.gpu
def test_on_a_gpu_the_memory_is_that_of_the_tensors():
    torch.ones(500 * MB, dtype=torch.uint8, device="cuda")  # left in the cache: not of the case below
    found = peak_memory(lambda: torch.ones(100 * MB, dtype=torch.uint8, device="cuda"), device="cuda")
    assert found["allocated_above"] == 100 * MB
    assert 100 * MB <= found["reserved_above"] < 200 * MB


@pytest.mark.gpu
def test_on_a_gpu_the_energy_of_more_work_is_more():
    pytest.importorskip("pynvml")
    x = torch.randn(4096, 4096, device="cuda")
    one = energy_j(lambda: x @ x, device="cuda")
    if one is None:
        pytest.skip("this GPU has no energy counter")
    assert 2 < energy_j(lambda: [x @ x for _ in range(4)], device="cuda") / one < 8
