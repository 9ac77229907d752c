"""Every solver, schedule and kind of grid that the tests of solvers run over; a new one joins these lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

import fastsample as fs
from fastsample import solvers
from fastsample.tracing import Solver
from fastsample.zoo.exact import GaussianMixture


@dataclass(frozen=True)
class Case:
    """order: of the error against the exact ODE, None where noise is added. evaluations: a step, at finite h."""

    solver: Solver
    order: float | None
    evaluations: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.solver.__name__, *(f"{key}={value:g}" for key, value in self.options.items())])


CASES = [
    Case(solvers.ddim, 1),
    Case(solvers.euler, 1),
    Case(solvers.dpmpp_1, 1),
    Case(solvers.dpmpp_2m, 2),
    Case(solvers.dpmpp_3m, 3),
    Case(solvers.dpmpp_3m, 2, options={"curvature": 0.5}),
    Case(solvers.dpmpp_2s, 2, evaluations=2),
    Case(solvers.heun, 2, evaluations=2),
    Case(solvers.unipc_2, 3),
    Case(solvers.unipc_3, 4),
    Case(solvers.unipc_3, 2, options={"lower_order_final": True}),
    Case(solvers.ddim, None, options={"eta": 0.5}),
    Case(solvers.ddim, None, options={"eta": 1.0}),
    Case(solvers.ddpm, None),
    Case(solvers.ddpm, None, options={"large": 1.0}),
    Case(solvers.euler, None, options={"s_churn": 2.0, "s_tmin": 0.05, "s_noise": 1.007}),
    Case(solvers.heun, None, evaluations=2, options={"s_churn": 2.0, "s_tmin": 0.05, "s_noise": 1.007}),
    Case(solvers.consistency, None),
]
DETERMINISTIC = [case for case in CASES if case.order]

SCHEDULES = {
    "vp_linear": fs.VP.linear(),
    "vp_cosine": fs.VP.cosine(),
    "vp_zero_snr": fs.VP.scaled_linear().zero_terminal_snr(),
    "vp_continuous": fs.VPContinuous(),
    "edm": fs.EDM(),
    "flow": fs.Flow(),
    "flow_shift": fs.Flow(shift=3.0),
}


def grids(case: Case, schedule: fs.Schedule, steps: int) -> Iterator[fs.Grid]:
    """A grid that ends at sigma = 0 and one that ends above it, from t_max where the solver can start there."""
    start = None
    if case.solver is solvers.heun and not schedule.alpha(schedule.t_max) > 0:
        start = 0.98 * schedule.t_max
    zero = not schedule.alpha(schedule.t_max if start is None else start) > 0
    yield fs.grid(schedule, steps, fs.uniform_t if zero else fs.uniform_lam, start=start)
    yield fs.grid(schedule, steps, fs.quadratic_t if zero else fs.karras, start=start, end=schedule.t_min)


@dataclass(frozen=True)
class Toy:
    """A smooth nonlinear model that is no denoiser of anything, and counts its calls."""

    schedule: fs.Schedule
    calls: list[fs.Node] = field(default_factory=list)

    def predict(self, x: torch.Tensor, node: fs.Node, **condition: Any) -> torch.Tensor:
        self.calls.append(node)
        mixed = x @ torch.tensor([[0.6, -0.8], [0.9, 0.3]], dtype=x.dtype)
        return torch.tanh(mixed + 0.5 * node.alpha)


def mixture(schedule: fs.Schedule) -> GaussianMixture:
    """Three broad components in two dimensions: the flow bends, yet 40 steps resolve it."""
    return GaussianMixture(
        schedule,
        weights=torch.tensor([0.3, 0.5, 0.2]),
        means=torch.tensor([[0.5, 0.2], [-0.4, 0.6], [0.1, -0.7]]),
        variances=torch.tensor([[0.05, 0.10], [0.15, 0.04], [0.06, 0.08]]),
    )


def gaussian(schedule: fs.Schedule) -> GaussianMixture:
    return GaussianMixture(
        schedule,
        weights=torch.ones(1),
        means=torch.tensor([[0.3, -0.2]]),
        variances=torch.tensor([[0.25, 0.04]]),
    )
