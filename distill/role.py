"""A model in training, with all that a checkpoint must hold of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastsample.denoiser import Denoiser


class Role:
    """A model in training: its optimizer, and the moving average of its weights."""

    def __init__(self, name: str, model: Denoiser, accelerator: Any, lr: float):
        if not isinstance(model.network, nn.Module):
            raise TypeError(
                f"role {name!r} has a network of type {type(model.network).__name__}; only a torch.nn.Module can be "
                f"trained"
            )
        self.name, self.model = name, model
        network = model.network.to(accelerator.device).train()
        self.weights: dict[str, Tensor] = {
            key: value for key, value in network.named_parameters() if value.requires_grad
        }
        self.fixed = [value for value in network.parameters() if not value.requires_grad]  # what LoRA stands on
        if not self.weights:
            raise ValueError(f"role {name!r} has no parameter that needs a gradient; call requires_grad_(True) on it")
        self.buffers = dict(network.named_buffers())
        self.average = {key: value.detach().float().clone() for key, value in self.weights.items()}
        self.inner = torch.optim.Adam(self.weights.values(), lr=lr)
        self.network, self.optimizer = accelerator.prepare(network, self.inner)
        model.network = self.network

    def gradient(self, loss: Tensor, accelerator: Any, clip: float) -> float:
        """Fill the gradients of this role, clipped; their norm before that."""
        self.optimizer.zero_grad()
        accelerator.backward(loss)
        return float(accelerator.clip_grad_norm_(list(self.weights.values()), clip))

    def update(self, lr: float) -> None:
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        now = [value.float() for value in self.weights.values()]
        torch._foreach_lerp_(list(self.average.values()), now, 1 - decay)

    @torch.no_grad()
    def take_average(self) -> None:
        for key, value in self.weights.items():
            value.copy_(self.average[key])

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint must hold of this role."""
        found: dict[str, Tensor] = {f"{self.name}.weight.{key}": value for key, value in self.weights.items()}
        found |= {f"{self.name}.buffer.{key}": value for key, value in self.buffers.items()}
        found |= {f"{self.name}.average.{key}": value for key, value in self.average.items()}
        for key, value in self.weights.items():
            state = self.inner.state.get(value, {})
            found |= {f"{self.name}.adam.{entry}.{key}": tensor for entry, tensor in state.items()}
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        kinds = (("weight", self.weights), ("buffer", self.buffers), ("average", self.average))
        for kind, own in kinds:
            for key, value in own.items():
                value.copy_(tensors[f"{self.name}.{kind}.{key}"])
        for key, value in self.weights.items():
            entries = {entry: f"{self.name}.adam.{entry}.{key}" for entry in ("step", "exp_avg", "exp_avg_sq")}
            if entries["step"] in tensors:
                moments = {entry: tensors[name] for entry, name in entries.items()}
                # Adam keeps its count of steps on the CPU: on a GPU it would wait for it at every step
                self.inner.state[value] = {k: v if k == "step" else v.to(value.device) for k, v in moments.items()}

    def shape(self) -> dict[str, Any]:
        return {
            "network": type(self.network).__name__,
            "parameters": {key: list(value.shape) for key, value in self.weights.items()},
            "buffers": {key: list(value.shape) for key, value in self.buffers.items()},
        }
