"""What a solver sees of the model that it runs."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fastsample.grid import Node


class Predictor(Protocol):
    """The model under `solve`, or the tape under `trace`, which passes symbols where Tensor is written."""

    def predict(self, x: Tensor, node: Node) -> Tensor:
        """x0 at (x, node): one network evaluation."""
        ...

    def noise(self) -> Tensor:
        """A fresh unit noise, shaped like x; at most one for each evaluation."""
        ...
