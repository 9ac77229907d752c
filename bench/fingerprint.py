"""A hash of a model: its weights, and the numbers of the wrappers around them."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from fastsample.denoiser import Denoiser

USED = torch.nn.Module | Tensor | Denoiser  # of what stands around a function; numbers may count its calls


def fingerprint(model: Any) -> str:
    """16 hex digits, the same in every process.

    Of plain functions their names, and the networks and tensors that they use, are known, not what they do with them.
    """
    return _Digest().add(model).hex


class _Digest:
    def __init__(self) -> None:
        self._hash, self._open = hashlib.sha256(), set[int]()

    @property
    def hex(self) -> str:
        return self._hash.hexdigest()[:16]

    def add(self, value: Any) -> _Digest:
        if isinstance(value, str | bytes | int | float | complex | type(None) | torch.dtype | torch.device):
            return self._say(f"{type(value).__name__} {value!r}")
        if isinstance(value, Tensor):
            return self._tensor(value)
        if id(value) in self._open:  # what holds itself
            return self._say("again")
        self._open.add(id(value))
        self._say(f"{type(value).__qualname__} {getattr(value, '__qualname__', '')}")
        for name, part in _parts(value).items():
            self._say(str(name)).add(part)
        self._open.remove(id(value))
        return self

    def _say(self, text: str) -> _Digest:
        self._hash.update(f"{len(text)}:{text}".encode())
        return self

    def _tensor(self, tensor: Tensor) -> _Digest:
        self._say(f"{tensor.dtype} {list(tensor.shape)}")
        if tensor.device.type != "meta":
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            self._hash.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
        return self


def _parts(value: Any) -> Mapping[Any, Any]:
    """What an object consists of, as far as it counts."""
    if isinstance(value, torch.nn.Module):
        return dict(value.state_dict())
    if isinstance(value, Denoiser):
        return {name: getattr(value, name) for name in ("network", "schedule", "prediction", "time", "dtype")}
    if isinstance(value, Mapping):
        return value
    if isinstance(value, list | tuple):
        return dict(enumerate(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields(value) if field.init}
    if isinstance(value, FunctionType):
        return _used(value)
    if isinstance(value, MethodType):
        return {"self": value.__self__}
    if isinstance(value, partial):
        return {"func": value.func, "args": value.args, "keywords": value.keywords}
    # A model or a network in a class of its own: what stands under the names that ours use.
    return {
        name: getattr(value, name) for name in ("model", "network", "weak") if getattr(value, name, None) is not None
    }


def _used(function: FunctionType) -> Mapping[str, Any]:
    """What a function takes from around it: the network in `lambda x, t: network(x, t)`."""
    found = inspect.getclosurevars(function)
    around = {**found.globals, **found.nonlocals}
    return {name: around[name] for name in sorted(around) if isinstance(around[name], USED)}
