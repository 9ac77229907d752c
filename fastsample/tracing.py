"""Tracing: from a solver, a function over states, to its plan.

`trace` runs a solver on symbols, in exact fractions, and reads the table off. Exactness matters: with floats,
rounding residue keeps every earlier evaluation alive in the memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any, cast

from torch import Tensor

from .grid import Grid, Node
from .plan import Plan, Row
from .prediction import EPS, FLOW, X0, Prediction

Solver = Callable[..., Tensor]


def trace(solver: Solver, grid: Grid, **options: Any) -> Plan:
    """Run a solver on symbols and write down its plan.

    options: the solver's own keywords, such as eta=0.5.
    Raises ValueError where the solver is not a fixed sum of states, noises and predictions: use `solve` there.
    TypeError where it is no function, or the grid no `Grid`.

    What is remembered of an evaluation, x0 or eps, is chosen so that the fewest need to be kept.
    """
    name = name_of(solver, grid)
    plan, reasons = None, []
    for limit in (16, None):
        for memory in (X0, EPS, FLOW):
            if plan is not None:
                limit = plan.memory - 1  # one that remembers as much would not be chosen
            if limit == 0:
                break
            try:
                plan = _read(Tape(memory, name, limit), solver, grid, options)
            except _Unfit as reason:
                reasons.append(reason)
        if plan is not None:
            break
    else:
        raise ValueError(f"{name} cannot be written as a plan: {reasons[0]}") from reasons[0]
    shown = ", ".join(f"{key}={getattr(value, '__name__', repr(value))}" for key, value in options.items())
    return replace(plan, solver=f"{name}({shown})" if shown else name)


def name_of(solver: Solver, grid: Grid) -> str:
    """The name of a solver. Raises TypeError where these two are not a solver and a grid."""
    if not callable(solver):
        raise TypeError(
            f"a solver is a function such as fastsample.solvers.dpmpp_2m (solvers.get finds one by its name), got "
            f"{solver!r:.80}"
        )
    if not isinstance(grid, Grid):
        raise TypeError(f"a solver runs on fs.grid(schedule, steps), got {type(grid).__name__}")
    return getattr(solver, "__name__", type(solver).__name__)


def _read(tape: Tape, solver: Solver, grid: Grid, options: dict[str, Any]) -> Plan:
    try:
        last = solver(cast(Any, tape), cast(Any, tape.first()), grid, **options)
    except ZeroDivisionError:  # the solver's own arithmetic, such as sigma / alpha at alpha = 0
        raise tape.infinite("infinite") from None
    except (TypeError, AttributeError) as error:
        if Expr.__name__ not in str(error):  # a fault of the solver itself
            raise
        raise ValueError(f"{tape.solver} does more to a state than sums and multiples ({error}); that is no plan, run "
                         f"it with fs.solve") from error  # fmt: skip
    if not tape.nodes:
        raise ValueError(f"{tape.solver} never called model.predict")
    tape.close(cast(Any, last))
    return Plan(
        solver=tape.solver,
        schedule=repr(grid.schedule),
        spacing=grid.spacing,
        remembers=tape.memory.name,
        start=grid.nodes[0],
        end=grid.nodes[-1],
        rows=tuple(tape.rows),
        entry=tape.entry,
        warm=grid.warm,
    )


Symbol = tuple[str, int]  # ("x", k): the state at evaluation k; ("m", k): its memory; ("z", k): the noise after it


class _Unfit(Exception):
    """This solver has no table with this kind of memory."""


class Expr:
    """A sum of symbols with exact coefficients; what a solver moves while it is traced."""

    __slots__ = ("tape", "terms")

    def __init__(self, tape: Tape, terms: dict[Symbol, Fraction]):
        self.tape = tape
        self.terms = {symbol: number for symbol, number in terms.items() if number}

    def __add__(self, other: Expr) -> Expr:
        if not isinstance(other, Expr):
            return self if other == 0 else NotImplemented
        terms = dict(self.tape.latest(self.terms))
        for symbol, number in self.tape.latest(other.terms).items():
            terms[symbol] = terms.get(symbol, Fraction(0)) + number
        return Expr(self.tape, terms)

    __radd__ = __add__

    def __mul__(self, factor: float | Fraction) -> Expr:
        if isinstance(factor, Expr):
            raise ValueError(f"{self.tape.solver} multiplies two states; that is no plan, run it with fs.solve")
        exact = self.tape.exact(factor)
        return Expr(self.tape, {symbol: number * exact for symbol, number in self.terms.items()})

    __rmul__ = __mul__

    def __neg__(self) -> Expr:
        return self * -1

    def __sub__(self, other: Expr) -> Expr:
        return self + -1 * other

    def __rsub__(self, other: Expr) -> Expr:
        return -1 * self + other

    def __truediv__(self, divisor: float) -> Expr:
        return self * (1 / self.tape.exact(divisor))


class Tape:
    """Stands in for the model while a solver is traced, and collects the rows."""

    def __init__(self, memory: Prediction, solver: str, limit: int | None):
        self.memory, self.solver, self.limit = memory, solver, limit
        self.nodes: list[Node] = []
        self.rows: list[Row] = []
        self.entry = (1.0, 0.0)
        # older states that are known as (a, rest): x_k = a x_{k-1} + rest
        self.made: list[tuple[Fraction, dict[Symbol, Fraction]]] = []
        self.drawn: set[int] = set()

    def first(self) -> Expr:
        return Expr(self, {("x", -1): Fraction(1)})

    def predict(self, x: Expr, node: Node) -> Expr:
        self._close_row(x, node)
        self.nodes.append(node)
        k = len(self.nodes) - 1
        p, q = self._pair(node)
        x_k, m_k = ("x", k), ("m", k)
        x.terms = {x_k: Fraction(1)}
        return Expr(self, {m_k: 1 / q, x_k: -p / q})

    def noise(self) -> Expr:
        """A unit noise, one for each evaluation; draws made before the first evaluation count as z_{-1}."""
        k = len(self.nodes) - 1
        if k in self.drawn:
            raise ValueError(f"{self.solver} draws two noises between two evaluations; there is one for each")
        self.drawn.add(k)
        return Expr(self, {("z", k): Fraction(1)})

    def close(self, x: Expr) -> None:
        self._close_row(x, None)

    def exact(self, number: float | Fraction) -> Fraction:
        try:
            return Fraction(number if isinstance(number, int | Fraction) else float(number))
        except (OverflowError, ValueError):
            raise self.infinite(str(number)) from None

    def infinite(self, number: str) -> _Unfit:
        where = f"after the evaluation at t = {self.nodes[-1].t:g}" if self.nodes else "before it evaluates"
        return _Unfit(f"a coefficient is {number} {where}; start the grid where alpha > 0, or end it where sigma > 0")

    def latest(self, terms: dict[Symbol, Fraction]) -> dict[Symbol, Fraction]:
        """Rewrite older states through the newest one, so that expressions stay short."""
        oldest = min((k for kind, k in terms if kind == "x"), default=len(self.made))
        for k in range(oldest, len(self.made) - 1):
            number = terms.get(("x", k))
            a, rest = self.made[k + 1]
            if number is None or not a:
                continue
            terms = {symbol: value for symbol, value in terms.items() if symbol != ("x", k)}
            for symbol, value in {("x", k + 1): Fraction(1), **{s: -v for s, v in rest.items()}}.items():
                terms[symbol] = terms.get(symbol, Fraction(0)) + value * number / a
            terms = {symbol: value for symbol, value in terms.items() if value}
        return terms

    def _pair(self, node: Node) -> tuple[Fraction, Fraction]:
        if self.memory is X0:
            return Fraction(0), Fraction(1)
        if self.memory is EPS and node.alpha == 0:
            raise _Unfit(f"eps says nothing of x0 at alpha = 0 (t = {node.t:g})")
        p, q = self.memory.output(Fraction(node.alpha), Fraction(node.sigma))
        return p, q

    def _close_row(self, x: Expr, node: Node | None) -> None:
        """Read x, the state at the next evaluation, as a row of the table."""
        if not isinstance(x, Expr):
            raise ValueError(f"{self.solver} moved {type(x).__name__}, not the state that it was given")
        k = len(self.nodes) - 1
        terms = self.latest(x.terms)
        a = terms.get(("x", k), Fraction(0))
        rest = {symbol: number for symbol, number in terms.items() if symbol != ("x", k)}
        older = [symbol for symbol in rest if symbol[0] == "x"]
        if older:
            raise _Unfit(f"evaluation {k + 1} needs the state of evaluation {older[0][1]} itself; run it with fs.solve")
        self.made.append((a, rest))
        if k < 0:
            self.entry = (float(a), float(rest.get(("z", -1), 0)))
            return
        b, c = (self._newest_first(rest, kind, k) for kind in "mz")
        if self.limit is not None and len(b) > self.limit:
            raise _Unfit(f"it would remember more than {self.limit} x {self.memory.name}")
        p, q = self._pair(self.nodes[k])
        self.rows.append(Row(self.nodes[k], float(p), float(q), float(a), b, c))

    def _newest_first(self, rest: dict[Symbol, Fraction], kind: str, k: int) -> tuple[float, ...]:
        oldest = min((i for name, i in rest if name == kind), default=k + 1)
        return tuple(float(rest.get((kind, i), Fraction(0))) for i in range(k, oldest - 1, -1))
