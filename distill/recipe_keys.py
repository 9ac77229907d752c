"""What may stand in a recipe: the keys of a method are the fields of its class, those of data the arguments of its
function, and each is checked by its annotation.

A number, a word, a list or a table stands for itself. Where a function of this package is meant, its name does
(spacing = "karras"), or, where that is made of numbers, a table: times = { name = "Doubling", over = 4000 }.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastsample import checks as check
from fastsample.checks import Check
from fastsample.spacing import SPACINGS, Spacing, power_t
from fastsample.tracing import Solver

from .consistency import ConsistencyDistillation
from .consistency_training import ConsistencyTraining, EasyConsistencyTuning
from .continuous import ContinuousConsistency
from .conversion import Conversion
from .curriculum import Doubling, Lognormal, Matched, SquareRoot
from .diffusion import Diffusion
from .distances import PseudoHuber
from .distribution import DistributionMatching
from .importance import Importance
from .latent import Huber, LatentConsistency
from .method import Method
from .progressive import ProgressiveDistillation
from .reflow import Reflow
from .scale import Embedded, Plain, Scales
from .times import CosMapTimes, LogitNormalTimes, LogNormalTimes, UniformTimes
from .weights import P2, EDMWeight, MinSNR

METHODS: dict[str, type[Method]] = {  # a new method joins here; its fields are its keys
    "consistency": ConsistencyDistillation,
    "consistency_training": ConsistencyTraining,
    "continuous": ContinuousConsistency,
    "conversion": Conversion,
    "diffusion": Diffusion,
    "distribution_matching": DistributionMatching,
    "easy_tuning": EasyConsistencyTuning,
    "latent_consistency": LatentConsistency,
    "progressive": ProgressiveDistillation,
    "reflow": Reflow,
}
OTHERWISE = {"tangent_warmup": "warmup"}  # keys that stand for a field whose name is one of the trainer's
MODELS = ("student", "model", "teacher", "critic")  # fields that the recipe's own networks fill
PARTS: dict[str, Any] = {  # what a table with a name makes
    "CosMapTimes": CosMapTimes,
    "Doubling": Doubling,
    "EDMWeight": EDMWeight,
    "Embedded": Embedded,
    "Huber": Huber,
    "Importance": Importance,
    "LogNormalTimes": LogNormalTimes,
    "LogitNormalTimes": LogitNormalTimes,
    "Lognormal": Lognormal,
    "Matched": Matched,
    "MinSNR": MinSNR,
    "P2": P2,
    "Plain": Plain,
    "PseudoHuber": PseudoHuber,
    "Scales": Scales,
    "SquareRoot": SquareRoot,
    "UniformTimes": UniformTimes,
}


@dataclass(frozen=True)
class Made:
    """A value as it is written, for files and comparisons, and as it is used."""

    written: Any
    value: Any = field(compare=False)


def keys_of(made: Callable[..., Any], solvers: Mapping[str, Solver], leave: Sequence[str] = MODELS) -> dict[str, Check]:
    """The checks of the keywords of a class or function, without those that `leave` names.

    Keywords whose annotation no recipe can say (a function of one's own) have none.
    """
    hints = typing.get_type_hints(made)
    if dataclasses.is_dataclass(made):
        hints = {one.name: hints[one.name] for one in dataclasses.fields(made) if one.init}
    found = {}
    for name, hint in hints.items():
        if name not in leave and name != "return" and (one := _check(hint, name, solvers)) is not None:
            found[name] = one
    return found


def keys_of_method(kind: type[Method], solvers: Mapping[str, Solver]) -> dict[str, Check]:
    """As `keys_of`, with the keys of `OTHERWISE` where a field has that name."""
    other = {field: key for key, field in OTHERWISE.items()}
    return {other.get(name, name): one for name, one in keys_of(kind, solvers).items()}


def needed(made: Callable[..., Any], leave: Sequence[str] = MODELS) -> list[str]:
    """The keywords that have no default."""
    parameters = inspect.signature(made).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.name not in leave]


def written(value: Any) -> Any:
    """A checked value as the file has it."""
    if isinstance(value, Made):
        return value.written
    if isinstance(value, Mapping):
        return {key: written(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [written(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value  # JSON has no infinity


def used(value: Any) -> Any:
    """A checked value as it is used."""
    if isinstance(value, Made):
        return value.value
    return {key: used(one) for key, one in value.items()} if isinstance(value, Mapping) else value


def spacing(value: Any, where: str) -> Made:
    """One of the spacings by name, or { name = "power_t", rho = 1.5 }."""
    one = _part({"power_t": power_t}, {}) if isinstance(value, dict) else _named(SPACINGS)
    found: Made = one(value, where)
    return found


def _check(hint: Any, name: str, solvers: Mapping[str, Solver]) -> Check | None:
    simple: dict[Any, Check] = {int: check.whole(0), float: _real, bool: check.flag, str: check.word}
    if hint in simple:
        return simple[hint]
    if hint == Spacing:
        return spacing
    if hint == Solver:
        return _named(solvers)
    if hint is Any:
        return check.anything
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return _one_of(inside)
    if origin in (typing.Union, types.UnionType):
        ways = [one for part in inside if (one := _check(part, name, solvers)) is not None]
        return _either([_nothing, *ways] if ways and type(None) in inside else ways)
    if origin in (tuple, list) or (isinstance(origin, type) and issubclass(origin, Sequence)):
        one = _check(inside[0], name, solvers) if inside else None
        return None if one is None else _list(one)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return check.mapping(_number_or_word)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        kinds = {key: kind for key, kind in PARTS.items() if issubclass(kind, hint)}
        return _part(kinds, solvers) if kinds else None
    if origin is not None and callable(origin):  # a function: those that a table can name
        return _part(PARTS, solvers)
    return None


def _real(value: Any, where: str) -> float:
    """A number; also infinity, by which limits are none."""
    return math.inf if value == math.inf else check.number(value, where)


def _either(ways: Sequence[Check]) -> Check | None:
    """The first that takes the value; the error is that of the one that came nearest."""
    if len(ways) < 2:
        return ways[0] if ways else None

    def one(value: Any, where: str) -> Any:
        errors = []
        for way in ways:
            try:
                return way(value, where)
            except ValueError as error:
                errors.append(str(error))
        plain = errors[1:] if ways[0] is _nothing else errors
        told = plain[-1] if isinstance(value, dict) else plain[0]  # what takes tables stands last
        raise ValueError(told)

    return one


def _nothing(value: Any, where: str) -> Made:
    if value != "none":
        raise ValueError(f'{where} may be "none", got {value!r}')
    return Made(value, None)


def _one_of(known: Sequence[Any]) -> Check:
    def one(value: Any, where: str) -> Any:
        if isinstance(value, bool) or value not in known:
            raise ValueError(f"{where} must be one of {', '.join(map(repr, known))}, got {value!r}")
        return value

    return one


def _named(known: Mapping[str, Any]) -> Check:
    def one(value: Any, where: str) -> Made:
        return Made(value, check.among(known, value_of=True)(value, where))

    return one


def _list(one: Check) -> Check:
    def whole(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or not value:
            raise ValueError(f"{where} must be a list of at least one, got {value!r}")
        return tuple(one(item, where) for item in value)

    return whole


def _part(kinds: Mapping[str, Any], solvers: Mapping[str, Solver]) -> Check:
    def one(value: Any, where: str) -> Made:
        if not isinstance(value, dict) or not isinstance(value.get("name"), str):
            hint = f'{{ name = "{next(iter(kinds))}", ... }}'
            raise ValueError(f"{where} must be a table with a name, such as {hint}, got {value!r}")
        check.all_known([value["name"]], kinds, f"name in {where}")
        kind = kinds[value["name"]]
        rest = {key: item for key, item in value.items() if key != "name"}
        given = check.table(rest, keys_of(kind, solvers), where)
        if lacking := [key for key in needed(kind) if key not in given]:
            raise ValueError(f"{where} lacks {lacking[0]}, which {value['name']} needs")
        return Made(value, kind(**{key: used(item) for key, item in given.items()}))

    return one


def _number_or_word(value: Any, where: str) -> Any:
    return value if isinstance(value, bool | str) else check.number(value, where) if isinstance(value, float) else value
