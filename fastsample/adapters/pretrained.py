"""Networks on disk: their weights, plus `fastsample.json`, which says how to use them.

`fastsample.json` holds what the network predicts, its schedule, its time convention, of a student its plan, guidance
and the hash of its teacher, and the SHA-256 of every other file; a folder whose files do not match is refused. Of a
diffusers network the folder is what diffusers writes, with a `scheduler_config.json` beside it, so that a pipeline
samples it as it is meant to be.
"""

from __future__ import annotations

import hashlib
import json
import math
import operator
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..card import Card
from ..denoiser import TIMES, Denoiser, Model
from ..files import folder as make_folder
from ..files import readable, sha256
from ..plan import Plan
from ..sampling import check_schedule
from ..schedule import EDM, VP, Flow, Schedule, TrigFlow, VPContinuous
from .diffusers import Sampled
from .scheduler_config import NAME as SCHEDULER
from .scheduler_config import scheduler_config

MANIFEST, PLAN, WEIGHTS = "fastsample.json", "plan.json", "model.safetensors"
VERSION = 1
SCHEDULES: dict[str, type[Schedule]] = {kind.__name__: kind for kind in (VP, VPContinuous, EDM, Flow, TrigFlow)}


@dataclass(frozen=True)
class Form:
    """A denoiser that is more than a network with a schedule; a wing that has one puts it into `FORMS`, by its name.

    taken: a model -> its network and what else is to be known, as JSON; None where it is not of this form.
    restored: (network, schedule, predicts, time, what taken gave) -> the model.
    scheduler: (model, plan) -> the configuration of a diffusers scheduler, or None, see `scheduler_config`.
    """

    taken: Callable[[Denoiser], tuple[Any, dict[str, Any]] | None]
    restored: Callable[[Any, Schedule, str, str, Mapping[str, Any]], Denoiser]
    scheduler: Callable[[Denoiser, Plan | None], dict[str, Any] | None]


FORMS: dict[str, Form] = {}


def save_pretrained(
    model: Denoiser,
    folder: str | Path,
    *,
    null: int | None = None,
    plan: Plan | None = None,
    guidance: float | tuple[float, float] | None = None,
    teacher: Model | str | None = None,
) -> None:
    """Write a denoiser so that `from_pretrained` can load it, and diffusers itself where it is a network of diffusers.

    Of another torch network the weights are written, and `from_pretrained` is given the network again.

    null: the class label that means no class, which guidance needs; None: that the model was loaded with, if any.
    plan: what a student is to be sampled by; also written as plan.json, and into scheduler_config.json.
    guidance: the scale that was distilled into it, or the range (low, high) of scales that it can be told.
    teacher: of which the hash of its weights is kept, or that hash.

    The files are whole before they take the place of earlier ones: a full disk leaves those as they were. The manifest
    is the last: a folder without a matching one was not finished, and is refused when loaded.
    Raises ValueError for what cannot be saved, OSError, naming the folder, where it cannot be written.
    """
    form, network, settings = _taken(model)
    sampled = network if isinstance(network, Sampled) else None
    if not isinstance(network, nn.Module) or not any(True for _ in network.state_dict()):
        raise ValueError(
            f"save_pretrained needs a network with weights, a torch.nn.Module, got {type(network).__name__}; wrap the "
            f"network itself, fs.Denoiser(network, ...) or fs.from_diffusers, and not a function that calls it"
        )
    if sampled is not None:
        null = sampled.null if null is None else null
        _check_null(null, sampled.config)
    elif null is not None:
        raise ValueError(f"null = {null} is of class labels of diffusers networks; {type(network).__name__} is another")
    names = [name for name, time in TIMES.items() if time is model.time]
    if not names:
        raise ValueError(
            f"the model's time is a function of your own, which cannot be saved; use one of {', '.join(TIMES)}"
        )
    if type(model.schedule) not in SCHEDULES.values():
        raise ValueError(
            f"{model.schedule!r} is a schedule of your own, which cannot be saved; use one of {', '.join(SCHEDULES)}"
        )
    if plan is not None:
        check_schedule(plan, model.schedule)
    _check_guidance(guidance)
    inner: Any = network if sampled is None else sampled.network
    inner = getattr(inner, "_orig_mod", inner)  # what torch.compile was given
    _check_adapters(inner)
    manifest = {
        "format": "fastsample.model",
        "version": VERSION,
        "network": type(inner).__name__,
        **({"weights": WEIGHTS} if sampled is None else {}),
        "predicts": model.prediction.name,
        "time": names[0],
        "schedule": {"type": type(model.schedule).__name__, **asdict(model.schedule)},  # type: ignore[call-overload]
        **({} if form is None else {"form": {"name": form, **settings}}),
        **({} if null is None else {"null": null}),
        **({} if plan is None else {"steps": plan.nfe, "plan": PLAN}),
        **({} if guidance is None else {"guidance": guidance}),
        **({} if teacher is None else {"teacher": teacher if isinstance(teacher, str) else weights_hash(teacher)}),
    }
    scheduler = FORMS[form].scheduler(model, plan) if form else scheduler_config(model, plan)

    def fill(place: Path) -> None:
        if sampled is None:
            _save_weights(inner, place / WEIGHTS)
        else:
            inner.save_pretrained(place, safe_serialization=True)
        if plan is not None:
            plan.save(place / PLAN)
        if sampled is not None and scheduler is not None:
            (place / SCHEDULER).write_text(json.dumps(scheduler, indent=1, allow_nan=False) + "\n", encoding="utf-8")

    _replace(make_folder(folder), fill, manifest)


def from_pretrained(folder: str | Path, *, network: nn.Module | None = None) -> Denoiser:
    """Load what `save_pretrained` wrote, in evaluation mode.

    network: of a torch network that is none of diffusers', one of the same shape, into which the weights are loaded.

    `model.card` has its plan, guidance and teacher, as far as they were saved, and `model.plan` is that plan;
    `model.network.null` is the label of no class of a diffusers network, or None.
    Raises FileNotFoundError for a folder without `fastsample.json` or without a file that it names, ValueError for
    files that are damaged, of another version, or do not match their SHA-256, and for weights that do not fit.
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
        guidance, plan_file, weights = _guidance(manifest), manifest.get("plan"), manifest.get("weights")
        if plan_file not in (None, *hashes) or weights not in (None, *hashes):
            raise ValueError(f"its plan {plan_file} or its weights {weights} are not among its files")
        teacher = None if manifest.get("teacher") is None else str(manifest["teacher"])
        form = {**manifest.get("form", {})}
        kind = str(form.pop("name")) if form else None
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
    if kind is not None and kind not in FORMS:
        raise ValueError(f"{folder} holds a network in the form {kind!r}; import fastsample.distill, which knows it")
    loaded: Any
    if weights is None:
        if network is not None:
            raise ValueError(f"{folder} holds a {name} of diffusers, which needs no network; leave out network=")
        inner: Any = _network_class(name).from_pretrained(folder, use_safetensors=True, low_cpu_mem_usage=False)
        loaded = Sampled(inner, null=null)
    else:
        if network is None:
            raise ValueError(
                f"{folder} holds the weights of a {name}, a torch network of your own; pass one of the same shape: "
                f"fs.from_pretrained(folder, network={name}(...))"
            )
        loaded = _load_weights(network, folder / weights)
    plan = None if plan_file is None else Plan.load(folder / plan_file)
    loaded.eval()
    if kind is None:
        model = Denoiser(loaded, schedule, predicts, time=time)
    else:
        model = FORMS[kind].restored(loaded, schedule, predicts, time, form)
    model.card = Card(plan, guidance, teacher)
    return model


def weights_hash(model: Model) -> str:
    """SHA-256 of the names, types, shapes and numbers of a network's tensors; of a guided model, of what it guides."""
    while not isinstance(model, Denoiser):
        inside = getattr(model, "model", None)
        if inside is None:
            raise TypeError(f"only a denoiser of a torch network has weights, got {model!r}")
        model = inside
    if not isinstance(model.network, nn.Module):
        raise TypeError(f"only a torch network has weights, got {type(model.network).__name__}")
    found = hashlib.sha256()
    for name, value in sorted(model.network.state_dict().items()):
        if isinstance(value, Tensor):
            data = value.detach().cpu().contiguous()
            found.update(f"{name} {data.dtype} {tuple(data.shape)} ".encode())
            found.update(data.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _taken(model: Denoiser) -> tuple[str | None, Any, dict[str, Any]]:
    """The name of the form, the network in it, and what else it says."""
    for name, form in FORMS.items():
        if (found := form.taken(model)) is not None:
            return name, *found
    if type(model) is not Denoiser:
        raise ValueError(
            f"save_pretrained knows no way to save a {type(model).__name__}; give the fs.Denoiser of the network itself"
        )
    return None, model.network, {}


def _replace(target: Path, fill: Callable[[Path], None], manifest: dict[str, Any]) -> None:
    """Write all files aside; then only rename, which needs no space, the manifest last."""
    names = _named(target)
    try:
        with tempfile.TemporaryDirectory(dir=target, prefix=".saving-") as temporary:
            place = Path(temporary)
            fill(place)
            files = sorted(path.name for path in place.iterdir())
            body = {**manifest, "sha256": {name: sha256(place / name) for name in files}}
            (place / MANIFEST).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")
            for name in (*files, MANIFEST):
                readable(place / name)
                with (place / name).open("rb+") as file:
                    os.fsync(file.fileno())
            (target / MANIFEST).unlink(missing_ok=True)
            for name in (*files, MANIFEST):
                (place / name).replace(target / name)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"cannot write the model into {target}: {error}; free some space or choose another folder. What was there "
            f"before is as it was"
        ) from error
    for name in names - {*files}:
        (target / name).unlink(missing_ok=True)


def _named(target: Path) -> set[str]:
    """The files of the model that was here before: those that the new one lacks, such as a plan, would mislead."""
    with suppress(OSError, ValueError, AttributeError, KeyError, TypeError):
        names = json.loads((target / MANIFEST).read_text(encoding="utf-8"))["sha256"].keys()
        return {name for name in names if Path(name).name == name}
    return set()


def _save_weights(network: nn.Module, path: Path) -> None:
    from safetensors.torch import save_model

    save_model(network, str(path))


def _load_weights(network: nn.Module, path: Path) -> nn.Module:
    from safetensors.torch import load_model

    try:
        load_model(network, str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the {type(network).__name__} that was given: {error}") from error
    return network


def _check_guidance(guidance: Any) -> None:
    numbers = guidance if isinstance(guidance, tuple | list) else [guidance]
    wrong = any(isinstance(n, bool) or not isinstance(n, int | float) or not math.isfinite(n) for n in numbers)
    if guidance is not None and (wrong or (numbers is guidance and len(numbers) != 2)):
        raise ValueError(f"guidance must be a scale or the range (low, high) of scales, got {guidance!r}")


def _check_adapters(network: nn.Module) -> None:
    """Their weights would be saved under names that no loader of the network itself knows."""
    if any(hasattr(module, "get_base_layer") for module in network.modules()):  # as all layers of peft
        raise ValueError(
            f"this {type(network).__name__} has adapters of peft; save distill.merged(student), in which they are "
            f"added to the weights, or the adapters alone: distill.save_lora(student, folder)"
        )


def _guidance(manifest: Mapping[str, Any]) -> float | tuple[float, float] | None:
    found = manifest.get("guidance")
    _check_guidance(found)
    return (float(found[0]), float(found[1])) if isinstance(found, list) else found


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
