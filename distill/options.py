"""Optimizers and learning rates by name, or given."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from .role import Optimizer

Schedule = Callable[[float], float]  # the share of the run that is done, 0 to 1 -> a factor of the learning rate


def linear(done: float) -> float:
    """The learning rate falls to 0 in a straight line; done: the share of the run, 0 to 1."""
    return 1 - done


def constant(done: float) -> float:
    """The learning rate stays."""
    return 1.0


def cosine(done: float) -> float:
    """The learning rate falls to 0 in half a cosine. Loshchilov and Hutter 2017, arXiv:1608.03983, Eq. 5."""
    return (1 + math.cos(math.pi * done)) / 2


SCHEDULES: dict[str, Schedule] = {"linear": linear, "constant": constant, "cosine": cosine}


def schedule_of(schedule: str | Schedule) -> Schedule:
    if not isinstance(schedule, str):
        return schedule
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; choose one of {', '.join(SCHEDULES)} or pass a function")
    return SCHEDULES[schedule]


def optimizer_of(optimizer: str | Optimizer) -> Optimizer:
    """One of torch.optim by name, or what was given: (parameters, lr=...) -> an optimizer."""
    if not isinstance(optimizer, str):
        return optimizer
    found = getattr(torch.optim, optimizer, None)
    known = [name for name, kind in vars(torch.optim).items() if inspect.isclass(kind) and _is_usable(kind)]
    if optimizer not in known:
        raise ValueError(
            f"unknown optimizer {optimizer!r}; choose one of {', '.join(sorted(known))}, or pass a function such as "
            f"functools.partial(torch.optim.AdamW, weight_decay=0.1)"
        )
    assert found is not None
    usable: Optimizer = found
    return usable


def _is_usable(kind: type) -> bool:
    """Those of gradients alone: LBFGS asks for a closure, SparseAdam for sparse gradients, Muon for matrices."""
    return (
        issubclass(kind, torch.optim.Optimizer)
        and kind is not torch.optim.Optimizer
        and kind.__name__ not in ("LBFGS", "SparseAdam", "Muon")
    )


def settings_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its name and what it was told, without the learning rate, which the trainer sets."""
    plain = bool | int | float | str | None
    told: Mapping[str, Any] = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in optimizer.defaults.items()
        if key != "lr" and isinstance(value, plain | tuple)
    }
    return {"name": type(optimizer).__name__, **told}
