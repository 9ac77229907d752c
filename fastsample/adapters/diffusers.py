"""diffusers networks as denoisers. Reads configurations alone, so diffusers itself is not imported."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..grid import Spacing, leading, linspace, trailing
from ..schedule import VP, Flow, Schedule

PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}


def from_diffusers(network: Any, scheduler: Any) -> Denoiser:
    """A diffusers network and scheduler as a model.

    network: UNet2DModel, or another whose forward takes (x, timestep, **condition) and returns `.sample`.
    scheduler: any diffusers scheduler (or its `config`): betas, prediction type and spacing are read from it. Its
        `clip_sample` and `thresholding` are not: wrap the model in `fs.Thresholded` for those.

    The spacing is `model.spacing`: `fs.grid(model.schedule, steps, spacing=model.spacing, round_to_index=True)`. It is
    that of diffusers' DDIM; its multistep schedulers place "leading" and "linspace" a little lower, and theirs are
    `fs.at_times(scheduler.timesteps.tolist())`.

    Raises ValueError for a network or a configuration that this cannot read.
    """
    whole = getattr(network, "_orig_mod", network)  # torch.compile hides the signature
    names = list(inspect.signature(getattr(whole, "forward", whole)).parameters)
    if names[1:2] != ["timestep"] or "return_dict" not in names:
        raise ValueError(
            f"{type(network).__name__}.forward takes ({', '.join(names[:3])}, ...), but from_diffusers passes "
            f"(x, timestep, **condition); wrap it yourself: fs.Denoiser(lambda x, t, **c: ..., schedule, predicts=...)"
        )
    config = getattr(scheduler, "config", scheduler)
    if not isinstance(config, Mapping):
        raise TypeError(f"scheduler must be a diffusers scheduler or its config, got {type(scheduler).__name__}")
    config = dict(config)
    schedule = schedule_of(config)
    default = "flow_prediction" if isinstance(schedule, Flow) else "epsilon"
    predicts = config.get("prediction_type", default)
    if predicts not in PREDICTS:
        raise ValueError(f"prediction_type {predicts!r} of the scheduler is not one of {', '.join(PREDICTS)}")
    return Denoiser(
        Sampled(network),
        schedule,
        PREDICTS[predicts],
        time="log_sigma" if _continuous(config) else "index",
        spacing=spacing_of(config) if isinstance(schedule, VP) else None,
    )


class Sampled(torch.nn.Module):
    """A diffusers network as a plain one: returns the tensor instead of an output object."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network
        self.channels = getattr(network, "config", {}).get("in_channels")

    def forward(self, x: Tensor, t: Tensor, **condition: Any) -> Tensor:
        if self.channels is not None and x.shape[1:2] != (self.channels,):
            raise ValueError(f"the network takes x of shape [B, {self.channels}, ...], got {list(x.shape)}")
        for name, value in condition.items():
            if isinstance(value, Tensor) and value.dim() and len(value) not in (1, len(x)):
                raise ValueError(f"condition {name!r} has {len(value)} rows for a batch of {len(x)}; give one a sample")
        output: Tensor = self.network(x, t, return_dict=False, **condition)[0]
        return output


def _continuous(config: dict[str, Any]) -> bool:
    """EulerDiscreteScheduler tells these networks ln(sigma) / 4, as EDM does."""
    return config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"


def schedule_of(config: dict[str, Any]) -> Schedule:
    """The schedule of a diffusers scheduler's configuration, in float64 (diffusers makes it in float32)."""
    if "num_train_timesteps" not in config:
        raise ValueError(f"the scheduler's configuration lacks num_train_timesteps; it has {', '.join(sorted(config))}")
    if config.get("use_flow_sigmas"):
        return _flow(config, "flow_shift")
    if "beta_start" not in config:
        if "shift" not in config or config.get("use_dynamic_shifting"):
            raise ValueError("neither betas nor a fixed shift in the scheduler's configuration; make an fs.Denoiser")
        return _flow(config, "shift")
    steps, start, end = (config[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    name = config.get("beta_schedule", "linear")
    made = {
        "linear": lambda: VP.linear(start, end, steps),
        "scaled_linear": lambda: VP.scaled_linear(start, end, steps),
        "squaredcos_cap_v2": lambda: VP.cosine(steps),
        "sigmoid": lambda: VP.sigmoid(start, end, steps),
    }
    if config.get("trained_betas") is not None:
        schedule = VP(tuple(np.asarray(config["trained_betas"], dtype=float)))
    elif name in made:
        schedule = made[name]()
    else:
        raise ValueError(f"beta_schedule {name!r} of the scheduler is not one of {', '.join(made)}")
    return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule


def _flow(config: dict[str, Any], shift: str) -> Flow:
    if config["num_train_timesteps"] != 1000 or config.get("invert_sigmas"):
        raise ValueError(
            f"flow networks are told 1000 sigma, but num_train_timesteps is {config['num_train_timesteps']} and "
            f"invert_sigmas {config.get('invert_sigmas', False)} in the scheduler's configuration; make an fs.Denoiser "
            f"with a `time=` of your own"
        )
    return Flow(shift=float(config.get(shift, 1.0)))


def spacing_of(config: dict[str, Any]) -> Spacing:
    """The `timestep_spacing` of a diffusers scheduler's configuration."""
    name = config.get("timestep_spacing", "leading")
    made: dict[str, Spacing] = {
        "leading": _named(partial(leading, offset=config.get("steps_offset", 0)), "leading"),
        "trailing": trailing,
        "linspace": linspace,
    }
    if name not in made:
        raise ValueError(f"timestep_spacing {name!r} of the scheduler is not one of {', '.join(made)}")
    return made[name]


def _named(spacing: Any, name: str) -> Spacing:
    spacing.__name__ = name
    return spacing  # type: ignore[no-any-return]
