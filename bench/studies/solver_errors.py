"""Endpoint errors on five problems whose answer is known: other people's samplers, ours, picked and tuned plans.

    python bench/studies/solver_errors.py                      # writes bench/results/solver_errors.csv and .md
    python bench/studies/solver_errors.py --problems gmm2 --sections peer ours --ends min zero

All run in one process, on the same noises, to the same end, with the same number of network evaluations (counted at the
model). Each piece of work is written as it is done to --work, from where a stopped run goes on. Needs the packages of
`peers.INSTALL`, and scikit-learn for the digits.

Nothing that is chosen sees the noises that are reported on: picking and tuning have seeds of their own.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import get_args

import torch
from peers import Counted, Peer, peers
from torch import Tensor

import fastsample as fs
from fastsample import solvers
from fastsample.bench.environment import environment
from fastsample.files import folder, write_text
from fastsample.solvers.picking import Candidate
from fastsample.zoo.problems import HELD_OUT, PROBLEMS, End, Problem

NFES = (4, 5, 6, 8, 10, 12, 15, 20)
JUDGED = (5, 6, 8, 10, 12, 15, 20)  # of the geometric means
TUNED_NFES = (5, 6, 8, 10)
PICK_SEEDS = range(64)
TUNE_SEEDS = range(1000, 1640)  # of which `tune` holds back a quarter
SECTIONS = ("peer", "default", "ours", "picked", "tuned", "crossed")

# Hand-made plans that are shown beside the default.
OURS = (
    Candidate(solvers.multistep, fs.quadratic_t, {"predicts": "eps", "variable": "angle", "order": 3}),
    Candidate(
        solvers.multistep,
        fs.quadratic_t,
        {"predicts": "flow", "variable": "tau", "order": 2, "corrector": True},
        lower_order_final=True,
    ),
    Candidate(solvers.unipc_2, fs.quadratic_t, {}, True),
    Candidate(solvers.unipc_3, fs.quadratic_t, {}, True),
    Candidate(solvers.dpmpp_2m, fs.uniform_lam),
)


# What the documentation names for those who measure nothing; `page` says on what it was chosen.
DEFAULT = Candidate(solvers.default, fs.default_t, lower_order_final=True)


@dataclass(frozen=True)
class Result:
    """One line of the CSV. rms: over samples and coordinates; standard_error: its jackknife over the samples;
    median: over the samples, of each one's own rms. fault: what a peer died of."""

    problem: str
    end: str
    nfe: int
    section: str
    method: str
    rms: float
    standard_error: float
    median: float
    samples: int
    fault: str = ""

    @classmethod
    def of(cls, where: Where, section: str, method: str, found: Tensor, exact: Tensor) -> Result:
        squares = (found.double() - exact).flatten(1).square().mean(1)
        if not bool(squares.isfinite().all()):
            return cls.failed(where, section, method, "NaN or infinity")
        rms, error = jackknife(squares)
        return cls(*where.key, section, method, rms, error, float(squares.sqrt().median()), len(squares))

    @classmethod
    def failed(cls, where: Where, section: str, method: str, fault: str) -> Result:
        return cls(*where.key, section, method, math.inf, math.nan, math.inf, 0, fault)


def jackknife(squares: Tensor) -> tuple[float, float]:
    """The rms of samples whose mean squares are `squares`, [B], and its standard error."""
    n = len(squares)
    without = ((squares.sum() - squares) / (n - 1)).sqrt()
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return float(squares.mean().sqrt()), float(error)


@dataclass(frozen=True)
class Where:
    """A problem, an end and a number of evaluations; cache: the folder of exact solutions."""

    problem: Problem
    end: End
    nfe: int
    samples: int
    cache: Path

    @property
    def key(self) -> tuple[str, str, int]:
        return self.problem.name, self.end, self.nfe

    def noise(self) -> Tensor:
        return self.problem.noise(HELD_OUT[: self.samples])

    def exact(self, noise: Tensor) -> Tensor:
        return self.problem.exact(noise, self.end, cache=self.cache)

    @property
    def frame(self) -> float:
        """What takes x at the end to x / alpha, in which errors are measured."""
        stop = self.problem.end_time(self.end)
        return 1.0 if stop is None else 1 / float(self.problem.schedule.alpha(stop))


def measure_peers(where: Where, some: Iterable[Peer], section: str) -> list[Result]:
    """Each peer that has a run of exactly this number of evaluations to this end."""
    noise = where.noise()
    exact = where.exact(noise) * where.frame
    first = fs.node(where.problem.schedule, where.problem.schedule.t_max)
    start = noise * (first.sigma / first.alpha)
    results = []
    for peer in some:
        if peer.end != where.end:
            continue
        model = Counted(where.problem)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = peer.run(model, start, where.nfe)
        except ImportError:
            raise
        except Exception as error:  # a fault of the peer is a result
            results.append(Result.failed(where, section, peer.name, f"{type(error).__name__}: {error}"[:200]))
            continue
        if found is None:
            continue
        if model.calls != where.nfe:
            raise AssertionError(f"{peer.name} took {model.calls} evaluations where {where.nfe} were allowed")
        results.append(Result.of(where, section, peer.name, found, exact))
    return results


def measure_plan(where: Where, section: str, name: str, plan: fs.Plan) -> Result:
    noise = where.noise()
    if plan.nfe != where.nfe:
        raise AssertionError(f"{name} takes {plan.nfe} evaluations where {where.nfe} were allowed")
    found = fs.sample(where.problem.model, plan, noise, progress=False)
    return Result.of(where, section, name, found * where.frame, where.exact(noise) * where.frame)


def measure_default(where: Where) -> list[Result]:
    model, stop = where.problem.model, where.problem.end_time(where.end)
    plan = DEFAULT.plan(model.schedule, where.nfe, end=stop)
    return [measure_plan(where, "default", DEFAULT.name, plan)]


def measure_ours(where: Where) -> list[Result]:
    model, stop = where.problem.model, where.problem.end_time(where.end)
    return [
        measure_plan(where, "ours", candidate.name, candidate.plan(model.schedule, where.nfe, end=stop))
        for candidate in OURS
    ]


def measure_picked(where: Where) -> list[Result]:
    """The best of the hand-made family on 64 noises of the user's own, measured on the held-out ones."""
    model, stop = where.problem.model, where.problem.end_time(where.end)
    noise = where.problem.noise(PICK_SEEDS)
    ranking = solvers.pick(model, where.nfe, noise, end=stop, reference=where.exact(noise), progress=False)
    best = ranking.best
    return [measure_plan(where, "picked", best.name, best.plan)]


def measure_tuned(where: Where) -> list[Result]:
    if where.nfe not in TUNED_NFES:
        return []
    model, stop = where.problem.model, where.problem.end_time(where.end)
    noise = where.problem.noise(TUNE_SEEDS)
    tuned = solvers.tune(model, where.nfe, noise, coefficients=True, end=stop, reference=where.exact(noise))
    name = tuned.plan.solver if tuned.won else f"picked: {tuned.picked.name}"
    return [measure_plan(where, "tuned", name, tuned.plan)]


WORK: dict[str, Callable[[Where], list[Result]]] = {
    "peer": lambda where: measure_peers(where, peers(crossed=False), "peer"),
    "default": measure_default,
    "ours": measure_ours,
    "picked": measure_picked,
    "tuned": measure_tuned,
    "crossed": lambda where: measure_peers(where, (p for p in peers() if p.crossed), "crossed"),
}


def piece(where: Where, section: str, work: Path) -> list[Result]:
    """The results of one section at one place, from the file of an earlier run or made now."""
    path = work / f"{where.problem.name}-{where.end}-{where.nfe:02d}-{section}.json"
    settings = {"samples": where.samples, "versions": _versions(), "code": _code(section)}
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["settings"] == settings:
            return [Result(**row) for row in kept["results"]]
    started = time.process_time()
    results = WORK[section](where)
    seconds = time.process_time() - started
    body = {"settings": settings, "seconds": round(seconds, 1), "results": [asdict(result) for result in results]}
    write_text(path, json.dumps(body, indent=1) + "\n")
    print(f"{where.problem.name:12} end {where.end:4} NFE {where.nfe:2} {section:8} {seconds:6.1f} s", flush=True)
    return results


@cache
def _code(section: str) -> str:
    """Of the files that the results of a section depend on: a change makes them anew."""
    here, ours = Path(__file__).parent, Path(solvers.__file__).parent
    theirs = section in ("peer", "crossed")
    core = Path(fs.__file__).parent
    files = [here / "peers.py", here / "peer_forms.py"]
    if not theirs:
        files = [Path(__file__), *sorted(ours.glob("*.py")), *sorted(core.glob("*.py"))]
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "diffusers", "k-diffusion"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "absent"
    return found


def table(results: Sequence[Result]) -> str:
    """The markdown page: for each end and problem, the best peer at each NFE and ours beside it."""
    ends = [end for end in get_args(End) if any(r.end == end for r in results)]
    names = [name for name in PROBLEMS if any(r.problem == name for r in results)]
    lines: list[str] = []
    for end in ends:
        title = "sigma of index 0" if end == "min" else "sigma = 0"
        lines += [f"## To {title}", "", *_summary(results, end, names)]
        for name in names:
            lines += _problem([r for r in results if (r.problem, r.end) == (name, end)], name)
    return "\n".join(lines)


def best(results: Iterable[Result], section: str, nfe: int) -> Result | None:
    """The least rms of a section at one NFE."""
    rows = [r for r in results if r.section == section and r.nfe == nfe]
    return min(rows, key=lambda r: r.rms, default=None)


def ratios(results: Sequence[Result], section: str, rival: str = "peer") -> dict[int, float]:
    """Our error over that of the best peer at each NFE, on one problem and one end."""
    found = {}
    for nfe in NFES:
        ours, theirs = best(results, section, nfe), best(results, rival, nfe)
        if ours and theirs:
            found[nfe] = ours.rms / theirs.rms
    return found


def geometric_mean(numbers: Iterable[float]) -> float:
    logs = [math.log(number) for number in numbers]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


COLUMNS = ("default", "picked", "tuned")


def _summary(results: Sequence[Result], end: str, names: Sequence[str]) -> list[str]:
    """Geometric means of the ratios to the best peer, for each problem and for each NFE; below 1 is less error."""
    by_name = {name: [r for r in results if (r.problem, r.end) == (name, end)] for name in names}
    crossed = any(r.section == "crossed" for r in results)
    heads = ["the default", "picked", "tuned", *["the default over the best crossed peer"] * crossed]
    lines = [
        f"Error over that of the best peer, geometric mean over NFE {', '.join(map(str, JUDGED))} (tuned: "
        f"{', '.join(map(str, TUNED_NFES))}); in brackets the worst NFE.",
        "",
        f"| problem | {' | '.join(heads)} |",
        f"| --- |{' --- |' * len(heads)}",
    ]
    for name, rows in by_name.items():
        cells = [_mean(ratios(rows, section)) for section in COLUMNS]
        lines.append(f"| {name} | {' | '.join([*cells, *[_mean(_crossed(rows))] * crossed])} |")
    lines += [
        "",
        f"The same at each NFE, geometric mean over the {len(names)} problems; in brackets the worst of them.",
        "",
        "| NFE | the default | picked | tuned |",
        "| --- | --- | --- | --- |",
    ]
    for nfe in sorted({r.nfe for r in results if r.end == end}):
        found = [
            [one[nfe] for rows in by_name.values() if nfe in (one := ratios(rows, section))] for section in COLUMNS
        ]
        cells = [f"**{geometric_mean(one):.2f}** ({max(one):.2f})" if one else "" for one in found]
        lines.append(f"| {nfe} | {' | '.join(cells)} |")
    return [*lines, ""]


def _crossed(rows: Sequence[Result]) -> dict[int, float]:
    """The default over the best of all peers, crossed ones too."""
    both, plain = (ratios(rows, "default", rival) for rival in ("crossed", "peer"))
    return {nfe: max(value, plain[nfe]) for nfe, value in both.items() if nfe in plain}


def _mean(by_nfe: dict[int, float]) -> str:
    judged = {nfe: value for nfe, value in by_nfe.items() if nfe in JUDGED}
    if not judged:
        return ""
    return f"**{geometric_mean(judged.values()):.2f}** ({max(judged.values()):.2f})"


def _problem(rows: Sequence[Result], name: str) -> list[str]:
    crossed = any(r.section == "crossed" for r in rows)
    heads = ["NFE", "best peer", "error", "the default", "picked", "tuned", *["best crossed peer"] * crossed]
    lines = [f"### {name}", "", f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for nfe in sorted({r.nfe for r in rows}):
        peer = best(rows, "peer", nfe)
        cells = [f"{peer.method}" if peer else "", _shown(peer)]
        for section in COLUMNS:
            found = best(rows, section, nfe)
            share = f", x {found.rms / peer.rms:.2f}" if found and peer else ""
            cells.append(f"{_shown(found)}{share}")
        other = best(rows, "crossed", nfe)
        cells += [f"{other.method} {_shown(other)}" if other else ""] * crossed
        lines.append(f"| {nfe} | {' | '.join(cells)} |")
    return [*lines, ""]


def _shown(result: Result | None) -> str:
    return f"{result.rms:.4f} +- {result.standard_error:.4f}" if result else ""


def as_csv(results: Sequence[Result]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [field.name for field in fields(Result)]
    writer.writerow(names)
    for result in results:
        row = asdict(result)
        writer.writerow([f"{row[n]:.6g}" if isinstance(row[n], float) else row[n] for n in names])
    return text.getvalue()


def page(results: Sequence[Result], samples: int) -> str:
    machine = environment()
    versions = ", ".join(f"{name} {number}" for name, number in _versions().items())
    return f"""# Solvers on problems whose answer is known

Root mean square distance of each sample's end from the converged probability-flow ODE, +- the jackknife's standard
error: {samples} start noises that nothing was fitted or picked on; the same noises, end and number of
network evaluations (NFE, counted) for all.

What was chosen with which knowledge: the default was searched for among several hundred combinations of form,
variable, order and spacing on these five problems, with other noises (seeds 0 to 255 and 20000 to 36383). Two earlier
versions of it were reported on noises of their own (seeds from 1,000,000 and from 2,000,000 on) and missed 1.15 on
gmm64 and digits there. The present one was made after that, on the seeds from 20000 on; then these noises (seeds from
{HELD_OUT.start} on) were drawn, on which nothing was chosen: not the default, not the family of plans, not the rule by
which it picks, not the number of noises.

- The default: `solvers.default` on `fs.default_t` with `lower_order_final`, at every NFE and on every problem.
- Picked: the best of `solvers.FAMILY` on {len(PICK_SEEDS)} other noises. Tuned: `solvers.tune` on {len(TUNE_SEEDS)}.
- The best peer is the best of some eighty, on the very noises that are reported. Crossed (a section of its own): a
  peer's method on another peer's spacing. The official code of DPM-Solver and UniPC can be asked for some of these;
  they were set apart late, after held-out results had been seen, since the published table lacks them. They are not in
  the tables below. With them as peers the default's first version had 1.35 (gmm64cfg4) to 2.05 (gmm64) times the error
  of the best, on 512 noises of the first set.
- The peers that are on no package index are written anew from their formulas (`bench/studies/peer_forms.py`) and
  compared with stored outputs of the originals by tests. gmm2 has the published constants; gmm64 and gmm64cfg4 are our
  own instances of the published description; the digits are scikit-learn's.

{table(results)}
Made by `python bench/studies/solver_errors.py`; {versions}; {machine.get("cpu", "")}. Every row: solver_errors.csv.
"""


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--problems", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--ends", nargs="+", choices=get_args(End), default=["min"])
    parser.add_argument("--nfe", nargs="+", type=int, default=list(NFES))
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--samples", type=int, default=len(HELD_OUT), help="of the held-out noises")
    parser.add_argument("--work", type=Path, default=Path("runs/solver_errors"), help="what is done so far")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    asked = parser.parse_args(arguments)
    if not 2 <= asked.samples <= len(HELD_OUT):
        parser.error(f"--samples must lie in 2 .. {len(HELD_OUT)}, got {asked.samples}")
    torch.set_num_threads(1)
    work = folder(asked.work)
    results: list[Result] = []
    for section in asked.sections:
        for end in asked.ends:
            for name in asked.problems:
                for nfe in asked.nfe:
                    where = Where(PROBLEMS[name], end, nfe, asked.samples, work / "exact")
                    results += piece(where, section, work)
    by_place: dict[str, int] = defaultdict(int)
    for result in results:
        by_place[result.section] += 1
    write_text(asked.out / "solver_errors.csv", as_csv(results))
    write_text(asked.out / "solver_errors.md", page(results, asked.samples))
    faults = [r for r in results if r.fault]
    print(f"{dict(by_place)} rows, {len(faults)} faults of peers; wrote {asked.out}/solver_errors.csv and .md")
    return results


if __name__ == "__main__":
    main()
