"""Random numbers of one update, the same whether its batch is on one process or cut into parts.

A `Method` draws by these functions what it draws for each sample: the first dimension is that of the samples it was
given. The trainer says which part of the whole batch they are; every process draws for the whole and keeps its part.
Outside of training they are torch's own functions. What a network draws, dropout, comes from torch's generator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Part:
    """The samples `first` to `first + count` of a batch of `total`, and the generator of the whole."""

    generator: torch.Generator
    first: int
    count: int
    total: int


_part: ContextVar[Part | None] = ContextVar("part", default=None)


@contextmanager
def part(generator: torch.Generator, *, first: int, count: int, total: int) -> Iterator[None]:
    """Inside, the functions of this module draw for this part of a batch."""
    token = _part.set(Part(generator, first, count, total))
    try:
        yield
    finally:
        _part.reset(token)


def randn(*shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Unit normal numbers, shape [B, ...], B the samples of this part."""
    return _drawn(torch.randn, shape, device=device, dtype=dtype)


def randn_like(x: Tensor) -> Tensor:
    """Unit normal numbers for x [B, ...]."""
    return randn(*x.shape, device=x.device, dtype=x.dtype)


def rand(*shape: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Uniform numbers in [0, 1), shape [B, ...]."""
    return _drawn(torch.rand, shape, device=device, dtype=dtype)


def randint(high: int, *shape: int, device: torch.device | str | None = None) -> Tensor:
    """Whole numbers from 0 to high - 1, shape [B, ...]."""
    return _drawn(lambda size, **options: torch.randint(high, size, **options), shape, device=device)


def place(size: int) -> tuple[int, int]:
    """The place of the first of these samples in the whole batch of an update, and the samples of that."""
    own = _part.get()
    return (0, size) if own is None else (own.first, own.total)


def _drawn(draw: Callable[..., Tensor], shape: tuple[int, ...], **options: Any) -> Tensor:
    own = _part.get()
    if own is None:
        return draw(shape, **options)
    if shape[0] != own.count:
        raise ValueError(
            f"numbers for {shape[0]} samples were asked for, the batch has {own.count}; draw for all of them and "
            f"choose after that, so that they do not depend on how the batch is split"
        )
    options["device"] = torch.device(options["device"] or own.generator.device)
    if options["device"].type != own.generator.device.type:
        raise ValueError(f"numbers on {options['device']} were asked for, the batch is on {own.generator.device}")
    whole = draw((own.total, *shape[1:]), generator=own.generator, **options)
    return whole if own.count == own.total else whole[own.first : own.first + own.count].clone()
