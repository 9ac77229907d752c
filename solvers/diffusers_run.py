"""A plan run step by step, as a diffusers pipeline asks for it: it may begin late, and change the state in between."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from fastsample.grid import Grid
from fastsample.plan import Plan, Row
from fastsample.step import plan_step
from fastsample.tracing import trace

from . import get
from .diffusers_config import Network


@dataclass(frozen=True)
class Course:
    """A plan, and what it was traced from: nothing of a ready one. options: of the solver, as JSON."""

    plan: Plan
    grid: Grid | None = None
    solver: str = ""
    options: str = "{}"

    @property
    def order(self) -> int:
        """How many evaluations the first interval takes; 1 where that is not known."""
        if self.grid is None:
            return 1
        if len(self.grid) == 1:
            return self.plan.nfe
        whole, rest = (self._on(replace(self.grid, nodes=self.grid.nodes[k:4])).nfe for k in (0, 1))
        return max(1, whole - rest)

    def tail(self, begin: int) -> Plan:
        """The plan that begins at this evaluation, without what came before. Raises ValueError where there is none."""
        whole = self.plan
        if begin == 0:
            return whole
        left, reason = whole.nfe - begin, "it stands within an interval"
        if not 0 < left < whole.nfe:
            reason = f"there are {whole.nfe}"
        elif self.grid is None:
            rows = whole.rows[begin:]
            if all(max(len(row.b), len(row.c)) <= k + 1 for k, row in enumerate(rows)):
                return replace(whole, rows=rows, start=rows[0].node, entry=(1.0, 0.0), warm=None)
            reason = "the ready plan remembers evaluations before it; give the solver's name in place of the plan"
        else:
            plan = self._with(left, self.grid, min(begin // self.order, len(self.grid) - 1))
            if [row.node for row in plan.rows] == [row.node for row in whole.rows[begin:]] and plain(plan):
                return plan
        raise ValueError(f"{whole.solver} cannot begin at evaluation {begin}: {reason}")

    def _with(self, evaluations: int, grid: Grid, k: int) -> Plan:
        """The last intervals that take so many evaluations, or nearly; sought from interval k on."""
        while k < len(grid) - 1 and self._after(grid, k).nfe > evaluations:
            k += 1
        while k > 0 and self._after(grid, k).nfe < evaluations:
            k -= 1
        return self._after(grid, k)

    def _after(self, grid: Grid, interval: int) -> Plan:
        return self._on(replace(grid, nodes=grid.nodes[interval:]))

    def _on(self, grid: Grid) -> Plan:
        return _traced(self.solver, self.options, grid)


def course(solver: str, options: dict[str, object], grid: Grid) -> Course:
    """The plan of a solver by its name on a grid."""
    text = json.dumps(options, sort_keys=True)
    return Course(_traced(solver, text, grid), grid, solver, text)


@lru_cache(maxsize=64)
def _traced(solver: str, options: str, grid: Grid) -> Plan:
    """A pipeline asks for the same plan at every call."""
    return trace(get(solver), grid, **json.loads(options))


class Run:
    """One run of a plan: `step` is the number of its next evaluation, in all `timesteps`; `plan` begins at `first`."""

    def __init__(self, plan: Plan, first: int):
        self.plan, self.first, self.step = plan, first, first
        self.widest = max(len(row.c) for row in plan.rows)
        self.drawn, self.older = plan.noises, plan.memory - 1
        self.memory: list[Tensor] = []
        self.noises: list[Tensor] = []
        self.kept: _Copy | None = None  # what the last step returned
        self.seen: _Copy | None = None  # what the network was last shown

    @property
    def row(self) -> Row:
        return self.plan.rows[self.step - self.first]

    @property
    def enters(self) -> bool:
        """Whether the plan changes the state before it first shows it to the network, and is to do so now."""
        return self.step == self.first and not plain(self.plan)

    @property
    def draws(self) -> bool:
        """Whether a noise follows this evaluation."""
        return self.step - self.first in self.drawn

    def show(self, sample: Tensor, scale: float) -> Tensor:
        """The state as the network sees it."""
        x = self._entered(sample)
        seen = (x * scale).to(sample.dtype)
        self.seen = _Copy(seen, x, _version(seen))
        return seen

    def state(self, sample: Tensor) -> Tensor:
        """The state in full precision: what was computed, where `sample` is only its rounding."""
        for copy in filter(None, (self.seen, self.kept)):  # DiTPipeline passes on what the network saw
            if copy.given is sample and copy.version is not None and _version(sample) == copy.version:
                return copy.exact
        return self._entered(sample)

    def advance(self, x: Tensor, x0: Tensor, noise: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The state after this evaluation, rounded to a dtype; noise: where it `draws`."""
        if self.widest:
            self.noises = [x if noise is None else noise, *self.noises][: self.widest]  # x stands where the factor is 0
        x, m = plan_step(x, x0, self.memory, self.noises, self.row)
        if self.older:
            self.memory = [m, *self.memory][: self.older]
        after = x.to(dtype)
        self.kept, self.seen = _Copy(after, x, _version(after)), None
        self.step += 1
        return after

    def _entered(self, sample: Tensor) -> Tensor:
        x = exact(sample)
        if not self.enters:
            return x
        if self.plan.warm is not None:
            x = self.plan.warm.gaussian.move(x, self.plan.warm.start, self.plan.start)
        return x * self.plan.entry[0]


@dataclass(frozen=True)
class _Copy:
    """A tensor that was given to the pipeline, and the state that it is a rounding of, while nobody writes to it."""

    given: Tensor
    exact: Tensor
    version: int | None


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version  # torch counts no writes to tensors of inference mode


def exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def plain(plan: Plan) -> bool:
    """Whether its first evaluation sees the very state it is given."""
    return plan.warm is None and plan.entry == (1.0, 0.0)


def check(plan: Plan, network: Network) -> None:
    """Raise ValueError where a pipeline with such a network cannot run this plan."""
    if plan.predicts and plan.predicts != network.prediction.name:
        raise ValueError(
            f"the plan was tuned for networks that predict {plan.predicts}, this one predicts "
            f"{network.prediction.name}; tune one for it"
        )
    if plan.entry[1]:
        raise ValueError(
            f"{plan.solver} adds noise before its first evaluation, where a pipeline has no place for it; for churn "
            f"choose s_tmax below the first level, {math.exp(-plan.start.lam):.4g}"
        )
    blind = [row.node.t for row in plan.rows if row.node.alpha == 0]
    if blind and network.prediction.name == "eps":
        raise ValueError(
            f"an eps network says nothing of x0 at alpha = 0 (t = {blind[0]:g}); use timestep_spacing='leading', or a "
            f"network that predicts v"
        )
