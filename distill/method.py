"""What a distillation or training method is: the networks it trains, and a loss for each.

Methods name *roles*, because some of them train a critic beside the student; one trainer serves them all.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastsample.denoiser import Denoiser, Model
from fastsample.wrapper import Wrapper

from . import draws

D = TypeVar("D", bound=Denoiser)
Batch = dict[str, Tensor]  # "x0": images [B, ...] in [-1, 1]; the other keys are the network's conditions


class Method:
    """What `train` runs. A subclass gives `roles` and `loss`; most are dataclasses, whose fields are then `settings`.

    Draw random numbers by `distill.draws` (`draws.randn_like(x0)`): they are seeded by the number of the step and do
    not depend on how the batch is split over processes, so that a run that was stopped goes on exactly as it would
    have. Dropout is seeded by the step too.

    A loss is a mean over the samples of the batch it is given, which may be a part of the whole.
    """

    @property
    def roles(self) -> dict[str, Denoiser]:
        """The models that are trained, by role. The first is what `train` returns."""
        raise NotImplementedError(f"{type(self).__name__} must define roles, such as {{'student': self.student}}")

    @property
    def frozen(self) -> Sequence[Denoiser]:
        """The models that are only asked: the trainer moves them to its device and puts them in eval mode."""
        return ()

    @property
    def helpers(self) -> Mapping[str, nn.Module]:
        """Modules that are trained with a role, by its name, and are no part of its model: an adaptive weight, a
        discriminator's head. They have the role's optimizer, and its checkpoints.
        """
        return {}

    @property
    def kept(self) -> Mapping[str, nn.Module]:
        """Modules that the method itself changes in `after`, such as a moving average: only put on the device, in eval
        mode, and written to checkpoints with their parameters and buffers.
        """
        return {}

    def turns(self, step: int) -> Sequence[str]:
        """The roles that are updated at this step (the first is step 0), in order."""
        return tuple(self.roles)

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        """The loss of `role`: a float32 scalar with a gradient to that role's parameters."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(role, batch, step)")

    def after(self, step: int) -> None:
        """Called after the updates of `step`, by every process; not called again for steps before a resume."""

    def settings(self) -> dict[str, Any]:
        """What a checkpoint remembers of the method, and compares when it is resumed."""
        names: list[str] = [field.name for field in dataclasses.fields(self)] if dataclasses.is_dataclass(self) else []
        return {name: described(getattr(self, name)) for name in names}


def described(value: Any) -> Any:
    """A setting as JSON can hold it: numbers and text as they are, a model by network, schedule and prediction."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Denoiser):
        return f"{value.prediction.name} of {type(value.network).__name__}, {value.schedule!r}"
    if isinstance(value, Wrapper):
        return {"name": type(value).__name__, **{key: described(item) for key, item in _fields(value).items()}}
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [described(item) for item in value]
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 16 else f"tensor {tuple(value.shape)}"
    name: str | None = getattr(value, "__name__", None)
    if name is None and dataclasses.is_dataclass(value):
        fields = {
            field.name: described(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init
        }
        return {"name": type(value).__name__, **fields}
    return name or type(value).__name__


def asked(model: Model) -> list[Denoiser]:
    """The denoisers that a model asks: itself, or those that guidance and its like are wrapped around, the main first.

    Raises TypeError where there is another model below.
    """
    if isinstance(model, Denoiser):
        return [model]
    if not isinstance(model, Wrapper):
        raise TypeError(f"a teacher must be an fs.Denoiser or a wrapper of one, such as fs.Guided, got {model!r}")
    inside = [value for value in _fields(model).values() if isinstance(value, Denoiser | Wrapper)]
    return [denoiser for value in inside for denoiser in asked(value)]


def _fields(wrapper: Wrapper) -> dict[str, Any]:
    return {field.name: getattr(wrapper, field.name) for field in dataclasses.fields(wrapper) if field.init}


def plain(model: D) -> D:
    """The same denoiser without what training wraps its network in (DDP, torch.compile): for work without gradients,
    for `torch.func` and for `after`. Gradients through it would not be averaged over the processes.
    """
    found = copy.copy(model)
    found.network = unwrapped(model.network)
    return found


def unwrapped(network: Any) -> Any:
    """The network below DDP and torch.compile."""
    while True:
        inside = getattr(network, "_orig_mod", None)
        if inside is None and isinstance(network, nn.parallel.DistributedDataParallel):
            inside = network.module
        if inside is None:
            return network
        network = inside


def device_of(model: Model) -> torch.device:
    """Where a model's networks are; the CPU where they have no tensors."""
    networks = [denoiser.network for denoiser in asked(model) if isinstance(denoiser.network, nn.Module)]
    tensors = (value for network in networks for value in [*network.parameters(), *network.buffers()])
    return next((value.device for value in tensors), torch.device("cpu"))


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """Inside, the networks are in eval mode: no dropout in what a teacher says."""
    networks = [denoiser.network for denoiser in asked(model) if isinstance(denoiser.network, nn.Module)]
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def conditions(batch: Batch) -> Batch:
    """The batch without its images."""
    return {key: value for key, value in batch.items() if key != "x0"}


def dropped(condition: Batch, null: Mapping[str, float | Tensor], share: float) -> Batch:
    """The conditions with a random `share` of the samples set to `null`, all conditions of a sample together.

    null: the value that means "none" for each condition: a number, or a tensor of one sample's shape. A condition
        that it does not name is kept.
    Raises ValueError where it names one that the batch lacks. Ho and Salimans 2022, arXiv:2207.12598, Alg. 1.
    """
    if not share:
        return condition
    if lacking := null.keys() - condition.keys():
        raise ValueError(
            f"null names {sorted(lacking)}, but the conditions of the batch are {sorted(condition)}; use their names"
        )
    size, device = next((len(value), value.device) for value in condition.values())
    drop = draws.rand(size, device=device) < share
    return {key: _where(drop, null[key], value) if key in null else value for key, value in condition.items()}


def check_drop(share: float, null: Mapping[str, float | Tensor]) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"drop is a share from 0 to 1, got {share:g}")
    if share and not null:
        raise ValueError(
            f"drop = {share:g} needs the values that mean no condition: null={{'class_labels': 10}} for an "
            f"eleventh class, for example"
        )


def _where(drop: Tensor, null: float | Tensor, value: Tensor) -> Tensor:
    nothing = torch.as_tensor(null, dtype=value.dtype, device=value.device)
    return torch.where(drop.view(-1, *[1] * (value.dim() - 1)), nothing, value)
