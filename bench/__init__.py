"""Measuring: latency against quality, of models, solvers and numbers of steps.

cases = bench.Case.product(model={"teacher": teacher, "student": student}, solver=[ddim, dpmpp_2m], steps=[2, 4, 8])
records = bench.run(cases, shape=(1, 8, 8), n=1000, quality=bench.fd_digits(images), latency=bench.latency(),
                    out="runs/sweep")
bench.report("runs/sweep")
"""

from .case import Case, Cost
from .environment import environment
from .latency import Latency, Ratio, Times, interleaved, latency, median_interval, paired_ratio
from .pictures import pareto_front, sample_grid
from .quality import (
    Frechet,
    FrechetTo,
    Quality,
    Score,
    Statistics,
    endpoint_rms,
    fd_digits,
    fd_pixels,
    frechet_distance,
    statistics,
)
from .record import Record, read_run, read_samples
from .report import report
from .run import run

__all__ = [
    "Case",
    "Cost",
    "Frechet",
    "FrechetTo",
    "Latency",
    "Quality",
    "Ratio",
    "Record",
    "Score",
    "Statistics",
    "Times",
    "endpoint_rms",
    "environment",
    "fd_digits",
    "fd_pixels",
    "frechet_distance",
    "interleaved",
    "latency",
    "median_interval",
    "paired_ratio",
    "pareto_front",
    "read_run",
    "read_samples",
    "report",
    "run",
    "sample_grid",
    "statistics",
]
