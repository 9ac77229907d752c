"""The update of one row, as an op."""

import pytest
import torch

from fastsample.grid import Node
from fastsample.plan import Row
from fastsample.step import plan_step, reference

OP = torch.ops.fastsample.plan_step.default
COUNTS = pytest.mark.parametrize(("memories", "noises"), [(0, 0), (1, 0), (2, 3), (0, 1)])


def arguments(memories, noises, dtype=torch.float64, p=0.3, q=0.7):
    generator = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(2, 3, 5, generator=generator, dtype=dtype)  # noqa: E731
    b = [0.1 * (k + 1) for k in range(memories + 1)]
    c = [0.2 * (k + 1) for k in range(noises)]
    return draw(), draw(), [draw() for _ in range(memories)], [draw() for _ in range(noises)], p, q, 0.9, b, c


@COUNTS
def test_it_is_the_formula(memories, noises):
    x, x0, memory, drawn, p, q, a, b, c = given = arguments(memories, noises)
    m = p * x + q * x0
    expected = a * x + sum(n * t for n, t in zip(b, [m, *memory])) + sum(n * z for n, z in zip(c, drawn))
    for step in (reference, OP):
        out, remembered = step(*given)
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(remembered, m)


def test_a_row_is_its_numbers():
    x, x0, memory, drawn, p, q, a, b, c = given = arguments(1, 2)
    row = Row(Node(1.0, 0.5, 0.5), p, q, a, tuple(b), tuple(c))
    for ours, theirs in zip(plan_step(x, x0, memory, drawn, row), OP(*given)):
        assert torch.equal(ours, theirs)


@COUNTS
def test_torch_finds_no_fault_in_the_op(memories, noises):
    torch.library.opcheck(OP, arguments(memories, noises))
    torch.library.opcheck(OP, arguments(memories, noises, torch.float32, p=0.0, q=1.0))


def test_the_shape_for_compilers_follows_strides_and_dtype():
    rest = arguments(0, 0)[2:]
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for pair in ((x, x.contiguous()), (x.contiguous(), x)):
        torch.library.opcheck(OP, (*pair, *rest))


def test_what_it_is_given_is_left_alone_and_not_handed_back():
    given = arguments(2, 2, p=0.0, q=1.0)
    before = [tensor.clone() for tensor in (*given[:2], *given[2], *given[3])]
    for step in (reference, OP):
        results = step(*given)
        tensors = (*given[:2], *given[2], *given[3])
        assert all(torch.equal(one, other) for one, other in zip(tensors, before))
        assert not {r.data_ptr() for r in results} & {t.data_ptr() for t in tensors}


def test_memories_and_noises_beyond_its_numbers_are_not_used():
    x, x0, memory, drawn, p, q, a, b, c = arguments(1, 1)
    spoilt = [*memory, torch.full_like(x, torch.nan)], [*drawn, torch.full_like(x, torch.nan)]
    expected = reference(x, x0, memory, drawn, p, q, a, b, c)
    for step in (reference, OP):
        for ours, theirs in zip(step(x, x0, *spoilt, p, q, a, b, c), expected):
            assert torch.equal(ours, theirs)
