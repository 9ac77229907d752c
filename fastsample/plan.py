"""Plans: a solver as a table, one row per network evaluation.

    m_k     = p_k x_k + q_k x0_k                                      what the solver remembers of evaluation k
    x_{k+1} = a_k x_k + sum_j b_kj m_{k-j} + sum_j c_kj z_{k-j}       the next state; z are unit noises

`tracing.trace` makes one of a solver, `sampling.sample` runs it.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .files import write_text
from .gaussian import Gaussian, Warm
from .grid import Node

VERSION = 1


@dataclass(frozen=True)
class Row:
    """One evaluation at `node` and the step that follows it; b and c are ordered from the newest backwards."""

    node: Node
    p: float
    q: float
    a: float
    b: tuple[float, ...]
    c: tuple[float, ...]


@dataclass(frozen=True)
class Plan:
    """What will be computed, in full: x_0 = entry_a x_T + entry_c z_{-1}, then `rows`, ending at `end`.

    warm: how x_T at `start` comes from noise above it; None: it is alpha init + sigma noise.
    predicts: what networks must predict to run it, for a plan tuned to one; None: anything.
    """

    solver: str
    schedule: str
    spacing: str
    remembers: str
    start: Node
    end: Node
    rows: tuple[Row, ...]
    entry: tuple[float, float] = (1.0, 0.0)
    warm: Warm | None = None
    predicts: str | None = None

    def __post_init__(self) -> None:
        self.check()

    @property
    def nfe(self) -> int:
        """Network evaluations for one sample; guidance makes each of them two rows of a batch."""
        return len(self.rows)

    @property
    def stochastic(self) -> bool:
        return bool(self.noises)

    @property
    def noises(self) -> frozenset[int]:
        """Which z are used; -1 is the one before the first evaluation."""
        steps = {k - j for k, row in enumerate(self.rows) for j, number in enumerate(row.c) if number}
        return frozenset(steps | ({-1} if self.entry[1] else set()))

    @property
    def memory(self) -> int:
        """How many evaluations the solver remembers at once, the newest included."""
        return max(len(row.b) for row in self.rows)

    def check(self) -> None:
        """Raise ValueError where the table cannot be run."""
        texts = (self.solver, self.schedule, self.spacing, self.remembers)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"solver, schedule, spacing and remembers of a plan must be text, got {texts}")
        if not self.rows:
            raise ValueError("the plan has no rows: it would evaluate nothing")
        if not (self.warm is None or isinstance(self.warm, Warm)) or not isinstance(self.predicts, str | None):
            raise ValueError(f"warm and predicts of a plan must be a Warm and a text, got {self.warm}, {self.predicts}")
        ends = [number for node in (self.start, self.end) for number in (node.t, node.alpha, node.sigma)]
        if len(self.entry) != 2 or not all(math.isfinite(number) for number in (*self.entry, *ends)):
            raise ValueError(f"start, end or entry {self.entry} of the plan holds a number that is not finite")
        for k, row in enumerate(self.rows):
            numbers = [row.p, row.q, row.a, *row.b, *row.c, row.node.t, row.node.alpha, row.node.sigma]
            if not all(math.isfinite(number) for number in numbers):
                raise ValueError(f"row {k} of the plan (t = {row.node.t:g}) holds a number that is not finite")
            if row.node.sigma <= 0 or row.node.alpha < 0:
                raise ValueError(f"row {k} evaluates the network at alpha = {row.node.alpha:g}, sigma = "
                                 f"{row.node.sigma:g}; sigma must be positive")  # fmt: skip
            if len(row.b) > k + 1 or len(row.c) > k + 2:
                raise ValueError(f"row {k} of the plan uses {len(row.b)} memories and {len(row.c)} noises, more "
                                 f"than there are yet")  # fmt: skip

    def __str__(self) -> str:
        noise, plural = ", adds noise" if self.stochastic else "", "s" if self.nfe > 1 else ""
        lines = [
            f"{self.solver}: {self.nfe} network evaluation{plural}, remembers {self.memory} x {self.remembers}{noise}",
            f"{self.schedule}, {self.spacing}, from t = {self.start.t:g} to t = {self.end.t:g} "
            f"(sigma {self.end.sigma:.4g})",
            f"{'k':>4} {'t':>9} {'sigma/alpha':>12} {'lam':>8} {'a':>10}  b (newest first)   c",
        ]
        if self.predicts:
            lines.insert(2, f"for networks that predict {self.predicts}")
        if self.warm:
            lines.insert(2, f"from noise at t = {self.warm.start.t:g} as if the data were Gaussian, at no evaluation")
        if self.entry != (1.0, 0.0):
            lines.append(f"{'':>46} {self.entry[0]:>10.5f}  {'':<17}  {self.entry[1]:.5f}")
        for k, row in enumerate(self.rows):
            ratio = row.node.sigma / row.node.alpha if row.node.alpha else math.inf
            b, c = (" ".join(f"{number:.5f}" for number in numbers) for numbers in (row.b, row.c))
            lines.append(
                f"{k:>4} {row.node.t:>9.3f} {ratio:>12.5g} {row.node.lam:>8.3f} {row.a:>10.5f}  {b:<17}  {c}".rstrip()
            )
        return "\n".join(lines)

    def to_json(self) -> str:
        """The plan as JSON text, with a schema version and a checksum: what stands in its file."""
        body = asdict(replace(self, warm=None))
        if self.warm:
            body["warm"] = {"gaussian": self.warm.gaussian.to_json(), "start": asdict(self.warm.start)}
        text = {"format": "fastsample.plan", "version": VERSION, "sha256": _digest(body), "plan": body}
        return json.dumps(text, indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read and check a plan. Raises ValueError for text that is damaged, edited or of another version."""
        return cls._read(text, "this text")

    def save(self, path: str | Path) -> None:
        """Write `to_json()` to a file."""
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """As `from_json`, of a file."""
        return cls._read(Path(path).read_bytes(), str(path))

    @classmethod
    def _read(cls, source: str | bytes, name: str) -> Plan:
        try:
            text = json.loads(source)
            if text["format"] != "fastsample.plan" or text["version"] != VERSION:
                raise ValueError(f"it says format {text['format']}, version {text['version']}")
            body = text["plan"]
            if _digest(body) != text["sha256"]:
                raise ValueError("its checksum does not match its numbers; make the plan again")
            rows = tuple(
                Row(**{**row, "node": Node(**row["node"]), "b": tuple(row["b"]), "c": tuple(row["c"])})
                for row in body["rows"]
            )
            nodes = {"start": Node(**body["start"]), "end": Node(**body["end"])}
            warm = body.get("warm")
            if warm:
                warm = Warm(Gaussian.from_json(warm["gaussian"]), Node(**warm["start"]))
            return cls(**{**body, **nodes, "rows": rows, "entry": tuple(body["entry"]), "warm": warm})
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            cause = f"it lacks {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{name} is no fastsample plan of version {VERSION}, or it is damaged: {cause}") from error


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
