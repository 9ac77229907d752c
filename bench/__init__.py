"""Measuring: latency against quality, of models, solvers and numbers of steps.

cases = bench.Case.product(model={"teacher": teacher, "student": student}, solver=[ddim, dpmpp_2m], steps=[2, 4, 8])
records = bench.run(cases, shape=(1, 8, 8), n=1000, quality=bench.fd_digits(images), latency=bench.latency(),
                    out="runs/sweep")
bench.report("runs/sweep")
"""

from .case import Case, Cost
from .compare import Tolerance, compare
from .comparison import Comparison
from .environment import environment
from .fid import fid, inception_features, inception_logits
from .frechet import Frechet, frechet_by_svd, frechet_distance
from .front import pareto_front, undominated
from .imported import import_benchmarks
from .inception_score import InceptionScore, inception_score
from .kernel_distance import KernelDistance, kernel_distance
from .latency import Latency, Ratio, Times, Timing, interleaved, latency, median_interval, paired_ratio
from .likelihood import Likelihood, NegativeLogLikelihood, nll
from .measure import Features, Measure, Score
from .moments import Moments, Statistics, gather, statistics
from .neighbours import Neighbours, neighbours
from .pictures import sample_grid
from .quality import FrechetTo, Quality, endpoint_rms, fd_digits, fd_pixels
from .record import Record, read_run, read_samples
from .reference import Reference
from .report import report
from .run import run
from .sliced import SlicedWasserstein, sliced_wasserstein

__all__ = [
    "Case",
    "Comparison",
    "Cost",
    "Features",
    "Frechet",
    "FrechetTo",
    "InceptionScore",
    "KernelDistance",
    "Latency",
    "Likelihood",
    "Measure",
    "Moments",
    "NegativeLogLikelihood",
    "Neighbours",
    "Quality",
    "Ratio",
    "Record",
    "Reference",
    "Score",
    "SlicedWasserstein",
    "Statistics",
    "Times",
    "Timing",
    "Tolerance",
    "compare",
    "endpoint_rms",
    "environment",
    "fd_digits",
    "fd_pixels",
    "fid",
    "frechet_by_svd",
    "frechet_distance",
    "gather",
    "import_benchmarks",
    "inception_features",
    "inception_logits",
    "inception_score",
    "interleaved",
    "kernel_distance",
    "latency",
    "median_interval",
    "neighbours",
    "nll",
    "paired_ratio",
    "pareto_front",
    "read_run",
    "read_samples",
    "report",
    "run",
    "sample_grid",
    "sliced_wasserstein",
    "statistics",
    "undominated",
]
