"""Sweeps from a TOML file: what to measure, read and checked before any model is loaded.

n = 1000
[model.teacher]
from = "digits"
[cases]                                  # every combination; [[include]] adds others, [[exclude]] removes some
solver = ["ddim", "dpmpp_2m"]
steps = [4, 8]
[quality.fd_digits]
reference = "digits"

What every key means stands in docs/bench.md. Paths are relative to the folder the command runs in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fastsample import checks as check
from fastsample import toml
from fastsample.checks import Check
from fastsample.denoiser import Model
from fastsample.plan import Plan
from fastsample.spacing import SPACINGS
from fastsample.tracing import Solver

from .case import Case
from .latency import Latency
from .sweep_quality import KEYS, MEASURES, Asked

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}
TOP = "the top of the file"


@dataclass(frozen=True)
class ModelAsked:
    """A [model.NAME]. source: its `from`. teacher: the model that it is distilled from where it is not there yet.

    guidance: its scale, in all of its cases. null: the class label that means none. interval, rescale: as in
    `fs.Guided`. converged: the model whose accurate solution is the truth for this one; None: there is none.
    """

    source: str
    teacher: str | None = None
    updates: float = 1.0
    guidance: float | None = None
    null: int | None = None
    interval: tuple[float, float] | None = None
    rescale: float = 0.0
    converged: str | None = None


@dataclass(frozen=True)
class Sweep:
    """A whole file. cases, include: tables as they stand, checked; exclude: what a case must have to be removed."""

    n: int
    models: Mapping[str, ModelAsked]
    products: Sequence[Mapping[str, Any]]
    exclude: Sequence[Mapping[str, tuple[Any, ...]]]
    quality: Mapping[str, Asked]
    latency: Latency | None
    accurate: Mapping[str, Any] | None
    solvers: Mapping[str, Solver] = field(repr=False)
    out: str | None = None
    title: str | None = None
    measure: str | None = None
    shape: tuple[int, ...] | None = None
    batch: int = 250
    shard: int = 1000
    keep: int = 64
    floor: bool = True
    device: str = "cpu"
    threads: int | None = None
    labels: tuple[int, ...] | None = None

    @property
    def used(self) -> list[str]:
        """The names of the models that cases or their truths need."""
        named = [name for one in self.products for name in one.get("model", self.models)]
        truths = [truth for name in named if (truth := self.models[name].converged)]
        return list(dict.fromkeys([*named, *truths]))

    @property
    def guided(self) -> set[str]:
        """The models whose cases set the scale of guidance, and those that give them their truth."""
        found = {name for one in self.products if "guidance" in one for name in one.get("model", self.models)}
        return found | {truth for name in found if (truth := self.models[name].converged)}

    def cases(self, models: Mapping[str, Model]) -> list[Case]:
        """The cases of these models, in the order of the file.

        Raises ValueError for a case that is asked for twice, and for an [[exclude]] that removes nothing.
        """
        found: dict[str, Case] = {}
        for place, one in zip(self._places, self.products):
            for case in _product(one, models, self.solvers):
                if case.name in found:
                    raise ValueError(f"{place} asks for {case.name}, which stands there already; name it once")
                found[case.name] = case
        for number, pattern in enumerate(self.exclude, 1):
            gone = [name for name, case in found.items() if _matches(case, pattern)]
            if not gone:
                given = ", ".join(f"{key} = {' or '.join(map(str, values))}" for key, values in pattern.items())
                raise ValueError(f"[[exclude]] {number} ({given}) removes no case; mend or remove it")
            found = {name: case for name, case in found.items() if name not in gone}
        if not found:
            raise ValueError("[[exclude]] leaves no case; nothing to measure")
        if self.latency and self.latency.baseline not in (None, *found):
            baseline = str(self.latency.baseline)
            raise ValueError(
                f"the baseline {baseline!r} in [latency] is no case{check.nearest(baseline, found)}; "
                f"--list shows their names"
            )
        return list(found.values())

    def truths(self, cases: Sequence[Case], models: Mapping[str, Model]) -> dict[str, Case]:
        """Model name -> the accurate case whose samples are its truth, guided as its cases are.

        Raises ValueError where the cases of a model have several scales of guidance, of which one truth has but one.
        """
        found = {}
        for name in dict.fromkeys(case.model_name for case in cases):
            truth = self.models[name].converged
            if self.accurate is None or truth is None:
                continue
            scales = list(dict.fromkeys(case.guidance for case in cases if case.model_name == name))
            if len(scales) > 1:
                told = ", ".join("none" if scale is None else f"{scale:g}" for scale in scales)
                raise ValueError(
                    f"the cases of {name} have the scales of guidance {told}, and [converged] makes one truth for all: "
                    f"give each scale a [model.NAME] with its own guidance, or this one converged = false"
                )
            asked = {**self.accurate, **({} if scales[0] is None else {"guidance": (scales[0],)}), "model": (truth,)}
            found[name] = _product(asked, models, self.solvers)[0]
        return found

    @property
    def _places(self) -> list[str]:
        return ["[cases]", *(f"[[include]] {number}" for number in range(1, len(self.products)))]


def read_sweep(path: str | Path, *, solvers: Mapping[str, Solver]) -> Sweep:
    """The sweep of a file, with the solvers that it may name.

    Raises ValueError, naming the file, the key, its place and what is known there, for all that cannot be meant.
    """
    try:
        return _sweep(toml.read(path), solvers)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _sweep(body: dict[str, Any], solvers: Mapping[str, Solver]) -> Sweep:
    sections = {key: body.pop(key) for key in SECTIONS if key in body}
    top = check.table(body, SETTINGS, TOP, others=SECTIONS)
    if "n" not in top:
        raise ValueError(f"n, the number of samples of each case, is missing at {TOP}, such as n = 1000")
    reference = top.pop("reference", None)
    models = _models(sections.get("model"))
    products = [_cases(sections.get("cases"), "[cases]", models, solvers)]
    for number, one in enumerate(_tables(sections, "include"), 1):
        products.append(_cases(one, f"[[include]] {number}", models, solvers))
    exclude = [_exclude(one, number) for number, one in enumerate(_tables(sections, "exclude"), 1)]
    quality = _quality(sections.get("quality", {}), reference)
    latency = _latency(sections["latency"]) if "latency" in sections else None
    if not quality and latency is None:
        raise ValueError("nothing to measure: add [quality.NAME], such as [quality.fd_digits], or [latency], or both")
    _check_measure(top.get("measure"), quality)
    accurate = _accurate(sections["converged"], solvers) if "converged" in sections else None
    _check_truths(models, accurate, sections["model"])
    if accurate is None:
        models = {name: _without_truth(one) for name, one in models.items()}
    return Sweep(
        models=models, products=products, exclude=exclude, quality=quality, latency=latency,
        accurate=accurate, solvers=solvers, **top,
    )  # fmt: skip


def _models(body: Any) -> dict[str, ModelAsked]:
    if not isinstance(body, dict) or not body:
        raise ValueError('no model: add [model.NAME] with a from, such as [model.teacher] and from = "digits"')
    found = {}
    for name, one in body.items():
        place = f"[model.{name}]"
        given = check.table(one, MODEL, place)
        if "from" not in given:
            raise ValueError(f'{place} says not where the model is; add from = "digits" or from = "FOLDER"')
        if given.get("converged") is True:
            given["converged"] = name
        given["converged"] = given.get("converged", name) or None
        lone = [key for key in ("interval", "rescale") if key in given and "guidance" not in given]
        if lone:
            raise ValueError(f"{lone[0]} in {place} is of guidance, which this model has none of; add guidance = 3.0")
        if "updates" in given and "teacher" not in given:
            raise ValueError(f"updates in {place} is of distilling, and no teacher is named; add teacher = NAME")
        found[name] = ModelAsked(given.pop("from"), **given)
    for name, model in found.items():
        for key, other in (("teacher", model.teacher), ("converged", model.converged)):
            if other is not None and other not in found:
                raise ValueError(f"{key} in [model.{name}] names no model: {other!r}{check.nearest(other, found)}")
        if model.teacher is not None and found[model.teacher].teacher is not None:
            raise ValueError(f"the teacher of [model.{name}] is distilled itself; name the model it came from")
    return found


def _check_truths(models: Mapping[str, ModelAsked], accurate: Any, written: Mapping[str, Any]) -> None:
    for name, body in written.items():
        if body.get("converged") and accurate is None:
            raise ValueError(
                f"converged in [model.{name}] needs to know what an accurate solution is: add [converged] with "
                f'solver = "dpmpp_2m" and steps = 100'
            )


def _without_truth(model: ModelAsked) -> ModelAsked:
    return replace(model, converged=None)


def _cases(body: Any, place: str, models: Mapping[str, ModelAsked], solvers: Mapping[str, Solver]) -> Mapping[str, Any]:
    if body is None:
        raise ValueError(f'no cases: add {place} with solver = ["ddim"] and steps = [4, 8]')
    given = check.table(body, CASES, place)
    if "solver" not in given and "plan" not in given:
        raise ValueError(f"{place} names no solver and no plan; add solver = [...] or plan = {{NAME = FILE}}")
    if ("solver" in given) != ("steps" in given):
        have, lack = ("solver", "steps") if "solver" in given else ("steps", "solver")
        raise ValueError(f"{place} has {have} but no {lack}; both make a case")
    check.all_known(given.get("model", ()), models, f"model in {place}")
    check.all_known(given.get("solver", ()), solvers, f"solver in {place}")
    both = [name for name in given.get("plan", ()) if name in given.get("solver", ())]
    if both:
        raise ValueError(f"{place} has a plan and a solver named {both[0]!r}; give the plan another name")
    return given


def _exclude(body: Any, number: int) -> dict[str, tuple[Any, ...]]:
    found = check.table(body, EXCLUDE, f"[[exclude]] {number}")
    if not found:
        raise ValueError(f"[[exclude]] {number} is empty and would remove every case; say which, such as steps = 1")
    return found


def _quality(body: Any, reference: str | None) -> dict[str, Asked]:
    if not isinstance(body, dict):
        raise ValueError(f"[quality] holds tables, such as [quality.fd_digits], got {body!r}")
    found = {}
    for name, one in body.items():
        place = f"[quality.{name}]"
        if not isinstance(one, dict):
            raise ValueError(f"{name} in [quality] must be a table of its own: write {place}")
        measure = str(one.get("measure", name))
        if measure not in MEASURES:
            raise ValueError(f"unknown measure {measure!r} in {place}{check.nearest(measure, MEASURES)}")
        known = {"measure": check.word, **{key: _measure_key(key) for key in MEASURES[measure].keys}}
        given = check.table(one, known, place)
        given.pop("measure", None)
        if "reference" in known and reference is not None:
            given.setdefault("reference", reference)
        for key in MEASURES[measure].needs:
            if key not in given:
                hint = (
                    ' (or at the top of the file, for all), such as reference = "digits"' if key == "reference" else ""
                )
                raise ValueError(f"{place} needs {key}{hint}")
        found[name] = Asked(name, measure, given)
    return found


def _check_measure(measure: str | None, quality: Mapping[str, Asked]) -> None:
    """Of the pictures: a measure, or a part of one, such as fd_digits_converged, which only the scores name."""
    if measure in (None, "endpoint_rms") or any(f"{measure}_".startswith(f"{name}_") for name in quality):
        return
    raise ValueError(
        f"measure in {TOP} is {measure!r}, which no [quality.NAME] measures{check.nearest(str(measure), quality)}"
    )


def _latency(body: Any) -> Latency:
    given = check.table(body, LATENCY, "[latency]")
    if given.get("threads") == 0:
        given["threads"] = None
    return Latency(**given)


def _accurate(body: Any, solvers: Mapping[str, Solver]) -> dict[str, Any]:
    given = check.table(body, {key: CASES[key] for key in TRUTH}, "[converged]")
    for key in ("solver", "steps"):
        if len(given.get(key, ())) != 1:
            raise ValueError(f'[converged] needs one {key}, such as solver = "dpmpp_2m" and steps = 100')
    check.all_known(given["solver"], solvers, "solver in [converged]")
    return given


def _product(asked: Mapping[str, Any], models: Mapping[str, Model], solvers: Mapping[str, Solver]) -> list[Case]:
    named = {name: models[name] for name in asked.get("model", models)}
    ways = {to: asked[key] for key, to in WAYS.items() if key in asked}
    found = []
    if "solver" in asked:
        found = Case.product(
            model=named,
            solver={name: solvers[name] for name in asked["solver"]},
            steps=asked["steps"],
            spacing=[SPACINGS[name] for name in asked["spacing"]] if "spacing" in asked else None,
            start=asked.get("start"),
            end=asked.get("end"),
            options=asked.get("options"),
            lower_order_final=asked.get("lower_order_final", False),
            **ways,
        )
    for name, path in asked.get("plan", {}).items():
        plan = Plan.load(path)
        for model, way in product(named, product(*ways.values())):
            found.append(Case.of_plan(model, named[model], name, plan, **dict(zip(ways, way))))
    return found


def _matches(case: Case, pattern: Mapping[str, tuple[Any, ...]]) -> bool:
    has = {
        "model": case.model_name,
        "solver": case.solver_name,
        "steps": case.steps,
        "spacing": case.spacing_name,
        **{key: getattr(case, to) for key, to in WAYS.items()},
    }
    return all(has[key] in values for key, values in pattern.items())


def _tables(sections: Mapping[str, Any], key: str) -> list[Any]:
    found = sections.get(key, [])
    if not isinstance(found, list):
        raise ValueError(f"{key} is a list of tables: write [[{key}]], in two brackets")
    return found


def _measure_key(key: str) -> Check:
    return {"word": check.word, "whole": check.whole(KEYS[key].least)}[KEYS[key].kind]


SECTIONS = ("model", "cases", "include", "exclude", "quality", "latency", "converged")
SETTINGS: dict[str, Check] = {
    "n": check.whole(1),
    "out": check.word,
    "title": check.word,
    "measure": check.word,
    "reference": check.word,
    "shape": check.shape,
    "batch": check.whole(1),
    "shard": check.whole(1),
    "keep": check.whole(0),
    "floor": check.flag,
    "device": check.device,
    "threads": check.whole(1),
    "labels": check.several(check.whole(0)),
}
MODEL: dict[str, Check] = {
    "from": check.word,
    "teacher": check.word,
    "updates": check.share,
    "guidance": check.number,
    "null": check.whole(0),
    "interval": check.pair,
    "rescale": check.number,
    "converged": check.truth,
}
WAYS = {
    "guidance": "guidance",
    "dtype": "dtype",
    "compile": "compiled",
    "graph": "graph",
    "batch": "batch",
    "device": "device",
}
CASES: dict[str, Check] = {
    "model": check.several(check.word),
    "solver": check.several(check.word),
    "plan": check.mapping(check.word),
    "steps": check.several(check.whole(1)),
    "spacing": check.several(check.among(SPACINGS)),
    "start": check.number,
    "end": check.number,
    "options": check.mapping(check.anything),
    "lower_order_final": check.flag,
    "guidance": check.several(check.number),
    "dtype": check.several(check.among(DTYPES, value_of=True)),
    "compile": check.several(check.flag),
    "graph": check.several(check.flag),
    "batch": check.several(check.whole(1)),
    "device": check.several(check.device),
}
TRUTH = ("solver", "steps", "spacing", "start", "end", "options", "lower_order_final")
EXCLUDE: dict[str, Check] = {
    **{key: CASES[key] for key in ("model", "solver", "steps", *WAYS)},
    "spacing": check.several(check.word),
}
LATENCY: dict[str, Check] = {
    "rounds": check.whole(1),
    "warmup": check.whole(0),
    "batch": check.whole(1),
    "threads": check.whole(0),
    "baseline": check.word,
}
