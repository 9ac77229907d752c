"""Latent consistency: a student that jumps to the end of a guided teacher's path, from any of its times.

Luo et al. 2023, arXiv:2310.04378 (LCM), and arXiv:2311.05556 (LCM-LoRA).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastsample.adapters.diffusers import spacing_of
from fastsample.denoiser import Denoiser, Model
from fastsample.grid import Grid, grid, node
from fastsample.guidance import Guided
from fastsample.schedule import VP
from fastsample.spacing import Spacing, trailing
from fastsample.tracing import Solver
from fastsample.wrapper import Wrapper, altered

from . import draws
from .boundary import Bounded, LCMBoundary
from .checking import check_pair, check_start
from .consistency import Consistency, check_heard, check_weight, weighed
from .distances import Distance
from .method import Batch, asked, conditions, described, dropped
from .path import Path, path
from .scale import Scales, at_scale
from .teacher_step import ddim
from .times import noisy
from .weights import Weight


@dataclass(frozen=True)
class Huber:
    """The mean over the numbers of a sample of sqrt(d^2 + c^2) - c, d the difference of each. About |d| far above c.

    So the code of LCM has it, with c = 0.001. It is not the pseudo-Huber distance of Song and Dhariwal 2023
    (arXiv:2310.14189), whose d is the norm of the whole sample and whose c grows with its size.
    """

    c: float = 0.001

    def __post_init__(self) -> None:
        if not 0 < self.c < math.inf:
            raise ValueError(f"c of a Huber distance must be positive and finite, got {self.c:g}; 'l2' has none")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)  # c^2 is 0 in float16
        d = a.to(dtype) - b.to(dtype)
        return ((d.square() + self.c**2).sqrt() - self.c).flatten(1).mean(1)


@dataclass(frozen=True)
class LatentConsistency(Consistency):
    """f(x_s, s) is to equal f(x_t, t), x_t being one step of the guided teacher from s to t, the next of `times`.

    Luo et al. 2023, arXiv:2310.04378, Alg. 1. The step is that of their augmented equation: guidance of x0 and of eps,
    which are one, since both are affine in what the network says. On 1000 indices the default is theirs: the times
    19, 39, ..., 999, each step skipping 20 indices, the last from 19 to 0, where f is the state itself.

    student: f, a denoiser with its boundary, `bounded(student, "lcm")`; made by `student_of`, `scaled_student` (told
        the scale) or `lora_student`. Networks that predict eps are usual here; at one step v is better.
    teacher: guided, fs.Guided(model, uncond={...}, scale=7.5), whose uncond has one row, [1, ...], for all samples. The
        conditions of the batches join it. Or a plain denoiser, to distil without guidance.
    scales: random scales in place of the teacher's own, told to the student or not.
    times, spacing: how many steps the path is cut into, and where. Sample on `skipping(times)`.
    solver: the teacher's step, as for `ConsistencyDistillation`.
    distance: `Huber(c)`, or as for `ConsistencyDistillation`.
    target: "student", or the rate of a moving average of its weights (0.95 in the code of LCM; none for LoRA).
    weight: of the distance, as for `ConsistencyDistillation`; LCM has none ("uniform").
    drop, null: as for `Diffusion`.

    "x0" of the batches are latents, `fs.encode`, and their loader says so: `Batches(..., bounded=False)`. The other
    entries are conditions of the network. One whose name has a dot is put into a dictionary:
    "added_cond_kwargs.text_embeds", for SDXL.

    Raises ValueError where the times cannot be placed, or start at alpha = 0 with a network that predicts eps.
    """

    teacher: Model
    distance: str | Distance = field(default=Huber(), kw_only=True)
    scales: Scales | None = field(default=None, kw_only=True)
    times: int = field(default=50, kw_only=True)
    spacing: Spacing = field(default=trailing, kw_only=True)
    solver: Solver = field(default=ddim, kw_only=True)
    weight: str | Weight = field(default="uniform", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.student, Bounded):
            raise TypeError(
                f"the student needs a boundary, where it is the identity, got a {type(self.student).__name__} without; "
                f"pass distill.bounded(student, 'lcm')"
            )
        check_pair(self.student, self.teacher)
        check_weight(self.weight)
        check_start("student", self.student, self.grid.nodes[0])
        check_start("teacher", self.teacher, self.grid.nodes[0])
        check_heard(self.weight, self.grid.nodes[0])
        if self.scales is not None:
            at_scale(self.teacher, torch.ones(1))

    @property
    def frozen(self) -> list[Denoiser]:
        return asked(self.teacher)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "scales": described(self.scales)}

    @property
    def grid(self) -> Grid:
        """The times of the student, the last that of its boundary."""
        return self._path.grid

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        data = batch["x0"]
        i = self._path.random(len(data), data.device)
        s, t = self._path.at(i)
        x_s = noisy(data, draws.randn_like(data), s)
        given = dropped(conditions(batch), self.null, self.drop)
        teacher, told = _fitted(self.teacher, given, data), nested(given)
        condition = told
        if self.scales is not None:
            scale = self.scales.draw(len(data), data.device)
            teacher, condition = at_scale(teacher, scale), {**told, **self.scales.told(scale)}
        assert self._path.steps is not None
        with torch.no_grad():
            x_t = self._path.steps.walk(teacher, x_s, i, told)
        found = self._distances(x_s, s, x_t, t, condition)
        return (weighed(self.weight, s, t).to(found) * found).mean()

    @cached_property
    def _path(self) -> Path:
        whole = grid(self.student.schedule, self.times, self.spacing)
        assert isinstance(self.student, Bounded)
        end = node(self.student.schedule, self.student.boundary.end(self.student.schedule))
        last = whole.nodes[-2].t
        if not last > end.t:
            raise ValueError(
                f"the last of {self.times} times of spacing {whole.spacing} is t = {last:g}, but the student's "
                f"boundary is at t = {end.t:g} and must lie below; take fewer times"
            )
        return path(Grid(self.student.schedule, (*whole.nodes[:-1], end), whole.spacing), "uniform", self.solver)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1, "c": 2} as {"a": {"b": 1}, "c": 2}: batches are flat, some conditions of diffusers are not."""
    found: dict[str, Any] = {}
    for key, value in flat.items():
        name, _, inner = key.partition(".")
        if inner:
            found[name] = {**found.get(name, {}), inner: value}
        else:
            found[name] = value
    return found


def _fitted(teacher: Model, condition: Batch, data: Tensor) -> Model:
    """The teacher with its uncond in a row for each sample; what it does not name is that of the batch."""
    if isinstance(teacher, Guided):
        own = {key: _row(value, data) for key, value in _flat(teacher.uncond).items()}
        return altered(teacher, uncond=nested({**condition, **own}))
    if isinstance(teacher, Wrapper):
        return altered(teacher, model=_fitted(teacher.model, condition, data))
    return teacher


def _flat(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in given.items():
        inside = value if isinstance(value, Mapping) else None
        found |= {key: value} if inside is None else {f"{key}.{name}": one for name, one in inside.items()}
    return found


def _row(value: Any, data: Tensor) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.to(data.device)
    return value.expand(len(data), *value.shape[1:]) if value.dim() and len(value) == 1 else value


def skipping(times: int = 50) -> Spacing:
    """Where to sample: a choice of the `times` that the student was trained at, as diffusers' LCMScheduler places it.

    Four steps of 50 times on 1000 indices: 999, 759, 499, 259. For `fs.grid(schedule, steps, spacing=skipping())`.
    """
    spacing = spacing_of({"original_inference_steps": times, "beta_start": None}, "LCMScheduler")
    assert spacing is not None
    return spacing


def lcm_scheduler(student: Bounded, times: int = 50) -> Any:
    """diffusers' LCMScheduler for this student: the same schedule, prediction, times and boundary.

    With it the student, or its LoRA, runs in any pipeline of diffusers: `pipe.scheduler = lcm_scheduler(student)`.
    Raises ValueError where that scheduler has no such setting.
    """
    names = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    schedule, limit, predicts = student.schedule, student.boundary, student.prediction.name
    if not isinstance(schedule, VP) or predicts not in names:
        raise ValueError(
            f"LCMScheduler is for a VP schedule and networks that predict {', '.join(names)}, got {predicts} on "
            f"{schedule!r}; sample this student by fs.sample"
        )
    if not isinstance(limit, LCMBoundary) or limit.sigma_data != 0.5:
        raise ValueError(
            f"LCMScheduler has the boundary of LCM with sigma_data = 0.5, this student {limit}; sample it by fs.sample"
        )
    try:
        from diffusers import LCMScheduler
    except ImportError as error:
        raise ImportError("this makes a scheduler of diffusers: pip install 'fastsample[diffusers]'") from error
    make: Any = LCMScheduler
    return make(
        num_train_timesteps=len(schedule.betas),
        trained_betas=list(schedule.betas),
        prediction_type=names[predicts],
        original_inference_steps=times,
        timestep_scaling=limit.timestep_scaling,
        clip_sample=False,
    )
