"""The cost of the ops that are worth a kernel, in torch's own words: what a kernel has to beat."""

import math

import pytest
import torch
import torch.nn.functional as F


def group_norm_silu(device, b, channels, size):
    x, scale, shift = torch.randn(b, channels, size, size, device=device), *torch.randn(2, channels, device=device)
    return lambda: F.silu(F.group_norm(x, 32, scale, shift, 1e-5)), x.shape


def attention(device, b, heads, tokens, d):
    q, k, v = torch.randn(3, b, heads, tokens, d, device=device)
    return lambda: F.scaled_dot_product_attention(q, k, v), q.shape


def guide(device, *shape):
    cond, uncond = torch.randn(2, *shape, device=device)
    return lambda: uncond + 5.0 * (cond - uncond), cond.shape


OPS = [  # how it is made, and its sizes; a kernel adds a line of its own
    (group_norm_silu, (1, 64, 16)),
    (group_norm_silu, (4, 320, 64)),
    (attention, (1, 4, 64, 32)),
    (attention, (4, 8, 1024, 40)),
    (guide, (4, 4, 64, 64)),
]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("make", "sizes"), OPS, ids=lambda part: getattr(part, "__name__", str(part)))
def test_the_op(measure, benchmark, make, sizes, device):
    benchmark.group = f"{make.__name__}, {list(sizes)}, {device}"
    call, shape = make(device, *sizes)
    # Small ops lie near the resolution of the clock's own cost, so a round is of several calls.
    made = measure(call, iterations=max(1, 100_000 // math.prod(shape)), device=device)
    assert made.shape == shape
    assert made.isfinite().all()
