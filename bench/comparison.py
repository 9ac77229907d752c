"""What a comparison of two runs found, as rows, and as text, Markdown and JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["quality", "latency", "cost", "window", "failure"]
Verdict = Literal[
    "broken", "regressed", "improved", "inconclusive", "unchanged", "inside", "changed", "not comparable"
]  # the gravest first: the verdict of a cell is that of its gravest row

HEAD = ("cell", "measure", "before", "after", "change", "p", "verdict", "how")


@dataclass(frozen=True)
class Row:
    """One measure of one cell, before and after.

    kind: "quality" and "latency" are tests; "cost" is a change of the evaluations, known exactly; "window" holds the
        number after against bounds that were set for it; "failure" is a cell that failed on either side.
    effect: after - before; for a latency after / before; for a window the distance outside of it. interval: of the
        effect, at the level that Holm's correction held this test to (for a window: of the number itself). p: adjusted.
    tolerance: up to which effect a difference does not count, in the unit of the effect.
    how: what was compared, and what is to be known of it.
    """

    cell: str
    measure: str
    kind: Kind
    verdict: Verdict
    before: float | None = None
    after: float | None = None
    effect: float | None = None
    interval: tuple[float, float] | None = None
    p: float | None = None
    tolerance: float | None = None
    how: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text, under HEAD."""
        if self.kind == "failure":
            return self.cell, self.measure, "", "", "", "", self.verdict, self.how
        form = "{:.6g}" if self.kind == "cost" else "{:.4g}"
        before, after = ("" if x is None else form.format(x) for x in (self.before, self.after))
        p = "" if self.p is None else "<1e-4" if self.p < 1e-4 else f"{self.p:.2g}"
        measure = self.measure + (" (window)" if self.kind == "window" else "")
        return self.cell, measure, before, after, self._change, p, self.verdict, self.how

    @property
    def _change(self) -> str:
        if self.effect is None or self.verdict == "inside":
            return ""
        form = "{:.3f}" if self.kind == "latency" else "{:+.3g}"
        text = ("x" if self.kind == "latency" else "") + form.format(self.effect)
        if self.interval and self.kind != "window":
            text += f" [{form.format(self.interval[0])}, {form.format(self.interval[1])}]"
        return text


@dataclass(frozen=True)
class Comparison:
    """Two runs, cell by cell. before, after: their folders. tests: how many Holm's correction was made for, at `level`.

    notes: what holds of the whole, such as cells that only one run has.
    """

    before: str
    after: str
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    tests: int
    level: float

    @property
    def verdicts(self) -> dict[str, Verdict]:
        """Cell -> the gravest verdict of its rows."""
        order = list(Verdict.__args__)  # type: ignore[attr-defined]
        found: dict[str, Verdict] = {}
        for row in self.rows:
            found[row.cell] = min(row.verdict, found.get(row.cell, row.verdict), key=order.index)
        return found

    @property
    def failed(self) -> tuple[Row, ...]:
        """What a gate stops for: regressions beyond interval and tolerance, failed cells, broken windows."""
        return tuple(row for row in self.rows if row.verdict in ("broken", "regressed"))

    @property
    def summary(self) -> str:
        counts = Counter(self.verdicts.values())
        parts = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        tests = f"{self.tests} tests, Holm's correction at {self.level:.3g}" if self.tests else "nothing to test"
        return f"{len(self.verdicts)} cells: {parts} ({tests})"

    def table(self) -> str:
        """For a terminal: the rows in columns, the notes, the summary, and what failed."""
        lines = [HEAD, *(row.cells for row in self.rows)]
        widths = [max(len(line[i]) for line in lines) for i in range(len(HEAD))]
        text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        return "\n".join([f"before: {self.before}", f"after:  {self.after}", "", *text, "", *self._foot(), ""])

    def markdown(self) -> str:
        lines = [HEAD, ("---",) * len(HEAD), *(row.cells for row in self.rows)]
        table = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
        foot = [f"- {line}" for line in self._foot()]
        return "\n".join([f"`{self.before}` against `{self.after}`", "", *table, "", *foot, ""])

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and text, for JSON."""
        return {
            "format": "fastsample.bench.comparison",
            "version": 1,
            **{name: value for name, value in asdict(self).items() if name != "rows"},
            "verdicts": self.verdicts,
            "failed": [f"{row.cell}: {row.measure}" for row in self.failed],
            "rows": [asdict(row) for row in self.rows],
        }

    def _foot(self) -> Sequence[str]:
        failed = ", ".join(f"{row.cell} ({row.measure}: {row.verdict})" for row in self.failed)
        return [*self.notes, self.summary, *([f"FAILED: {failed}"] if failed else [])]
