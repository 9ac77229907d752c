"""Fitting the numbers of a plan to the converged ends of samples: Levenberg-Marquardt, derivatives by differences.

Marquardt 1963, SIAM J. Appl. Math. 11. Nothing is asked of the model but `predict`. A number of row k changes nothing
before the step of row k, so the run with it changed begins there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsample.denoiser import Model
from fastsample.plan import Plan
from fastsample.sampling import sample
from fastsample.step import plan_step

from .picking import distance, rows_of, run

Array = NDArray[np.float64]
Build = Callable[[Array], Plan]
SETTLED = 3e-4  # an update that takes off less than this share of the error is the last
Seen = list[tuple[Tensor, Tensor]]  # (x, x0) of each evaluation


@dataclass(frozen=True)
class Sample:
    """Noises [B, ...], the converged end of each, and their conditions; `batch` of them are run together."""

    model: Model
    noise: Tensor
    reference: Tensor
    condition: Mapping[str, Any]
    batch: int

    def errors(self, plan: Plan) -> Tensor:
        """The root mean square error of each sample's end, [B]."""
        return distance(run(self.model, plan, self.noise, self.condition, self.batch), self.reference)

    def rms(self, plan: Plan) -> float:
        """Of all of them; infinite for a plan that ends at NaN or infinity."""
        try:
            return float(self.errors(plan).square().mean().sqrt())
        except FloatingPointError:
            return math.inf

    def pieces(self) -> list[Sample]:
        rows = [slice(k, k + self.batch) for k in range(0, len(self.noise), self.batch)]
        return [
            replace(
                self,
                noise=self.noise[at],
                reference=self.reference[at],
                condition=rows_of(self.condition, at, len(self.noise)),
            )
            for at in rows
        ]


@dataclass(frozen=True)
class Fit:
    """Where a fit stands: all that it needs to go on. theta: the numbers; best: those with the least `expected` error.

    history: the rms on the training and the held-out noises, at the start and after each update.
    """

    theta: tuple[float, ...]
    best: tuple[float, ...]
    least: float
    damping: float = 0.01
    since: int = 0
    done: bool = False
    history: tuple[tuple[float, float], ...] = field(default=())


def expected(train: float, held: float, sizes: tuple[int, int], numbers: int) -> float:
    """The rms to expect on new noises, from that on `sizes` = (training, held-out) noises, after `numbers` were fitted.

    Of all noises together, since the few that carry an rms are missing from many a held-out set; what was trained on
    counts for more by (n + p) / (n - p) of Akaike 1969 (final prediction error), and not at all where n < 2 p.
    """
    n, m = sizes
    if n < 2 * numbers:
        return held
    return math.sqrt((n * (n + numbers) / (n - numbers) * train**2 + m * held**2) / (n + m))


def begin_fit(build: Build, theta: Array, train: Sample, test: Sample) -> Fit:
    plan, numbers = build(theta), tuple(theta.tolist())
    rms, held = train.rms(plan), test.rms(plan)
    sizes = (len(train.noise), len(test.noise))
    return Fit(numbers, numbers, expected(rms, held, sizes, len(theta)), history=((rms, held),))


def update(
    fit: Fit, build: Build, train: Sample, test: Sample, *, difference: float, iterations: int, patience: int
) -> Fit:
    """One step of Levenberg-Marquardt; `done` where there is none to take, or expected errors no longer fall."""
    theta, loss, damping = np.array(fit.theta), fit.history[-1][0], fit.damping
    if not len(theta) or not math.isfinite(loss):
        return replace(fit, done=True)
    normal, slope = normal_equations(build, theta, train, difference)
    scale = np.diag(normal) + 1e-9 * max(np.trace(normal) / len(theta), 1e-300)
    for _ in range(8):
        step = -np.linalg.solve(normal + damping * np.diag(scale), slope)
        tried = theta + step.clip(-1, 1)  # far outside, the linear model says nothing
        plan = _built(build, tried)
        now = train.rms(plan) if plan else math.inf
        if now < loss:
            break
        damping *= 5
    else:
        return replace(fit, done=True)
    assert plan is not None
    held, numbers = test.rms(plan), tuple(tried.tolist())
    hoped = expected(now, held, (len(train.noise), len(test.noise)), len(theta))
    gained = hoped < 0.999 * fit.least
    since = 0 if gained else fit.since + 1
    history = (*fit.history, (now, held))
    return Fit(
        theta=numbers,
        best=numbers if gained else fit.best,
        least=hoped if gained else fit.least,
        damping=max(damping / 5, 1e-6),
        since=since,
        done=since >= patience or len(history) > iterations or now > (1 - SETTLED) * loss,
        history=history,
    )


def normal_equations(build: Build, theta: Array, train: Sample, difference: float) -> tuple[Array, Array]:
    """J^T J and J^T r of the errors r of all coordinates of all ends, with J = dr / dtheta by forward differences."""
    plan = build(theta)
    nearby = [build(theta + row) for row in difference * np.eye(len(theta))]
    first = [_changed(plan, other) for other in nearby]
    normal, slope = np.zeros((len(theta), len(theta))), np.zeros(len(theta))
    for piece in train.pieces():
        ends, seen = _watched(piece, plan)
        columns = [(_from(piece, other, k, seen) - ends).flatten() / difference for other, k in zip(nearby, first)]
        matrix, error = torch.stack(columns), (ends - piece.reference).flatten()
        normal += (matrix @ matrix.T).double().cpu().numpy()
        slope += (matrix @ error).double().cpu().numpy()
    return normal, slope


def _built(build: Build, theta: Array) -> Plan | None:
    """The plan, where these numbers make one: times may have met, a coefficient grown infinite."""
    try:
        return build(theta)
    except (ValueError, OverflowError):
        return None


def _changed(plan: Plan, other: Plan) -> int:
    """The first row whose step differs; -1 where the start or the first evaluation does."""
    if (plan.start, plan.entry, plan.rows[0].node) != (other.start, other.entry, other.rows[0].node):
        return -1
    for k, (old, new) in enumerate(zip(plan.rows, other.rows)):
        if old != new:
            return k - ((old.node, old.p, old.q) != (new.node, new.p, new.q))
    return len(plan.rows) - 1


def _watched(piece: Sample, plan: Plan) -> tuple[Tensor, Seen]:
    seen: Seen = []
    ends = sample(
        piece.model, plan, piece.noise, condition=piece.condition, progress=False,
        callback=lambda k, x, x0: seen.append((x, x0)),
    )  # fmt: skip
    return ends, seen


@torch.no_grad()
def _from(piece: Sample, plan: Plan, first: int, seen: Seen) -> Tensor:
    """The ends under a plan that agrees with the one watched until the step of row `first`."""
    if first < 0 or hasattr(piece.model, "begin"):  # what such a model remembers of a run was not watched
        return sample(piece.model, plan, piece.noise, condition=piece.condition, progress=False)
    memory = [row.p * x + row.q * x0 for row, (x, x0) in zip(plan.rows[:first], seen)][::-1]
    x, x0 = seen[first]
    for k, row in enumerate(plan.rows[first:], first):
        if k > first:
            x0 = piece.model.predict(x, row.node, **piece.condition)
        x, m = plan_step(x, x0, memory, [], row)
        memory = [m, *memory][: plan.memory - 1]
    return x
