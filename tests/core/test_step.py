"""The update of one row, as an op."""

import pytest
import torch

from fastsample.grid import Node
from fastsample.plan import Row
from fastsample.step import mixed_step, plan_step, reference
from fastsample.table import Mixed

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("p", "q"), [(0.0, 1.0), (0.0, 0.7), (0.3, 1.0), (0.3, 0.7)])
def test_without_the_dispatcher_a_row_gives_the_same_bits(p, q, dtype):
    x, x0, memory, drawn, p, q, a, b, c = given = arguments(2, 3, dtype, p=p, q=q)
    before = [tensor.clone() for tensor in (x, x0, *memory, *drawn)]
    out, m = plan_step(x, x0, memory, drawn, Row(Node(1.0, 0.5, 0.5), p, q, a, tuple(b), tuple(c)))
    for ours, theirs in zip((out, m), OP(*given)):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(one, other) for one, other in zip((x, x0, *memory, *drawn), before))
    assert not {out.data_ptr()} & {t.data_ptr() for t in (x, x0, m, *memory, *drawn)}
    assert (m is x0) == ((p, q) == (0.0, 1.0))  # remembered as it is; all else is new


@COUNTS
@pytest.mark.parametrize("which", ["all", "some", "none"])
def test_a_row_of_several_plans_is_each_of_them(memories, noises, which):
    x, x0, memory, drawn, *rest = arguments(memories, noises, p=0.0, q=1.0)
    p, q, a, b, c = rest
    other = (0.3, 0.7, 0.5, [n + 1 for n in b], [n + 1 for n in c])
    if which != "all":
        other = (p, q, a, b, [n + 1 for n in c]) if which == "some" else tuple(rest)

    def both(one, two):
        return one if one == two else torch.tensor([one, two], dtype=torch.float64).view(2, 1, 1)

    row = Mixed(Node(1.0, 0.5, 0.5), *(both(*pair) for pair in zip(rest[:3], other[:3])),
                *(tuple(both(*pair) for pair in zip(*lists)) for lists in zip(rest[3:], other[3:])))  # fmt: skip
    before = [tensor.clone() for tensor in (x, x0, *memory, *drawn)]
    results = mixed_step(x, x0, memory, drawn, row)
    assert all(torch.equal(one, two) for one, two in zip((x, x0, *memory, *drawn), before))
    for ours, first, second in zip(results, reference(x, x0, memory, drawn, *rest),
                                   reference(x, x0, memory, drawn, *other)):  # fmt: skip
        torch.testing.assert_close(ours, torch.stack([first[0], second[1]]))


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


def test_what_has_a_factor_of_zero_is_not_read():
    """The loop passes x in the place of a noise that no row uses."""
    x, x0, memory, _, p, q, a, b, _ = arguments(1, 0)
    expected = reference(x, x0, memory, [], p, q, a, b, [])
    spoilt = torch.full_like(x, torch.nan)
    zeros = (p, q, a, [*b, 0.0], [0.0])
    row = Row(Node(1.0, 0.5, 0.5), p, q, a, (*b, 0.0), (0.0,))
    mixed = Mixed(row.node, p, q, a, row.b, row.c)
    given = x, x0, [*memory, spoilt], [spoilt]
    for pair in (reference(*given, *zeros), OP(*given, *zeros), plan_step(*given, row), mixed_step(*given, mixed)):
        for ours, theirs in zip(pair, expected):
            assert torch.equal(ours, theirs)


def test_memories_and_noises_beyond_its_numbers_are_not_used():
    x, x0, memory, drawn, p, q, a, b, c = arguments(1, 1)
    spoilt = [*memory, torch.full_like(x, torch.nan)], [*drawn, torch.full_like(x, torch.nan)]
    expected = reference(x, x0, memory, drawn, p, q, a, b, c)
    for step in (reference, OP):
        for ours, theirs in zip(step(x, x0, *spoilt, p, q, a, b, c), expected):
            assert torch.equal(ours, theirs)
