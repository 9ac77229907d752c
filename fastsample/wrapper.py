"""Wrappers: models made of a model, and what a run of them costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from .denoiser import Model, begin
from .grid import Node
from .plan import Plan
from .schedule import Schedule

W = TypeVar("W", bound="Wrapper")


@dataclass(frozen=True)
class Wrapper:
    """A model that changes what another one predicts; it hands on whatever a run needs to know.

    One of your own: a frozen dataclass with a `predict`. What remembers evaluations also overrides `remembers` and
    `begin`, what evaluates more than once `rows_at`, what holds one number for each sample `twice`.
    """

    model: Model

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule

    @property
    def remembers(self) -> bool:
        """Whether an evaluation depends on earlier ones, so that it has a meaning only within a run."""
        return remembers(self.model)

    def predict(self, x: Any, node: Any, **condition: Any) -> Any:
        raise NotImplementedError(f"{type(self).__name__} has no predict")

    def begin(self: W) -> W:
        """This wrapper for one run, see `denoiser.begin`."""
        return altered(self, model=begin(self.model)) if self.remembers else self

    def rows_at(self, nodes: Sequence[Node]) -> int:
        """The rows a network is given for one sample of a run that evaluates this model at these nodes in turn."""
        return rows_at(self.model, nodes)

    def twice(self: W) -> W:
        """This wrapper for a batch that holds every sample twice, [x, x], as guidance makes it."""
        model = twice(self.model)
        return self if model is self.model else altered(self, model=model)


def rows(model: Model, plan: Plan) -> int:
    """What `fs.sample(model, plan, ...)` will cost: the rows the network is given for one sample.

    Without guidance this is `plan.nfe`. The model below the wrappers counts as one row an evaluation. Rows of a weak
    model (`Autoguided`) count like the others.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must come from fs.trace(solver, grid) or fs.Plan.load, got {type(plan).__name__}")
    return rows_at(model, [row.node for row in plan.rows])


def rows_at(model: Model, nodes: Sequence[Node]) -> int:
    forecast: Callable[[Sequence[Node]], int] | None = getattr(model, "rows_at", None)
    return len(nodes) if forecast is None else forecast(nodes)


def remembers(model: Model) -> bool:
    return model.remembers if isinstance(model, Wrapper) else hasattr(model, "begin")


def twice(model: Model) -> Model:
    return model.twice() if isinstance(model, Wrapper) else model


def altered(wrapper: W, **fields: Any) -> W:
    """A copy with these fields, unchecked: `replace` would look at tensors again, and so wait for the device."""
    fresh = copy.copy(wrapper)
    for name, value in fields.items():
        object.__setattr__(fresh, name, value)
    return fresh
