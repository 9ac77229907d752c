"""Energy of a call: the GPU's own counter, around calls enough for it to move."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from .latency import Call


def energy_j(call: Call, *, device: str | torch.device = "cpu", least_s: float = 1.0) -> float | None:
    """Joules a call of the whole GPU, its idle power and its other work included; None where nothing measures it.

    That is: on a CPU, without the package nvidia-ml-py (`pynvml`), and on GPUs without the counter (before Volta, or a
    part of one under MIG). The counter moves some tens of times a second, so calls are repeated for `least_s` seconds.
    """
    if least_s <= 0:
        raise ValueError(f"least_s of an energy must be above 0, got {least_s}")
    device = torch.device(device)
    if device.type != "cuda":
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None
    try:
        try:
            handle = _handle(pynvml, device)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except pynvml.NVMLError:
            return None
        calls = math.ceil(least_s / max(_seconds(call, 1, device), 1e-6))
        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        _seconds(call, calls, device)
        millijoules = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) - before
        return float(millijoules) / 1000 / calls
    finally:
        pynvml.nvmlShutdown()


def _handle(nvml: Any, device: torch.device) -> Any:
    """By UUID, since CUDA_VISIBLE_DEVICES renumbers the GPUs for torch alone."""
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return nvml.nvmlDeviceGetHandleByUUID("GPU-" + uuid.removeprefix("GPU-"))


def _seconds(call: Call, calls: int, device: torch.device) -> float:
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begin
