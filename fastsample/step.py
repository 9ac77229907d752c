"""The update of one row of a plan, as an op: the kernels register a faster CUDA implementation of it.

m = p x + q x0;   next x = a x + sum_j b_j m_j + sum_j c_j z_j      (m_0 = m, then `memory`, newest first)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .plan import Row
from .table import Mixed, Number

LIBRARY = torch.library.Library("fastsample", "DEF")
LIBRARY.define(
    "plan_step(Tensor x, Tensor x0, Tensor[] memory, Tensor[] noises, float p, float q, float a, float[] b, float[] c) "
    "-> (Tensor, Tensor)"
)


def reference(
    x: Tensor,
    x0: Tensor,
    memory: Sequence[Tensor],
    noises: Sequence[Tensor],
    p: float,
    q: float,
    a: float,
    b: Sequence[float],
    c: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """What the op means, on any device: (the next x, m)."""
    m = _remembered(x, x0, p, q)
    return _sum(x, (m, *memory), noises, a, b, c), m


LIBRARY.impl("plan_step", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("fastsample::plan_step", lib=LIBRARY)
def _(x, x0, memory, noises, p, q, a, b, c):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(x0)


def plan_step(
    x: Tensor, x0: Tensor, memory: Sequence[Tensor], noises: Sequence[Tensor], row: Row
) -> tuple[Tensor, Tensor]:
    """Apply one row of a plan: (the next x, what is remembered of this evaluation).

    On a CPU no kernel replaces the op, and the way through the dispatcher costs as much as the sums. There x0 itself is
    what is remembered where m = x0: the op would have to copy it.
    """
    if not x.is_cpu:
        op: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fastsample.plan_step.default
        return op(x, x0, memory, noises, row.p, row.q, row.a, row.b, row.c)
    m = x0 if (row.p, row.q) == (0, 1) else _remembered(x, x0, row.p, row.q)
    return _sum(x, (m, *memory), noises, row.a, row.b, row.c), m


def affine_step(x: Tensor, output: Tensor, u: float, w: float, noises: Sequence[Tensor], row: Row) -> Tensor:
    """`plan_step` of a row of which nothing is remembered, x0 = u x + w output: the next x alone.

    The factors are joined on the host in float64: two sums less, and less rounding.
    """
    (b,) = row.b or (0.0,)
    a, b = row.a + b * (row.p + row.q * u), b * row.q * w
    if not x.is_cpu:
        op: Callable[..., tuple[Tensor, Tensor]] = torch.ops.fastsample.plan_step.default
        return op(x, output, [], noises, 0.0, 1.0, a, (b,), row.c)[0]
    return _sum(x, (output,), noises, a, (b,), row.c)


def mixed_step(
    x: Tensor, x0: Tensor, memory: Sequence[Tensor], noises: Sequence[Tensor], row: Mixed
) -> tuple[Tensor, Tensor]:
    """As `plan_step`, for a row whose numbers may differ from sample to sample."""
    m = _plus(x0 * row.q, x, row.p)
    out = x * row.a
    for tensors, numbers in (((m, *memory), row.b), (noises, row.c)):
        for tensor, number in zip(tensors, numbers, strict=False):
            out = _plus(out, tensor, number)
    return out, m


def _remembered(x: Tensor, x0: Tensor, p: float, q: float) -> Tensor:
    m = x0 * q
    return m.add_(x, alpha=p) if p else m


def _sum(
    x: Tensor, memory: Sequence[Tensor], noises: Sequence[Tensor], a: float, b: Sequence[float], c: Sequence[float]
) -> Tensor:
    out = x * a
    for tensor, number in zip(memory, b, strict=False):
        if number:
            out.add_(tensor, alpha=number)
    for tensor, number in zip(noises, c, strict=False):
        if number:
            out.add_(tensor, alpha=number)
    return out


def _plus(x: Tensor, y: Tensor, number: Number) -> Tensor:
    if isinstance(number, Tensor):
        return x.addcmul_(y, number)
    return x.add_(y, alpha=number) if number else x
