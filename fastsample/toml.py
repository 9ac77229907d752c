"""TOML, with Python's own reader, or before Python 3.11 with tomli."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def read(path: str | Path) -> dict[str, Any]:
    """What the file holds. Raises ValueError, with the line and column, for what is no TOML."""
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no text in UTF-8 ({error.reason} at byte {error.start})") from error


def parse(text: str) -> dict[str, Any]:
    """As `read`, of a text."""
    try:
        if sys.version_info >= (3, 11):
            import tomllib
        else:
            import tomli as tomllib
    except ImportError as error:
        raise ImportError("reading TOML needs tomli before Python 3.11: pip install 'fastsample[bench]'") from error
    try:
        return dict(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"it is no TOML: {error}") from error


def value(text: str) -> Any:
    """One value, such as 0.1, true or [1, 2]; what is no TOML is a word, taken as it stands."""
    try:
        return parse(f"value = {text}")["value"] if text else text
    except ValueError:
        return text
