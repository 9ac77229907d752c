"""What a run tells while it lasts: a file of losses, and a bar."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from fastsample import files

LOG = "log.jsonl"


class Log:
    """A line for every `every` steps: the mean losses since the last, the learning rate, the seconds of this start."""

    def __init__(self, folder: Path | None, done: int, every: int):
        self.every, self.losses, self.begin = every, dict[str, list[float]](), time.monotonic()
        self.file = None
        if folder is not None:
            for left in folder.glob(f".{LOG}.*"):  # by a run that was killed
                left.unlink()
            path = folder / LOG
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            files.write_text(path, "".join(line + "\n" for line in lines if _is_before(line, done)))
            self.file = path.open("a", encoding="utf-8")

    def add(self, step: int, losses: dict[str, float], lr: float) -> None:
        if self.file is None:
            return
        for name, loss in losses.items():
            self.losses.setdefault(name, []).append(loss)
        if (step + 1) % self.every == 0:
            means = {name: sum(values) / len(values) for name, values in self.losses.items()}
            line = {"step": step + 1, "loss": means, "lr": lr, "seconds": round(time.monotonic() - self.begin, 3)}
            self.file.write(json.dumps(line, allow_nan=False) + "\n")
            self.file.flush()
            self.losses.clear()

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file:
            self.file.close()


def _is_before(line: str, done: int) -> bool:
    try:
        return int(json.loads(line)["step"]) <= done
    except (ValueError, KeyError, TypeError):  # the last line of a run that was killed may be half a line
        return False


@contextlib.contextmanager
def bar(steps: int, done: int, show: bool | None) -> Iterator[Callable[[int, dict[str, float]], None]]:
    """A bar with the losses, smoothed."""
    if show is False or (show is None and not sys.stderr.isatty()):
        yield lambda step, losses: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.fields[losses]}"))
    smooth: dict[str, float] = {}
    with Progress(TextColumn("training"), *columns, console=Console(stderr=True), transient=not show) as shown:
        task = shown.add_task("training", total=steps, completed=done, losses="")

        def tell(step: int, losses: dict[str, float]) -> None:
            smooth.update({name: 0.95 * smooth.get(name, loss) + 0.05 * loss for name, loss in losses.items()})
            shown.update(task, completed=step, losses=" ".join(f"{name} {loss:.4g}" for name, loss in smooth.items()))

        yield tell
