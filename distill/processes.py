"""Processes: what accelerate starts a run in, and how they agree."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch


@contextlib.contextmanager
def accelerator_of(precision: str | None, trackers: Sequence[str], out: str | Path | None) -> Iterator[Any]:
    """An accelerator of its own precision: by itself, accelerate keeps that of the first run of a process."""
    try:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, GradientState
        from accelerate.utils import DistributedType
    except ImportError as error:
        raise ImportError("training needs accelerate: pip install 'fastsample[train]'") from error
    if trackers and out is None:
        raise ValueError(f"trackers ({', '.join(trackers)}) need a folder to write to; give out='runs/one'")
    shared = [AcceleratorState._shared_state, GradientState._shared_state]
    before = [dict(state) for state in shared]
    for state in shared:
        state.clear()
    try:
        accelerator = Accelerator(mixed_precision=precision, log_with=_available(trackers), project_dir=out)
        kind = accelerator.distributed_type
        if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.XLA):
            raise ValueError(f"train knows DDP and FSDP 2, and was started under {kind.value}; run accelerate config")
        if kind == DistributedType.FSDP and not accelerator.is_fsdp2:
            raise ValueError(
                "train knows FSDP 2, and was started under FSDP 1; set fsdp_version: 2 (accelerate config)"
            )
        if kind == DistributedType.FSDP and accelerator.state.fsdp_plugin.activation_checkpointing:
            raise ValueError(
                "FSDP was told to checkpoint activations, which renames the weights; set "
                "fsdp_activation_checkpointing: false (accelerate config), and pass checkpointing to train"
            )
        if (number := accelerator.gradient_accumulation_steps) != 1:
            raise ValueError(
                f"accelerate was told to accumulate the gradients of {number} steps; leave that out (accelerate "
                f"config), and pass accumulate={number} to train"
            )
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != accelerator.num_processes:
            raise ValueError(
                f"{started} processes were started (WORLD_SIZE), accelerate joins {accelerator.num_processes}: each "
                f"would train alone; without a GPU set ACCELERATE_USE_CPU=true"
            )
        yield accelerator
    finally:
        for state, kept in zip(shared, before, strict=True):
            state.clear()
            state.update(kept)


def _available(trackers: Sequence[str]) -> list[str] | None:
    """The same names, where what they need is installed; accelerate would leave the others out in silence."""
    if not trackers:
        return None
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS
    from accelerate.utils import is_tensorboard_available, is_wandb_available

    known = sorted(str(getattr(name, "value", name)) for name in LOGGER_TYPE_TO_CLASS)
    for name in trackers:
        if name not in known:
            raise ValueError(f"unknown tracker {name!r}; accelerate has {', '.join(known)}")
        installed = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}.get(name)
        if installed is not None and not installed():
            raise ImportError(f"the tracker {name} is not installed: pip install {name}")
    return list(trackers)


def on_main(accelerator: Any, work: Callable[[], object]) -> None:
    """Do what the first process alone does, and the others wait for. Raises on all of them where it fails."""
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            work()
        except Exception as caught:
            error = caught
    told = agreed(accelerator, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if told is not None:
        raise RuntimeError(f"the first process failed: {told}")


def agreed(accelerator: Any, value: Any) -> Any:
    """What the first process says, on all."""
    if accelerator.num_processes == 1:
        return value
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def summed(accelerator: Any, value: torch.Tensor) -> torch.Tensor:
    """The sum over the processes, on all."""
    found: torch.Tensor = accelerator.reduce(value, reduction="sum") if accelerator.num_processes > 1 else value
    return found


@torch.no_grad()
def spread(accelerator: Any, tensors: Iterable[torch.Tensor]) -> None:
    """Give all processes the first one's values."""
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import broadcast

    for value in tensors:
        value.copy_(broadcast(value.detach().clone(memory_format=torch.contiguous_format)))
