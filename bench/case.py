"""Cases: what a sweep compares, one model with one solver in so many steps, and what each really cost."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from dataclasses import KW_ONLY, dataclass, field, is_dataclass, replace
from functools import cached_property, partial
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor

from fastsample.denoiser import Count, Denoiser, Model, begin
from fastsample.grid import Node, grid
from fastsample.guidance import Guidance
from fastsample.plan import Plan
from fastsample.schedule import Schedule
from fastsample.spacing import Spacing
from fastsample.tracing import Solver, trace
from fastsample.wrapper import rows


@dataclass(frozen=True, eq=False)
class Case:
    """One model, one solver, one grid, and how it is run; `plan` is traced when first asked for.

    steps: intervals of the grid (plan.nfe is what they cost). spacing, start, end, lower_order_final: as for `fs.grid`.
    options: the solver's own keywords. given: a ready plan in place of solver, steps and spacing, see `of_plan`.
    guidance: the scale of the model, which must be, or wrap, an `fs.Guided` or the like; None leaves it as it is.
    dtype: of a copy of the network. compiled: the network through torch.compile. graph: the whole run as a CUDA graph.
    batch: images a call where latency is measured; None: what the run says. device: of a copy of the model; None: the
    run's, where the model is already.
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
    _: KW_ONLY
    lower_order_final: bool = False
    given: Plan | None = None
    guidance: float | None = None
    dtype: torch.dtype | None = None
    compiled: bool = False
    graph: bool = False
    batch: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        if self.batch is not None and self.batch < 1:
            raise ValueError(f"batch of {self.name} must be at least 1, got {self.batch}")
        if self.guidance is not None and not any(isinstance(layer, Guidance) for layer in layers(self.model)):
            raise ValueError(
                f"{self.name} asks for guidance, but {self.model_name} is a {type(self.model).__name__}; give "
                f"fs.Guided(model, uncond=..., scale=1), whose scale each case sets"
            )

    @classmethod
    def of_plan(cls, model_name: str, model: Model, name: str, plan: Plan, **how: Any) -> Case:
        """A case that runs this very plan, such as a tuned one; `name` stands in the solver's column."""
        return cls(model_name, model, name, _no_solver, len(plan.rows), given=plan, **how)

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
        lower_order_final: bool = False,
        guidance: float | Sequence[float | None] | None = None,
        dtype: torch.dtype | Sequence[torch.dtype | None] | None = None,
        compiled: bool | Sequence[bool] = False,
        graph: bool | Sequence[bool] = False,
        batch: int | Sequence[int | None] | None = None,
        device: str | Sequence[str | None] | None = None,
    ) -> list[Case]:
        """Every model with every solver, spacing, number of steps and way to run it.

        solver: functions, or name -> function where the functions' own names do not tell them apart.
        Where a student needs another solver than its teacher, add the lists of two products.
        """
        if not isinstance(model, Mapping):
            raise TypeError(f"model must map names to models, such as {{'teacher': model}}, got {type(model).__name__}")
        solvers = _named(solver)
        places = product(model, solvers, _several(spacing), _several(steps))
        ways = [
            dict(zip(("guidance", "dtype", "compiled", "graph", "batch", "device"), way))
            for way in product(*map(_several, (guidance, dtype, compiled, graph, batch, device)))
        ]
        return [
            cls(
                model_name,
                model[model_name],
                name,
                solvers[name],
                count,
                place,
                start,
                end,
                dict(options or {}),
                lower_order_final=lower_order_final,
                **way,
            )
            for model_name, name, place, count in places
            for way in ways
        ]

    @cached_property
    def plan(self) -> Plan:
        if self.given is not None:
            return self.given
        schedule, lower = self.model.schedule, self.lower_order_final
        nodes = grid(schedule, self.steps, self.spacing, self.start, self.end, lower_order_final=lower)
        return trace(self.solver, nodes, **self.options)

    def build(self, copies: dict[Hashable, Any] | None = None) -> Model:
        """The model as this case runs it: guided, of another dtype or device, compiled. The given one stays as it is.

        copies: of networks, made so far; what is made here joins them, so that cases of one network share a copy.
        """
        model: Model = self.model if self.guidance is None else _scaled(self.model, self.guidance)
        if self.dtype is None and self.device is None and not self.compiled:
            return model
        return cast(Model, _altered(model, partial(self._changed, {} if copies is None else copies)))

    def _changed(self, copies: dict[Hashable, Any], model: Denoiser) -> Denoiser:
        network, made = model.network, copy(model)
        if self.dtype is not None or self.device is not None:
            if not isinstance(network, torch.nn.Module):
                raise ValueError(
                    f"{self.name} asks for another dtype or device, but the network of {self.model_name} is a "
                    f"{type(network).__name__} and no torch module; make a model of each and name both"
                )
            moved: Hashable = (id(model.network), self.dtype, self.device)
            if moved not in copies:
                copies[moved] = deepcopy(network).to(self.device, self.dtype)
            network, made.dtype = copies[moved], self.dtype or made.dtype
        if self.compiled:
            compiled: Hashable = (id(model.network), self.dtype, self.device, "compiled")
            if compiled not in copies:
                copies[compiled] = torch.compile(network)
            network = copies[compiled]
        made.network, made.count = network, Count()
        return made

    @property
    def spacing_name(self) -> str:
        """The name of the spacing; "default" is that of `fs.grid`."""
        return _name_of(self.spacing) if self.spacing else "default"

    @property
    def settings(self) -> dict[str, str]:
        """How the case is run, where that is not as usual."""
        found = {
            "lower_order_final": self.lower_order_final or None,
            "guidance": None if self.guidance is None else f"{self.guidance:g}",
            "dtype": str(self.dtype).removeprefix("torch.") if self.dtype else None,
            "compile": self.compiled or None,
            "graph": self.graph or None,
            "batch": self.batch,
            "device": self.device,
        }
        return {name: "yes" if value is True else str(value) for name, value in found.items() if value is not None}

    @property
    def name(self) -> str:
        """What tells this case from others, for people: teacher/dpmpp_2m/8."""
        return "/".join([*self._parts, *(f"{key}={value}" for key, value in self.settings.items())])

    @property
    def key(self) -> str:
        """The same for files: a hash of the name and its parts."""
        return _hash([*self._parts, self.settings])

    @property
    def quality_key(self) -> str:
        """The same for all cases that make the same samples: they differ in the batch of their latency alone."""
        return _hash([*self._parts, {name: value for name, value in self.settings.items() if name != "batch"}])

    @property
    def _parts(self) -> list[str]:
        given = {"start": self.start, "end": self.end, **self.options}
        extras = [f"{key}={shown(value)}" for key, value in given.items() if value is not None]
        place = [self.spacing_name] if self.spacing else []
        return [self.model_name, self.solver_name, str(self.steps), *place, *extras]


@dataclass(frozen=True)
class Cost:
    """What one sample cost: evaluations of the model; calls of its network for a batch, and rows for one sample.

    With guidance an evaluation is two rows. calls and rows are None where no `fs.Denoiser` lies below the model.
    """

    nfe: int
    calls: int | None
    rows: float | None


class Counted:
    """A model that counts its evaluations and, while `counting`, what the networks below it do.

    network: of all of them together; None where one of them is none of a `fs.Denoiser`.
    """

    def __init__(self, model: Model):
        self.model, self.whole, self.evaluations = model, model, 0
        self.network: Count | None = None

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule

    @property
    def alone(self) -> bool:
        """Whether it is a denoiser with nothing around it, which a run treats better than what wraps one."""
        return isinstance(self.model, Denoiser) and type(self.model).predict is Denoiser.predict

    def begin(self) -> Model:
        """The same counter over the model as one run sees it; a denoiser alone runs as it is: its network counts."""
        if self.alone:
            return self.model
        self.model = begin(self.model)
        return self

    def predict(self, x: Tensor, node: Node, **condition: Any) -> Tensor:
        self.evaluations += 1
        return self.model.predict(x, node, **condition)


@contextmanager
def counting(model: Model) -> Iterator[Counted]:
    """Count at the networks themselves, whatever the wrappers above them say."""
    counted = Counted(model)
    found = {id(below): below for below in denoisers(model)}
    if not all(isinstance(below, Denoiser) for below in found.values()):
        yield counted
        return
    networks = [(below, below.network) for below in found.values()]
    counted.network = Count()
    for below, network in networks:
        below.network = _CountedNetwork(network, counted.network)
    try:
        yield counted
    finally:
        for below, network in networks:
            below.network = network


def cost(case: Case, counted: Counted, batch: int) -> Cost:
    """What one batch cost. Raises ValueError where that is not what the plan says."""
    nfe, count = case.plan.nfe, counted.network
    evaluated = count.calls if count and counted.alone else counted.evaluations
    if evaluated != nfe:
        raise ValueError(f"the plan promises nfe = {nfe}, but the model was evaluated {evaluated} times")
    if count is None:
        return Cost(nfe, None, None)
    promised = rows(counted.whole, case.plan)
    if count.rows != promised * batch:
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


def layers(model: Any) -> Iterator[Any]:
    """A model and the models it wraps, the innermost last."""
    while model is not None:
        yield model
        model = getattr(model, "model", None)


def denoisers(model: Any) -> list[Any]:
    """What lies below all wrappers: one, or with autoguidance two, of which the weak model's comes last."""
    below = _below(model)
    return [found for inner in below.values() for found in denoisers(inner)] if below else [model]


def _below(model: Any) -> dict[str, Any]:
    if isinstance(model, Denoiser):
        return {}
    found = {name: getattr(model, name, None) for name in ("model", "weak")}
    return {name: inner for name, inner in found.items() if inner is not None}


def _altered(model: Any, change: Callable[[Denoiser], Denoiser]) -> Any:
    """A copy of a model and its wrappers around changed denoisers; the given one stays as it is."""
    if isinstance(model, Denoiser):
        return change(model)
    below = _below(model)
    if not below or not is_dataclass(model):
        raise ValueError(
            f"dtype, device and compile are settings of a network in an fs.Denoiser and wrappers that are dataclasses, "
            f"such as fs.Wrapper, not of a {type(model).__name__}"
        )
    return replace(model, **{name: _altered(inner, change) for name, inner in below.items()})  # type: ignore[type-var]


def _scaled(model: Any, scale: float) -> Any:
    """A copy whose outermost guidance has this scale."""
    if isinstance(model, Guidance):
        return replace(model, scale=scale)
    return replace(model, model=_scaled(model.model, scale))


def _no_solver(model: Any, x: Any, grid: Any) -> Any:
    raise ValueError("this case runs a given plan and has no solver")


def _several(given: Any) -> list[Any]:
    return list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]


def _hash(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


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


def shown(value: Any) -> str:
    """repr, but of a function its name: its address would be another in every process."""
    text = repr(value)
    return _name_of(value) if " at 0x" in text else text


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))
