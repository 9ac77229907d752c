"""Progress bars for work that lasts: none for short runs, none where nobody looks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")


def track(items: Sequence[T], label: str, show: bool | None = None, *, after_s: float = 2.0) -> Iterator[T]:
    """Iterate; show=None puts up a bar on a terminal once the loop has lasted `after_s`, True at once, False never."""
    if show is False or torch.compiler.is_compiling() or (show is None and not sys.stderr.isatty()):
        yield from items
        return
    begin = time.monotonic()
    bar: Progress | None = None
    try:
        for k, item in enumerate(items):
            if bar is None and (show or time.monotonic() - begin >= after_s):
                bar = _bar()
                task = bar.add_task(label, total=len(items), completed=k)
            yield item
            if bar is not None:
                bar.update(task, completed=k + 1)
    finally:
        if bar is not None:
            bar.stop()


def _bar() -> Progress:
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(console=Console(stderr=True), transient=True)
    bar.start()
    return bar
