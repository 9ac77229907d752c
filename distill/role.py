"""A model in training, with all that a checkpoint must hold of it."""

from __future__ import annotations

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastsample.denoiser import Denoiser

from . import checkpointing, sharded
from .processes import spread

Optimizer = Callable[..., torch.optim.Optimizer]  # (parameters, lr=...) -> an optimizer


class Role:
    """A model in training: its optimizer, and the moving averages of its weights.

    model.network is wrapped (DDP, FSDP, torch.compile) from `start` to `finish` or `abandon`. Tensors that FSDP shards
    are kept as shards.
    """

    def __init__(
        self,
        name: str,
        model: Denoiser,
        accelerator: Any,
        *,
        lr: float,
        helper: nn.Module | None = None,
    ):
        if not isinstance(model.network, nn.Module):
            raise TypeError(
                f"role {name!r} has a network of type {type(model.network).__name__}; only a torch.nn.Module can be "
                f"trained"
            )
        self.name, self.model, self.accelerator, self.lr = name, model, accelerator, lr
        self.plain = model.network
        fixed = [value for value in self.plain.parameters() if not value.requires_grad]  # what LoRA stands on
        self.fixed = digest(self.plain, fixed) if fixed else None
        if all(not value.requires_grad for value in self.plain.parameters()):
            raise ValueError(f"role {name!r} has no parameter that needs a gradient; call requires_grad_(True) on it")
        self.helper = nn.Module() if helper is None else helper
        self.whole: nn.Module | None = None
        self.prepared: Any = self.plain
        self.trained: dict[str, Tensor] = {}
        self.undo = [checkpointing.forward_kept(self.plain)]  # accelerate puts one of its own there, and leaves it

    def start(
        self,
        *,
        optimizer: Optimizer,
        ema: Sequence[float],
        compiled: bool = False,
        recompute: bool | Sequence[str] = False,
    ) -> None:
        """Wrap the network, and make what trains it. `abandon` follows, also where this fails."""
        accelerator = self.accelerator
        for module in (self.plain, self.helper):
            spread(accelerator, itertools.chain(module.to(accelerator.device).parameters(), module.buffers()))
            module.train()
        if accelerator.is_fsdp2:
            self.whole = copy.deepcopy(self.plain).cpu()  # sharding cannot be undone
        self.undo += checkpointing.start(self.plain, recompute)
        self.prepared = _prepared(self.plain, accelerator)
        self.network = torch.compile(self.prepared) if compiled else self.prepared
        self.model.network = self.network
        self.weights: dict[str, Tensor] = {k: v for k, v in self.plain.named_parameters() if v.requires_grad}
        self.buffers = dict(self.plain.named_buffers())
        aids = dict(self.helper.named_parameters())
        self.aids = {key: value for key, value in aids.items() if value.requires_grad}
        fixed = {key: value for key, value in aids.items() if not value.requires_grad}
        self.aid_buffers = {**dict(self.helper.named_buffers()), **fixed}
        self.trained = {**self.weights, **{f"helper.{key}": value for key, value in self.aids.items()}}
        self.averages = {
            decay: {key: _precise(sharded.local(value.detach())).clone() for key, value in self.weights.items()}
            for decay in ema
        }
        self.inner = optimizer(list(self.trained.values()), lr=self.lr)
        self.groups = [dict(group) for group in self.inner.param_groups]
        self.optimizer = accelerator.prepare_optimizer(self.inner)

    def part(self, last: bool) -> AbstractContextManager[None]:
        """Around the loss of a part of a batch: processes meet at the last alone."""
        return nullcontext() if last else self.accelerator.no_sync(self.prepared)

    def gradient(self, clip: float) -> float:
        """Average the gradients that DDP does not, and clip all; their norm before that.

        Raises ValueError where DDP waits for the gradient of a weight that the loss did not use.
        """
        unused = [key for key, value in self.weights.items() if value.grad is None]
        if unused and isinstance(self.prepared, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"the loss of role {self.name!r} does not use {', '.join(unused[:5])}, and several processes wait for "
                f"its gradient; call requires_grad_(False) on it"
            )
        for value in self.aids.values():
            if value.grad is not None and self.accelerator.num_processes > 1:
                value.grad = self.accelerator.reduce(value.grad, reduction="mean")
        if self.accelerator.scaler is not None:
            # of this role alone: accelerate's clipping would find the infinite ones of another role at each turn again
            self.accelerator.scaler.unscale_(self.inner)
        return float(sharded.clipped(self.trained.values(), clip))

    def update(self, factor: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = self.lr * factor
        self.optimizer.step()

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Move the averages; at first faster than they shall, so that short runs forget their start."""
        now = [_precise(sharded.local(value)) for value in self.weights.values()]
        for decay, average in self.averages.items():
            get_ema_multi_avg_fn(min(decay, (1 + step) / (10 + step)))(list(average.values()), now, 0)

    @contextmanager
    def alone(self, others: Iterable[Role]) -> Iterator[None]:
        """Inside, the other roles are only asked, so their gradients are neither computed nor waited for."""
        others = [role for role in others if role is not self]
        frozen = [value for role in others for value in role.trained.values()]
        for role in others:
            role.model.network = role.plain
        for value in frozen:
            value.requires_grad_(False)
        try:
            yield
        finally:
            for value in frozen:
                value.requires_grad_(True)
            for role in others:
                role.model.network = role.network

    @contextmanager
    def averaged(self) -> Iterator[Denoiser]:
        """Inside, the model with the first moving average of its weights, in eval mode and not wrapped."""
        before = {key: sharded.local(value.detach()).clone() for key, value in self.weights.items()}
        try:
            self._take(next(iter(self.averages.values())))
            self.plain.eval()
            self.model.network = self.plain
            yield self.model
        finally:
            self._take(before)
            self.plain.train()
            self.model.network = self.network

    @torch.no_grad()
    def _take(self, values: Mapping[str, Tensor]) -> None:
        for key, value in self.weights.items():
            sharded.local(value).copy_(values[key])

    def finish(self, average: bool) -> None:
        """Put the plain network back, with its first moving average where that is wanted, in eval mode."""
        if average:
            self._take(next(iter(self.averages.values())))
        spread(self.accelerator, [*self.buffers.values(), *self.aid_buffers.values()])  # BatchNorm's are of a part
        if self.whole is not None:
            tensors = {**dict(self.plain.named_parameters()), **self.buffers}
            own = {**dict(self.whole.named_parameters()), **dict(self.whole.named_buffers())}
            with torch.no_grad():
                for key, value in own.items():
                    value.copy_(sharded.whole(tensors[key]))
        self.abandon()

    def abandon(self) -> None:
        """Put a plain network back, of whatever weights: what follows an error may not wait for other processes."""
        for value in self.trained.values():
            value.grad = None
        if self.whole is None:
            self.accelerator.unwrap_model(self.prepared, keep_fp32_wrapper=False)
        for undo in reversed(self.undo):
            undo()
        self.undo = []
        self.helper.eval()
        network = self.plain if self.whole is None else self.whole
        self.model.network = network.to(self.accelerator.device).eval()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All that a checkpoint must hold of this role: tensors, and the numbers of an optimizer that keeps such."""
        found: dict[str, Tensor] = {f"{self.name}.weight.{k}": sharded.whole(v) for k, v in self.trained.items()}
        buffers = {**self.buffers, **{f"helper.{key}": value for key, value in self.aid_buffers.items()}}
        found |= {f"{self.name}.buffer.{key}": value for key, value in buffers.items()}
        for decay, average in self.averages.items():
            for key, value in average.items():
                found[f"{self.name}.average.{decay}.{key}"] = sharded.whole(sharded.like(value, self.weights[key]))
        numbers = {}
        for key, value in self.trained.items():
            for entry, kept in self.inner.state.get(value, {}).items():
                name = f"{self.name}.optimizer.{entry}.{key}"
                if isinstance(kept, Tensor):
                    found[name] = sharded.whole(kept)
                else:
                    numbers[name] = self._number(entry, kept)
        for k, (group, before) in enumerate(zip(self.inner.param_groups, self.groups, strict=True)):
            for entry, kept in group.items():  # some optimizers count in their groups
                known = before.get(entry)
                if entry not in ("params", "lr") and kept is not known and kept != known:
                    numbers[f"{self.name}.group.{k}.{entry}"] = self._number(entry, kept)
        return found, numbers

    def _number(self, entry: str, kept: Any) -> bool | int | float | None:
        if kept is None or isinstance(kept, bool | int | float):
            return kept
        raise TypeError(
            f"{type(self.inner).__name__} keeps {entry!r} as {type(kept).__name__}, which a checkpoint cannot hold; "
            f"choose an optimizer that keeps tensors and numbers, such as Adam"
        )

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        buffers = {**self.buffers, **{f"helper.{key}": value for key, value in self.aid_buffers.items()}}
        for key, value in self.trained.items():
            sharded.local(value).copy_(sharded.local(sharded.scattered(tensors[f"{self.name}.weight.{key}"], value)))
        for key, value in buffers.items():
            value.copy_(tensors[f"{self.name}.buffer.{key}"])
        for decay, average in self.averages.items():
            for key, value in average.items():
                found = sharded.scattered(tensors[f"{self.name}.average.{decay}.{key}"], self.weights[key])
                value.copy_(sharded.local(found))
        for name, kept in numbers.items():
            if name.startswith(f"{self.name}.group."):
                k, entry = name.removeprefix(f"{self.name}.group.").split(".", 1)
                self.inner.param_groups[int(k)][entry] = kept
        on_device = {
            value: bool(group.get("fused") or group.get("capturable"))
            for group in self.inner.param_groups
            for value in group["params"]
        }
        begin = f"{self.name}.optimizer."
        for name, kept in {**tensors, **numbers}.items():
            if not name.startswith(begin):
                continue
            entry, key = name.removeprefix(begin).split(".", 1)
            value = self.trained[key]
            if isinstance(kept, Tensor) and kept.shape == value.shape and kept.dim():
                kept = sharded.scattered(kept, value)
            elif isinstance(kept, Tensor) and (entry != "step" or on_device[value]):
                kept = kept.to(value.device)
            # else a count of steps stays on the CPU, where Adam keeps it: on a GPU it would wait for it at every step
            self.inner.state[value][entry] = kept

    def shape(self) -> dict[str, Any]:
        return {
            "network": type(self.plain).__name__ if self.whole is None else type(self.whole).__name__,
            "parameters": {key: list(value.shape) for key, value in self.trained.items()},
            "buffers": {key: list(value.shape) for key, value in {**self.buffers, **self.aid_buffers}.items()},
        }


def digest(network: Any, tensors: Iterable[Tensor]) -> str:
    """What no checkpoint holds of a network, and may not change either: its class, and the SHA-256 of its tensors."""
    found = hashlib.sha256()
    for value in tensors:
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return f"{type(network).__name__} {found.hexdigest()[:16]}"


def _prepared(network: nn.Module, accelerator: Any) -> Any:
    """The network as accelerate wraps it. Its optimizer is made after that, of the parameters there are then."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare_model(network)
    stand_in = torch.optim.SGD(network.parameters(), lr=0.0)  # accelerate shards a network with its optimizer alone
    prepared, _ = accelerator.prepare(network, stand_in)
    accelerator._optimizers.pop()
    return prepared


def _precise(value: Tensor) -> Tensor:
    """In float32, or float64: an average in half precision would stand still."""
    return value if value.dtype == torch.float64 else value.float()
