"""Tuning: a plan's times and coefficients fitted to one network at one number of evaluations.

It begins at the best hand-made plans, and noises that it never trained on decide whether it ends there too.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample.denoiser import Model
from fastsample.files import folder, write, write_text
from fastsample.grid import Node
from fastsample.guidance import prediction_of
from fastsample.noise import Noise
from fastsample.plan import Plan, Row
from fastsample.schedule import Schedule

from .fit import Array, Build, Fit, Sample, begin_fit, update
from .picking import FAMILY, Candidate, Ranking, Scored, converged, draw, pick, rows_of

LEAST_GAIN = 1e-3  # a tuned plan must take off this share of the error: a fit that never moved wins by rounding
MOST_PICKED = 128  # training noises that hand-made plans are picked on: enough, and the family is large


@dataclass(frozen=True)
class Tuned:
    """What `tune` found.

    plan: the tuned plan, or the picked one where tuning did not win on the held-out noises. picked: the best hand-made
    plan by the training noises. report: on the held-out noises, the tuned plans beside the best of each solver.
    """

    plan: Plan
    picked: Scored
    report: Ranking

    @property
    def won(self) -> bool:
        return self.plan != self.picked.plan

    def __str__(self) -> str:
        mine = next(one for one in self.report if one.plan == self.plan)
        end = f"the plan is the picked one, {mine.name}: tuning did not win on the held-out noises"
        if self.won:
            gain = self.picked.rms / mine.rms if mine.rms else math.inf
            end = f"{mine.name}: {gain:.2f} times less error on held-out noises than the picked {self.picked.name}"
        return f"{self.report.table(len(self.report))}\n{end}"


def tune(
    model: Model,
    nfe: int,
    noise: Noise | Tensor,
    *,
    coefficients: bool = False,
    out: str | Path | None = None,
    resume: bool = True,
    family: Sequence[Candidate] = FAMILY,
    starts: int = 2,
    held_out: float = 0.25,
    start: float | None = None,
    end: float | None = None,
    condition: Mapping[str, Any] | None = None,
    reference: Tensor | None = None,
    iterations: int = 30,
    patience: int = 6,
    difference: float | None = None,
    batch: int = 256,
    say: Callable[[str], object] | None = None,
) -> Tuned:
    """Fit a plan of `nfe` evaluations to a model: its times and, if asked, all its coefficients.

    noise: 500 or more; with few, coefficients learn them by heart. The last share `held_out` is not trained on: it
        helps to end the fit early (`fit.expected`), and only what beats the picked plan there can take its place.
    coefficients: also fit a and b of every row: the greater gain, and the easier to overfit.
    out: a folder for the plan (plan.json), the report (report.json, report.csv) and the work so far, from which a
        killed run goes on to the same plan (resume=False starts anew).
    family, start, end, condition, reference, batch: as for `pick`.
    starts: how many of the best hand-made solvers to begin at.
    iterations, patience: at most so many updates a fit, and so many in a row without gain.
    difference: the step of the derivatives; None: 1e-3 for float64 noise, 1e-2 for float32.
    say: called with a line of text after each update.
    Raises ValueError for too few noises, or a folder that holds another run.

    The plan is for this network with its guidance and conditions. `fs.sample` refuses it where the schedule or the
    prediction is another.
    """
    drawn, wanted, tell = draw(noise), dict(condition or {}), say or (lambda line: None)
    kept = len(drawn) - round(held_out * len(drawn))
    if not 0 < kept < len(drawn):
        raise ValueError(f"held_out = {held_out:g} of {len(drawn)} noises leaves {kept} to train on; give more of them")
    if starts < 1 or iterations < 1 or patience < 1:
        raise ValueError(f"starts, iterations and patience are at least 1, got {starts}, {iterations}, {patience}")
    difference = difference or (1e-3 if drawn.dtype == torch.float64 else 1e-2)
    ends = [None if t is None else float(t) for t in (start, end)]
    names = [candidate.name for candidate in family]
    settings = [
        nfe,
        coefficients,
        starts,
        held_out,
        ends,
        difference,
        iterations,
        patience,
        names,
        repr(model.schedule),
    ]
    store = _open(out, resume, settings, drawn)
    if reference is None:
        reference = store.reference(
            model, drawn, wanted, lambda: converged(model, drawn, start=start, end=end, condition=wanted, batch=batch)
        )
    parts = (slice(0, kept), slice(kept, None))
    train, test = (
        Sample(model, drawn[rows], reference[rows].to(drawn), rows_of(wanted, rows, len(drawn)), batch)
        for rows in parts
    )
    few = train.pieces()[0] if batch <= MOST_PICKED else replace(train, batch=MOST_PICKED).pieces()[0]
    hand = _one_a_solver(
        pick(
            model, nfe, few.noise, family=family, start=start, end=end, condition=few.condition,
            reference=few.reference, batch=batch,
        )
    )  # fmt: skip
    tell(f"picked {hand[0].name}: rms {hand[0].rms:.4g} on {len(few.noise)} noises")

    def fitted(label: str, build: Build, theta: Array) -> Fit:
        fit = store.fits.get(label) or begin_fit(build, theta, train, test)
        while not fit.done:
            fit = update(fit, build, train, test, difference=difference, iterations=iterations, patience=patience)
            store.keep(label, fit)
            rms, held = fit.history[-1]
            tell(f"{label}, update {len(fit.history) - 1}: rms {rms:.4g}, held out {held:.4g}")
        return fit

    tuned: dict[str, Plan] = {}
    hopes: dict[str, float] = {}
    best: tuple[float, Times, Array] | None = None
    for one in hand[:starts]:
        assert one.candidate is not None
        times = Times.of(one.candidate, model.schedule, nfe, start=start, end=end)
        label = f"tuned times of {one.name}"
        fit = fitted(label, times.plan, times.theta())
        tuned[label] = times.plan(np.array(fit.best))
        hopes[label] = fit.least
        if best is None or fit.least < best[0]:
            best = fit.least, times, np.array(fit.best)
    if coefficients:
        assert best is not None
        table = Table(best[1], len(best[2]))
        label = f"tuned times and coefficients of {best[1].candidate.name}"
        fit = fitted(label, table.plan, table.theta(best[2]))
        tuned[label], hopes[label] = table.plan(np.array(fit.best)), fit.least

    predicts = prediction_of(model).name
    tuned = {label: replace(plan, solver=label, spacing="tuned", predicts=predicts) for label, plan in tuned.items()}
    measured = [Scored.of(label, plan, test.errors(plan)) for label, plan in tuned.items()]
    by_hand = [Scored.of(one.name, one.plan, test.errors(one.plan), one.candidate) for one in hand]
    winners = [one for one in measured if one.rms < (1 - LEAST_GAIN) * by_hand[0].rms]
    result = Tuned(
        plan=min(winners, key=lambda one: hopes[one.name], default=by_hand[0]).plan,
        picked=by_hand[0],
        report=Ranking(tuple(sorted([*measured, *by_hand], key=lambda one: one.rms)), len(test.noise)),
    )
    store.finish(result)
    return result


def _one_a_solver(ranking: Ranking) -> list[Scored]:
    """The best spacing of each solver: times are tuned anyway, what a solver does with them is not."""
    best: dict[str, Scored] = {}
    for one in ranking:
        best.setdefault(one.plan.solver, one)
    return list(best.values())


@dataclass(frozen=True)
class Times:
    """The times of a candidate as free numbers: each as a share of the way from the one before it to the end.

    Sigmoids keep them in order. A plan that starts warm is free to start anywhere below t_max.
    """

    candidate: Candidate
    schedule: Schedule
    begun: tuple[float, ...]  # the times of the grid that the fit begins at, without its end
    first: float  # where the shares begin: the start itself, or t_max above a free one
    last: float
    ends: bool
    last_traced: dict[bytes, Plan] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, candidate: Candidate, schedule: Schedule, nfe: int, *, start: float | None, end: float | None) -> Times:
        nodes = candidate.made(schedule, nfe, start=start, end=end)[0].nodes
        first = nodes[0].t if candidate.warm is None else schedule.t_max
        return cls(candidate, schedule, tuple(node.t for node in nodes[:-1]), first, nodes[-1].t, end is not None)

    def theta(self) -> Array:
        before = [self.first, *self.begun] if self.candidate.warm is not None else self.begun
        shares = (np.array(before[1:]) - self.last) / (np.array(before[:-1]) - self.last)
        # the numbers of one fit are of about the same size, whether a schedule spans 80 or 1
        return np.log(shares / (1 - shares))

    def plan(self, theta: Array) -> Plan:
        key = theta.tobytes()
        if key not in self.last_traced:  # while coefficients are varied the times stay, and tracing costs the most
            plan = self._traced(theta)
            self.last_traced.clear()
            self.last_traced[key] = plan
        return self.last_traced[key]

    def _traced(self, theta: Array) -> Plan:
        shares = (self.last + (self.first - self.last) * np.cumprod(1 / (1 + np.exp(-theta)))).tolist()
        times = shares if self.candidate.warm is not None else [self.first, *shares]
        return self.candidate.at(self.schedule, [*times, self.last] if self.ends else times, ends=self.ends)


@dataclass(frozen=True)
class Table:
    """The times and what is added to a and b of every row, each in units of what it multiplies."""

    times: Times
    count: int  # of the numbers that are times

    def theta(self, times: Array) -> Array:
        plan = self.times.plan(times)
        return np.concatenate([times, np.zeros(sum(1 + len(row.b) for row in plan.rows))])

    def plan(self, theta: Array) -> Plan:
        plan, left = self.times.plan(theta[: self.count]), iter(theta[self.count :].tolist())
        after = [*(row.node for row in plan.rows[1:]), plan.end]
        rows = tuple(_added(row, _size(node), left) for row, node in zip(plan.rows, after))
        return replace(plan, rows=rows)


def _added(row: Row, size: float, left: Any) -> Row:
    return replace(row, a=row.a + next(left) * size / _size(row.node), b=tuple(b + next(left) * size for b in row.b))


def _size(node: Node) -> float:
    """Of a state, where data and noise have unit variance."""
    return math.hypot(node.alpha, node.sigma)


def _open(out: str | Path | None, resume: bool, settings: list[Any], noise: Tensor) -> _Store:
    if out is None:
        return _Store(None, "", {}, resumed=False)
    path = folder(out)
    numbers = noise.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    key = hashlib.sha256(json.dumps(settings).encode() + numbers).hexdigest()
    work = path / "work.json"
    if not (resume and work.exists()):
        return _Store(path, key, {}, resumed=False)
    try:
        kept = json.loads(work.read_text(encoding="utf-8"))
        fits = {label: _fit(body) for label, body in kept["fits"].items()}
        same = kept["key"] == key
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{work} is damaged ({error}); start anew with resume=False") from error
    if not same:
        raise ValueError(
            f"{path} holds a run with other settings or noises; choose another folder, or start anew with resume=False"
        )
    return _Store(path, key, fits, resumed=True)


def _fit(body: dict[str, Any]) -> Fit:
    lists = {name: tuple(body[name]) for name in ("theta", "best")}
    return Fit(**{**body, **lists, "history": tuple((train, held) for train, held in body["history"])})


@dataclass
class _Store:
    """A folder with the work so far; without one nothing is kept."""

    path: Path | None
    key: str
    fits: dict[str, Fit]
    resumed: bool

    def keep(self, label: str, fit: Fit) -> None:
        self.fits[label] = fit
        self.save()

    def save(self) -> None:
        if self.path is not None:
            body = {"key": self.key, "fits": {name: asdict(one) for name, one in self.fits.items()}}
            write_text(self.path / "work.json", json.dumps(body, indent=1) + "\n")

    def reference(
        self, model: Model, noise: Tensor, condition: Mapping[str, Any], solve: Callable[[], Tensor]
    ) -> Tensor:
        """The converged ends, from the folder where they are there for these noises and this model."""
        if self.path is None:
            return solve()
        from safetensors.torch import load_file, save_file

        path = self.path / "reference.safetensors"
        probe = _probe(model, noise, condition)
        if self.resumed and path.exists():
            kept = load_file(path)
            if not torch.allclose(kept["probe"], probe, rtol=1e-3, atol=1e-4):
                raise ValueError(
                    f"{self.path} holds a run of another model or condition; choose another folder, or start anew with "
                    f"resume=False"
                )
            return kept["reference"].to(noise.device)
        found = solve()
        write(path, lambda to: save_file({"reference": found.cpu().contiguous(), "probe": probe}, to))
        self.save()
        return found

    def finish(self, result: Tuned) -> None:
        if self.path is None:
            return
        result.plan.save(self.path / "plan.json")
        fields = ("name", "rms", "standard_error", "median")
        rows = [{name: getattr(one, name) for name in fields} for one in result.report]
        chosen = next(one.name for one in result.report if one.plan == result.plan)
        body = {"plan": chosen, "picked": result.picked.name, "won": result.won, "held_out": result.report.samples}
        write_text(self.path / "report.json", json.dumps({**body, "plans": rows}, indent=1) + "\n")
        lines = io.StringIO()
        table = csv.DictWriter(lines, fields, lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        write_text(self.path / "report.csv", lines.getvalue())


@torch.no_grad()
def _probe(model: Model, noise: Tensor, condition: Mapping[str, Any]) -> Tensor:
    """What the model says of the first noises half-way: another network, or another condition, says something else."""
    some = slice(0, 4)
    schedule = model.schedule
    t = 0.5 * (schedule.t_max + schedule.t_zero)
    node = Node(t, float(schedule.alpha(t)), float(schedule.sigma(t)))
    x = noise[some] if noise.dtype == torch.float64 else noise[some].float()
    return model.predict(node.sigma * x, node, **rows_of(condition, some, len(noise))).detach().cpu().contiguous()
