"""Memory: the most that one call needs, measured in a call of its own, which is not timed.

Measure it after the timed rounds: what earlier cases left in the caches is given back first, and the next call would
have to ask for it again.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from pathlib import Path

import torch

from .latency import Call

STATUS = Path("/proc/self/status")
CLEAR = Path("/proc/self/clear_refs")


def peak_memory(call: Call, *, device: str | torch.device = "cpu") -> dict[str, int]:
    """Bytes at the most during one call of a case, and `..._above` what there was before it: the model, other models.

    On a GPU of torch's allocator: allocated, of tensors alive; reserved, of the blocks taken from the driver.
    On a CPU under Linux: rss, the resident memory of the whole process. Where its peak cannot be reset, rss_ever, which
    is the peak since the process began: an upper bound that may stem from another case. Empty where nothing is known.
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        return _cuda(call, device)
    return _resident(call) if device.type == "cpu" else {}


def _cuda(call: Call, device: torch.device) -> dict[str, int]:
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()  # else `reserved` is that of the greediest case before
    torch.cuda.reset_peak_memory_stats(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    call()
    torch.cuda.synchronize(device)
    most, taken = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    return {
        "allocated": most,
        "allocated_above": most - allocated,
        "reserved": taken,
        "reserved_above": taken - reserved,
    }


def _resident(call: Call) -> dict[str, int]:
    _trim()
    try:
        CLEAR.write_text("5")  # resets VmHWM to VmRSS: proc(5)
        before = _status("VmRSS")
    except (OSError, KeyError):
        return _ever(call)
    call()
    most = _status("VmHWM")
    return {"rss": most, "rss_above": max(0, most - before)}


def _ever(call: Call) -> dict[str, int]:
    try:
        import resource
    except ImportError:  # not on Windows
        return {}
    call()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"rss_ever": most if sys.platform == "darwin" else 1024 * most}  # bytes on macOS, KiB on Linux


def _status(name: str) -> int:
    """Bytes of a line of /proc/self/status, such as `VmHWM:  1234 kB`."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text(encoding="ascii").splitlines())
    return 1024 * int(lines[name].split()[0])


def _trim() -> None:
    """Give freed memory back to the system, so that a case pays for its own. Only glibc has this."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)
