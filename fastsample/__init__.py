"""fastsample: fewer steps, cheaper steps, and proof of both, for any diffusion model."""

from .adapters.diffusers import from_diffusers
from .adapters.latents import decode, encode, guidance_embedding, latent_ids, pack_latents, unpack_latents
from .adapters.pretrained import from_pretrained, save_pretrained
from .denoiser import TIMES, Denoiser, Model
from .gaussian import Gaussian
from .graph import Compiled, compile
from .grid import Grid, Node, Nodes, exponential_step, grid, node, nodes, per_sample
from .guidance import Autoguided, Guided, ProjectedGuided, Thresholded, cfg_plus_plus
from .inpaint import Inpainted
from .noise import Noise, noise
from .plan import Plan, Row
from .prediction import Prediction, prediction
from .sampling import sample, solve
from .schedule import EDM, VP, Flow, Schedule, TrigFlow, VPContinuous
from .spacing import (
    SPACINGS,
    Spacing,
    at_times,
    ays_sd15,
    ays_sdxl,
    ays_svd,
    beta,
    default_t,
    exponential,
    karras,
    late,
    leading,
    linspace,
    power_t,
    quadratic_t,
    snr_table,
    trailing,
    uniform_lam,
    uniform_t,
)
from .tracing import trace
from .wrapper import Wrapper, rows

__version__ = "0.1.0"

__all__ = [
    "EDM",
    "SPACINGS",
    "TIMES",
    "VP",
    "Autoguided",
    "Compiled",
    "Denoiser",
    "Flow",
    "Gaussian",
    "Grid",
    "Guided",
    "Inpainted",
    "Model",
    "Node",
    "Nodes",
    "Noise",
    "Plan",
    "Prediction",
    "ProjectedGuided",
    "Row",
    "Schedule",
    "Spacing",
    "Thresholded",
    "TrigFlow",
    "VPContinuous",
    "Wrapper",
    "at_times",
    "ays_sd15",
    "ays_sdxl",
    "ays_svd",
    "beta",
    "cfg_plus_plus",
    "compile",
    "decode",
    "default_t",
    "encode",
    "exponential",
    "exponential_step",
    "from_diffusers",
    "from_pretrained",
    "grid",
    "guidance_embedding",
    "karras",
    "late",
    "latent_ids",
    "leading",
    "linspace",
    "node",
    "nodes",
    "noise",
    "pack_latents",
    "per_sample",
    "power_t",
    "prediction",
    "quadratic_t",
    "rows",
    "sample",
    "save_pretrained",
    "snr_table",
    "solve",
    "trace",
    "trailing",
    "uniform_lam",
    "uniform_t",
    "unpack_latents",
]
