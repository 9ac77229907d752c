"""What a saved network says of itself beyond its weights: what it was distilled from, and for which plan."""

from __future__ import annotations

from dataclasses import dataclass

from .plan import Plan


@dataclass(frozen=True)
class Card:
    """plan: what to sample it by. guidance: the scale that is in it, or the range (low, high) it can be told.

    teacher: the SHA-256 of its teacher's weights, as `adapters.pretrained.weights_hash` has it.
    """

    plan: Plan | None = None
    guidance: float | tuple[float, float] | None = None
    teacher: str | None = None

    @property
    def steps(self) -> int | None:
        """Network evaluations of the plan."""
        return None if self.plan is None else self.plan.nfe
