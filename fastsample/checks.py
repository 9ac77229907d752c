"""What may stand at a key of a TOML file: each check takes (value, where it stands) and gives the value as it is used.

All raise ValueError, naming the value, its place and the remedy.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

Check = Callable[[Any, str], Any]


def table(body: Any, known: Mapping[str, Check], place: str, *, others: Iterable[str] = ()) -> dict[str, Any]:
    """The checked values. others: what is known at this place too, for the hint."""
    if not isinstance(body, dict):
        raise ValueError(f"{place} must be a table, got {body!r}")
    for key in body:
        if key not in known:
            raise ValueError(f"unknown key {key!r} in {place}{nearest(key, [*known, *others])}")
    return {key: known[key](value, f"{key} in {place}") for key, value in body.items()}


def all_known(names: Iterable[str], known: Iterable[str], where: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {where}: {name!r}{nearest(name, known)}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint, to be put behind what is unknown."""
    listed = list(known)
    close = difflib.get_close_matches(name, listed, n=1, cutoff=0.5)
    shown = ", ".join(listed[:40]) + (f" and {len(listed) - 40} more" if len(listed) > 40 else "")
    return f"; did you mean {close[0]!r}? Known: {shown}" if close else f"; known: {shown or 'none'}"


def whole(least: int) -> Check:
    def check(value: Any, where: str) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{where} must be a whole number, at least {least}, got {value!r}")
        return value

    return check


def number(value: Any, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value!r}")
    return float(value)


def word(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{where} must be a text in quotes, got {value!r}")
    return value


def flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} must be true or false, got {value!r}")
    return value


def several(one: Check) -> Check:
    """One value or a list of them, each once."""

    def check(value: Any, where: str) -> tuple[Any, ...]:
        found = [one(item, where) for item in (value if isinstance(value, list) else [value])]
        if not found:
            raise ValueError(f"{where} is an empty list; give one value at least, or leave the key out")
        twice = [item for item in found if found.count(item) > 1]
        if twice:
            raise ValueError(f"{where} has {value[found.index(twice[0])]!r} twice")
        return tuple(found)

    return check


def among(choices: Mapping[str, Any], value_of: bool = False) -> Check:
    """One of these names; value_of: as what the name stands for."""

    def check(value: Any, where: str) -> Any:
        all_known([word(value, where)], choices, where)
        return choices[value] if value_of else value

    return check


def pair(value: Any, where: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{where} must be [low, high], got {value!r}")
    low, high = (number(item, where) for item in value)
    return low, high


def mapping(one: Check) -> Check:
    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not value:
            raise ValueError(f"{where} must be a table, such as {{ NAME = ... }}, got {value!r}")
        return {name: one(item, f"{name} of {where}") for name, item in value.items()}

    return check


def anything(value: Any, where: str) -> Any:
    return value


def truth(value: Any, where: str) -> str | bool:
    return value if isinstance(value, bool) else word(value, where)


def share(value: Any, where: str) -> float:
    if not number(value, where) > 0:
        raise ValueError(f"{where} must be above 0, got {value!r}")
    return float(value)


def device(value: Any, where: str) -> str:
    try:
        torch.device(word(value, where))
    except RuntimeError as error:
        raise ValueError(f"{where} is {value!r}, which torch does not know; such as cpu, cuda or cuda:1") from error
    return str(value)


def shape(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be the shape of one sample, such as [3, 32, 32], got {value!r}")
    return tuple(whole(1)(size, where) for size in value)
