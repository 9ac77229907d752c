"""Picking: hand-made plans measured on the user's own model, at one number of network evaluations.

No solver, order, variable and spacing is best for every model, so the choice is a measurement: the ends of a few dozen
samples beside the converged solution of the same network, which is what is left when the solver's error is gone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastsample.denoiser import Model
from fastsample.gaussian import Gaussian
from fastsample.grid import Grid, grid
from fastsample.noise import Noise
from fastsample.plan import Plan
from fastsample.progress import track
from fastsample.sampling import sample, solve
from fastsample.schedule import Schedule
from fastsample.spacing import Spacing, at_times, default_t, karras, late, power_t, quadratic_t, uniform_lam, uniform_t
from fastsample.tracing import Solver, trace

from .adams import ipndm, lms
from .default import default
from .dpm_solver import dpmpp_2m, dpmpp_3m
from .multistep import Angle, Level, multistep
from .unipc import unipc_2, unipc_3

Condition = Mapping[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A hand-made plan for any model: a solver with its options, and a spacing.

    warm, start: a Gaussian warm start at no evaluation, from noise at t_max to `start`.
    """

    solver: Solver
    spacing: Spacing
    options: Condition = field(default_factory=dict)
    lower_order_final: bool = False
    warm: Gaussian | None = None
    start: float | None = None

    @property
    def name(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        words = [f"{_called(self.solver)}({options})" if options else _called(self.solver), _called(self.spacing)]
        words += ["lower_order_final"] * self.lower_order_final
        words += [f"warm from t = {self.start:g}"] if self.warm is not None else []
        return ", ".join(words)

    def plan(self, schedule: Schedule, nfe: int, *, start: float | None = None, end: float | None = None) -> Plan:
        """The plan of exactly `nfe` evaluations. Raises ValueError where there is none on this schedule."""
        return self.made(schedule, nfe, start=start, end=end)[1]

    def made(
        self, schedule: Schedule, nfe: int, *, start: float | None = None, end: float | None = None
    ) -> tuple[Grid, Plan]:
        """The grid and its plan, of `nfe` evaluations and at most so many steps."""
        for steps in range(nfe, 0, -1):
            nodes = self._grid(schedule, steps, self.spacing, start if self.start is None else self.start, end)
            plan = trace(self.solver, nodes, **self.options)
            if plan.nfe <= nfe:
                break
        if plan.nfe != nfe:
            raise ValueError(f"{_called(self.solver)} has no plan of exactly {nfe} evaluations")
        if plan.stochastic:
            raise ValueError(f"{_called(self.solver)} adds noise, so it has no converged solution to be measured by")
        return nodes, plan

    def at(self, schedule: Schedule, times: Sequence[float], *, ends: bool) -> Plan:
        """The plan on these times, the first one its start; ends: whether the last is its end, or sigma = 0 is."""
        steps, end = len(times) - ends, times[-1] if ends else None
        nodes = self._grid(schedule, steps, at_times(times), times[0], end)
        return trace(self.solver, nodes, **self.options)

    def _grid(self, schedule: Schedule, steps: int, spacing: Spacing, start: float | None, end: float | None) -> Grid:
        return grid(schedule, steps, spacing, start, end, lower_order_final=self.lower_order_final, warm=self.warm)


def _called(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def candidates(
    members: Sequence[tuple[Solver, Condition]], spacings: Sequence[Spacing], *, lower_order_final: bool = False
) -> tuple[Candidate, ...]:
    """Every solver, each with its options, on every spacing."""
    return tuple(
        Candidate(solver, spacing, options, lower_order_final)
        for (solver, options), spacing in product(members, spacings)
    )


def warmed(
    gaussian: Gaussian,
    schedule: Schedule,
    members: Sequence[Candidate],
    levels: Sequence[float] = (6.0, 12.0, 24.0),
) -> tuple[Candidate, ...]:
    """The same candidates with a warm start from this Gaussian of the data to each level sigma / alpha.

    The Gaussian may be that of `converged` ends: `fs.Gaussian.of(solvers.converged(model, noise))`.
    """
    starts = [float(schedule.time(-math.log(level))) for level in levels]
    return tuple(replace(one, warm=gaussian, start=start) for one in members for start in starts)


def _free(variable: str, *orders: int, **options: Any) -> list[tuple[Solver, Condition]]:
    return [(multistep, {"variable": variable, "order": order, **options}) for order in orders]


_IN_T = (uniform_t, power_t(1.5), quadratic_t)
_LAM: list[tuple[Solver, Condition]] = [
    (unipc_2, {}),
    (unipc_3, {}),
    (unipc_2, {"predicts": "eps", "variant": "bh1"}),
    (unipc_3, {"predicts": "eps", "variant": "bh1"}),
    (dpmpp_2m, {}),
    (dpmpp_3m, {}),
    (dpmpp_3m, {"curvature": 0.5}),
]
_CORRECTED = [
    *_free("angle", 2, 3, 4, corrector=True),
    *_free("lam", 2, 3, corrector=True),
    *_free("t", 3, 4, corrector=True),
]
_ROBUST: list[tuple[Solver, Condition]] = [
    (multistep, {"predicts": "x0", "variable": variable, "order": 3, "corrector": True})
    for variable in (Level(3.0), Angle(2.0), Angle(6.0))
]
# Measured unless the caller says otherwise. Each of those spaced in t was best, or within a tenth of it, on one of five
# known problems at 4 to 12 evaluations; the others are for schedules that t says less of, and what people know.
FAMILY: tuple[Candidate, ...] = (
    Candidate(default, default_t, lower_order_final=True),
    *candidates(_ROBUST, _IN_T, lower_order_final=True),
    *candidates([*_ROBUST[:2], *_LAM[:2]], (default_t, late(uniform_t), late(quadratic_t)), lower_order_final=True),
    *candidates(_LAM, _IN_T, lower_order_final=True),
    *candidates(_CORRECTED, _IN_T, lower_order_final=True),
    *candidates(_CORRECTED, (quadratic_t,)),
    *candidates([*_free("angle", 2, 3, 4), *_free("lam", 2, 3), *_free("t", 3, 4)], _IN_T),
    *candidates([*_free("angle", 3, 4), *_free("lam", 2), *_free("t", 4)], (power_t(3),)),
    *candidates([(dpmpp_2m, {})], (power_t(1.5), quadratic_t)),
    *candidates([(lms, {}), *((ipndm, {"order": order}) for order in (2, 3, 4))], (uniform_t, uniform_lam, karras)),
    *candidates(_LAM, (uniform_lam, karras), lower_order_final=True),
    *candidates(_free("angle", 2, 3), (uniform_lam, karras)),
)


@dataclass(frozen=True)
class Scored:
    """A plan and its error on the noises it was measured on.

    rms, median: over the samples, of the root mean square distance of a sample's coordinates from the converged ones.
    standard_error: of rms, over the samples. score: what the ranking goes by, see `score`.
    """

    name: str
    plan: Plan
    rms: float
    standard_error: float
    median: float
    score: float
    candidate: Candidate | None = None

    @classmethod
    def of(cls, name: str, plan: Plan, errors: Tensor, candidate: Candidate | None = None) -> Scored:
        """errors: [B], one root mean square a sample."""
        squares = errors.double() ** 2
        rms = float(squares.mean().sqrt())
        spread = float(squares.std()) if len(squares) > 1 else math.inf
        error = spread / (2 * rms * math.sqrt(len(squares))) if rms else 0.0
        return cls(name, plan, rms, error, float(errors.median()), score(errors), candidate)


@dataclass(frozen=True)
class Ranking:
    """Plans of the same number of evaluations on the same noises, best first; and those that could not be measured."""

    scored: tuple[Scored, ...]
    samples: int
    left_out: tuple[tuple[str, str], ...] = ()

    @property
    def best(self) -> Scored:
        return self.scored[0]

    def __iter__(self) -> Iterator[Scored]:
        return iter(self.scored)

    def __len__(self) -> int:
        return len(self.scored)

    def __str__(self) -> str:
        return self.table()

    def table(self, most: int = 12) -> str:
        """The first `most` plans as text."""
        nfe = self.best.plan.nfe
        lines = [
            f"{len(self)} plans of {nfe} evaluation{'s' * (nfe > 1)}, {self.samples} noises: distance of the end from "
            f"the converged solution",
            f"{'rms':>9} {'+-':>8} {'median':>9}  plan",
            *(f"{s.rms:>9.5f} {s.standard_error:>8.5f} {s.median:>9.5f}  {s.name}" for s in self.scored[:most]),
        ]
        if len(self) > most:
            lines.append(f"and {len(self) - most} more, to rms {max(s.rms for s in self):.5f}")
        if self.left_out:
            lines.append(f"left out: {len(self.left_out)}, such as {self.left_out[0][0]}: {self.left_out[0][1]}")
        return "\n".join(lines)


def score(errors: Tensor) -> float:
    """What plans are ranked by, from the root mean square error of each sample, [B].

    The geometric mean of the rms over all samples and of the mean over them: the rms of a few dozen hangs on the one or
    two of them that end at another mode, the mean less so.
    """
    errors = errors.double()
    return float((errors.square().mean().sqrt() * errors.mean()).sqrt())


def pick(
    model: Model,
    nfe: int,
    noise: Noise | Tensor,
    *,
    family: Sequence[Candidate] = FAMILY,
    start: float | None = None,
    end: float | None = None,
    condition: Condition | None = None,
    reference: Tensor | None = None,
    batch: int = 256,
    progress: bool | None = None,
) -> Ranking:
    """Measure a family of hand-made plans of `nfe` evaluations on a model: the ranking, best first.

    noise: some dozens, 64 are enough. start, end: as for `fs.grid`. condition: as for `fs.sample`, tensors [B, ...].
    reference: what `converged` gives for the same noises, to be used again for another nfe; None: it is made here.
    batch: samples that go through the network together.
    Raises ValueError where no member of the family can be run on this model's schedule; members that cannot be are
    listed in `left_out` with the reason.
    """
    drawn, wanted = draw(noise), dict(condition or {})
    if not family:
        raise ValueError("the family of plans to choose from is empty")
    if reference is None:
        reference = converged(model, drawn, start=start, end=end, condition=wanted, batch=batch)
    if reference.shape != drawn.shape:
        raise ValueError(
            f"reference has shape {list(reference.shape)}, the noise {list(drawn.shape)}: give one for each"
        )
    scored, left_out = [], []
    measured: dict[Any, Tensor] = {}  # with few evaluations, solvers of several orders are the same table
    for candidate in track(family, f"pick {nfe}", progress):
        try:
            plan = candidate.plan(model.schedule, nfe, start=start, end=end)
            table = (plan.start, plan.warm, plan.entry, plan.rows)
            if table not in measured:
                measured[table] = distance(run(model, plan, drawn, wanted, batch), reference)
        except (ValueError, FloatingPointError) as error:
            left_out.append((candidate.name, str(error)))
            continue
        scored.append(Scored.of(candidate.name, plan, measured[table], candidate))
    if not scored:
        raise ValueError(f"no plan of {nfe} evaluations can be measured; {left_out[0][0]}: {left_out[0][1]}")
    return Ranking(tuple(sorted(scored, key=lambda one: one.score)), len(drawn), tuple(left_out))


def converged(
    model: Model,
    noise: Noise | Tensor,
    *,
    start: float | None = None,
    end: float | None = None,
    condition: Condition | None = None,
    tolerance: float = 5e-4,
    most: int = 1600,
    batch: int = 256,
) -> Tensor:
    """The end of each noise's probability-flow ODE under this very network, [B, ...].

    UniPC of order 3 with 100 evaluations, then twice as many, and so on until the rms change is below `tolerance`.
    Raises RuntimeError where it is not at `most` evaluations.
    """
    drawn, wanted = draw(noise), dict(condition or {})
    first = model.schedule.t_max if start is None else start
    spacing = karras if float(model.schedule.alpha(first)) > 0 else quadratic_t
    before: Tensor | None = None
    steps, change = 100, math.inf
    while steps <= most:
        nodes = grid(model.schedule, steps, spacing, start, end)
        found = torch.cat([solve(model, unipc_3, nodes, z, condition=c) for z, c in _pieces(drawn, wanted, batch)])
        if before is not None:
            change = float(distance(found, before).square().mean().sqrt())
            if change <= tolerance:
                return found
        before, steps = found, 2 * steps
    raise RuntimeError(
        f"the solution did not converge: from {steps // 4} to {steps // 2} evaluations it moved by {change:.2g} rms, "
        f"more than {tolerance:g}; raise tolerance= or most=, run the network in float32, or pass your own reference="
    )


def run(model: Model, plan: Plan, noise: Tensor, condition: Condition, batch: int) -> Tensor:
    """`fs.sample` in pieces of a batch."""
    return torch.cat([sample(model, plan, z, condition=c, progress=False) for z, c in _pieces(noise, condition, batch)])


def _pieces(noise: Tensor, condition: Condition, batch: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    for k in range(0, len(noise), batch):
        rows = slice(k, k + batch)
        yield noise[rows], rows_of(condition, rows, len(noise))


def rows_of(condition: Condition, rows: slice, batch: int) -> dict[str, Any]:
    """The condition of these rows: tensors [batch, ...] are cut, also within a mapping, all else stays."""
    found: dict[str, Any] = {}
    for key, value in condition.items():
        if isinstance(value, Mapping):
            found[key] = rows_of(value, rows, batch)
        else:
            found[key] = value[rows] if isinstance(value, Tensor) and value.dim() and len(value) == batch else value
    return found


def distance(x: Tensor, reference: Tensor) -> Tensor:
    """The root mean square distance of each sample, [B], float64."""
    return (x - reference.to(x.device)).double().flatten(1).square().mean(1).sqrt().cpu()


def draw(noise: Noise | Tensor) -> Tensor:
    if not isinstance(noise, Noise | Tensor):
        raise TypeError(f"noise must come from fs.noise(...) or be a tensor, got {type(noise).__name__}")
    drawn = noise.draw(0) if isinstance(noise, Noise) else noise
    if drawn.dim() < 2:
        raise ValueError(f"noise must be [B, ...], got shape {list(drawn.shape)}")
    return drawn
