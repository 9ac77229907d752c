"""Wrapped diffusers networks on disk: the folder diffusers writes, plus `fastsample.json`, which says how to use it.

`fastsample.json` holds what the network predicts, its schedule, its time convention and the SHA-256 of every other
file; a folder whose files do not match is refused.
"""

from __future__ import annotations

import json
import operator
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..denoiser import TIMES, Denoiser
from ..files import folder as make_folder
from ..files import readable, sha256, write_text
from ..schedule import EDM, VP, Flow, Schedule, VPContinuous
from .diffusers import Sampled

MANIFEST = "fastsample.json"
VERSION = 1
SCHEDULES: dict[str, type[Schedule]] = {kind.__name__: kind for kind in (VP, VPContinuous, EDM, Flow)}


def save_pretrained(model: Denoiser, folder: str | Path, *, null: int | None = None) -> None:
    """Write a denoiser of a diffusers network so that `from_pretrained`, and diffusers itself, can load it.

    null: the class label that means no class, which guidance needs; None: that the model was loaded with, if any.
    The manifest is written last: a folder without a matching one was not finished, and is refused when loaded.
    """
    network: Any = getattr(model.network, "network", None)
    network = getattr(network, "_orig_mod", network)  # what torch.compile was given
    if not isinstance(model.network, Sampled) or not hasattr(network, "save_pretrained"):
        raise ValueError(
            f"save_pretrained needs a diffusers network wrapped by fs.from_diffusers, got "
            f"{type(model.network).__name__}; save other networks with safetensors"
        )
    null = model.network.null if null is None else null
    _check_null(null, model.network.config)
    names = [name for name, time in TIMES.items() if time is model.time]
    if not names:
        raise ValueError(
            f"the model's time is a function of your own, which cannot be saved; use one of {', '.join(TIMES)}"
        )
    if type(model.schedule) not in SCHEDULES.values():
        raise ValueError(
            f"{model.schedule!r} is a schedule of your own, which cannot be saved; use one of {', '.join(SCHEDULES)}"
        )
    target = make_folder(folder)
    with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
        network.save_pretrained(temporary, safe_serialization=True)
        files = sorted(path.name for path in Path(temporary).iterdir())
        hashes = {name: sha256(Path(temporary) / name) for name in files}
        (target / MANIFEST).unlink(missing_ok=True)
        for name in files:
            readable(Path(temporary) / name)
            shutil.move(Path(temporary) / name, target / name)
    manifest = {
        "format": "fastsample.model",
        "version": VERSION,
        "network": type(network).__name__,
        "predicts": model.prediction.name,
        "time": names[0],
        "schedule": {"type": type(model.schedule).__name__, **asdict(model.schedule)},  # type: ignore[call-overload]
        **({} if null is None else {"null": null}),
        "sha256": hashes,
    }
    write_text(target / MANIFEST, json.dumps(manifest, indent=1) + "\n")


def from_pretrained(folder: str | Path) -> Denoiser:
    """Load what `save_pretrained` wrote, in evaluation mode; `model.network.null` is its label of no class, or None.

    Raises FileNotFoundError for a folder without `fastsample.json` or without a file that it names, ValueError for
    files that are damaged, of another version, or do not match their SHA-256.
    """
    folder = Path(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {MANIFEST}; give a folder written by fs.save_pretrained")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != "fastsample.model" or manifest["version"] != VERSION:
            raise ValueError(f"it says format {manifest['format']}, version {manifest['version']}; expected {VERSION}")
        settings = {**manifest["schedule"]}
        schedule = SCHEDULES[settings.pop("type")](**settings)
        name, predicts, time = (str(manifest[key]) for key in ("network", "predicts", "time"))
        null = None if manifest.get("null") is None else operator.index(manifest["null"])
        hashes = dict(manifest["sha256"].items())
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path} is damaged or no model manifest: {error!r}") from error
    for file, expected in hashes.items():
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing, {MANIFEST} names it; get the folder again")
        found = sha256(folder / file)
        if found != expected:
            raise ValueError(
                f"{folder / file} is damaged: SHA-256 is {found}, {MANIFEST} says {expected}; get it again"
            )
    network: Any = _network_class(name).from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
    return Denoiser(Sampled(network, null=null).eval(), schedule, predicts, time=time)


def _check_null(null: int | None, config: Mapping[str, Any]) -> None:
    added = config.get("num_embeds_ada_norm")  # DiT has one more label than it counts
    count = config.get("num_class_embeds") or (added + 1 if added else 0)
    if null is not None and not (isinstance(null, int) and 0 <= null < count):
        raise ValueError(f"null must be one of the network's {count} class labels, counted from 0, got {null!r}")


def _network_class(name: str) -> Any:
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("this network is a diffusers model: pip install 'fastsample[diffusers]'") from error
    kind = getattr(diffusers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.ModelMixin)):
        raise ValueError(
            f"diffusers {diffusers.__version__} has no network {name!r}; install the version it was saved with"
        )
    return kind
