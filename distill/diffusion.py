"""Diffusion: the ordinary training of a denoiser, from which every teacher comes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from fastsample.denoiser import Denoiser
from fastsample.grid import per_sample

from . import draws
from .method import Batch, Method, check_drop, conditions, dropped
from .times import noisy, random_nodes


@dataclass(frozen=True)
class Diffusion(Method):
    """Squared error of what the network predicts, at random times. Ho et al. 2020, arXiv:2006.11239, Eq. 14.

    Of an eps network that is the paper's loss; x0, v and flow networks are trained on their own quantity.

    drop: share of the samples whose conditions are replaced by `null`, so that the network can be guided.
        Ho and Salimans 2022, arXiv:2207.12598.
    null: the value that means "none" for each condition, such as {"class_labels": 10}.
    """

    model: Denoiser
    drop: float = field(default=0.0, kw_only=True)
    null: Mapping[str, float | Tensor] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        check_drop(self.drop, self.null)

    @property
    def roles(self) -> dict[str, Denoiser]:
        return {"model": self.model}

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        x0 = batch["x0"]
        at = random_nodes(self.model.schedule, len(x0), x0.device)
        eps = draws.randn_like(x0)
        p, q = self.model.prediction.output(at.alpha, at.sigma)
        # p x + q x0 with x written out in float64: in float32 the two halves cancel where sigma is small
        target: Tensor = per_sample(p * at.alpha + q, x0) * x0 + per_sample(p * at.sigma, x0) * eps
        condition = dropped(conditions(batch), self.null, self.drop)
        output = self.model.output(noisy(x0, eps, at), at, **condition)
        return (output - target).square().mean()
