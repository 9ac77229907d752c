"""What a network predicts, as a pair (p, q): output = p x + q x0; and back: x0 = u x + w output.

Written over x = alpha x0 + sigma eps, so a solver, a loss and a conversion between two predictions need
nothing but these four numbers. They may be floats of one node or tensors of many times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Pair = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class Prediction:
    """`output(alpha, sigma)` gives (p, q), `x0(alpha, sigma)` gives (u, w)."""

    name: str
    output: Pair
    x0: Pair


X0 = Prediction("x0", lambda a, s: (0 * s, 1 + 0 * s), lambda a, s: (0 * s, 1 + 0 * s))
# singular at alpha = 0, where eps says nothing of x0; Ho et al. 2020, arXiv:2006.11239
EPS = Prediction("eps", lambda a, s: (1 / s, -a / s), lambda a, s: (1 / a, -s / a))
# v = alpha eps - sigma x0; Salimans and Ho 2022, arXiv:2202.00512, Sec. 4
V = Prediction(
    "v", lambda a, s: (a / s, -(a * a + s * s) / s), lambda a, s: (a / (a * a + s * s), -s / (a * a + s * s))
)
# flow = eps - x0; Liu et al. 2022, arXiv:2209.03003
FLOW = Prediction("flow", lambda a, s: (1 / s, -(a + s) / s), lambda a, s: (1 / (a + s), -s / (a + s)))

PREDICTIONS = {prediction.name: prediction for prediction in (EPS, X0, V, FLOW)}


def prediction(name: str | Prediction) -> Prediction:
    """The prediction of this name: 'eps', 'x0', 'v' or 'flow'."""
    if isinstance(name, Prediction):
        return name
    if name not in PREDICTIONS:
        raise ValueError(f"unknown prediction {name!r}; choose one of {', '.join(PREDICTIONS)}")
    return PREDICTIONS[name]
