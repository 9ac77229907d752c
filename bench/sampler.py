"""What all cases of a sweep share: the noise and the condition of sample i, and copies of networks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastsample.denoiser import Model
from fastsample.graph import Compiled
from fastsample.graph import compile as graph
from fastsample.noise import Noise, noise
from fastsample.sampling import sample

from .case import Case, Cost, cost, counting

Condition = Callable[[Tensor], Mapping[str, Any]]


@dataclass(frozen=True)
class Sampler:
    """Samples by index: sample i is the same whatever the shard, the process or the sweep it is made in.

    shape: of one sample. batch: how many go through the network together. condition: indices [b] -> keywords.
    """

    shape: tuple[int, ...]
    batch: int
    device: torch.device
    condition: Condition | None = None
    _copies: dict[Hashable, Any] = field(default_factory=dict, repr=False, compare=False)
    _models: dict[int, Model] = field(default_factory=dict, repr=False, compare=False)
    _graphs: dict[int, Compiled] = field(default_factory=dict, repr=False, compare=False)
    _paid: dict[int, Cost] = field(default_factory=dict, repr=False, compare=False)

    def samples(self, case: Case, indices: Tensor) -> tuple[Tensor, Cost]:
        """Samples [len(indices), ...] on the CPU, float32, and what a batch of them cost, which is counted."""
        parts, rest = [], list(indices.split(self.batch))
        if not case.graph or id(case) not in self._paid:
            with counting(self.model(case)) as counted:
                parts = [self.call(case, rest[0], counted)()]
            self._paid[id(case)] = cost(case, counted, len(rest[0]))
        # A graph replays where nobody counts: its first batch was sampled without it, and is sampled once more.
        parts = [] if case.graph else [_kept(part) for part in parts]
        parts += [_kept(self.call(case, some)()) for some in rest[len(parts) :]]
        return torch.cat(parts), self._paid[id(case)]

    def call(self, case: Case, indices: Tensor, model: Any = None, *, drawn: bool = False) -> Callable[[], Tensor]:
        """A function that samples these indices. drawn: the starting noise is drawn in the first call alone."""
        device = torch.device(case.device or self.device)
        seeds = noise(self.shape, indices.tolist(), device=device)
        start = _Drawn(**vars(seeds)) if drawn else seeds
        condition = self.condition(indices.to(device)) if self.condition else None
        if case.graph and model is None:
            if id(case) not in self._graphs:
                made = self.model(case)
                self._graphs[id(case)] = graph(made, case.plan, start.shape, condition=condition, device=device)
            recorded = self._graphs[id(case)]
            return lambda: recorded(start, condition=condition)
        asked = model or self.model(case)
        return lambda: sample(asked, case.plan, start, condition=condition, progress=False)

    def model(self, case: Case) -> Model:
        """The model as the case runs it; cases of one network share its copies."""
        if id(case) not in self._models:
            self._models[id(case)] = case.build(self._copies)
        return self._models[id(case)]

    def forget(self, case: Case) -> None:
        """Give the memory of its graph back, and the model that stood between the case and its network."""
        for kept in (self._graphs, self._models, self._paid):
            kept.pop(id(case), None)


def _kept(samples: Tensor) -> Tensor:
    return samples.to("cpu", torch.float32)


class _Drawn(Noise):
    """Noise that is started with more than once, and drawn for that but once."""

    @cached_property
    def _start(self) -> Tensor:
        return super().draw(0)

    def draw(self, k: int) -> Tensor:
        return super().draw(k) if k else self._start
