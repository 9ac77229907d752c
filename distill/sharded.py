"""Tensors that FSDP spreads over the processes, and plain ones, under the same names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm


def is_sharded(value: Tensor) -> bool:
    return hasattr(value, "to_local")  # a DTensor; without torch.distributed there is no such class to ask for


def local(value: Tensor) -> Tensor:
    """This process's shard, which shares its memory; a plain tensor itself."""
    sharded: Any = value
    found: Tensor = sharded.to_local() if is_sharded(value) else value
    return found


def whole(value: Tensor) -> Tensor:
    """The whole tensor, on every process; all of them must ask."""
    sharded: Any = value
    found: Tensor = sharded.full_tensor() if is_sharded(value) else value
    return found


def like(shard: Tensor, model: Tensor) -> Tensor:
    """The tensor of which this is the local shard, spread as `model` is."""
    if not is_sharded(model):
        return shard
    from torch.distributed.tensor import DTensor

    spread: Any = model
    return DTensor.from_local(
        shard, spread.device_mesh, spread.placements, run_check=False, shape=model.shape, stride=model.stride()
    )


def scattered(value: Tensor, model: Tensor) -> Tensor:
    """The whole tensor spread as `model` is, on its device."""
    value = value.to(local(model).device)
    if not is_sharded(model):
        return value
    from torch.distributed.tensor import distribute_tensor

    spread: Any = model
    return distribute_tensor(value, spread.device_mesh, spread.placements)


def clipped(parameters: Iterable[Tensor], largest: float) -> Tensor:
    """Scale the gradients, sharded or not, to a norm of at most `largest` together; their norm before that.

    All processes must ask.
    """
    with_gradient = [value for value in parameters if value.grad is not None]
    plain = [value for value in with_gradient if not is_sharded(value)]
    shards = [value for value in with_gradient if is_sharded(value)]
    groups = [group for group in (plain, shards) if group]
    norms = [whole(get_total_norm([value.grad for value in group if value.grad is not None])) for group in groups]
    norm = norms[0] if len(norms) == 1 else get_total_norm(norms)
    clip_grads_with_norm_(plain, largest, norm)
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)  # as torch does it
    for value in shards:
        if value.grad is not None:
            local(value.grad).mul_(factor)
    return norm
