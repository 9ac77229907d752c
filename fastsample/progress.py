"""Progress bars for work that lasts: none for short runs, none where nobody looks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], label: str, show: bool | None = None, *, after_s: float = 2.0) -> Iterator[T]:
    """Iterate; show=None puts up a bar on a terminal once the loop has lasted `after_s`, True at once, False never."""
    if show is False or (show is None and not sys.stderr.isatty()):
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    wait = 0.0 if show else after_s
    begin = time.monotonic()
    bar = Progress(console=Console(stderr=True), transient=True)
    task = bar.add_task(label, total=len(items))
    try:
        for k, item in enumerate(items):
            if not bar.live.is_started and time.monotonic() - begin >= wait:
                bar.start()
            yield item
            bar.update(task, completed=k + 1)
    finally:
        bar.stop()
