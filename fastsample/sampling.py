"""Sampling: one loop for every plan, and the direct run of a solver as its reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, cast, overload

import torch
from torch import Tensor

from .denoiser import Denoiser, Model, begin
from .gaussian import Warm
from .grid import Grid, Node, Nodes
from .guidance import prediction_of
from .noise import Noise
from .plan import Plan, Row
from .progress import track
from .schedule import Schedule
from .step import affine_step, mixed_step, plan_step
from .table import Mixed, Stack, Table, table
from .tracing import Solver, name_of
from .variance import hearing, share_of

Callback = Callable[[int, Tensor, Tensor], object]


@overload
def sample(
    model: Model,
    plan: Plan | Sequence[Plan],
    noise: Noise | Tensor,
    *,
    init: Tensor | None = None,
    condition: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    trajectory: Literal[False] = False,
    progress: bool | None = None,
) -> Tensor: ...


@overload
def sample(
    model: Model,
    plan: Plan | Sequence[Plan],
    noise: Noise | Tensor,
    *,
    init: Tensor | None = None,
    condition: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    trajectory: Literal[True],
    progress: bool | None = None,
) -> tuple[Tensor, list[Tensor]]: ...


@torch.no_grad()
def sample(
    model: Model,
    plan: Plan | Sequence[Plan],
    noise: Noise | Tensor,
    *,
    init: Tensor | None = None,
    condition: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    trajectory: bool = False,
    progress: bool | None = None,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Run a plan: start at alpha init + sigma noise of its first node, return the state at its end.

    plan: of all samples, or a list with one for each, with equal numbers of evaluations: then every sample has its own
        times, and the model is asked at `Nodes`.
    noise: `fs.noise(...)`, or a tensor [B, ...] of unit variance (a stochastic plan needs the former).
    init: x0 to start from, [B, ...] (with a grid that starts late); None: none.
    condition: the network's keyword conditions, passed on at every evaluation.
    callback: called as callback(k, x_k, x0_k) after evaluation k, to look at both and not to change them.
    trajectory: also return the states, x_0 to the end: a list of nfe + 1 tensors.
    progress: show a bar; None: only once the run has lasted some seconds, on a terminal.
    Raises ValueError where model and plan do not fit, FloatingPointError where the network returns NaN or infinity.

    The state is float32 (float64 where the noise is), and the loop never waits for the device. torch.compile makes one
    graph of a run whose noise is a tensor; noise drawn by seed it cannot follow.
    """
    check_model(model)
    given = read(plan)
    check_fit(model, given)
    draw = source(noise, stochastic=given.stochastic, name=given.solver)
    start, condition = begin_at(given, draw(0), init), condition or {}
    what = table(given, start)
    x, states = run(model, what, start, draw, condition, callback, trajectory, progress)
    if not finite(x):
        raise explained(model, what, start, draw, condition)
    return (x, states) if trajectory else x


def run(
    model: Model,
    table: Table,
    x: Tensor,
    draw: Callable[[int], Tensor],
    condition: Mapping[str, Any],
    callback: Callback | None = None,
    trajectory: bool = False,
    progress: bool | None = False,
) -> tuple[Tensor, list[Tensor]]:
    """The loop itself: the state at the end and, if wanted, the states before it."""
    model = begin(model)
    used, older, widest = table.noises, table.older, table.widest
    memory: list[Tensor] = []
    noises = [draw(1) if -1 in used else x] if widest or table.entry else []  # x stands where the factor is 0
    if table.entry:
        a, c = table.entry
        x = a * x + c * noises[0]
    states = [x] if trajectory else []
    direct = None if older else _direct(model)

    def newest(k: int) -> list[Tensor]:
        return [draw(k + 2) if k in used else x, *noises][:widest] if widest else []

    for k, row in enumerate(track(table.rows, table.name, progress)):
        if direct is not None and isinstance(row, Row):
            output, u, w = direct.affine(x, row.node, **condition)
            if callback is not None:
                callback(k, x, u * x + w * output)
            noises = newest(k)
            x = affine_step(x, output, u, w, noises, row)
        else:
            x0 = model.predict(x, row.node, **condition)
            if callback is not None:
                callback(k, x, x0)
            noises = newest(k)
            if isinstance(row, Mixed):
                x, m = mixed_step(x, x0, memory, noises, row)
            else:
                x, m = plan_step(x, x0, memory, noises, row)
            memory = [m, *memory][:older] if older else memory
        if trajectory:
            states.append(x)
    return x, states


def _direct(model: Model) -> Denoiser | None:
    """The model where its steps may take the network's output as it is: a denoiser, and nothing around it."""
    own = isinstance(model, Denoiser) and type(model).predict is Denoiser.predict and "predict" not in vars(model)
    return cast(Denoiser, model) if own else None


def explained(
    model: Model, table: Table, x: Tensor, draw: Callable[[int], Tensor], condition: Mapping[str, Any]
) -> FloatingPointError:
    """Run again with a look at every evaluation: raises where a number first was not finite, or returns the error."""
    run(_Watched(model), table, x, draw, condition)
    return FloatingPointError(f"{table.name} ended at NaN or infinity although no prediction was; use float64")


@torch.no_grad()
def solve(
    model: Model,
    solver: Solver,
    grid: Grid,
    noise: Noise | Tensor,
    *,
    init: Tensor | None = None,
    condition: Mapping[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """Run a solver's function directly on tensors: the reference for its plan, and the way for those without one.

    Arguments and errors as for `sample`; options: the solver's own keywords.
    """
    check_model(model)
    name = name_of(solver, grid)
    draw = source(noise, stochastic=False, name=name)
    start, condition = _start(draw(0), init, grid.nodes[0], grid.warm), condition or {}
    x = solver(_Direct(model, draw, condition, name), start, grid, **options)
    if not finite(x):
        solver(_Direct(_Watched(model), draw, condition, name), start, grid, **options)
        raise FloatingPointError(f"{name} ended at NaN or infinity although no prediction was; use float64")
    return x


class _Direct:
    """The model as a solver sees it in `solve`; noises are numbered as in a plan."""

    def __init__(self, model: Model, draw: Callable[[int], Tensor], condition: Mapping[str, Any], name: str):
        self.model, self.draw, self.condition, self.name = begin(model), draw, condition, name
        self.evaluations = 0
        self.drawn = -1
        self.heard: list[Tensor] | None = None

    def predict(self, x: Tensor, node: Node) -> Tensor:
        self.evaluations += 1
        return self.model.predict(x, node, **self.condition)

    def predict_with_variance(self, x: Tensor, node: Node) -> tuple[Tensor, Tensor]:
        if self.heard is None:
            self.heard = []
            self.model = hearing(self.model, self.heard)
        self.heard.clear()
        return self.predict(x, node), share_of(self.heard, x)

    def noise(self) -> Tensor:
        if self.drawn == self.evaluations:
            raise ValueError(f"{self.name} draws two noises between two evaluations; there is one for each")
        self.drawn = self.evaluations
        return self.draw(self.evaluations + 1)


class _Watched:
    """The model with a look at every evaluation: looking waits for the device, so only a failed run is repeated so."""

    def __init__(self, model: Model):
        self.model, self.evaluations = begin(model), 0

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule

    def predict(self, x: Tensor, node: Node | Nodes, **condition: Any) -> Tensor:
        x0 = self.model.predict(x, node, **condition)
        self.evaluations += 1
        for what, tensor in (("the network was given", x), ("the network returned", x0)):
            bad = (~tensor.isfinite()).unsqueeze(-1).flatten(1).any(1).nonzero().flatten().tolist()
            if bad:
                t, sigma = (v if isinstance(v, float) else float(v[bad[0]]) for v in (node.t, node.sigma))
                raise FloatingPointError(
                    f"{what} NaN or infinity at step {self.evaluations} (t = {t:g}, sigma = {sigma:.4g}) for "
                    f"samples {bad[:8]}; check the noise, the network's weights, its dtype and its range of times"
                )
        return x0


def finite(x: Tensor) -> bool:
    """The one wait for the device, after the loop. A sum is finite only where all numbers are, and found sooner."""
    return torch.compiler.is_compiling() or math.isfinite(x.sum()) or bool(x.isfinite().all())


def read(plan: Plan | Sequence[Plan]) -> Plan | Stack:
    """A plan, or one for each sample. Raises TypeError where it is neither."""
    if isinstance(plan, Plan):
        return plan
    plans = tuple(plan) if isinstance(plan, list | tuple) else (plan,)
    wrong = [one for one in plans if not isinstance(one, Plan)]
    if wrong:
        raise TypeError(
            f"plan must come from fs.trace(solver, grid) or fs.Plan.load, or be a list of such plans with one for each "
            f"sample, got {type(wrong[0]).__name__}"
        )
    return Stack(plans)


def begin_at(plan: Plan | Stack, noise: Tensor, init: Tensor | None) -> Tensor:
    """The state before the first row, from unit noise and perhaps an image."""
    if isinstance(plan, Plan):
        return _start(noise, init, plan.start, plan.warm)
    if len(plan.plans) != len(noise):
        raise ValueError(f"{len(plan.plans)} plans for a batch of {len(noise)}; give one for each sample")
    if init is not None:
        _check_init(init, noise)
    inits = [None] * len(noise) if init is None else init.split(1)
    each = zip(plan.plans, noise.split(1), inits)
    return torch.cat([_start(z, x0, one.start, one.warm) for one, z, x0 in each])


def _start(noise: Tensor, init: Tensor | None, first: Node, warm: Warm | None) -> Tensor:
    if warm is not None:
        if init is not None:
            raise ValueError("a warm start begins at pure noise, and so takes no init; make the grid without warm=")
        return warm.begin(noise, first)
    if init is None:
        return noise * first.sigma
    _check_init(init, noise)
    return first.alpha * init.to(noise) + first.sigma * noise


def _check_init(init: Tensor, noise: Tensor) -> None:
    if init.shape != noise.shape:
        raise ValueError(f"init has shape {tuple(init.shape)}, the noise {tuple(noise.shape)}; give both the same")


def source(noise: Noise | Tensor, *, stochastic: bool, name: str) -> Callable[[int], Tensor]:
    """The noises of a run by number, 0 for the start, in the dtype of its state."""
    if not isinstance(noise, Noise | Tensor):
        raise TypeError(f"noise must come from fs.noise(...) or be a tensor, got {type(noise).__name__}")
    if isinstance(noise, Tensor) and noise.dim() == 0:
        raise ValueError("noise must be a tensor [B, ...] with one entry for each sample, got a single number")
    refusal = f"{name} adds noise at its steps: pass noise=fs.noise(shape, seeds=...), not a tensor"
    if isinstance(noise, Tensor) and stochastic:
        raise ValueError(refusal)

    def draw(k: int) -> Tensor:
        if isinstance(noise, Tensor) and k:
            raise ValueError(refusal)
        z = noise if isinstance(noise, Tensor) else noise.draw(k)
        return z if z.dtype == torch.float64 else z.float()

    return draw


def check_model(model: Model) -> None:
    if not (hasattr(model, "predict") and hasattr(model, "schedule")):
        raise TypeError(
            f"a model has a `schedule` and `predict(x, node)`, {type(model).__name__} has not; wrap a network: "
            f"fs.Denoiser(network, schedule, predicts=...)"
        )


def check_fit(model: Model, plan: Plan | Stack) -> None:
    """A plan made for another schedule would sample in silence, and badly."""
    if torch.compiler.is_compiling():  # a graph cannot ask; the run without one does
        return
    predicts = prediction_of(model).name
    for one in (plan,) if isinstance(plan, Plan) else {id(one): one for one in plan.plans}.values():
        if one.predicts and predicts != one.predicts:
            raise ValueError(
                f"the plan was tuned for networks that predict {one.predicts}, this model's predicts {predicts}; tune "
                f"one for it"
            )
        # asked at `Nodes`, it could not say so itself without a wait for the device
        if predicts == "eps" and isinstance(plan, Stack) and any(row.node.alpha == 0 for row in one.rows):
            raise ValueError(
                f"an eps network says nothing of x0 at alpha = 0 (t = {one.start.t:g}); start every grid below it or "
                f"use a network that predicts v, x0 or flow"
            )
        key = id(one), id(model.schedule)
        if key not in _FITS:
            check_schedule(one, model.schedule)
            if len(_FITS) >= 64:
                _FITS.clear()
            _FITS[key] = one, model.schedule


# Plans and the schedules they were found to fit: to ask again costs more than the rest of a run on a small state. Both
# never change, and while they stand here nothing else can have their ids.
_FITS: dict[tuple[int, int], tuple[Plan, Schedule]] = {}


def check_schedule(plan: Plan, schedule: Schedule) -> None:
    """Raise ValueError where a plan was not made on this schedule."""
    nodes = [row.node for row in plan.rows]
    t = torch.tensor([node.t for node in nodes], dtype=torch.float64)
    there = zip(schedule.alpha(t).tolist(), schedule.sigma(t).tolist())
    for node, (alpha, sigma) in zip(nodes, there):
        if not (_close(node.alpha, alpha) and _close(node.sigma, sigma)):
            raise ValueError(
                f"the plan was made for {plan.schedule} and does not fit this model's {schedule!r}: at "
                f"t = {node.t:g} sigma is {node.sigma:.6g} in the plan, {sigma:.6g} in the schedule; trace it on "
                f"fs.grid(model.schedule, ...)"
            )


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7)  # tables in float32, as diffusers has them, still fit
