"""Cases: what a sweep compares, one model with one solver in so many steps, and what each really cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from typing import Any

from torch import Tensor

from fastsample.denoiser import Count, Denoiser, Model, begin
from fastsample.grid import Node, grid
from fastsample.guidance import Autoguided
from fastsample.plan import Plan
from fastsample.schedule import Schedule
from fastsample.spacing import Spacing
from fastsample.tracing import Solver, trace
from fastsample.wrapper import rows


@dataclass(frozen=True, eq=False)
class Case:
    """One model, one solver, one grid; `plan` is traced when it is first asked for.

    steps: intervals of the grid (plan.nfe is what they cost). spacing, start, end: as for `fs.grid`.
    options: the solver's own keywords.
    """

    model_name: str
    model: Model
    solver_name: str
    solver: Solver
    steps: int
    spacing: Spacing | None = None
    start: float | None = None
    end: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def product(
        cls,
        *,
        model: Mapping[str, Model],
        solver: Solver | Sequence[Solver] | Mapping[str, Solver],
        steps: int | Iterable[int],
        spacing: Spacing | Sequence[Spacing | None] | None = None,
        start: float | None = None,
        end: float | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> list[Case]:
        """Every model with every solver, spacing and number of steps.

        solver: functions, or name -> function where the functions' own names do not tell them apart.
        Where a student needs another solver than its teacher, add the lists of two products.
        """
        if not isinstance(model, Mapping):
            raise TypeError(f"model must map names to models, such as {{'teacher': model}}, got {type(model).__name__}")
        solvers = _named(solver)
        counts = [steps] if isinstance(steps, int) else list(steps)
        spacings = list(spacing) if isinstance(spacing, Sequence) else [spacing]
        return [
            cls(model_name, model[model_name], name, solvers[name], count, place, start, end, dict(options or {}))
            for model_name, name, place, count in product(model, solvers, spacings, counts)
        ]

    @cached_property
    def plan(self) -> Plan:
        nodes = grid(self.model.schedule, self.steps, self.spacing, self.start, self.end)
        return trace(self.solver, nodes, **self.options)

    @property
    def spacing_name(self) -> str:
        """The name of the spacing; "default" is that of `fs.grid`."""
        return _name_of(self.spacing) if self.spacing else "default"

    @property
    def name(self) -> str:
        """What tells this case from others, for people: teacher/dpmpp_2m/8."""
        given = {"start": self.start, "end": self.end, **self.options}
        extras = [f"{key}={value!r}" for key, value in given.items() if value is not None]
        place = [self.spacing_name] if self.spacing else []
        return "/".join([self.model_name, self.solver_name, str(self.steps), *place, *extras])

    @property
    def key(self) -> str:
        """The same for files: a hash of the name and its parts."""
        parts = [self.model_name, self.solver_name, self.steps, self.spacing_name, self.name]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cost:
    """What one sample cost: evaluations of the model; calls of its network for a batch, and rows for one sample.

    With guidance an evaluation is two rows. calls and rows are None where no `fs.Denoiser` lies below the model.
    """

    nfe: int
    calls: int | None
    rows: float | None


class Counted:
    """A model that counts its evaluations and, while `counting`, what the network below it does."""

    def __init__(self, model: Model):
        self.model, self.evaluations = model, 0
        self.network: Count | None = None

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule

    def begin(self) -> Counted:
        """The same counter over the model as one run sees it."""
        self.model = begin(self.model)
        return self

    def predict(self, x: Tensor, node: Node, **condition: Any) -> Tensor:
        self.evaluations += 1
        return self.model.predict(x, node, **condition)


@contextmanager
def counting(model: Model) -> Iterator[Counted]:
    """Count at the network itself, whatever the wrappers above it say."""
    counted = Counted(model)
    denoiser = list(_layers(model))[-1]
    if not isinstance(denoiser, Denoiser):
        yield counted
        return
    network, counted.network = denoiser.network, Count()
    denoiser.network = _CountedNetwork(network, counted.network)
    try:
        yield counted
    finally:
        denoiser.network = network


def cost(case: Case, counted: Counted, batch: int) -> Cost:
    """What one batch cost. Raises ValueError where that is not what the plan says."""
    nfe, count = case.plan.nfe, counted.network
    if counted.evaluations != nfe:
        raise ValueError(f"the plan promises nfe = {nfe}, but the model was evaluated {counted.evaluations} times")
    if count is None:
        return Cost(nfe, None, None)
    promised = rows(case.model, case.plan)
    weak = any(isinstance(layer, Autoguided) for layer in _layers(case.model))  # whose rows are another network's
    if count.rows != promised * batch and not weak:
        raise ValueError(
            f"the plan promises nfe = {nfe}, {promised} rows of the network for each sample, but it saw "
            f"{count.rows / batch:g} in {count.calls} calls; a model that evaluates its network more than once must "
            f"say so: see fs.Wrapper"
        )
    return Cost(nfe, count.calls, float(promised))


class _CountedNetwork:
    def __init__(self, network: Callable[..., Any], count: Count):
        self._network, self._count = network, count

    def __call__(self, x: Tensor, t: Tensor, **condition: Any) -> Any:
        self._count.calls += 1
        self._count.rows += len(x)
        return self._network(x, t, **condition)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)


def _layers(model: Any) -> Iterator[Any]:
    """A model and the models it wraps, the innermost last."""
    while model is not None:
        yield model
        model = getattr(model, "model", None)


def _named(solver: Solver | Sequence[Solver] | Mapping[str, Solver]) -> dict[str, Solver]:
    if isinstance(solver, Mapping):
        solvers = list(solver.items())
    else:
        listed = solver if isinstance(solver, Sequence) and not isinstance(solver, str) else [solver]
        solvers = [(_name_of(one), one) for one in listed]
    for _, one in solvers:
        if not callable(one):
            raise TypeError(f"a solver is given as a function, such as solvers.ddim, got {one!r}")
    if len(dict(solvers)) < len(solvers):
        raise ValueError("two solvers have the same name; pass a dict of name -> function")
    return dict(solvers)


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
