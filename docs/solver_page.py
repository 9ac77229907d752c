"""Writes docs/solvers.md: the docstrings of solvers and spacings, and the measured tables of bench/results.

    python docs/solver_page.py

tests/test_docs.py compares the page with what this would write.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import fastsample as fs
from fastsample import solvers

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "solvers.md"
RESULTS = ROOT / "bench" / "results" / "solver_errors.md"

DIRECT = ("ddpm_learned", "dpm_solver_12", "dpm_solver_23", "rk45", "exact")
FEW_STEP = ("consistency", "tcd")

INTRODUCTION = """# Solvers

Every solver is one function, `solver(model, x, grid, **options)`, and (but for the adaptive ones) becomes a plan:

```python
import torch

import fastsample as fs
from fastsample import solvers, zoo

model = zoo.digits()
grid = fs.grid(model.schedule, 8, spacing=fs.default_t, lower_order_final=True)
plan = fs.trace(solvers.default, grid)
images = fs.sample(model, plan, fs.noise((1, 8, 8), seeds=range(16)), condition={"class_labels": torch.arange(16) % 10})
```

## Which one when

- **You want a default**: `default` on `fs.default_t` with `lower_order_final=True`. Of some hundred fixed choices tried
  on the five problems below it is the most even over data, guidance and number of steps, within 1.15 of the best peer
  on each of them; it is alike on every schedule, and starts at alpha = 0 (flow, zero terminal SNR) too.
- **You can spare a minute**: `fastsample plan pick`, or `solvers.pick(model, nfe, noises)`. No solver is best for every
  model; this measures a family of them on yours, against the converged solution of your own network.
- **You sample this model a lot**: `fastsample tune`, or `solvers.tune(model, nfe, noises)`, fits the times and, if you
  like, all coefficients, and keeps the picked plan where that does not win on noises it was not fitted to.
- **You want the images of your diffusers pipeline, faster**: `solvers.PlanScheduler.from_config(pipe.scheduler.config,
  solver=...)` in place of its scheduler.
- **More than 20 evaluations**: `unipc_3` or `dpmpp_3m`; they are of true order 4 and 3.
- **Noise on purpose** (more variety, errors of a network averaged out; 20 evaluations and more): `sde_dpmpp_2m`,
  `sa_solver`, `restart`, `heun` with churn.
- **A distilled network**: `consistency` (LCM as well), `tcd`.
- **Rectified flow** (SD3, Flux): any of the x0 or flow forms: `euler`, `flow_2m`, `flow_heun`, `dpmpp_2m`, `multistep`;
  eps forms cannot start at alpha = 0, and say so.
- **A reference**: `exact` in `fs.solve`, to a tolerance.

Order is that of the error in 1 / steps on smooth problems, measured by tests. Evaluations are the network's (NFE).
"""


def first_paragraph(what: Callable[..., Any]) -> str:
    return " ".join((inspect.getdoc(what) or "").split("\n\n")[0].split()).replace("|", "\\|")


def options_of(what: Callable[..., Any]) -> str:
    chosen = [p for p in inspect.signature(what).parameters.values() if p.kind is p.KEYWORD_ONLY]
    return ", ".join(f"`{p.name}={_shown(p.default)}`" if p.default is not p.empty else f"`{p.name}`" for p in chosen)


def _shown(value: Any) -> str:
    return value.__name__ if inspect.isfunction(value) else repr(value)


def table(names: Iterable[str], where: dict[str, Callable[..., Any]]) -> list[str]:
    rows = [f"| `{name}` | {first_paragraph(where[name])} | {options_of(where[name])} |" for name in names]
    return ["| name | what | options and their defaults |", "| --- | --- | --- |", *rows, ""]


def stochastic(name: str) -> bool:
    """Whether it adds noise as it is."""
    return fs.trace(solvers.get(name), fs.grid(fs.VP.linear(), 3, fs.quadratic_t)).stochastic


def page() -> str:
    named = dict(solvers.SOLVERS)
    plans = [name for name in named if name not in FEW_STEP and name not in DIRECT]
    noisy = [name for name in plans if stochastic(name)]
    every = {name: getattr(solvers, name) for name in (*named, *DIRECT)}
    lines = [INTRODUCTION]
    lines += ["## Solvers of the probability-flow ODE", "", *table([n for n in plans if n not in noisy], every)]
    lines += ["## Solvers that add noise", "", *table(noisy, every)]
    lines += ["## For distilled networks", "", *table(FEW_STEP, every)]
    lines += ["## In `fs.solve` only", "", "Their steps depend on what they see, so there is no plan.", ""]
    lines += table(DIRECT, every)
    lines += [
        "## Spacings",
        "",
        "`fs.grid(schedule, steps, spacing)`; besides these `fs.power_t(rho)`, `fs.late(spacing)`,",
        "`fs.snr_table(levels)` and `fs.at_times(times)`.",
        "",
        "| name | what |",
        "| --- | --- |",
        *(f"| `{name}` | {_spacing(name)} |" for name in fs.SPACINGS),
        "",
    ]
    measured = RESULTS.read_text(encoding="utf-8").partition("\n")[2].strip().replace("\n## ", "\n### ")
    lines += ["## Measured beside the peers", "", measured]
    return "\n".join(lines).rstrip() + "\n"


def _spacing(name: str) -> str:
    if name.startswith("ays_"):
        return "Align Your Steps: its table of levels, Sabour et al. 2024, arXiv:2404.14507."
    return first_paragraph(fs.SPACINGS[name])


if __name__ == "__main__":
    from fastsample.files import write_text

    write_text(PAGE, page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
