"""Tables: what the loop reads of one plan, or of one plan for each sample of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from .grid import Node, Nodes, per_sample
from .plan import Plan, Row

Number = float | Tensor  # of all samples, or one for each in a shape that multiplies the state


@dataclass(frozen=True)
class Mixed:
    """A `Row` of several plans at once: what they do not share stands here once for each sample."""

    node: Node | Nodes
    p: Number
    q: Number
    a: Number
    b: tuple[Number, ...]
    c: tuple[Number, ...]


@dataclass(frozen=True)
class Table:
    """`older` evaluations before the newest are kept, and the `widest` newest noises; of these `noises` are drawn."""

    name: str
    rows: Sequence[Row | Mixed]
    entry: tuple[Number, Number] | None  # None: the state as it is
    noises: frozenset[int]
    older: int
    widest: int


@dataclass(frozen=True)
class Stack:
    """One plan for each sample of a batch, in order. Raises ValueError where they cannot be run together."""

    plans: tuple[Plan, ...]

    def __post_init__(self) -> None:
        if not self.plans:
            raise ValueError("an empty list of plans; give one plan, or one for each sample")
        counts = sorted({plan.nfe for plan in self.plans})
        if len(counts) > 1:
            raise ValueError(
                f"the plans of a batch take {', '.join(map(str, counts))} network evaluations; make all with the same "
                f"number of steps, or sample them one after the other"
            )

    @property
    def solver(self) -> str:
        return ", ".join(dict.fromkeys(plan.solver for plan in self.plans))

    @property
    def stochastic(self) -> bool:
        return any(plan.stochastic for plan in self.plans)


def table(plan: Plan | Stack, x: Tensor) -> Table:
    """The table of a run whose state is like x."""
    plans = (plan,) if isinstance(plan, Plan) else plan.plans
    same = plans[0] if all(one == plans[0] for one in plans) else None
    rows: Sequence[Row | Mixed]
    a: Number
    c: Number
    if same is not None:
        rows, (a, c) = same.rows, same.entry
    else:
        rows = [_mixed(each, x) for each in zip(*(one.rows for one in plans))]
        a, c = (_column(numbers, x) for numbers in zip(*(one.entry for one in plans)))
    return Table(
        name=plan.solver,
        rows=rows,
        entry=None if _is(a, 1) and _is(c, 0) else (a, c),
        noises=frozenset().union(*(one.noises for one in plans)),
        older=max(one.memory for one in plans) - 1,
        widest=max(len(row.c) for one in plans for row in one.rows),
    )


def _mixed(rows: Sequence[Row], x: Tensor) -> Mixed:
    b, c = (
        tuple(_column(numbers, x) for numbers in zip_longest(*(getattr(row, name) for row in rows), fillvalue=0.0))
        for name in "bc"
    )
    p, q, a = (_column([getattr(row, name) for row in rows], x) for name in "pqa")
    return Mixed(_node([row.node for row in rows], x), p, q, a, b, c)


def _column(numbers: Sequence[float], x: Tensor) -> Number:
    """One coefficient of every sample; a single number where they agree, which costs less and is the plan's own."""
    if len(set(numbers)) == 1:
        return numbers[0]
    return per_sample(torch.tensor(numbers, dtype=torch.float64), x)


def _node(nodes: Sequence[Node], x: Tensor) -> Node | Nodes:
    if len(set(nodes)) == 1:
        return nodes[0]
    numbers = torch.tensor([(node.t, node.alpha, node.sigma) for node in nodes], dtype=torch.float64)
    return Nodes(*numbers.to(x.device).unbind(1))


def _is(number: Number, value: float) -> bool:
    return isinstance(number, float) and number == value
