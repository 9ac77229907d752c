"""Progressive distillation: a student learns to go in one step where its teacher goes in two; then it is the teacher.

Salimans and Ho 2022, arXiv:2202.00512, Alg. 2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastsample.denoiser import Denoiser, Model
from fastsample.grid import Grid, Node, Nodes, grid, per_sample
from fastsample.prediction import EPS
from fastsample.schedule import Schedule
from fastsample.spacing import Spacing, uniform_t

from . import draws
from .checking import check_pair, check_starts
from .conversion import Conversion, student_of, told_scales
from .method import Batch, Method, asked, check_drop, conditions, dropped
from .scale import Embedded, Scales, scaled_student
from .times import ddim_step, noisy
from .trainer import train
from .weights import Weight, weight_of

MAGNIFIED = 100  # times an error of eps at the first node: the built-in digits have 15, DDPM's linear betas 157


@dataclass(frozen=True)
class ProgressiveDistillation(Method):
    """One DDIM step of the student, over an interval of its grid, is to land where two of the teacher land.

    Salimans and Ho 2022, arXiv:2202.00512, Alg. 2, at the discrete times of the student's grid, as there. Losses are
    means over the numbers of an image, where the paper has sums.

    student: predicts v, x0 or flow; start it from the teacher's weights, see `student_of` and `Conversion`.
    teacher: a denoiser, or one in guidance that answers at any time, such as fs.Guided(model, uncond=..., scale=3.0);
        the conditions of the batches join it.
    steps, spacing: the student's grid. The teacher walks twice the steps, and every second of its nodes must be one
        of the student's, as with equal steps in t, in lam or in a power of t. Sample by DDIM on `grid`.
    weight: "truncated_snr", "snr+1", another of those of `Diffusion`, or a function Nodes -> [B], of the squared error
        of x0.
    scales: guidance scales, one drawn for each sample, that the student is told; a guided teacher has them in place of
        its own, any other is told them too. Meng et al. 2023, arXiv:2210.03142, Sec. 3.2.
    drop, null: as for `Diffusion`, so that the student knows "no condition" too.

    Raises ValueError where the two grids do not share their nodes, or start at alpha = 0 with a network that predicts
    eps. Warns where a teacher of eps starts near it.
    """

    student: Denoiser
    teacher: Model
    steps: int = field(kw_only=True)
    spacing: Spacing = field(default=uniform_t, kw_only=True)
    weight: str | Weight = field(default="truncated_snr", kw_only=True)
    scales: Scales | None = field(default=None, kw_only=True)
    drop: float = field(default=0.0, kw_only=True)
    null: Mapping[str, float | Tensor] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        check_drop(self.drop, self.null)
        check_pair(self.student, self.teacher)
        weight_of(self.weight)
        check_starts(self.student, self.teacher, self.finer.nodes[0])
        check_magnified(self.teacher, self.finer.nodes[0])

    @property
    def roles(self) -> dict[str, Denoiser]:
        return {"student": self.student}

    @property
    def frozen(self) -> list[Denoiser]:
        return asked(self.teacher)

    @cached_property
    def grid(self) -> Grid:
        """The nodes of the student."""
        return grid(self.student.schedule, self.steps, self.spacing)

    @cached_property
    def finer(self) -> Grid:
        """The nodes of the teacher."""
        return halved(self.student.schedule, self.steps, self.spacing)

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        data = batch["x0"]
        i = draws.randint(self.steps, len(data), device=data.device)
        s, _, _ = self._interval(i)
        x = noisy(data, draws.randn_like(data), s)
        condition = dropped(conditions(batch), self.null, self.drop)
        teacher, taught, told = told_scales(self.teacher, self.scales, data)
        error = self.student.predict(x, s, **condition, **told) - self._target(teacher, x, i, {**condition, **taught})
        return (weight_of(self.weight)(s).to(error) * error.square().flatten(1).mean(1)).mean()

    def target(self, x: Tensor, i: Tensor, **condition: Any) -> Tensor:
        """The x0 whose one step from x, over interval i of the student, ends where two of the teacher end.

        x: [B, ...]; i: [B], 0 to steps - 1. With x1, the teacher's x0 at the start s, and x2, that in the middle m,
        the target of Alg. 2 is a mean of them; written so, it does not cancel where steps are short:
            (x_t - r x_s) / (alpha_t - r alpha_s) = (1 - share) x1 + share x2,   r = sigma_t / sigma_s
        In the last interval, sigma_t = 0, it is x2.
        """
        return self._target(self.teacher, x, i, condition)

    @torch.no_grad()
    def _target(self, teacher: Model, x: Tensor, i: Tensor, condition: Mapping[str, Any]) -> Tensor:
        s, m, t = self._interval(i)
        x1 = teacher.predict(x, s, **condition)
        x2 = teacher.predict(ddim_step(x, x1, s, m), m, **condition)
        share = (t.alpha - m.alpha * (t.sigma / m.sigma)) / (t.alpha - s.alpha * (t.sigma / s.sigma))
        found: Tensor = torch.lerp(x1, x2, per_sample(share, x))
        return found

    def _interval(self, i: Tensor) -> tuple[Nodes, Nodes, Nodes]:
        """The start, the middle and the end of interval i of each sample."""
        table = self._table.to(i.device)
        s, m, t = (Nodes(*(row[2 * i + k] for row in table)) for k in range(3))
        return s, m, t

    @cached_property
    def _table(self) -> Tensor:
        """t, alpha and sigma at the nodes of the teacher, [3, 2 steps + 1], float64."""
        return torch.tensor([[n.t, n.alpha, n.sigma] for n in self.finer.nodes], dtype=torch.float64).T


def progressive(
    teacher: Model,
    loader: Iterable[Batch],
    *,
    updates: int | Sequence[int],
    rounds: Sequence[int] = (16, 8, 4, 2, 1),
    student: Denoiser | None = None,
    conversion: int = 1000,
    limit: float = 1.0,
    spacing: Spacing = uniform_t,
    weight: str | Weight = "truncated_snr",
    scales: Scales | None = None,
    drop: float = 0.0,
    null: Mapping[str, float | Tensor] | None = None,
    out: str | Path | None = None,
    save: Callable[[Denoiser, Path], object] | None = None,
    seed: int = 0,
    **options: Any,
) -> Denoiser:
    """Halve the steps of a teacher round by round; return the student of the last. Sample it by DDIM on its grid.

    Each student begins with the weights of its teacher, the student of the round before; the first teacher walks
    2 rounds[0] steps of DDIM. That is the one given, where Meng et al. 2023 (arXiv:2210.03142, Sec. 3.2) have the
    converted student: so what conversion has missed is learned, not handed on.

    updates: of each round, or one number for all.
    rounds: the steps of the students, each half of those before.
    student: of the first round, trained in place; None is a copy of the teacher, which predicts v in place of eps and,
        with scales that are told as `timestep_cond`, has a projection for them (`scaled_student`).
    conversion: updates of `Conversion` before the first round, which are done where the student is given, the teacher
        is guided or it predicts eps: then the student does not yet say what the teacher says. 0 leaves them out.
    limit: of the conversion; math.inf for latents.
    spacing, weight, scales, drop, null: as for `ProgressiveDistillation`. With scales the teacher is guided, at those
        in place of its own; sample the student at one by condition={..., **scales.told(scale, batch)}.
    out: a folder with one for each round in it, steps-16, steps-8, ..., and conversion; None writes nothing. The same
        call again goes on where it was stopped, in a round or between two, with the weights of an uninterrupted run.
    save: writes each student to `model` in the folder of its round, such as fs.save_pretrained.
    seed: of the conversion; round k = 1, 2, ... has seed + k.
    options: those of `train`: lr, ema, clip, save_every, ...
    Raises ValueError, before any training, where the steps do not halve or the spacing does not fit.
    """
    counts = _updates(updates, rounds)
    check_rounds(rounds)
    weight_of(weight)
    for steps in rounds:
        halved(teacher.schedule, steps, spacing)
    if save and out is None:
        raise ValueError("save needs a folder to write to; give out='runs/progressive'")
    first, null = asked(teacher)[0], null or {}
    copied = student is None and isinstance(teacher, Denoiser) and first.prediction is not EPS
    if student is None:
        student = _copy(first, scales)
    if conversion and not copied:
        convert = Conversion(student, teacher, limit=limit, scales=scales, drop=drop, null=null)
        train(convert, loader, steps=conversion, out=_inside(out, "conversion"), seed=seed, **options)
    for k, (steps, count) in enumerate(zip(rounds, counts), 1):
        method = ProgressiveDistillation(
            student, teacher, steps=steps, spacing=spacing, weight=weight, scales=scales, drop=drop, null=null
        )
        folder = _inside(out, f"steps-{steps}")
        done = train(method, loader, steps=count, out=folder, seed=seed + k, **options)
        if save and folder:
            save(done, folder / "model")
        if steps > rounds[-1]:
            teacher, student = done, student_of(done)
    return done


def _copy(teacher: Denoiser, scales: Scales | None) -> Denoiser:
    predicts = "v" if teacher.prediction is EPS else None
    if scales and isinstance(scales.embed, Embedded):
        return scaled_student(teacher, scales.embed.size, predicts=predicts)
    return student_of(teacher, predicts=predicts)


def halved(schedule: Schedule, steps: int, spacing: Spacing) -> Grid:
    """The grid of 2 `steps` intervals, every second node of which is a node of the grid of `steps`, or a ValueError."""
    coarse, fine = (grid(schedule, number, spacing) for number in (steps, 2 * steps))
    for a, b in zip(coarse.nodes, fine.nodes[::2]):
        if not math.isclose(a.t, b.t, rel_tol=1e-9, abs_tol=1e-9):
            raise ValueError(
                f"spacing {coarse.spacing} places {steps} steps at t = {a.t:g} and every second of {2 * steps} at "
                f"t = {b.t:g}: two steps of the teacher would not end where one of the student does; use uniform_t, "
                f"uniform_lam, quadratic_t or power_t"
            )
    return fine


def check_magnified(teacher: Model, first: Node) -> None:
    """Warn of a teacher that predicts eps and has next to no signal at the first node. Called by __post_init__."""
    if first.sigma > MAGNIFIED * first.alpha > 0 and any(denoiser.prediction is EPS for denoiser in asked(teacher)):
        warnings.warn(
            f"the teacher predicts eps: x0 = (x - sigma eps) / alpha magnifies its errors by "
            f"{first.sigma / first.alpha:.3g} at the first step (t = {first.t:g}), and the student would learn them; "
            f"train a student that predicts v by Conversion, which clips that x0, and make it the teacher",
            stacklevel=4,
        )


def check_rounds(rounds: Sequence[int]) -> None:
    if not rounds:
        raise ValueError("rounds is empty; give the steps of each student, such as (16, 8, 4, 2, 1)")
    for before, now in pairwise(rounds):
        if before != 2 * now:
            raise ValueError(
                f"each round must halve the steps of the one before, got {now} after {before} in {tuple(rounds)}; "
                f"begin with a power of two, such as (16, 8, 4, 2, 1)"
            )


def _updates(updates: int | Sequence[int], rounds: Sequence[int]) -> list[int]:
    counts = [updates] * len(rounds) if isinstance(updates, int) else list(updates)
    if len(counts) != len(rounds) or min(counts, default=1) < 1:
        raise ValueError(
            f"updates must be one number of at least 1 or one for each of the {len(rounds)} rounds, got {updates}"
        )
    return counts


def _inside(out: str | Path | None, name: str) -> Path | None:
    return None if out is None else Path(out) / name
