"""Wrappers of a model that change what it predicts: classifier-free guidance and thresholding."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser, Model
from .grid import Node, Nodes, per_sample
from .prediction import X0, Prediction
from .schedule import Schedule


@dataclass(frozen=True)
class Guided:
    """Classifier-free guidance: uncond + scale (cond - uncond), so scale 1 is none.

    Ho and Salimans 2022, arXiv:2207.12598.

    cond, uncond: the network's keyword conditions, such as {"class_labels": labels}; tensors are [B, ...]. What is
        given to `predict` or `sample` joins both, so cond may come from there, batch by batch, and be left out here.
        A number in uncond, such as {"class_labels": 10}, stands for every sample.
    batched: one call with a doubled batch, or (False) two calls.
    interval: guide only where low <= lam <= high, elsewhere `cond` alone, which saves those rows.
        Kynkaanniemi et al. 2024, arXiv:2404.07724.
    rescale: pull the standard deviation of the guided prediction towards that of `cond` by this share, 0 to 1.
        Lin et al. 2023, arXiv:2305.08891, Eq. 15 and 16; on the quantity the network predicts.
    """

    model: Model
    cond: Mapping[str, Any] = field(default_factory=dict)
    uncond: Mapping[str, Any] = field(default_factory=dict)
    scale: float = field(kw_only=True)
    batched: bool = field(default=True, kw_only=True)
    interval: tuple[float, float] | None = field(default=None, kw_only=True)
    rescale: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        for name, given in (("cond", self.cond), ("uncond", self.uncond)):
            if not isinstance(given, Mapping):
                raise TypeError(
                    f"{name} must map the network's keywords to values, such as "
                    f"{{'class_labels': labels}}, got {type(given).__name__}"
                )
        if not self.uncond or (self.batched and self.cond and self.cond.keys() != self.uncond.keys()):
            raise ValueError(
                f"cond has the keywords {sorted(self.cond)} and uncond {sorted(self.uncond)}; give both the same (cond "
                f"may be left out and given to fs.sample), or batched=False"
            )
        if self.interval is not None and not self.interval[0] <= self.interval[1]:
            raise ValueError(f"interval is (low, high) in lam, got {self.interval}: it would never guide")
        if not math.isfinite(self.scale):
            raise ValueError(f"scale must be a finite number, got {self.scale:g}; 1 is no guidance")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"rescale is a share from 0 to 1, got {self.rescale:g}")

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule

    def predict(self, x: Tensor, node: Node | Nodes, **condition: Any) -> Tensor:
        low, high = self.interval or (-torch.inf, torch.inf)
        if self.scale == 1 or (isinstance(node, Node) and not low <= node.lam <= high):
            return self.model.predict(x, node, **{**condition, **self.cond})
        cond, uncond = self._both(x, node, {**condition, **self.cond}, {**condition, **self.uncond})
        guided = uncond + self.scale * (cond - uncond)
        if self.rescale:
            guided = self._rescaled(x, node, guided, cond)
        if isinstance(node, Nodes) and self.interval:
            guided = torch.where(per_sample((low <= node.lam) & (node.lam <= high), x).bool(), guided, cond)
        return guided

    def _both(
        self, x: Tensor, node: Node | Nodes, cond: Mapping[str, Any], uncond: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor]:
        uncond = {key: _like(cond.get(key), value) for key, value in uncond.items()}
        if not self.batched:
            return self.model.predict(x, node, **cond), self.model.predict(x, node, **uncond)
        if cond.keys() != uncond.keys():
            raise ValueError(
                f"uncond has {sorted(self.uncond)}, of which cond and the condition given here lack "
                f"{sorted(uncond.keys() - cond.keys())}; pass fs.sample(..., condition=...)"
            )
        both = {key: _pair(key, cond[key], uncond[key], len(x)) for key in cond}
        first, second = self.model.predict(torch.cat([x, x]), _twice(node), **both).chunk(2)
        return first, second

    def _rescaled(self, x: Tensor, node: Node | Nodes, guided: Tensor, cond: Tensor) -> Tensor:
        prediction = prediction_of(self.model)
        p, q = (per_sample(number, x) for number in prediction.output(node.alpha, node.sigma))
        u, w = (per_sample(number, x) for number in prediction.x0(node.alpha, node.sigma))
        output, target = p * x + q * guided, p * x + q * cond
        factor = per_sample(_rows(target).std(1) / _rows(output).std(1), x)
        rescaled: Tensor = u * x + w * (output * (1 + self.rescale * (factor - 1)))
        return rescaled


def prediction_of(model: Model) -> Prediction:
    """What the network below the wrappers predicts; any other model is asked for x0 alone."""
    while isinstance(model, Guided | Thresholded):
        model = model.model
    return model.prediction if isinstance(model, Denoiser) else X0


def _twice(node: Node | Nodes) -> Node | Nodes:
    if isinstance(node, Node):
        return node
    return Nodes(*(torch.cat([number, number]) for number in (node.t, node.alpha, node.sigma)))


def _like(cond: Any, uncond: Any) -> Any:
    """A number as a tensor that says it of every sample, where cond is one."""
    number = isinstance(cond, Tensor) and isinstance(uncond, bool | int | float)
    return torch.full_like(cond, uncond) if number else uncond


def _pair(key: str, cond: Any, uncond: Any, batch: int) -> Any:
    """The condition of the doubled batch; nested ones, such as SDXL's added_cond_kwargs, tensor by tensor."""
    if isinstance(cond, Tensor) and isinstance(uncond, Tensor):
        if len(cond) != batch or len(uncond) != batch:
            raise ValueError(
                f"condition {key!r} has {len(cond)} and {len(uncond)} rows for a batch of {batch}; give one a sample"
            )
        return torch.cat([cond, uncond])
    if isinstance(cond, Mapping) and isinstance(uncond, Mapping) and cond.keys() == uncond.keys():
        return {name: _pair(f"{key}.{name}", cond[name], uncond[name], batch) for name in cond}
    if cond is uncond or cond == uncond:
        return cond
    raise TypeError(f"condition {key!r} differs between cond and uncond and is no tensor; pass batched=False")


@dataclass(frozen=True)
class Thresholded:
    """Clip x0: static, to [-limit, limit], or dynamic, to a quantile of |x0| of each sample, then scaled to `limit`.

    dynamic: the quantile, such as 0.995; None is static. Saharia et al. 2022, arXiv:2205.11487, Sec. 2.3.
    """

    model: Model
    limit: float = field(default=1.0, kw_only=True)
    dynamic: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not self.limit > 0:
            raise ValueError(f"limit must be positive, got {self.limit:g}")
        if self.dynamic is not None and not 0 < self.dynamic <= 1:
            raise ValueError(f"dynamic is a quantile in (0, 1], got {self.dynamic:g}")

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule

    def predict(self, x: Tensor, node: Node | Nodes, **condition: Any) -> Tensor:
        x0 = self.model.predict(x, node, **condition)
        if self.dynamic is None:
            return x0.clamp(-self.limit, self.limit)
        bound = per_sample(_quantile(_rows(x0).abs(), self.dynamic).clamp(min=self.limit), x0)
        return x0.clamp(-bound, bound) * (self.limit / bound)


def _rows(x: Tensor) -> Tensor:
    """[B, ...] as [B, numbers of one sample]."""
    return x.unsqueeze(-1).flatten(1)


def _quantile(rows: Tensor, share: float) -> Tensor:
    """Like rows.quantile(share, dim=1), where older torch refuses more than 16 million numbers, 21 images of 512."""
    place = share * (rows.shape[1] - 1)
    ordered, low = rows.sort(dim=1).values, int(place)
    return torch.lerp(ordered[:, low], ordered[:, math.ceil(place)], place - low)
