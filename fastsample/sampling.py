"""Sampling: one loop for every plan, and the direct run of a solver as its reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .denoiser import Model
from .grid import Grid, Node
from .noise import Noise
from .plan import Plan, Solver
from .progress import track
from .step import plan_step

Callback = Callable[[int, Tensor, Tensor], object]


@overload
def sample(
    model: Model,
    plan: Plan,
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
    plan: Plan,
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
    plan: Plan,
    noise: Noise | Tensor,
    *,
    init: Tensor | None = None,
    condition: Mapping[str, Any] | None = None,
    callback: Callback | None = None,
    trajectory: bool = False,
    progress: bool | None = None,
) -> Tensor | tuple[Tensor, list[Tensor]]:
    """Run a plan: start at alpha init + sigma noise of its first node, return the state at its end.

    noise: `fs.noise(...)`, or a tensor [B, ...] of unit variance (a stochastic plan needs the former).
    init: x0 to start from, [B, ...] (with a grid that starts late); None: none.
    condition: the network's keyword conditions, passed on at every evaluation.
    callback: called as callback(k, x_k, x0_k) after evaluation k.
    trajectory: also return the states, x_0 to the end: a list of nfe + 1 tensors.
    progress: show a bar; None: only once the run has lasted some seconds, on a terminal.
    Raises ValueError where model and plan do not fit, FloatingPointError where the network returns NaN or infinity.

    The state is float32 (float64 where the noise is), and the loop never waits for the device.
    """
    _check_fit(model, plan)
    draw = _source(noise, stochastic=plan.stochastic, name=plan.solver)
    condition = condition or {}
    x = _start(draw(0), init, plan.start)
    used, keep, keep_noise = plan.noises, plan.memory, max(len(row.c) for row in plan.rows)
    memory: list[Tensor] = []
    noises: list[Tensor] = []
    if plan.entry != (1.0, 0.0):
        noises = [draw(1) if -1 in used else torch.zeros_like(x)]
        x = plan.entry[0] * x + plan.entry[1] * noises[0]
    states = [x]
    for k, row in enumerate(track(plan.rows, plan.solver, progress)):
        x0 = model.predict(x, row.node, **condition)
        if callback is not None:
            callback(k, x, x0)
        if keep_noise:
            noises = [draw(k + 2) if k in used else x, *noises[: keep_noise - 1]]  # x: a place, its factor is 0
        x, m = plan_step(x, x0, memory, noises, row)
        memory = [m, *memory[: keep - 1]]
        if trajectory:
            states.append(x)
    if not torch.compiler.is_compiling() and not bool(x.isfinite().all()):
        _blame(model, plan, noise, init, condition)
    return (x, states) if trajectory else x


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

    Arguments as for `sample`; options: the solver's own keywords.
    """
    draw = _source(noise, stochastic=False, name=getattr(solver, "__name__", "the solver"))
    return solver(_Direct(model, draw, condition or {}), _start(draw(0), init, grid.nodes[0]), grid, **options)


class _Direct:
    """The model as a solver sees it in `solve`; noises are numbered as in a plan."""

    def __init__(self, model: Model, draw: Callable[[int], Tensor], condition: Mapping[str, Any]):
        self.model, self.draw, self.condition = model, draw, condition
        self.evaluations = 0

    def predict(self, x: Tensor, node: Node) -> Tensor:
        self.evaluations += 1
        return self.model.predict(x, node, **self.condition)

    def noise(self) -> Tensor:
        return self.draw(self.evaluations + 1)


def _start(noise: Tensor, init: Tensor | None, first: Node) -> Tensor:
    noise = noise if noise.dtype == torch.float64 else noise.float()
    if init is None:
        return noise * first.sigma
    if init.shape != noise.shape:
        raise ValueError(f"init has shape {tuple(init.shape)}, the noise {tuple(noise.shape)}; give both the same")
    return first.alpha * init.to(noise) + first.sigma * noise


def _source(noise: Noise | Tensor, *, stochastic: bool, name: str) -> Callable[[int], Tensor]:
    if isinstance(noise, Noise):
        return noise.draw
    if not isinstance(noise, Tensor):
        raise TypeError(f"noise must come from fs.noise(...) or be a tensor, got {type(noise).__name__}")
    if stochastic:
        raise ValueError(f"{name} adds noise at its steps: pass noise=fs.noise(shape, seeds=...), not a tensor")

    def only_first(k: int) -> Tensor:
        if k:
            raise ValueError(f"{name} adds noise at its steps: pass noise=fs.noise(shape, seeds=...), not a tensor")
        return noise

    return only_first


def _check_fit(model: Model, plan: Plan) -> None:
    """A plan made for another schedule would sample in silence, and badly."""
    t = torch.tensor([row.node.t for row in plan.rows], dtype=torch.float64)
    there = torch.stack([model.schedule.alpha(t), model.schedule.sigma(t)])
    planned = torch.tensor([[row.node.alpha for row in plan.rows], [row.node.sigma for row in plan.rows]])
    wrong = ~torch.isclose(there, planned.double(), rtol=1e-5, atol=1e-7).all(0)
    if wrong.any():
        k = int(wrong.nonzero()[0])
        raise ValueError(
            f"the plan was made for {plan.schedule} and does not fit this model's {model.schedule!r}: at t = {t[k]:g} "
            f"sigma is {planned[1, k]:.6g} in the plan, {there[1, k]:.6g} in the schedule; trace it on "
            f"fs.grid(model.schedule, ...)"
        )


def _blame(model: Model, plan: Plan, noise: Noise | Tensor, init: Tensor | None, condition: Mapping[str, Any]) -> None:
    """Run once more with a look at every evaluation: looking costs a wait for the device, so `sample` does not."""

    def look(k: int, x: Tensor, x0: Tensor) -> None:
        bad = (~x0.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            node = plan.rows[k].node
            raise FloatingPointError(
                f"the network returned NaN or infinity at step {k + 1} of {plan.nfe} (t = {node.t:g}, sigma = "
                f"{node.sigma:.4g}) for samples {bad[:8]}; check its weights, its dtype and its range of times"
            )

    sample(model, plan, noise, init=init, condition=condition, callback=look, trajectory=False, progress=False)
    raise FloatingPointError(f"the result of {plan.solver} is not finite although every prediction was; use float32")
