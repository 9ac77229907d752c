"""Solvers: each one function `solver(model, x, grid, **options) -> x`, written as in its paper.

To add one, write the function in a file of this folder and its name here and in tests/solvers/cases.py.
"""

from fastsample.tracing import Solver

from .ddim import ddim, ddpm
from .dpm_solver import dpmpp_1, dpmpp_2m, dpmpp_2s, dpmpp_3m
from .few_step import consistency
from .heun import euler, heun
from .unipc import unipc_2, unipc_3

SOLVERS: dict[str, Solver] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_1": dpmpp_1,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2s": dpmpp_2s,
    "unipc_2": unipc_2,
    "unipc_3": unipc_3,
    "consistency": consistency,
}


def get(name: str) -> Solver:
    """The solver of this name, for those who have it from a command line or a file."""
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name]


__all__ = [
    "SOLVERS",
    "consistency",
    "ddim",
    "ddpm",
    "dpmpp_1",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_3m",
    "euler",
    "get",
    "heun",
    "unipc_2",
    "unipc_3",
]
