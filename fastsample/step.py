"""The update of one row of a plan, as an op: the kernels register a faster CUDA implementation of it.

m = p x + q x0;   next x = a x + sum_j b_j m_j + sum_j c_j z_j      (m_0 = m, then `memory`, newest first)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .plan import Row

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
    m = x0 * q
    if p:
        m.add_(x, alpha=p)
    out = x * a
    for number, tensor in [*zip(b, (m, *memory), strict=False), *zip(c, noises, strict=False)]:
        out.add_(tensor, alpha=number)
    return out, m


LIBRARY.impl("plan_step", reference, "CompositeExplicitAutograd")


@torch.library.register_fake("fastsample::plan_step", lib=LIBRARY)
def _(x, x0, memory, noises, p, q, a, b, c):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), torch.empty_like(x0)


def plan_step(
    x: Tensor, x0: Tensor, memory: Sequence[Tensor], noises: Sequence[Tensor], row: Row
) -> tuple[Tensor, Tensor]:
    """Apply one row of a plan: (the next x, what is remembered of this evaluation)."""
    # No kernel replaces it on a CPU, where the way through the dispatcher costs as much as the sums.
    op = reference if x.is_cpu else torch.ops.fastsample.plan_step.default
    return op(x, x0, memory, noises, row.p, row.q, row.a, row.b, row.c)
