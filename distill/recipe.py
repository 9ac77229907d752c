"""Recipes: a training or a distillation in a TOML file, read and checked before any work starts.

title = "Digits: one step"
[teacher]
from = "digits"                       # built in, or a folder; [network] in place of it trains one from nothing
[student]
predicts = "v"
[data]
from = "digits"
[stages]                              # of every stage, unless it has its own
drop = 0.1
[stage.conversion]                    # stages run in the order of the file, each on the student of the one before
method = "conversion"
updates = 400
[stage.consistency]
method = "consistency"
updates = 1200
[plan]                                # what the student is sampled by; it is saved with it
solver = "ddim"
steps = 1

What every key means stands in docs/distillation.md. Paths are relative to the folder the command runs in.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastsample import checks as check
from fastsample import toml
from fastsample.checks import Check
from fastsample.prediction import PREDICTIONS
from fastsample.tracing import Solver

from .boundary import BOUNDARIES
from .options import optimizer_of, schedule_of
from .progressive import check_rounds
from .recipe_data import SOURCES
from .recipe_keys import METHODS, keys_of, keys_of_method, needed, spacing, written

CONFIGS = Path(__file__).parent / "configs"
TOP = "the top of the file"


@dataclass(frozen=True)
class Stage:
    """One run of `train`. settings: of the method. options: of `train`, lr and ema among them.

    previous: its teacher is the student of the stage before, as in the rounds of progressive distillation.
    """

    name: str
    method: str
    updates: int
    seed: int
    settings: Mapping[str, Any]
    options: Mapping[str, Any]
    previous: bool = False


@dataclass(frozen=True)
class Recipe:
    """A whole file, checked. teacher, network, student, data, plan, evaluate: its tables; network where teacher is
    None. body: the file itself, as it was changed by `--set`.
    """

    stages: Sequence[Stage]
    data: Mapping[str, Any]
    teacher: Mapping[str, Any] | None
    network: Mapping[str, Any] | None
    student: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    evaluate: Mapping[str, Any]
    solvers: Mapping[str, Solver] = field(repr=False)
    body: Mapping[str, Any] = field(repr=False)
    title: str = ""
    cost: str = ""
    reaches: str = ""
    out: str | None = None
    seed: int = 0
    threads: int | None = None

    def resolved(self) -> dict[str, Any]:
        """What decides the weights, as JSON: a run goes on only where it is the same."""
        shown: dict[str, Any] = {"seed": self.seed, "data": written(self.data), "student": written(self.student)}
        shown["teacher" if self.teacher is not None else "network"] = written(self.teacher or self.network)
        stages = {
            one.name: {
                "method": one.method,
                "updates": one.updates,
                **written(one.settings),
                **{key: value for key, value in written(one.options).items() if key not in FREE},
            }
            for one in self.stages
        }
        return {**shown, "stages": stages}


def built_in() -> dict[str, Path]:
    """The recipes that come with the package, by name."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.toml"))}


def find(name: str | Path) -> Path:
    """The file of a recipe: a path, or the name of one that is built in."""
    path = Path(name)
    if path.is_file():
        return path
    known = built_in()
    if str(name) in known:
        return known[str(name)]
    raise ValueError(f"no recipe {str(name)!r}: no such file, and none built in{check.nearest(str(name), known)}")


def read_recipe(
    path: str | Path, *, solvers: Mapping[str, Solver], changes: Sequence[str] = (), teacher: str | None = None
) -> Recipe:
    """The recipe of a file, or of a built-in name, with the solvers that it may name.

    changes: such as "stage.consistency.updates=10", in place of what the file says. teacher: in place of its `from`.
    Raises ValueError, naming the file, the key, its place and what is known there, for all that cannot be meant.
    """
    found = find(path)
    try:
        body = toml.read(found)
        for one in changes:
            change(body, one)
        if teacher is not None:
            if "teacher" not in body:
                raise ValueError("it has no [teacher] that another could take the place of; leave out --teacher")
            body["teacher"] = {**_dict(body["teacher"], "[teacher]"), "from": teacher}
        return _recipe(body, solvers)
    except ValueError as error:
        raise ValueError(f"{found}: {error}") from error


def change(body: dict[str, Any], text: str) -> None:
    """Put key=value, with dots between the names of tables, into what a file holds."""
    place, equals, value = text.partition("=")
    names = [name.strip() for name in place.split(".")]
    if not equals or not all(names):
        raise ValueError(f"a change is written key=value, such as stage.consistency.updates=10, got {text!r}")
    table = body
    for name in names[:-1]:
        table = table.setdefault(name, {})
        if not isinstance(table, dict):
            raise ValueError(f"{text!r} changes a key of {name}, which is no table")
    table[names[-1]] = toml.value(value.strip())


def _recipe(body: dict[str, Any], solvers: Mapping[str, Solver]) -> Recipe:
    whole = {**body}
    tables = {key: whole.pop(key) for key in TABLES if key in whole}
    top = check.table(whole, SETTINGS, TOP, others=TABLES)
    if ("teacher" in tables) == ("network" in tables):
        raise ValueError(
            "a recipe has a [teacher], of which a student is distilled, or a [network], which is trained; "
            + ("this has both" if "teacher" in tables else 'add [teacher] with from = "digits", for example')
        )
    for key in ("data", "stage"):
        if not tables.get(key):
            raise ValueError(f"there is no [{key}{'.NAME' if key == 'stage' else ''}]; {HINTS[key]}")
    teacher = check.table(tables["teacher"], TEACHER, "[teacher]") if "teacher" in tables else None
    network = check.table(tables["network"], NETWORK, "[network]") if "network" in tables else None
    student = check.table(tables.get("student", {}), STUDENT, "[student]")
    for table, place in ((teacher, "[teacher]"), (network, "[network]")):
        if table is not None and "from" not in table:
            raise ValueError(f'{place} says not which; add from = "digits" or from = "FOLDER"')
    if teacher is not None:
        _check_teacher(teacher)
    if student and network is not None:
        raise ValueError("[student] is of distilling; what is trained from nothing is the [network]")
    if "lora" in student and ("scale_size" in student or "predicts" in student):
        raise ValueError("lora in [student] leaves the teacher's network as it is; leave out predicts and scale_size")
    plan = _plan(tables["plan"], solvers) if "plan" in tables else None
    evaluate = check.table(tables.get("evaluate", {}), EVALUATE, "[evaluate]")
    if evaluate and plan is None:
        raise ValueError("[evaluate] samples the student, and there is no [plan] for that; add one")
    seed = top.get("seed", 0)
    return Recipe(
        stages=_stages(tables["stage"], tables.get("stages", {}), solvers, seed, teacher is not None),
        data=_data(tables["data"], solvers),
        teacher=teacher,
        network=network,
        student=student,
        plan=plan,
        evaluate=evaluate,
        solvers=solvers,
        body=body,
        **top,
    )


def _stages(body: Any, common: Any, solvers: Mapping[str, Solver], seed: int, distils: bool) -> list[Stage]:
    common = _dict(common, "[stages]")
    found: list[Stage] = []
    taken: set[str] = set()
    for name, one in _dict(body, "[stage]").items():
        place = f"[stage.{name}]"
        given = _dict(one, place)
        if not _is_name(name):
            raise ValueError(f"{place} names a folder; use letters, digits, - and _")
        method = given.get("method")
        if method is None:
            raise ValueError(f'{place} names no method; add method = "consistency", or one of {", ".join(METHODS)}')
        check.all_known([check.word(method, f"method in {place}")], METHODS, f"method in {place}")
        kind = METHODS[method]
        own = keys_of_method(kind, solvers)
        known: dict[str, Check] = {"method": check.word, "updates": _updates, **own, **TRAIN}
        if method == "progressive":
            known["rounds"] = _rounds
        shared = {key: value for key, value in common.items() if key in known}
        taken |= shared.keys()
        if method == "progressive" and ("rounds" in given or "steps" in given):
            shared = {key: value for key, value in shared.items() if key not in ("rounds", "steps")}
        values = check.table({**shared, **given}, known, place)
        values.pop("method")
        if "updates" not in values:
            raise ValueError(f"{place} says not how long it is trained; add updates = 1000")
        if not distils and "teacher" in needed(kind, leave=()):
            raise ValueError(f"{method} in {place} needs a teacher, and this recipe trains a [network]; add [teacher]")
        found += _rounds_of(name, method, values, own, seed, place) if "rounds" in values else [
            _stage(name, method, values, own, values.pop("seed", seed), place)
        ]  # fmt: skip
    unknown = [key for key in common if key not in taken]
    if unknown:
        every = dict.fromkeys([*TRAIN, *(key for kind in METHODS.values() for key in keys_of_method(kind, solvers))])
        raise ValueError(f"{unknown[0]!r} in [stages] is a key of none of the stages{check.nearest(unknown[0], every)}")
    return found


def _stage(name: str, method: str, values: dict[str, Any], own: Mapping[str, Check], seed: int, place: str,
           previous: bool = False) -> Stage:  # fmt: skip
    lacking = [key for key in needed(METHODS[method]) if key not in values]
    if lacking:
        more = ", or rounds" if method == "progressive" else ""
        raise ValueError(f"{place} lacks {lacking[0]}{more}, which {method} needs")
    updates = values["updates"]
    if len(updates) != 1:
        raise ValueError(f"updates in {place} is a list, which only the rounds of progressive distillation have")
    options = {key: value for key, value in values.items() if key in TRAIN and key != "seed"}
    settings = {key: value for key, value in values.items() if key in own}
    return Stage(name, method, updates[0], seed, settings, options, previous)


def _rounds_of(
    name: str, method: str, values: dict[str, Any], own: Mapping[str, Check], seed: int, place: str
) -> list[Stage]:
    """A stage for each round; that of k = 1, 2, ... has seed + k, as `distill.progressive`."""
    if "steps" in values:
        raise ValueError(f"{place} has rounds and steps; give the one or the other")
    rounds = values.pop("rounds")
    counts = values["updates"] * len(rounds) if len(values["updates"]) == 1 else values["updates"]
    if len(counts) != len(rounds):
        raise ValueError(f"updates in {place} has {len(counts)} numbers for {len(rounds)} rounds; give one, or as many")
    first = values.pop("seed", seed)
    found = []
    for k, (steps, count) in enumerate(zip(rounds, counts)):
        told = {**values, "steps": steps, "updates": (count,)}
        found.append(_stage(f"{name}/steps-{steps}", method, told, own, first + k + 1, place, previous=k > 0))
    return found


def _data(body: Any, solvers: Mapping[str, Solver]) -> dict[str, Any]:
    given = _dict(body, "[data]")
    source = given.get("from")
    if source is None:
        raise ValueError(f'[data] says not which; add from = "digits", or one of {", ".join(SOURCES)}')
    check.all_known([check.word(source, "from in [data]")], SOURCES, "from in [data]")
    made = SOURCES[source]
    known = {"from": check.word, **keys_of(made, solvers, leave=INSIDE)}
    values = check.table(given, known, "[data]")
    if lacking := [key for key in needed(made, leave=INSIDE) if key not in values]:
        raise ValueError(f"[data] lacks {lacking[0]}, which {source} needs")
    return values


def _plan(body: Any, solvers: Mapping[str, Solver]) -> dict[str, Any]:
    given = check.table(body, PLAN, "[plan]")
    for key in ("solver", "steps"):
        if key not in given:
            raise ValueError(f'[plan] lacks {key}; it needs one, such as solver = "ddim" and steps = 1')
    check.all_known([given["solver"]], solvers, "solver in [plan]")
    options = list(inspect.signature(solvers[given["solver"]]).parameters)[3:]  # behind model, x and grid
    check.all_known(given.get("options", {}), options, f"option of {given['solver']} in [plan]")
    if "skipping" in given and "spacing" in given:
        raise ValueError("[plan] has a spacing and skipping, which is one; give the one or the other")
    return given


def _check_teacher(teacher: Mapping[str, Any]) -> None:
    if ("null" in teacher or "uncond" in teacher) and "guidance" not in teacher:
        raise ValueError("null and uncond in [teacher] are of guidance, which it has none of; add guidance = 3.0")


def _updates(value: Any, where: str) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise ValueError(f"{where} is an empty list; give a number of updates for each round")
    return tuple(check.whole(1)(one, where) for one in values)


def _rounds(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{where} must be a list of steps, such as [16, 8, 4, 2, 1], got {value!r}")
    rounds = tuple(check.whole(1)(one, where) for one in value)
    try:
        check_rounds(rounds)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return rounds


def _rates(value: Any, where: str) -> Any:
    return check.mapping(check.share)(value, where) if isinstance(value, dict) else check.share(value, where)


def _decays(value: Any, where: str) -> Any:
    return tuple(check.number(one, where) for one in value) if isinstance(value, list) else check.number(value, where)


def _dropout(value: Any, where: str) -> float:
    if not 0 <= check.number(value, where) < 1:
        raise ValueError(f"{where} is a share of at least 0 and below 1, got {value!r}")
    return float(value)


def _clip(value: Any, where: str) -> float:
    return value if value == math.inf else float(check.share(value, where))


def _optimizer(value: Any, where: str) -> Any:
    settings = {**value} if isinstance(value, dict) else {"name": value}
    name = check.word(settings.pop("name", None), f"name of {where}" if isinstance(value, dict) else where)
    try:
        made: Any = optimizer_of(name)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    known = [key for key in inspect.signature(made).parameters if key not in ("params", "lr")]
    check.all_known(settings, known, f"setting of {name}, {where}")
    return value


def _schedule(value: Any, where: str) -> str:
    try:
        schedule_of(check.word(value, where))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return str(value)


def _layers(value: Any, where: str) -> Any:
    return [check.word(one, where) for one in value] if isinstance(value, list) else check.flag(value, where)


def _words(value: Any, where: str) -> tuple[str, ...]:
    return tuple(check.word(one, where) for one in (value if isinstance(value, list) else [value]))


def _boundary(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return check.mapping(check.anything)(value, where)
    return check.among(BOUNDARIES)(value, where)


def _table(known: Mapping[str, Check]) -> Check:
    return lambda value, where: check.table(value, known, where)


def _dict(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{place} must be a table, got {value!r}")
    return value


def _is_name(name: str) -> bool:
    return bool(name) and all(c.isalnum() or c in "-_" for c in name)


TABLES = ("teacher", "network", "student", "data", "stages", "stage", "plan", "evaluate")
HINTS = {
    "data": 'add one with from = "digits", for example',
    "stage": 'add [stage.consistency] with method = "consistency" and updates = 1000, for example',
}
INSIDE = ("teacher", "out", "solvers", "seed", "progress")  # what the run itself tells a source of data
SETTINGS: dict[str, Check] = {
    "title": check.word,
    "cost": check.word,
    "reaches": check.word,
    "out": check.word,
    "seed": check.whole(0),
    "threads": check.whole(1),
}
TEACHER: dict[str, Check] = {
    "from": check.word,
    "guidance": check.number,
    "null": check.whole(0),
    "uncond": check.word,
    "dtype": check.among({"float16": 0, "bfloat16": 0, "float32": 0}),
}
NETWORK: dict[str, Check] = {
    "from": check.word,
    "config": check.mapping(check.anything),
    "schedule": check.among({"linear": 0, "scaled_linear": 0, "cosine": 0, "edm": 0, "flow": 0}),
    "predicts": check.among(PREDICTIONS),
    "sigma_data": check.share,
    "boundary": _boundary,
    "null": check.whole(0),
}
STUDENT: dict[str, Check] = {
    "predicts": check.among(PREDICTIONS),
    "boundary": _boundary,
    "scale_size": check.whole(2),
    "dropout": _dropout,
    "lora": _table({"rank": check.whole(1), "alpha": check.share, "targets": _words, "seed": check.whole(0)}),
}
TRAIN: dict[str, Check] = {
    "lr": _rates,
    "optimizer": _optimizer,
    "schedule": _schedule,
    "warmup": check.whole(0),
    "ema": _decays,
    "clip": _clip,
    "seed": check.whole(0),
    "precision": check.among({"no": 0, "fp16": 0, "bf16": 0}),
    "accumulate": check.whole(1),
    "compiled": check.flag,
    "checkpointing": _layers,
    "save_every": check.whole(1),
    "keep": check.whole(1),
    "log_every": check.whole(1),
    "trackers": _words,
}
FREE = ("accumulate", "compiled", "checkpointing", "save_every", "keep", "log_every", "trackers")  # not of the weights
PLAN: dict[str, Check] = {
    "solver": check.word,
    "steps": check.whole(1),
    "spacing": spacing,
    "skipping": check.whole(1),
    "options": check.mapping(check.anything),
    "end": check.number,
}
EVALUATE: dict[str, Check] = {
    "every": check.whole(1),
    "n": check.whole(2),
    "seed": check.whole(0),
    "measure": check.word,
    "reference": check.word,
}
