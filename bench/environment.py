"""Where a number was measured: without this, no latency can be read. Names the machine's parts, never its owner."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = ("fastsample", "torch", "numpy", "scipy", "diffusers", "triton", "accelerate", "onnxruntime", "tensorrt")


def environment(device: str | torch.device = "cpu") -> dict[str, str]:
    """Versions, processor, GPU and driver, threads, torch's settings, the git revision of the working folder, the load.

    What is not there has no entry: a package that is not installed, the GPU of a run on a CPU.
    """
    found = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **_versions(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu(),
        "cpu instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "interop threads": str(torch.get_num_interop_threads()),
        "load average": " ".join(f"{load:.2f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown",
        "device": str(device),
        "float32 matmul precision": _setting(torch.get_float32_matmul_precision),
        "deterministic algorithms": str(torch.are_deterministic_algorithms_enabled()),
    }
    if torch.device(device).type == "cuda":
        found |= _gpu(torch.device(device))
    revision = _output("git", "rev-parse", "HEAD")
    if revision:
        changed = _output("git", "status", "--porcelain", "--untracked-files=no")
        found["git revision of the working folder"] = revision + (" with changes" if changed else "")
    return found


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        with suppress(PackageNotFoundError):
            found[package] = torch.__version__ if package == "torch" else version(package)  # the former has +cu128 too
    return found


def _gpu(device: torch.device) -> dict[str, str]:
    properties = torch.cuda.get_device_properties(device)
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name(device),
        "gpu memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "compute capability": f"{properties.major}.{properties.minor}",
        "driver": driver.split("\n")[0] or "unknown",
        "cuda": str(torch.version.cuda),
        "cudnn": str(cudnn.version()),
        "cudnn benchmark": str(cudnn.benchmark),
        "cudnn deterministic": str(cudnn.deterministic),
        "tf32 in matmul": _setting(lambda: matmul.allow_tf32),
        "tf32 in cudnn": _setting(lambda: cudnn.allow_tf32),
        "reduced precision sums in fp16 matmul": str(matmul.allow_fp16_reduced_precision_reduction),
        "reduced precision sums in bf16 matmul": str(matmul.allow_bf16_reduced_precision_reduction),
    }


def _setting(read: Callable[[], object]) -> str:
    """torch has two ways to set these, and refuses to read the one where the other was written."""
    try:
        return str(read())
    except RuntimeError:
        return "set through torch's fp32_precision"


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _output(*command: str) -> str:
    """What a command prints; empty where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
