"""Solvers: each one function `solver(model, x, grid, **options) -> x`, written as in its paper.

To add one, write the function in a file of this folder and its name here and in tests/solvers/cases.py.
"""

from typing import TYPE_CHECKING, Any

from fastsample.tracing import Solver

from .adams import deis, ipndm, ipndm_v, lms, plms, pndm
from .adaptive import Effort, dpm_solver_12, dpm_solver_23, exact, rk45
from .ddim import ddim, ddpm, ddpm_learned
from .default import default
from .dpm_solver import (
    dpm_solver_1,
    dpm_solver_2,
    dpm_solver_2m,
    dpm_solver_3,
    dpm_solver_3m,
    dpmpp_1,
    dpmpp_2m,
    dpmpp_2s,
    dpmpp_3m,
    dpmpp_3s,
)
from .few_step import consistency, tcd
from .flow import flow_2m, flow_heun
from .heun import euler, heun
from .multistep import Angle, Level, multistep
from .picking import FAMILY, Candidate, Ranking, Scored, converged, pick, warmed
from .restart import Interval, restart
from .sa_solver import sa_solver
from .stochastic import (
    dpm2_ancestral,
    dpmpp_2s_ancestral,
    euler_ancestral,
    euler_ancestral_flow,
    sde_dpmpp_1,
    sde_dpmpp_2m,
    sde_dpmpp_2s,
    sde_dpmpp_3m,
)
from .tuned import Tuned, tune
from .unipc import unipc, unipc_1, unipc_2, unipc_3

SOLVERS: dict[str, Solver] = {
    "default": default,
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "heun": heun,
    "dpmpp_1": dpmpp_1,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_2s": dpmpp_2s,
    "dpmpp_3s": dpmpp_3s,
    "dpm_solver_1": dpm_solver_1,
    "dpm_solver_2": dpm_solver_2,
    "dpm_solver_3": dpm_solver_3,
    "dpm_solver_2m": dpm_solver_2m,
    "dpm_solver_3m": dpm_solver_3m,
    "unipc_1": unipc_1,
    "unipc_2": unipc_2,
    "unipc_3": unipc_3,
    "multistep": multistep,
    "deis": deis,
    "lms": lms,
    "ipndm": ipndm,
    "ipndm_v": ipndm_v,
    "pndm": pndm,
    "plms": plms,
    "flow_heun": flow_heun,
    "flow_2m": flow_2m,
    "euler_ancestral": euler_ancestral,
    "euler_ancestral_flow": euler_ancestral_flow,
    "dpm2_ancestral": dpm2_ancestral,
    "dpmpp_2s_ancestral": dpmpp_2s_ancestral,
    "sde_dpmpp_1": sde_dpmpp_1,
    "sde_dpmpp_2m": sde_dpmpp_2m,
    "sde_dpmpp_3m": sde_dpmpp_3m,
    "sde_dpmpp_2s": sde_dpmpp_2s,
    "sa_solver": sa_solver,
    "restart": restart,
    "consistency": consistency,
    "tcd": tcd,
}

if TYPE_CHECKING:
    from .scheduler import PlanScheduler as PlanScheduler


def __getattr__(name: str) -> Any:
    """PlanScheduler is loaded when it is first asked for, since it needs diffusers."""
    if name != "PlanScheduler":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from .scheduler import PlanScheduler
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise ImportError("PlanScheduler needs diffusers: pip install 'fastsample[diffusers]'") from error
    return PlanScheduler


def get(name: str) -> Solver:
    """The solver of this name, for those who have it from a command line or a file."""
    if name not in SOLVERS:
        raise ValueError(f"unknown solver {name!r}; choose one of {', '.join(SOLVERS)}")
    return SOLVERS[name]


__all__ = [
    "FAMILY",
    "SOLVERS",
    "Angle",
    "Candidate",
    "Effort",
    "Interval",
    "Level",
    "Ranking",
    "Scored",
    "Tuned",
    "consistency",
    "converged",
    "ddim",
    "ddpm",
    "ddpm_learned",
    "default",
    "deis",
    "dpm2_ancestral",
    "dpm_solver_1",
    "dpm_solver_2",
    "dpm_solver_2m",
    "dpm_solver_3",
    "dpm_solver_3m",
    "dpm_solver_12",
    "dpm_solver_23",
    "dpmpp_1",
    "dpmpp_2m",
    "dpmpp_2s",
    "dpmpp_2s_ancestral",
    "dpmpp_3m",
    "dpmpp_3s",
    "euler",
    "euler_ancestral",
    "euler_ancestral_flow",
    "exact",
    "flow_2m",
    "flow_heun",
    "get",
    "heun",
    "ipndm",
    "ipndm_v",
    "lms",
    "multistep",
    "pick",
    "plms",
    "pndm",
    "restart",
    "rk45",
    "sa_solver",
    "sde_dpmpp_1",
    "sde_dpmpp_2m",
    "sde_dpmpp_2s",
    "sde_dpmpp_3m",
    "tcd",
    "tune",
    "unipc",
    "unipc_1",
    "unipc_2",
    "unipc_3",
    "warmed",
]
