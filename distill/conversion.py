"""Conversion: a student of another prediction first learns to say what the teacher says.

An eps network gives no usable x0 at the noisiest times, where one step must begin; v and x0 networks do.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fastsample.denoiser import Denoiser, Model
from fastsample.grid import node, per_sample
from fastsample.guidance import Guidance
from fastsample.prediction import Prediction
from fastsample.wrapper import Wrapper

from . import draws
from .checking import check_pair, check_start
from .method import Batch, Method, asked, check_drop, conditions, dropped
from .scale import Scales, at_scale
from .times import noisy, random_nodes


def student_of(teacher: Denoiser, *, predicts: str | Prediction | None = None) -> Denoiser:
    """A copy of the teacher, to be trained; `predicts` says what its network shall come to predict.

    Where that is another quantity, the weights are only a start: train it by `Conversion`.
    """
    if not isinstance(teacher.network, nn.Module):
        raise TypeError(f"only a torch.nn.Module can be copied and trained, got {type(teacher.network).__name__}")
    network = copy.deepcopy(teacher.network).requires_grad_(True)
    return Denoiser(
        network,
        teacher.schedule,
        predicts or teacher.prediction,
        time=teacher.time,
        dtype=teacher.dtype,
        spacing=teacher.spacing,
    )


@dataclass(frozen=True)
class Conversion(Method):
    """Squared error between the student's output and what the teacher's x0 is in the student's own prediction.

    Of a v student that is the error of x0 with weight SNR + 1 (Salimans and Ho 2022, arXiv:2202.00512, Sec. 4).

    teacher: may be guided; the student then learns to say alone what the two evaluations of guidance say, at the
        teacher's scale or at any of `scales`. Meng et al. 2023, arXiv:2210.03142, Sec. 3.1.
    limit: the teacher's x0 is clipped to [-limit, limit]; of an eps teacher it may be far outside at noisy times.
        math.inf clips none, as latents need, which have no such range: data beyond the limit are refused.
    scales: guidance scales in place of the teacher's own, one drawn for each sample, that the student is told.
    drop, null: as for `Diffusion`.
    """

    student: Denoiser
    teacher: Model
    limit: float = field(default=1.0, kw_only=True)
    scales: Scales | None = field(default=None, kw_only=True)
    drop: float = field(default=0.0, kw_only=True)
    null: Mapping[str, float | Tensor] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        check_drop(self.drop, self.null)
        check_pair(self.student, self.teacher)
        if not self.limit > 0:
            raise ValueError(f"limit must be above 0, got {self.limit:g}; math.inf clips none")
        if self.scales:
            at_scale(self.teacher, torch.ones(1))
        check_start("teacher", self.teacher, node(self.teacher.schedule, self.teacher.schedule.t_max))

    @property
    def roles(self) -> dict[str, Denoiser]:
        return {"student": self.student}

    @property
    def frozen(self) -> list[Denoiser]:
        return asked(self.teacher)

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        data = batch["x0"]
        check_limit(data, self.limit)
        at = random_nodes(self.student.schedule, len(data), data.device)
        x = noisy(data, draws.randn_like(data), at)
        condition = dropped(conditions(batch), self.null, self.drop)
        teacher, _, told = told_scales(self.teacher, self.scales, data)
        with torch.no_grad():
            x0 = teacher.predict(x, at, **condition).clamp(-self.limit, self.limit)
        p, q = self.student.prediction.output(at.alpha, at.sigma)
        target = per_sample(p, x) * x + per_sample(q, x) * x0
        return (self.student.output(x, at, **condition, **told) - target).square().mean()


def check_limit(data: Tensor, limit: float) -> None:
    """What the data themselves exceed must not bound what the teacher says of them."""
    most = 0.0 if limit == math.inf else float(data.detach().abs().max())
    if most > 1.001 * limit:
        raise ValueError(
            f"x0 of the batch reaches {most:.3g}, but Conversion clips what the teacher says of it to "
            f"limit = {limit:g}; latents have no such range: pass limit=math.inf"
        )


def told_scales(teacher: Model, scales: Scales | None, data: Tensor) -> tuple[Model, Batch, Batch]:
    """The teacher at a scale drawn for each sample of data, [B, ...], and the conditions that tell teacher and student.

    A guided teacher is guided at those scales; any other must have been taught to take them as the student does.
    """
    if scales is None:
        return teacher, {}, {}
    scale = scales.draw(len(data), data.device)
    told = scales.told(scale)
    return (at_scale(teacher, scale), {}, told) if guided(teacher) else (teacher, told, told)


def guided(model: Model) -> bool:
    """Whether there is guidance among the wrappers of a model."""
    return isinstance(model, Guidance) or (isinstance(model, Wrapper) and guided(model.model))
