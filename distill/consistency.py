"""Consistency distillation: a student that jumps from any noise level straight to the end of the teacher's path."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from fastsample.denoiser import Denoiser, Model
from fastsample.grid import Grid, Node, Nodes, grid, per_sample
from fastsample.prediction import EPS
from fastsample.spacing import Spacing, uniform_t
from fastsample.wrapper import remembers

from . import draws
from .method import Batch, Method, asked, check_drop, conditions, dropped
from .times import ddim_step, noisy


@dataclass(frozen=True)
class ConsistencyDistillation(Method):
    """f(x_s, s) is to equal f(x_t, t), x_t being one DDIM step of the teacher from s to t, the next of `times`.

    Song et al. 2023, arXiv:2303.01469, Alg. 2, with these departures: f is the student's x0, so f(x, sigma = 0) = x
    without skip factors, and the last interval's target is the teacher's own step to sigma = 0; the target is the
    student itself without gradient (Song and Dhariwal 2023, arXiv:2310.14189, Sec. 3.2) and the distance their
    pseudo-Huber (Sec. 3.3); the weight is max(SNR, 1) (Salimans and Ho 2022, arXiv:2202.00512, Sec. 4).

    student: predicts v, x0 or flow; start it from the teacher's weights, see `student_of` and `Conversion`.
    times, spacing: how many intervals the path is cut into, and where. Sample on a grid of the same spacing.
    drop, null: as for `Diffusion`, so that the student knows "no condition" too.

    Raises ValueError where the times cannot be placed, or start at alpha = 0 with a network that predicts eps.
    """

    student: Denoiser
    teacher: Model
    times: int = field(default=16, kw_only=True)
    spacing: Spacing = field(default=uniform_t, kw_only=True)
    drop: float = field(default=0.0, kw_only=True)
    null: Mapping[str, float | Tensor] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        check_drop(self.drop, self.null)
        check_pair(self.student, self.teacher)
        check_starts(self.student, self.teacher, self.grid.nodes[0])

    @property
    def roles(self) -> dict[str, Denoiser]:
        return {"student": self.student}

    @property
    def frozen(self) -> list[Denoiser]:
        return asked(self.teacher)

    @cached_property
    def grid(self) -> Grid:
        return grid(self.student.schedule, self.times, self.spacing)

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        data = batch["x0"]
        i = draws.randint(self.times, len(data), device=data.device)
        last = per_sample(i == self.times - 1, data) > 0
        s, t = (Nodes(*(row[i] for row in table.to(data.device))) for table in self._tables)
        condition = dropped(conditions(batch), self.null, self.drop)
        x_s = noisy(data, draws.randn_like(data), s)
        with torch.no_grad(), same_dropout(data.device):
            x0 = self.teacher.predict(x_s, s, **condition)
            x_t = ddim_step(x_s, x0, s, t)
            # at the end, sigma = 0, f is the state itself, and the network cannot be asked
            target = torch.where(last, x_t, self.student.predict(x_t, _asked(s, t), **condition))
        distance = pseudo_huber(self.student.predict(x_s, s, **condition), target)
        weight = (s.alpha / s.sigma).square().clamp(min=1)
        loss: Tensor = (weight.to(distance) * distance).mean()
        return loss

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor]:
        """t, alpha and sigma at the start and at the end of each interval, [3, times], float64."""
        starts, ends = zip(*self.grid.steps())
        first, second = (
            torch.tensor([[n.t, n.alpha, n.sigma] for n in row], dtype=torch.float64).T for row in (starts, ends)
        )
        return first, second


def _asked(s: Nodes, t: Nodes) -> Nodes:
    """t, but s where sigma is 0."""
    ends = t.sigma == 0
    return Nodes(*(torch.where(ends, a, b) for a, b in ((s.t, t.t), (s.alpha, t.alpha), (s.sigma, t.sigma))))


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """sqrt(|a - b|^2 + c^2) - c of each sample, [B], with c = 0.00054 sqrt(d).

    Song and Dhariwal 2023, arXiv:2310.14189, Sec. 3.3.
    """
    difference = (a - b).flatten(1).float()
    c = 0.00054 * math.sqrt(difference.shape[1])
    return (difference.square().sum(1) + c * c).sqrt() - c


def same_dropout(device: torch.device) -> AbstractContextManager[None]:
    """The generators stay as they are, so what follows meets the dropout masks of what runs inside.

    Song and Dhariwal 2023, arXiv:2310.14189, Sec. 3.1.
    """
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def check_starts(student: Denoiser, teacher: Model, first: Node) -> None:
    """`check_start` of both; an eps student that can start is warned of. Called by __post_init__ of a method."""
    check_start("student", student, first)
    check_start("teacher", teacher, first)
    if student.prediction is EPS:
        warnings.warn(
            f"the student predicts eps: x0 = (x - sigma eps) / alpha magnifies its errors by "
            f"{first.sigma / first.alpha:.3g} at the first step, so one-step samples will be poor; take "
            f"student_of(teacher, predicts='v') and train it by Conversion first",
            stacklevel=4,
        )


def check_start(role: str, model: Model, first: Node) -> None:
    """An eps network has no x0 at alpha = 0: one such sample makes the loss NaN."""
    if first.alpha == 0 and any(denoiser.prediction is EPS for denoiser in asked(model)):
        raise ValueError(
            f"the {role} predicts eps, which says nothing of x0 at alpha = 0, where the times start (t = {first.t:g} "
            f"of {model.schedule!r}); take a {role} that predicts v, x0 or flow, or a schedule that stays below"
        )


def check_pair(student: Denoiser, teacher: Model) -> None:
    """A student and a teacher must speak of the same times, and not be one network; a teacher answers at any of them.

    Raises ValueError, or TypeError where the teacher is neither a denoiser nor made of one.
    """
    if any(student.network is denoiser.network for denoiser in asked(teacher)):
        raise ValueError("student and teacher are one network; make a copy: student_of(teacher, predicts='v')")
    if student.schedule != teacher.schedule:
        raise ValueError(f"the student's schedule {student.schedule!r} is not the teacher's {teacher.schedule!r}")
    if remembers(teacher):
        raise ValueError(
            f"the teacher remembers earlier evaluations ({type(teacher).__name__}), so it answers only within a run; "
            f"take one that does not, such as fs.Guided(..., reuse=1)"
        )
