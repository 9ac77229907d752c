"""Recipes: how the built-in digits network is made, and a student of it."""

from __future__ import annotations

from pathlib import Path

from fastsample.adapters.pretrained import save_pretrained
from fastsample.denoiser import Denoiser
from fastsample.zoo.data import digits
from fastsample.zoo.digits import NULL, digits_network

from .consistency import ConsistencyDistillation
from .conversion import Conversion, student_of
from .data import Batches
from .diffusion import Diffusion
from .method import Method
from .trainer import train


def train_digits(
    out: str | Path,
    *,
    predicts: str = "eps",
    steps: int = 8000,
    seed: int = 0,
    resume: bool = True,
    progress: bool | None = None,
) -> Denoiser:
    """Train the digits network from nothing, and save it in `out`/model for `fs.from_pretrained`.

    `fastsample.zoo.digits()` is what this makes with its defaults, on one thread.
    """
    method = Diffusion(digits_network(predicts, seed=seed), drop=0.15, null={"class_labels": NULL})
    model = train(
        method,
        _loader(),
        steps=steps,
        out=out,
        lr=2e-3,
        warmup=100,
        ema=0.999,
        seed=seed,
        resume=resume,
        progress=progress,
    )
    save_pretrained(model, Path(out) / "model")
    return model


def distill_digits(
    teacher: Denoiser,
    out: str | Path,
    *,
    updates: float = 1.0,
    seed: int = 0,
    resume: bool = True,
    progress: bool | None = None,
) -> Denoiser:
    """Distil a student of the digits network, for one to four steps of DDIM on `fs.uniform_t`; saved in `out`/model.

    It predicts v: the first 400 updates convert it, the next 1200 make it consistent.
    updates: the share of these that is done; 0.1 shows the path and makes a poor student.
    """
    if not updates > 0:
        raise ValueError(f"updates is a share above 0, such as 1.0 for all, got {updates:g}")
    out = Path(out)
    student = student_of(teacher, predicts="v")
    null = {"class_labels": NULL}
    stages: list[tuple[str, Method, int, float]] = [
        ("conversion", Conversion(student, teacher, drop=0.1, null=null), 400, 2e-3),
        ("consistency", ConsistencyDistillation(student, teacher, drop=0.1, null=null), 1200, 5e-4),
    ]
    for name, method, steps, lr in stages:
        train(
            method,
            _loader(),
            steps=max(1, round(steps * updates)),
            out=out / name,
            lr=lr,
            seed=seed,
            save_every=100,
            resume=resume,
            progress=progress,
        )
    save_pretrained(student, out / "model")
    return student


def _loader() -> Batches:
    images, labels = digits("train")
    return Batches(images, {"class_labels": labels})
