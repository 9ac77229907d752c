"""Checkpoints of a run: folders `step-000500`, whole or absent, holding tensors (safetensors) and a manifest (JSON).

A checkpoint goes on only with the configuration it was made with; what differs is named. There is no pickle in it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsample import files

VERSION = 2
STATE, MANIFEST = "state.safetensors", "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """A run after `step` steps.

    place: the epoch of the data and how many of its batches were used. machine: what the last bits of a sum depend on.
    """

    step: int
    place: tuple[int, int]
    machine: dict[str, str]
    scaler: dict[str, float] | None
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]  # what an optimizer keeps beside tensors


def save(out: Path, checkpoint: Checkpoint, configuration: Mapping[str, Any], *, keep: int) -> Path:
    """Write one checkpoint under a temporary name, rename it, and remove all but the newest `keep`."""
    target = out / f"step-{checkpoint.step:06d}"
    hidden = Path(tempfile.mkdtemp(dir=out, prefix=".step-"))
    temporary = hidden / target.name
    try:
        temporary.mkdir()  # with the rights of any new folder, unlike `hidden`
        save_file(_own(checkpoint.tensors), temporary / STATE)
        files.readable(temporary / STATE)
        manifest = {
            "format": "fastsample.checkpoint",
            "version": VERSION,
            "step": checkpoint.step,
            "place": list(checkpoint.place),
            "machine": checkpoint.machine,
            "scaler": checkpoint.scaler,
            "numbers": checkpoint.numbers,
            "sha256": files.sha256(temporary / STATE),
            "configuration": finite(configuration),
        }
        text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"
        (temporary / MANIFEST).write_text(text, encoding="utf-8")
        for name in (STATE, MANIFEST):
            with (temporary / name).open("rb+") as file:
                os.fsync(file.fileno())
        temporary.rename(target)
    except (OSError, SafetensorError) as error:
        code, reason = (error.errno, error.strerror) if isinstance(error, OSError) else (None, str(error))
        told = f"cannot write {target}: {reason}; the checkpoints before it stay. Make room, and run again to go on"
        raise (OSError(told) if code is None else OSError(code, told)) from error
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
    for old in folders(out)[:-keep]:
        _remove(old)
    return target


def _own(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, each with a memory of its own: safetensors writes no two that share it."""
    found, seen = dict[str, Tensor](), set[int]()
    for key, value in tensors.items():
        kept = value.detach().cpu().contiguous()
        place = kept.untyped_storage().data_ptr()
        found[key] = kept.clone() if place in seen else kept
        seen.add(place)
    return found


def folders(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    found = [path for path in out.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def sweep(out: Path) -> None:
    """Remove what a run that was killed left half written."""
    for path in out.glob(".step-*"):
        shutil.rmtree(path, ignore_errors=True)


def load(folder: Path, configuration: Mapping[str, Any]) -> Checkpoint:
    """Read and check a checkpoint. Raises ValueError where it is damaged or of another configuration."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        form, version = manifest["format"], manifest["version"]
        if (form, version) == ("fastsample.checkpoint", VERSION):
            epoch, used = manifest["place"]
            names = ("step", "machine", "scaler", "numbers", "configuration")
            step, machine, scaler, numbers, found = (manifest[key] for key in names)
            if files.sha256(folder / STATE) != manifest["sha256"]:
                raise ValueError(f"the SHA-256 of {STATE} is not that of the manifest")
            tensors = load_file(folder / STATE)
    except (OSError, KeyError, TypeError, AttributeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({type(error).__name__}: {error}); {_REMEDY}") from error
    if (form, version) != ("fastsample.checkpoint", VERSION):
        raise ValueError(
            f"{folder} is {form} of version {version}; expected fastsample.checkpoint {VERSION}: train into another "
            f"folder"
        )
    differs = differences(found, json.loads(json.dumps(finite(configuration))))
    if differs:
        raise ValueError(
            f"{folder} was made with another configuration: {'; '.join(differs[:5])}"
            f"{f'; and {len(differs) - 5} more' if len(differs) > 5 else ''}. Pass what it was made with, or train "
            f"into another folder"
        )
    return Checkpoint(step, (epoch, used), machine, scaler, tensors, numbers)


def tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, checked. Raises ValueError where it is damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if files.sha256(folder / STATE) != manifest["sha256"]:
            raise ValueError(f"the SHA-256 of {STATE} is not that of the manifest")
        return load_file(folder / STATE)
    except (OSError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder} is damaged ({type(error).__name__}: {error}); {_REMEDY}") from error


def roles(folder: Path) -> list[str]:
    """The roles of the run that made a checkpoint, the first first."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return list(manifest["configuration"]["networks"])


_REMEDY = "remove that folder, and the run goes on from the checkpoint before it"


def differences(then: Any, now: Any, name: str = "") -> list[str]:
    """What differs between two nested dictionaries, one line each."""
    if isinstance(then, dict) and isinstance(now, dict):
        missing = "absent"
        keys = list(dict.fromkeys([*then, *now]))
        inside = (differences(then.get(k, missing), now.get(k, missing), f"{name}.{k}".strip(".")) for k in keys)
        return [line for lines in inside for line in lines]
    return [] if then == now else [f"{name} was {_short(then)}, now {_short(now)}"]


def finite(value: Any) -> Any:
    """The same with infinity and NaN as text: JSON has neither."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _remove(folder: Path) -> None:
    hidden = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".step-"))  # renamed first: never half a checkpoint
    folder.rename(hidden / folder.name)
    shutil.rmtree(hidden)
