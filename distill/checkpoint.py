"""Checkpoints of a run: folders `step-000500`, whole or absent, holding tensors (safetensors) and a manifest (JSON).

A checkpoint goes on only with the configuration it was made with; what differs is named. There is no pickle in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

VERSION = 1
STATE, MANIFEST = "state.safetensors", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """step: how many steps were done. place: the epoch of the data and how many of its batches were used."""

    step: int
    place: tuple[int, int]
    scaler: dict[str, float] | None
    tensors: dict[str, Tensor]


def save(out: Path, checkpoint: Checkpoint, configuration: Mapping[str, Any], *, keep: int) -> Path:
    """Write one checkpoint under a temporary name, rename it, and remove all but the newest `keep`."""
    target = out / f"step-{checkpoint.step:06d}"
    temporary = Path(tempfile.mkdtemp(dir=out, prefix=".step-"))
    try:
        tensors = {key: value.detach().cpu().contiguous() for key, value in checkpoint.tensors.items()}
        save_file(tensors, temporary / STATE)
        manifest = {
            "format": "fastsample.checkpoint",
            "version": VERSION,
            "step": checkpoint.step,
            "place": list(checkpoint.place),
            "scaler": checkpoint.scaler,
            "sha256": _sha256(temporary / STATE),
            "configuration": configuration,
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for name in (STATE, MANIFEST):
            with (temporary / name).open("rb+") as file:
                os.fsync(file.fileno())
            (temporary / name).chmod(0o644)
        temporary.chmod(0o755)  # mkdtemp and safetensors write what only the owner may read
        if target.exists():
            _remove(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in folders(out)[:-keep]:
        _remove(old)
    return target


def folders(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in out.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def sweep(out: Path) -> None:
    """Remove what a run that was killed left half written."""
    for path in out.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def load(folder: Path, configuration: Mapping[str, Any], device: torch.device) -> Checkpoint:
    """Read and check a checkpoint. Raises ValueError where it is damaged or of another configuration."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != "fastsample.checkpoint" or manifest["version"] != VERSION:
            raise ValueError(
                f"{folder} is {manifest['format']} of version {manifest['version']}; expected "
                f"fastsample.checkpoint {VERSION}: train into another folder"
            )
        found, step = manifest["configuration"], int(manifest["step"])
        epoch, used = (int(number) for number in manifest["place"])
        damaged = _sha256(folder / STATE) != manifest["sha256"]
        tensors = {} if damaged else load_file(folder / STATE, device=str(device))
    except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder} is damaged ({error!r}); {_REMEDY}") from error
    except SafetensorError as error:
        raise ValueError(f"{folder / STATE} is damaged ({error}); {_REMEDY}") from error
    if damaged:
        raise ValueError(f"{folder / STATE} is damaged: its SHA-256 is not that of the manifest; {_REMEDY}")
    differs = differences(found, json.loads(json.dumps(configuration)))
    if differs:
        raise ValueError(
            f"{folder} was made with another configuration: {'; '.join(differs[:5])}"
            f"{f'; and {len(differs) - 5} more' if len(differs) > 5 else ''}. Pass what it was made with, or train "
            f"into another folder"
        )
    return Checkpoint(step, (epoch, used), manifest["scaler"], tensors)


_REMEDY = "remove that folder, and the run goes on from the checkpoint before it"


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two nested dictionaries, one line each."""
    if isinstance(then, dict) and isinstance(now, dict):
        missing = "absent"
        keys = list(dict.fromkeys([*then, *now]))
        inside = (differences(then.get(k, missing), now.get(k, missing), f"{name}.{k}".strip(".")) for k in keys)
        return [line for lines in inside for line in lines]
    return [] if then == now else [f"{name} was {_short(then)}, now {_short(now)}"]


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _remove(folder: Path) -> None:
    hidden = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".step-"))  # renamed first: never half a checkpoint
    folder.rename(hidden / folder.name)
    shutil.rmtree(hidden)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
