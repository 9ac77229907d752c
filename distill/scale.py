"""Guidance scales as a condition: drawn at random for a guided teacher, and told to its student.

A student that is told the scale may be sampled at any it was trained with, by one evaluation in place of two.
Meng et al. 2023, arXiv:2210.03142, Sec. 3.1; Luo et al. 2023, arXiv:2310.04378, Sec. 4.2. w there is scale - 1.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastsample.adapters.diffusers import Sampled
from fastsample.adapters.latents import guidance_embedding
from fastsample.denoiser import Denoiser, Model
from fastsample.guidance import Guidance
from fastsample.prediction import Prediction
from fastsample.wrapper import Wrapper, altered

from . import draws

Told = Callable[[Tensor], Mapping[str, Tensor]]  # scales [B] -> the conditions that say them, [B, ...]


@dataclass(frozen=True)
class Embedded:
    """Scales as `timestep_cond`, [B, size]: for diffusers networks with time_cond_proj_dim = size."""

    size: int = 256

    def __post_init__(self) -> None:
        guidance_embedding(1.0, self.size)

    @property
    def __name__(self) -> str:  # what a checkpoint remembers
        return f"timestep_cond of {self.size}"

    def __call__(self, scale: Tensor) -> dict[str, Tensor]:
        return {"timestep_cond": guidance_embedding(scale, self.size)}


@dataclass(frozen=True)
class Plain:
    """Scales as they are, [B]: for networks with `guidance`, such as FLUX, or with a keyword of your own."""

    keyword: str = "guidance"

    @property
    def __name__(self) -> str:
        return self.keyword

    def __call__(self, scale: Tensor) -> dict[str, Tensor]:
        return {self.keyword: scale.float()}


@dataclass(frozen=True)
class Scales:
    """Guidance scales, one for each sample, uniform from low to high.

    low, high: as in `fs.Guided`, so 1 is none. LCM has 3 to 15 (its paper) or 6 to 16 (its scripts).
    embed: how the student is told: `Embedded(256)`, `Plain()`, a function scales [B] -> {keyword: [B, ...]}, or None,
        where it is not, as in the script of LCM-LoRA: such a student has one unknown scale.
    """

    low: float
    high: float
    embed: Told | None = Embedded()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high):
            raise ValueError(f"scales are drawn from low to high, finite, got {self.low:g} to {self.high:g}")

    @property
    def __name__(self) -> str:
        told = "not told" if self.embed is None else f"as {getattr(self.embed, '__name__', 'a function')}"
        return f"{self.low:g} to {self.high:g}, {told}"

    def draw(self, size: int, device: torch.device | str | None = None) -> Tensor:
        """[size], float64."""
        return self.low + (self.high - self.low) * draws.rand(size, device=device, dtype=torch.float64)

    def told(self, scale: float | Tensor, batch: int = 1) -> dict[str, Tensor]:
        """The conditions that tell the student a scale: a number, or a tensor [B] in place of `batch`.

        To sample it: `fs.sample(student, plan, noise, condition={**text, **scales.told(8.0, batch)})`.
        """
        scale = scale if isinstance(scale, Tensor) else torch.full((batch,), float(scale))
        return {} if self.embed is None else dict(self.embed(scale))


def at_scale(teacher: Model, scale: Tensor) -> Model:
    """The guided teacher with another scale for each sample, [B]. It answers at `Nodes` alone.

    Raises TypeError where there is no guidance in it.
    """
    if isinstance(teacher, Guidance):
        return altered(teacher, scale=lambda nodes: scale)
    if isinstance(teacher, Wrapper):
        return altered(teacher, model=at_scale(teacher.model, scale))
    raise TypeError(
        f"random scales need a teacher with guidance, got {type(teacher).__name__}; wrap it: fs.Guided(teacher, "
        f"uncond={{...}}, scale=1.0), whose own scale is then not used"
    )


def scaled_student(teacher: Denoiser, size: int = 256, *, predicts: str | Prediction | None = None) -> Denoiser:
    """A copy of a diffusers teacher, to be trained, with a projection of `timestep_cond` [B, size] added to its time.

    The projection begins at zero, and so the student as its teacher. Its config has time_cond_proj_dim = size.
    Raises ValueError for a network without `time_embedding`, or one that has such a projection.
    """
    sampled: Any = teacher.network
    network = sampled.network if isinstance(sampled, Sampled) else None
    embedding: Any = getattr(network, "time_embedding", None)
    if network is None or not hasattr(embedding, "cond_proj") or "time_cond_proj_dim" not in sampled.config:
        raise ValueError(
            f"{type(network or sampled).__name__} has no time_cond_proj_dim: only such networks of diffusers, a "
            f"UNet2DConditionModel for one, are told the scale so; give another a keyword of its own, see distill.Plain"
        )
    if embedding.cond_proj is not None:
        raise ValueError(
            f"this network is told the scale already (time_cond_proj_dim = {network.config.time_cond_proj_dim}); "
            f"copy it by student_of"
        )
    guidance_embedding(1.0, size)
    copied = copy.deepcopy(network).requires_grad_(True)
    weight = embedding.linear_1.weight
    projection = nn.Linear(size, embedding.linear_1.in_features, bias=False, device=weight.device, dtype=weight.dtype)
    nn.init.zeros_(projection.weight)
    copied.time_embedding.cond_proj = projection
    copied.register_to_config(time_cond_proj_dim=size)
    return Denoiser(
        Sampled(copied, null=sampled.null),
        teacher.schedule,
        predicts or teacher.prediction,
        time=teacher.time,
        dtype=teacher.dtype,
        spacing=teacher.spacing,
    )
