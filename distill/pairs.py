"""Pairs of noise and what a teacher makes of it, in files: for reflow, and as data for those who have none.

A folder of shards (safetensors) and a manifest (JSON), which names teacher, plan and seeds. Shards are whole or absent;
what was interrupted goes on with the next one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from fastsample import files
from fastsample.denoiser import Model
from fastsample.noise import noise
from fastsample.plan import Plan
from fastsample.progress import track
from fastsample.sampling import check_fit, sample

from .checkpoint import differences
from .data import Drawn
from .method import Batch, asked, described, device_of, evaluating
from .role import digest

VERSION = 1
MANIFEST = "pairs.json"


def make_pairs(
    teacher: Model,
    plan: Plan,
    out: str | Path,
    *,
    shape: Sequence[int],
    count: int,
    condition: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    clip: float = 1.0,
    batch: int = 256,
    shard: int = 4096,
    progress: bool | None = None,
) -> Path:
    """Sample `count` pairs into the folder `out`, which `Pairs` reads; the same call again goes on where it stopped.

    plan: how the teacher samples. Reflow needs one without noise at its steps.
    shape: of one sample. Pair i begins with the noise of seed `seed` + i, whatever the size of a batch.
    condition: what the network is told of each sample, [count, ...] by keyword; kept with the pairs.
    clip: samples are clipped to [-clip, clip]; math.inf leaves them as they are.
    batch, shard: samples at a time, and in a file; what is lost by an interruption is at most a shard.
    progress: show a bar; None: only once the work has lasted some seconds, on a terminal.

    Raises ValueError, before any sampling, where `out` holds pairs of another teacher, plan or setting, and OSError
    where it cannot be written; the shards that are done stay.
    """
    condition = dict(condition or {})
    _check(count, seed, clip, batch, shard, condition)
    check_fit(teacher, plan)
    folder = files.folder(out)
    settings: dict[str, Any] = {
        "count": count,
        "shard": shard,
        "seed": seed,
        "clip": str(clip),
        "shape": [int(size) for size in shape],
        "conditions": {key: _digest(value) for key, value in condition.items()},
        "plan": json.loads(plan.to_json()),
        "teacher": _described(teacher),
    }
    done = _begun(folder, settings)
    device = device_of(teacher)
    names = [f"pairs-{first:09d}.safetensors" for first in range(0, count, shard)]
    missing = [k for k, name in enumerate(names) if name not in done]
    with evaluating(teacher):
        for k in track(missing, "pairs", progress):
            end = min((k + 1) * shard, count)
            made = []
            for first in range(k * shard, end, batch):
                rows = slice(first, min(first + batch, end))
                z = noise(shape, range(seed + rows.start, seed + rows.stop), device=device)
                given = {key: value[rows].to(device) for key, value in condition.items()}
                x0 = sample(teacher, plan, z, condition=given, progress=False).clamp(-clip, clip)
                made.append({"x0": x0, "noise": z.draw(0), **given})
            tensors = {key: torch.cat([part[key] for part in made]).cpu().contiguous() for key in made[0]}
            done[names[k]] = _write(folder, names[k], tensors, done)
            _write_manifest(folder, settings, done)
    return folder


class Pairs(Drawn):
    """The pairs of a folder in shuffled batches {"x0", "noise", conditions}: a loader for `Reflow`.

    size: of a batch. The last pairs of an epoch that do not fill one are left out; each epoch shuffles anew, with
        torch's generator.
    noise: False leaves the noise out, so that the samples are data for any other method.

    The files are mapped, not read into memory, after all of them were compared with their SHA-256.
    Raises FileNotFoundError where there are no pairs or a shard is missing, ValueError where a file is damaged, the
    folder was not finished, or noise is wanted of a plan that adds noise at its steps.
    """

    def __init__(self, folder: str | Path, *, size: int = 128, noise: bool = True):
        if size < 1:
            raise ValueError(f"size of a batch must be at least 1, got {size}")
        self.folder = Path(folder)
        manifest = _read(self.folder)
        settings, shards = manifest["settings"], manifest["shards"]
        self.plan = Plan.from_json(json.dumps(settings["plan"]))
        if noise and self.plan.stochastic:
            raise ValueError(
                f"the pairs of {folder} were made by {self.plan.solver}, which adds noise at its steps, so the first "
                f"noise does not say which sample follows; make them by a plan such as ddim, or pass noise=False"
            )
        self.count, self._shard = int(settings["count"]), int(settings["shard"])
        held = sum(shard["rows"] for shard in shards.values())
        if held != self.count:
            raise ValueError(
                f"{folder} holds {held} of {self.count} pairs; call make_pairs again as it was called, and it goes on"
            )
        self._shards = [_shard(self.folder / name, shards[name]["sha256"]) for name in sorted(shards)]
        self.names = [key for key in self._shards[0] if noise or key != "noise"]
        self.size = min(size, self.count)
        self.bounded = float(settings["clip"]) <= 1

    def __len__(self) -> int:
        return self.count // self.size

    def chosen(self) -> Iterator[Batch]:
        order = torch.randperm(self.count)
        for k in range(len(self)):
            yield {"rows": order[k * self.size : (k + 1) * self.size]}

    def made(self, chosen: Batch) -> Batch:
        return self.rows(chosen["rows"])

    def rows(self, chosen: Tensor) -> Batch:
        """The pairs of these numbers, [n], counted from 0, in their order."""
        found: Batch = {}
        which = chosen // self._shard
        for key in self.names:
            first = self._shards[0][key]
            found[key] = first.new_empty((len(chosen), *first.shape[1:]))
            for k in which.unique().tolist():
                found[key][which == k] = self._shards[k][key][chosen[which == k] - k * self._shard]
        return found


def _check(count: int, seed: int, clip: float, batch: int, shard: int, condition: Mapping[str, Tensor]) -> None:
    for name, number in (("count", count), ("batch", batch), ("shard", shard)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not 0 <= seed <= 2**32 - count:
        raise ValueError(f"the seeds {seed} to {seed + count - 1} must lie in 0 .. 2**32 - 1; take a smaller seed")
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip:g}; math.inf clips nothing")
    for key, value in condition.items():
        if key in ("x0", "noise"):
            raise ValueError(f"{key!r} names a part of each pair and cannot be a condition too")
        if not isinstance(value, Tensor):
            raise TypeError(
                f"condition {key!r} must be a tensor with a row for each pair, got {type(value).__name__}; what is one "
                f"for all belongs into the teacher, such as fs.Guided(model, cond=...)"
            )
        rows = len(value) if value.dim() else 0
        if rows != count:
            raise ValueError(f"condition {key!r} has {rows} rows for {count} pairs; give one for each")


def _begun(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The shards that are done, by name. Raises ValueError where they are of other settings."""
    if not (folder / MANIFEST).is_file():
        return {}
    manifest = _read(folder)
    differs = differences(manifest["settings"], settings)
    if differs:
        raise ValueError(
            f"{folder} holds pairs that were made otherwise: {'; '.join(differs[:3])}"
            f"{f'; and {len(differs) - 3} more' if len(differs) > 3 else ''}. Choose another folder, or call with what "
            f"they were made with"
        )
    done = {name: shard for name, shard in manifest["shards"].items() if (folder / name).is_file()}
    for name, shard in done.items():
        _shard(folder / name, shard["sha256"])
    return done


def _write(folder: Path, name: str, tensors: Mapping[str, Tensor], done: Mapping[str, Any]) -> dict[str, Any]:
    try:
        # as bytes: safetensors' own writing tells of a full disk by an error without its number
        files.write(folder / name, lambda path: path.write_bytes(save(dict(tensors))))
    except OSError as error:
        held = sum(shard["rows"] for shard in done.values())
        raise OSError(
            error.errno,
            f"{folder / name} could not be written ({error.strerror}); {held} pairs are there and stay: make room, and "
            f"call make_pairs again",
        ) from error
    return {"rows": len(tensors["x0"]), "sha256": files.sha256(folder / name)}


def _write_manifest(folder: Path, settings: Mapping[str, Any], shards: Mapping[str, Any]) -> None:
    body = {"settings": settings, "shards": {name: shards[name] for name in sorted(shards)}}
    manifest = {"format": "fastsample.pairs", "version": VERSION, "sha256": _hash(body), **body}
    files.write_text(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False) + "\n")


def _read(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}; give a folder written by distill.make_pairs")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if (manifest["format"], manifest["version"]) != ("fastsample.pairs", VERSION):
            raise ValueError(
                f"it is {manifest['format']} of version {manifest['version']}, expected fastsample.pairs {VERSION}"
            )
        if _hash({key: manifest[key] for key in ("settings", "shards")}) != manifest["sha256"]:
            raise ValueError("its checksum does not match what it says")
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        cause = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{path} is damaged or no manifest of pairs: {cause}; make them into a new folder") from error
    return manifest


def _shard(path: Path, sha256: str) -> dict[str, Tensor]:
    remedy = "remove it, and call make_pairs again as it was called, which makes it anew"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, {MANIFEST} names it; call make_pairs again as it was called")
    if files.sha256(path) != sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is not that of {MANIFEST}; {remedy}")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no file of tensors ({error}); {remedy}") from error


def _hash(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest(value: Tensor) -> str:
    """Type, shape and SHA-256 of a condition: another one makes other pairs."""
    found = hashlib.sha256(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{value.dtype} {list(value.shape)} {found.hexdigest()[:16]}"


def _described(teacher: Model) -> dict[str, Any]:
    networks = [denoiser.network for denoiser in asked(teacher)]
    return {"model": described(teacher), "networks": [digest(network, _tensors(network)) for network in networks]}


def _tensors(network: Any) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()] if isinstance(network, nn.Module) else []
