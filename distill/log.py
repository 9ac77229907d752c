"""What a run tells while it lasts: a file of losses, and a bar."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fastsample import files

from .checkpoint import finite

LOG = "log.jsonl"


class Log:
    """A line for every `every` steps: the mean losses since the last, the learning rate, the seconds of this start.

    tracker: an accelerator, whose trackers are told the same; configuration: what they show beside it.
    """

    def __init__(
        self,
        folder: Path | None,
        done: int,
        every: int,
        tracker: Any = None,
        configuration: Mapping[str, Any] | None = None,
    ):
        self.every, self.losses, self.begin = every, dict[str, list[float]](), time.monotonic()
        self.tracker = tracker
        if tracker is not None:
            # of what is done again, TensorBoard then forgets the first time
            own = {"tensorboard": {"purge_step": done + 1}} if done else {}
            tracker.init_trackers("fastsample", config=flat(configuration or {}), init_kwargs=own)
        self.file = None
        if folder is not None:
            for left in folder.glob(f".{LOG}.*"):  # by a run that was killed
                left.unlink()
            path = folder / LOG
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            files.write_text(path, "".join(line + "\n" for line in lines if _is_before(line, done)))
            self.file = path.open("a", encoding="utf-8")

    def add(self, step: int, losses: dict[str, float], lr: float) -> None:
        if self.file is None and self.tracker is None:
            return
        for name, loss in losses.items():
            self.losses.setdefault(name, []).append(loss)
        if (step + 1) % self.every == 0:
            means = {name: sum(values) / len(values) for name, values in self.losses.items()}
            seconds = round(time.monotonic() - self.begin, 3)
            self._tell(step, {"loss": means, "lr": lr, "seconds": seconds})
            self.losses.clear()

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        if values:
            self._tell(step, {"evaluation": dict(values)})

    def _tell(self, step: int, line: Mapping[str, Any]) -> None:
        if self.file is not None:
            self.file.write(json.dumps(finite({"step": step + 1, **line}), allow_nan=False) + "\n")
            self.file.flush()
        if self.tracker is not None:
            self.tracker.log(flat(line), step=step + 1)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self.file:
            self.file.close()
        for tracker in self.tracker.trackers if self.tracker is not None else ():
            tracker.finish()  # accelerate's end_training would also end the processes' group


def flat(values: Mapping[str, Any], name: str = "") -> dict[str, Any]:
    """Nested mappings as one, with names such as loss/student; lists as text: what trackers take."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        inside = f"{name}/{key}" if name else str(key)
        if isinstance(value, Mapping):
            found |= flat(value, inside)
        else:
            found[inside] = value if isinstance(value, bool | int | float | str) else json.dumps(value, default=str)
    return found


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
