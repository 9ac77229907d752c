"""One interval of a teacher by any solver, every sample of a batch with its own interval."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from fastsample.denoiser import Model
from fastsample.grid import Grid, Nodes, exponential_step, per_sample
from fastsample.plan import Plan, Row
from fastsample.tracing import Solver, trace


def ddim(model: Any, x: Tensor, grid: Grid) -> Tensor:
    """Song et al. 2021, arXiv:2010.02502, Eq. 12: the default step of a teacher, one evaluation."""
    for s, t in grid.steps():
        x = exponential_step(x, model.predict(x, s), s, t)
    return x


@dataclass(frozen=True)
class TeacherSteps:
    """The plans of one interval each of a grid, as tables: numbers are [intervals], by evaluation.

    Where an interval takes fewer evaluations than others (Heun at sigma = 0), what is left changes nothing there.
    """

    name: str
    nodes: list[Tensor]  # of each evaluation, [3, intervals]: t, alpha, sigma
    numbers: list[Tensor]  # of each evaluation, [3 + memory, intervals]: p, q, a, b_0, b_1, ...

    @property
    def nfe(self) -> int:
        return len(self.nodes)

    def walk(self, teacher: Model, x: Tensor, i: Tensor, condition: dict[str, Any]) -> Tensor:
        """x [B, ...] at the start of interval i [B] of each sample, moved to its end."""
        memory: list[Tensor] = []
        for at, numbers in zip(self.nodes, self.numbers):
            x0 = teacher.predict(x, Nodes(*(row[i] for row in at.to(i.device))), **condition)
            p, q, a, *b = (per_sample(row[i], x) for row in numbers.to(i.device))
            memory.insert(0, p * x + q * x0)
            x = a * x + sum(number * old for number, old in zip(b, memory))
        return x


def teacher_steps(solver: Solver, grid: Grid) -> TeacherSteps:
    """Trace a solver on each interval of a grid by itself.

    Raises ValueError where it cannot walk one interval, has no plan, or adds noise.
    """
    plans = [_plan(solver, Grid(grid.schedule, (s, t), grid.spacing)) for s, t in grid.steps()]
    padded = list(zip(*(_padded(plan, max(plan.nfe for plan in plans)) for plan in plans)))
    return TeacherSteps(
        name=solver_name(solver),
        nodes=[_columns([(r.node.t, r.node.alpha, r.node.sigma) for r in rows]) for rows in padded],
        numbers=[_columns([(r.p, r.q, r.a, *r.b) for r in rows]) for rows in padded],
    )


def solver_name(solver: Solver) -> str:
    """A solver as settings hold it, with the options that functools.partial gave it."""
    if isinstance(solver, partial):
        options = ", ".join(f"{key}={value!r}" for key, value in solver.keywords.items())
        return f"{solver_name(solver.func)}({options})"
    return getattr(solver, "__name__", type(solver).__name__)


def _plan(solver: Solver, interval: Grid) -> Plan:
    s, t = interval.nodes
    where = f"from t = {s.t:g} to t = {t.t:g}"
    try:
        plan = trace(solver, interval)
    except (ValueError, ZeroDivisionError, IndexError) as error:
        raise ValueError(
            f"{solver_name(solver)} cannot walk one interval of the teacher, {where}: {error}; take ddim or heun"
        ) from error
    if plan.stochastic:
        raise ValueError(
            f"{solver_name(solver)} adds noise {where}, but a teacher's step must follow its path; take a solver "
            f"without noise, such as ddim or heun"
        )
    return plan


def _padded(plan: Plan, count: int) -> list[Row]:
    """The rows, and after them rows that evaluate where the first does and leave the state as it is."""
    first = plan.rows[0]
    if plan.entry[0] != 1:
        raise ValueError(f"{plan.solver} moves the state before its first evaluation; take ddim or heun")
    return [*plan.rows, *[Row(first.node, 0.0, 1.0, 1.0, (), ())] * (count - plan.nfe)]


def _columns(rows: list[tuple[float, ...]]) -> Tensor:
    """[numbers of a row, rows], 0 where a row is shorter."""
    return torch.tensor(list(zip_longest(*rows, fillvalue=0.0)), dtype=torch.float64)
