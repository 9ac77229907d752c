"""Every solver, schedule and kind of grid that the tests of solvers run over; a new one joins these lists."""

from __future__ import annotations

import math
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
    """order: of the error against the exact ODE, None where noise is added. evaluations: a step, at finite h.

    first: only so many steps take them, the later ones one. memory: the most evaluations that a plan remembers.
    from_alpha_0: may the grid start at alpha = 0? through: is that step then like any other?
    steps: from which the order shows, to four times as many.
    """

    solver: Solver
    order: float | None
    evaluations: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    first: int = 10**9
    memory: int = 5
    from_alpha_0: bool = True
    through: bool = False
    steps: int = 40

    def __str__(self) -> str:
        shown = (f"{key}={value if isinstance(value, str) else f'{value:g}'}" for key, value in self.options.items())
        return "-".join([self.solver.__name__, *shown])

    def nfe(self, grid: fs.Grid) -> int:
        """Evaluations on a grid, whose steps that are infinite in lam take one."""
        if self.solver is solvers.restart and len(grid) > 1:  # one restart, from near 0.1 up to 20 times that
            levels = [math.exp(-node.lam) for node in grid.nodes]
            low = min(levels[1:-1], key=lambda level: abs(math.log(level / 0.1)))
            again = max(1, sum(low < level <= 20 * low * (1 + 1e-12) for level in levels))
            return 2 * again + 2 * len(grid) - (grid.nodes[-1].sigma == 0)
        infinite = sum(t.sigma == 0 or (s.alpha == 0 and not self.through) for s, t in grid.steps())
        return len(grid) + (self.evaluations - 1) * min(len(grid) - infinite, self.first)


CASES = [
    Case(solvers.ddim, 1),
    Case(solvers.euler, 1),
    Case(solvers.dpmpp_1, 1),
    Case(solvers.dpmpp_2m, 2),
    Case(solvers.dpmpp_3m, 3),
    Case(solvers.dpmpp_3m, 2, options={"curvature": 0.5}),
    Case(solvers.dpmpp_2s, 2, evaluations=2),
    Case(solvers.heun, 2, evaluations=2, from_alpha_0=False),
    Case(solvers.dpmpp_3s, 3, evaluations=3),
    Case(solvers.dpm_solver_1, 1, from_alpha_0=False),
    Case(solvers.dpm_solver_2, 2, evaluations=2, from_alpha_0=False),
    Case(solvers.dpm_solver_3, 3, evaluations=3, from_alpha_0=False),
    Case(solvers.dpm_solver_2m, 2, from_alpha_0=False),
    Case(solvers.dpm_solver_3m, 3, from_alpha_0=False),
    Case(solvers.dpm_solver_3m, 2, options={"curvature": 0.5}, from_alpha_0=False),
    Case(solvers.unipc_1, 2),
    Case(solvers.unipc_2, 3),
    Case(solvers.unipc_3, 4),
    Case(solvers.unipc_2, 2, options={"corrector": False}),
    Case(solvers.unipc_3, 3, options={"corrector": False}),
    Case(solvers.unipc_2, 3, options={"variant": "bh1"}, from_alpha_0=False),
    Case(solvers.unipc_3, 4, options={"predicts": "eps", "variant": "bh1"}, from_alpha_0=False),
    Case(solvers.default, 4, steps=160),  # 3.2 from 40 to 80 steps, 3.9 from 160 to 320, 4.0 beyond
    Case(solvers.multistep, 3, from_alpha_0=False),
    Case(solvers.multistep, 4, options={"order": 4}, from_alpha_0=False),
    Case(solvers.multistep, 4, options={"corrector": True}, from_alpha_0=False),
    Case(solvers.multistep, 2, options={"predicts": "eps", "variable": "lam", "order": 2}, from_alpha_0=False),
    Case(solvers.multistep, 3, options={"predicts": "x0"}),
    Case(solvers.multistep, 3, options={"predicts": "x0", "variable": "lam", "order": 2, "corrector": True}),
    Case(solvers.multistep, 3, options={"predicts": "flow", "variable": "tau"}),
    Case(solvers.multistep, 4, options={"predicts": "flow", "variable": "tau", "corrector": True}),
    Case(solvers.deis, 3, from_alpha_0=False),
    Case(solvers.lms, 4, from_alpha_0=False),
    Case(solvers.ipndm, 2, from_alpha_0=False),
    Case(solvers.ipndm_v, 4, from_alpha_0=False),
    Case(solvers.pndm, 2, evaluations=4, first=3, memory=13, from_alpha_0=False),
    Case(solvers.plms, 2, evaluations=2, first=1, from_alpha_0=False),
    Case(solvers.flow_heun, 2, evaluations=2, through=True),
    Case(solvers.flow_2m, 2),
    Case(solvers.ddim, None, options={"eta": 0.5}),
    Case(solvers.ddim, None, options={"eta": 1.0}),
    Case(solvers.ddpm, None),
    Case(solvers.ddpm, None, options={"large": 1.0}),
    Case(solvers.euler, None, options={"s_churn": 2.0, "s_tmin": 0.05, "s_noise": 1.007}),
    Case(solvers.heun, None, 2, {"s_churn": 2.0, "s_tmin": 0.05, "s_noise": 1.007}, from_alpha_0=False),
    Case(solvers.sde_dpmpp_1, 1, options={"eta": 0.0}),
    Case(solvers.sde_dpmpp_2m, 2, options={"eta": 0.0}),
    Case(solvers.sde_dpmpp_3m, 3, options={"eta": 0.0}),
    Case(solvers.sde_dpmpp_2s, 2, evaluations=2, options={"eta": 0.0}),
    Case(solvers.euler_ancestral, 1, options={"eta": 0.0}),
    Case(solvers.euler_ancestral_flow, 1, options={"eta": 0.0}),
    Case(solvers.dpm2_ancestral, 2, evaluations=2, options={"eta": 0.0}),
    Case(solvers.dpmpp_2s_ancestral, 2, evaluations=2, options={"eta": 0.0}),
    Case(solvers.sa_solver, 4, options={"tau": 0.0}),
    Case(solvers.sa_solver, 3, options={"tau": 0.0, "corrector": 0}),
    Case(solvers.sa_solver, 2, options={"tau": 0.0, "predictor": 1, "corrector": 2}),
    Case(solvers.tcd, 1, options={"gamma": 0.0}),
    Case(solvers.sde_dpmpp_1, None, options={"eta": 0.5}),
    Case(solvers.sde_dpmpp_2m, None),
    Case(solvers.sde_dpmpp_2m, None, options={"eta": 0.4, "s_noise": 1.003, "midpoint": False}),
    Case(solvers.sde_dpmpp_3m, None),
    Case(solvers.sde_dpmpp_3m, None, options={"curvature": 0.5}),
    Case(solvers.sde_dpmpp_2s, None, evaluations=2),
    Case(solvers.euler_ancestral, None),
    Case(solvers.euler_ancestral, None, options={"eta": 0.6, "s_noise": 1.003}),
    Case(solvers.euler_ancestral_flow, None),
    Case(solvers.euler_ancestral_flow, None, options={"eta": 0.5, "s_noise": 1.003}),
    Case(solvers.dpm2_ancestral, None, evaluations=2),
    Case(solvers.dpmpp_2s_ancestral, None, evaluations=2, options={"eta": 0.6}),
    Case(solvers.sa_solver, None),
    Case(solvers.sa_solver, None, options={"tau": 0.6, "predictor": 2, "corrector": 0}),
    Case(solvers.restart, None, evaluations=2, from_alpha_0=False),
    Case(solvers.consistency, None),
    Case(solvers.tcd, None),
    Case(solvers.tcd, None, options={"gamma": 1.0}),
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
    # nor where alpha = 5e-5 (cosine): dividing by it, and long extrapolations from there, leave few digits
    if not case.from_alpha_0 and not schedule.alpha(schedule.t_max) > 1e-3:
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
