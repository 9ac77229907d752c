"""fastsample: fewer steps, cheaper steps, and proof of both, for any diffusion model."""

from .adapters.diffusers import from_diffusers
from .adapters.pretrained import from_pretrained, save_pretrained
from .denoiser import TIMES, Denoiser, Model
from .gaussian import Gaussian
from .grid import (
    SPACINGS,
    Grid,
    Node,
    Nodes,
    Spacing,
    at_times,
    ays_sd15,
    ays_sdxl,
    ays_svd,
    beta,
    exponential,
    exponential_step,
    grid,
    karras,
    leading,
    linspace,
    node,
    nodes,
    per_sample,
    power_t,
    quadratic_t,
    snr_table,
    trailing,
    uniform_lam,
    uniform_t,
)
from .guidance import Guided, Thresholded
from .noise import Noise, noise
from .plan import Plan, Row
from .prediction import Prediction, prediction
from .sampling import sample, solve
from .schedule import EDM, VP, Flow, Schedule, VPContinuous
from .tracing import trace

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "SPACINGS",
    "TIMES",
    "VP",
    "Denoiser",
    "Flow",
    "Gaussian",
    "Grid",
    "Guided",
    "Model",
    "Node",
    "Nodes",
    "Noise",
    "Plan",
    "Prediction",
    "Row",
    "Schedule",
    "Spacing",
    "Thresholded",
    "VPContinuous",
    "at_times",
    "ays_sd15",
    "ays_sdxl",
    "ays_svd",
    "beta",
    "exponential",
    "exponential_step",
    "from_diffusers",
    "from_pretrained",
    "grid",
    "karras",
    "leading",
    "linspace",
    "node",
    "nodes",
    "noise",
    "per_sample",
    "power_t",
    "prediction",
    "quadratic_t",
    "sample",
    "save_pretrained",
    "snr_table",
    "solve",
    "trace",
    "trailing",
    "uniform_lam",
    "uniform_t",
]
