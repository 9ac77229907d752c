"""The trainer: one loop for every `Method`, on accelerate; a run that is killed goes on bit for bit.

Random numbers are stateless: before step k torch is seeded with mix(seed, k), before batch j of epoch e with
mix(seed, e, j). So a checkpoint needs no generators, and the steps after it do not know of the interruption.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastsample import files
from fastsample.denoiser import Denoiser
from fastsample.noise import mix

from . import checkpoint as checkpoints
from .checkpoint import Checkpoint
from .data import Stream
from .log import Log, bar
from .method import Batch, Method
from .role import Role

Decay = Callable[[float], float]


def linear(done: float) -> float:
    """The learning rate falls to 0 in a straight line; done: the share of the run, 0 to 1."""
    return 1 - done


def constant(done: float) -> float:
    """The learning rate stays."""
    return 1.0


def train(
    method: Method,
    loader: Iterable[Batch],
    *,
    steps: int,
    out: str | Path | None = None,
    lr: float = 5e-4,
    decay: Decay = linear,
    warmup: int = 0,
    ema: float = 0.995,
    clip: float = 1.0,
    seed: int = 0,
    precision: str | None = None,
    save_every: int = 500,
    keep: int = 2,
    log_every: int = 10,
    resume: bool = True,
    progress: bool | None = None,
) -> Denoiser:
    """Train every role of a method; return the first with the moving average of its weights, in eval mode.

    loader: gives batches {"x0": images in [-1, 1], "class_labels": ..., ...}, anew each time it is iterated: a
        DataLoader or `Batches`.
    out: the folder of the run: checkpoints step-000500, ... and log.jsonl; None writes nothing.
    lr, decay, warmup: Adam's learning rate; its factor over the run; the steps it takes to rise to lr.
    ema: decay of the moving average, in float32; it begins smaller, so that short runs forget their start.
    clip: largest norm of a role's gradient; math.inf clips none.
    precision: "no", "fp16" or "bf16"; None is what `accelerate launch` was told, else "no".
    save_every, keep: steps between checkpoints, and how many stay.
    resume: go on from the newest checkpoint in `out`, with the weights that an uninterrupted run would have had; a
        warning says where another number of threads, device or torch may change their last digits.
    progress: show a bar; None: on a terminal.
    Raises FloatingPointError where a loss is not finite; the last checkpoint stays.

    The networks are trained in place.
    """
    _check(steps=steps, save_every=save_every, keep=keep, log_every=log_every, lr=lr, warmup=warmup, ema=ema, clip=clip)
    with _accelerator(precision) as accelerator, _generators_kept(accelerator.device):
        data = Stream(loader, seed)
        example = data.first()
        folder = files.folder(out) if out is not None else None
        with _prepared(method, accelerator, lr) as roles:
            training = {
                "lr": lr,
                "decay": getattr(decay, "__name__", type(decay).__name__),
                "warmup": warmup,
                "ema": ema,
                "clip": clip,
                "seed": seed,
                "precision": str(accelerator.mixed_precision),
            }
            configuration = {"steps": steps, "training": training, **_configuration(method, roles, example)}
            done = _resumed(folder, roles, data, accelerator, configuration, resume) if folder else 0
            if done:
                method.after(done - 1)
            with bar(steps, done, progress) as tell, Log(folder, done, log_every) as log:
                for step in range(done, steps):
                    batch = {key: value.to(accelerator.device) for key, value in data.next().items()}
                    torch.manual_seed(mix(seed, step))
                    rate = lr * min(1.0, (step + 1) / max(warmup, 1)) * decay(step / steps)
                    losses = {}
                    for name in method.turns(step):
                        loss = method.loss(name, batch, step)
                        losses[name] = loss.item()
                        norm = roles[name].gradient(loss, accelerator, clip)
                        if not math.isfinite(losses[name]) or not (math.isfinite(norm) or accelerator.scaler):
                            raise FloatingPointError(_burst(name, losses[name], norm, step, steps, folder))
                        roles[name].update(rate)
                        roles[name].follow(min(ema, (1 + step) / (10 + step)))
                    method.after(step)
                    log.add(step, losses, rate)
                    tell(step + 1, losses)
                    if folder and ((step + 1) % save_every == 0 or step + 1 == steps):
                        now = _snapshot(step + 1, roles, data, accelerator)
                        checkpoints.save(folder, now, configuration, keep=keep)
    first = next(iter(roles.values()))
    first.take_average()
    return first.model


@contextlib.contextmanager
def _accelerator(precision: str | None) -> Iterator[Any]:
    """An accelerator of its own precision: by itself, accelerate keeps that of the first run of a process."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'fastsample[train]'") from error
    shared = AcceleratorState._shared_state
    before = dict(shared)
    shared.clear()
    try:
        accelerator = Accelerator(mixed_precision=precision)
        if accelerator.num_processes > 1:
            raise ValueError(
                f"train runs in one process for now, and was started in {accelerator.num_processes}: start it with "
                f"python instead of accelerate launch or torchrun"
            )
        yield accelerator
    finally:
        shared.clear()
        shared.update(before)


def _check(*, lr: float, warmup: int, ema: float, clip: float, **counts: int) -> None:
    for name, number in counts.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    if not 0 <= ema < 1 or not lr > 0 or not clip > 0:
        raise ValueError(f"need 0 <= ema < 1, lr > 0 and clip > 0, got ema = {ema:g}, lr = {lr:g}, clip = {clip:g}")


def _generators_kept(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """What the caller draws next does not depend on the training."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


@contextlib.contextmanager
def _prepared(method: Method, accelerator: Any, lr: float) -> Iterator[dict[str, Role]]:
    """The roles, wrapped by accelerate inside, in eval mode and plain again outside."""
    for model in method.frozen:
        if isinstance(model.network, nn.Module):
            model.network.to(accelerator.device).eval()
    if not method.roles:
        raise ValueError(f"{type(method).__name__} has no roles: there is nothing to train")
    roles: dict[str, Role] = {}
    try:
        for name, model in method.roles.items():
            roles[name] = Role(name, model, accelerator, lr)
        yield roles
    finally:
        for role in roles.values():
            role.model.network = accelerator.unwrap_model(role.network, keep_fp32_wrapper=False).eval()
        accelerator.free_memory()


def _configuration(method: Method, roles: dict[str, Role], example: Batch) -> dict[str, Any]:
    """What must be the same for a run to go on, beside the numbers that `train` was given."""
    return {
        "method": {"name": type(method).__name__, **method.settings()},
        "batch": {key: list(value.shape) for key, value in example.items()},
        "networks": {name: role.shape() for name, role in roles.items()},
        "frozen": {
            **{str(k): _digest(model.network, _tensors(model.network)) for k, model in enumerate(method.frozen)},
            **{name: _digest(role.network, role.fixed) for name, role in roles.items() if role.fixed},
        },
    }


def _tensors(network: Any) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()] if isinstance(network, nn.Module) else []


def _digest(network: Any, tensors: Iterable[Tensor]) -> str:
    """What no checkpoint holds of a network, and may not change either: its class, and the SHA-256 of its tensors."""
    digest = hashlib.sha256()
    for value in tensors:
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{type(network).__name__} {digest.hexdigest()[:16]}"


def _resumed(
    folder: Path, roles: dict[str, Role], data: Stream, accelerator: Any, configuration: dict[str, Any], resume: bool
) -> int:
    """Restore the newest checkpoint; the number of steps that are done."""
    found = checkpoints.folders(folder)
    if not found:
        checkpoints.sweep(folder)
        return 0
    if not resume:
        raise FileExistsError(
            f"{folder} holds {found[-1].name} of an earlier run; pass resume=True, remove it, or choose another folder"
        )
    checkpoint = checkpoints.load(found[-1], configuration)
    checkpoints.sweep(folder)
    changes = checkpoints.differences(checkpoint.machine, _machine(accelerator.device))
    if changes and checkpoint.step < configuration["steps"]:
        warnings.warn(
            f"{found[-1]} was made elsewhere: {'; '.join(changes)}. The run goes on, but the last digits of its "
            f"weights may not be those of an uninterrupted run",
            stacklevel=3,
        )
    for role in roles.values():
        role.restore(checkpoint.tensors)
    if checkpoint.scaler is not None:
        accelerator.scaler.load_state_dict(checkpoint.scaler)
    if checkpoint.step < configuration["steps"]:  # else no batch is wanted, and going there would read an epoch
        data.go_to(*checkpoint.place)
    return checkpoint.step


def _snapshot(step: int, roles: dict[str, Role], data: Stream, accelerator: Any) -> Checkpoint:
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()
    tensors = {key: value for role in roles.values() for key, value in role.tensors().items()}
    return Checkpoint(step, (data.epoch, data.used), _machine(accelerator.device), scaler, tensors)


def _machine(device: torch.device) -> dict[str, str]:
    """What the order of summation, and so the last bits of a result, depends on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": torch.__version__, "device": name, "threads": str(torch.get_num_threads())}


def _burst(role: str, loss: float, norm: float, step: int, steps: int, folder: Path | None) -> str:
    found = checkpoints.folders(folder) if folder else []
    what = f"the gradient of role {role!r} is {norm}" if math.isfinite(loss) else f"the loss of role {role!r} is {loss}"
    return (
        f"{what} at step {step + 1} of {steps}; "
        f"{f'the last good checkpoint is {found[-1]}' if found else 'there is no checkpoint yet'}; "
        f"try a smaller lr, a smaller clip, or precision='bf16' in place of 'fp16'"
    )
