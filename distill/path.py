"""The path that consistency is trained along: the intervals of a grid, one of which each sample draws."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastsample.denoiser import Denoiser
from fastsample.grid import Grid, Nodes, grid
from fastsample.spacing import Spacing
from fastsample.tracing import Solver

from . import draws
from .boundary import boundary_of
from .curriculum import Curriculum, Sampling, intervals, sampling
from .teacher_step import TeacherSteps, teacher_steps


@dataclass(frozen=True)
class Path:
    """A grid as tables of its intervals: the start and the end, [3, intervals] of t, alpha, sigma in float64."""

    grid: Grid
    starts: Tensor
    ends: Tensor
    reached: Tensor | None  # the probability of an interval and those before it; None: all the same
    steps: TeacherSteps | None

    def at(self, i: Tensor) -> tuple[Nodes, Nodes]:
        """The nodes at the start and at the end of interval i [B] of each sample."""
        s, t = (Nodes(*(row[i] for row in table.to(i.device))) for table in (self.starts, self.ends))
        return s, t

    def random(self, size: int, device: torch.device) -> Tensor:
        """A random interval for each sample, [B]."""
        if self.reached is None:
            return draws.randint(len(self.grid), size, device=device)
        u = draws.rand(size, device=device, dtype=torch.float64)
        return torch.searchsorted(self.reached.to(device), u, right=True).clamp(max=len(self.grid) - 1)


def path(grid: Grid, how: str | Sampling, solver: Solver | None = None) -> Path:
    """Tables of a grid, with the steps of a teacher by a solver."""
    rows = torch.tensor([[n.t, n.alpha, n.sigma] for n in grid.nodes], dtype=torch.float64).T
    reached = None
    if how != "uniform":
        shares = torch.tensor(sampling(how)(grid), dtype=torch.float64)
        if shares.shape != (len(grid),) or not bool((shares >= 0).all()) or not 0 < float(shares.sum()) < float("inf"):
            raise ValueError(
                f"sampling must give {len(grid)} shares for {len(grid)} intervals, none negative and not all 0, got "
                f"{shares.tolist()[:8]}"
            )
        reached = shares.cumsum(0) / shares.sum()
    steps = None if solver is None else teacher_steps(solver, grid)
    return Path(grid, rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), reached, steps)


def path_grid(student: Denoiser, count: int, spacing: Spacing) -> Grid:
    """The grid of training: to sigma = 0, or to where the boundary of the student begins."""
    boundary, schedule = boundary_of(student), student.schedule
    end = None if boundary is None else boundary.end(schedule)
    return grid(schedule, count, spacing, end=end if end is not None and end > schedule.t_zero else None)


def counts_of(times: int | Curriculum) -> list[int]:
    """The numbers of intervals to look at before training: the first, and the last where the curriculum says it."""
    if isinstance(times, int):
        return [times]
    return sorted({intervals(times, 0), *(times.counts() if hasattr(times, "counts") else ())})
