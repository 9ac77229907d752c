"""What a student and its teacher must be to one another, looked at before any training."""

from __future__ import annotations

import warnings

from fastsample.denoiser import Denoiser, Model
from fastsample.grid import Node
from fastsample.prediction import EPS
from fastsample.wrapper import remembers

from .method import asked


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


def check_starts(student: Denoiser, teacher: Model, first: Node) -> None:
    """`check_start` of both; an eps student that can start is warned of. Called by __post_init__ of a method."""
    check_start("student", student, first)
    check_start("teacher", teacher, first)
    warn_of_eps(student, first, stacklevel=5)


def warn_of_eps(student: Denoiser, first: Node, *, stacklevel: int = 4) -> None:
    """Warn of an eps student, whose x0 at the first step is a small number divided by alpha."""
    if student.prediction is EPS:
        warnings.warn(
            f"the student predicts eps: x0 = (x - sigma eps) / alpha magnifies its errors by "
            f"{first.sigma / first.alpha:.3g} at the first step, so one-step samples will be poor; take "
            f"student_of(teacher, predicts='v') and train it by Conversion first",
            stacklevel=stacklevel,
        )


def check_start(role: str, model: Model, first: Node) -> None:
    """An eps network has no x0 at alpha = 0: one such sample makes the loss NaN."""
    if first.alpha == 0 and any(denoiser.prediction is EPS for denoiser in asked(model)):
        raise ValueError(
            f"the {role} predicts eps, which says nothing of x0 at alpha = 0, where the times start (t = {first.t:g} "
            f"of {model.schedule!r}); take a {role} that predicts v, x0 or flow, or a schedule that stays below"
        )
