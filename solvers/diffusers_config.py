"""What the configuration of a diffusers scheduler tells `PlanScheduler`: schedule, grid, how its network is asked.

Most of it is `fastsample.adapters.schedulers`; here is what only a pipeline has: times handed in by the caller,
networks whose input is scaled (EDM, Stable Video Diffusion), and bounds of x0.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import diffusers
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fastsample.adapters.diffusers import PREDICTS
from fastsample.adapters.schedulers import CURVES, KNOWN, schedule_of, spacing_of
from fastsample.grid import Grid, Node, grid
from fastsample.guidance import Thresholded
from fastsample.prediction import PREDICTIONS, Prediction
from fastsample.schedule import EDM, Flow, Schedule
from fastsample.spacing import SPACINGS, Spacing, at_times, exponential, karras

Config = Mapping[str, Any]
Floats = NDArray[np.float64]

EDMS = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
REPLACED = sorted({*KNOWN, *EDMS})


def parameters(scheduler: Any) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(scheduler.__init__).parameters.items() if name != "self"}


def whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with every value it stands for: a file of an older diffusers leaves out what it did not know."""
    name = config.get("_class_name") or config.get("replaces") or _kind(config)
    scheduler = getattr(diffusers, name, None)
    unset = {} if scheduler is None else parameters(scheduler)
    defaults = {key: value for key, value in unset.items() if value is not inspect.Parameter.empty}
    kind = {} if name in ("", "PlanScheduler") else {"replaces": name}
    return {**defaults, **{key: value for key, value in config.items() if key != "_use_default_values"}, **kind}


def _kind(config: Mapping[str, Any]) -> str:
    """Whose configuration this is, by its keys: those of a scheduler that was never saved do not name its class."""
    keys = {key for key in config if not key.startswith("_")}
    fits = [name for name in REPLACED if set(parameters(getattr(diffusers, name, object))) == keys]
    return min(fits, key=len, default="")


def schedule_for(config: Config, kind: str, mu: float | None = None) -> Schedule:
    """The schedule of a configuration of the class `kind`; mu: of a flow with `use_dynamic_shifting`, else not read.

    Raises ValueError for a configuration that cannot be read, or without the mu that it needs.
    """
    if not _is_edm(config, kind):
        dynamic = bool(config.get("use_dynamic_shifting"))
        if dynamic and mu is None:
            raise ValueError("this flow has use_dynamic_shifting: set_timesteps needs mu, the exponent of its shift")
        return schedule_of(config, kind, mu=None if mu is None else float(mu)) if dynamic else schedule_of(config, kind)
    low, high = config.get("sigma_min"), config.get("sigma_max")
    if not low or not high:
        raise ValueError(
            f"the scheduler's configuration has sigma_min = {low} and sigma_max = {high}; a network that is told "
            f"ln(sigma) / 4 needs both"
        )
    return EDM(float(low), float(high))


def prediction_for(config: Config, schedule: Schedule) -> Prediction:
    """What the network predicts. Raises ValueError for a `prediction_type` that is not known."""
    name = config.get("prediction_type", "flow_prediction" if isinstance(schedule, Flow) else "epsilon")
    if name not in PREDICTS:
        raise ValueError(f"prediction_type {name!r} of the scheduler is not one of {', '.join(PREDICTS)}")
    return PREDICTIONS[PREDICTS[name]]


def spacing_for(schedule: Schedule, config: Config, kind: str) -> Spacing:
    """Where the scheduler of this configuration evaluates."""
    if isinstance(schedule, EDM):
        if config.get("sigma_schedule") == "karras" or config.get("use_karras_sigmas"):
            spaced: Any = partial(karras, rho=float(config.get("rho", 7.0)))
            spaced.__name__ = "karras"
            return spaced  # type: ignore[no-any-return]
        if config.get("sigma_schedule") == "exponential" or config.get("use_exponential_sigmas"):
            return exponential
    spacing = spacing_of(config, kind)
    if spacing is None or isinstance(schedule, EDM):
        raise ValueError(f"the times of this configuration of {kind} are not known; pass spacing= of your own")
    return spacing


def spacing_given(schedule: Schedule, config: Config, timesteps: Floats | None, sigmas: Floats | None) -> Spacing:
    """Through times as the network is told them, or through levels; of a flow, sigma before the shift."""
    if isinstance(schedule, Flow):
        levels = _bent(schedule, sigmas, config) if sigmas is not None else np.asarray(timesteps) / 1000
        shift = schedule.shift
        return at_times((levels / (shift - (shift - 1) * levels)).tolist())
    if timesteps is not None:
        return at_times((np.exp(4 * timesteps) if isinstance(schedule, EDM) else timesteps).tolist())
    assert sigmas is not None
    times = [float(schedule.time(-math.log(level))) for level in sigmas]
    return at_times([min(t, schedule.t_max) if t < 1.001 * schedule.t_max else t for t in times])  # 14.615 is rounded


def _bent(schedule: Flow, t: Floats, config: Config) -> Floats:
    levels = np.array([schedule.unit(float(value)) for value in t])
    if len(levels) < 2:
        return levels
    if terminal := config.get("shift_terminal"):
        levels = 1 - (1 - levels) * (1 - terminal) / (1 - levels[-1])
    curve = next((CURVES[name] for name in CURVES if config.get(name)), None)
    return curve(float(levels[0]), float(levels[-1]), len(levels)) if curve else levels


FIXED = ("leading", "trailing", "linspace")  # spacings that know no other end


@dataclass(frozen=True)
class Asked:
    """What a pipeline asks of `set_timesteps`: a number of steps, or as many times, or levels above 0."""

    steps: int
    times: Floats | None = None
    levels: Floats | None = None

    @classmethod
    def of(cls, steps: int | None, timesteps: Any = None, sigmas: Any = None) -> Asked:
        """timesteps and sigmas as sequences or tensors. Raises ValueError where they do not go together."""
        times, levels = _numbers(timesteps), _numbers(sigmas)
        levels = None if levels is None else levels[levels > 0]
        if times is not None and levels is not None:
            raise ValueError("timesteps and sigmas say the same thing twice; pass one of them")
        given = times if times is not None else levels
        if given is None:
            if steps is None or steps < 1:
                raise ValueError(
                    f"set_timesteps needs num_inference_steps of at least 1, timesteps or sigmas, got {steps}"
                )
            return cls(int(steps))
        if len(given) < 1 or (steps is not None and steps != len(given)):
            raise ValueError(f"num_inference_steps is {steps}, but {len(given)} times were given; pass one of them")
        return cls(len(given), times, levels)

    def without_times(self, own: str, schedule: Schedule) -> Asked:
        """The same of a scheduler that has times of its own. Raises ValueError where the user gave others."""
        even = self.levels is not None and np.allclose(
            self.levels, np.linspace(1, 1 / self.steps, self.steps), atol=1e-6
        )
        if isinstance(schedule, Flow) and even:  # pipelines of flows say so where the user said nothing
            return Asked(self.steps)
        if self.times is not None or self.levels is not None:
            raise ValueError(
                f"this scheduler was made with {own} and is given {'sigmas' if self.times is None else 'timesteps'} "
                f"too; choose one of them"
            )
        return self


def _numbers(values: Any) -> Any:
    if values is None:
        return None
    return np.asarray(values.tolist() if isinstance(values, Tensor) else values, dtype=float)


def grid_for(schedule: Schedule, config: Config, asked: Asked) -> Grid:
    """The intervals of a run, as asked or as the configuration of a `PlanScheduler` says."""
    end = schedule.t_min if config["final_sigmas_type"] == "sigma_min" else None
    if asked.times is not None or asked.levels is not None:
        spacing = spacing_given(schedule, config, asked.times, asked.levels)
    elif config["spacing"] is not None:
        spacing = SPACINGS[config["spacing"]]
    else:
        spacing = spacing_for(schedule, config, config["replaces"])
    name = spacing.__name__
    if end is not None and (config["spacing"] is None or config["spacing"] in FIXED):
        points = [*spacing(schedule, asked.steps, schedule.t_max, None), end]
        if not points[-2] > end:
            raise ValueError(
                f"final_sigmas_type 'sigma_min' ends at t = {end:g}, and the last evaluation of {name} already "
                f"stands at {points[-2]:g}; use 'zero' or another spacing"
            )
        spacing = at_times(points)
    made = grid(schedule, asked.steps, spacing, end=end, lower_order_final=config["lower_order_final"])
    return replace(made, spacing=made.spacing.replace("at_times", name))


def _is_edm(config: Config, kind: str) -> bool:
    """Of EDM, or EulerDiscreteScheduler with continuous times (Stable Video Diffusion): told ln(sigma) / 4."""
    svd = config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
    return kind in EDMS or svd


class Network:
    """How the network of a configuration is asked, and what its answer says of x0."""

    def __init__(self, schedule: Schedule, config: Config):
        self.schedule, self.prediction = schedule, prediction_for(config, schedule)
        self.scales = isinstance(schedule, EDM)  # the others see the state as it is
        self.data = float(config.get("sigma_data", 1.0))
        self.bounds = _bounds(schedule, config)

    def told(self, at: Node) -> float:
        return math.log(at.sigma) / 4 if self.scales else float(self.schedule.index(at.t))

    def level(self, at: Node) -> float:
        """sigma of a flow, sigma / alpha of the rest: what `sigmas` of diffusers' schedulers hold."""
        return at.sigma if isinstance(self.schedule, Flow) else (at.sigma / at.alpha if at.alpha > 0 else math.inf)

    def scale(self, at: Node) -> float:
        return 1 / math.hypot(at.sigma, self.data) if self.scales else 1.0  # c_in of Karras et al. 2022, Table 1

    def x0(self, x: Tensor, output: Tensor, at: Node) -> Tensor:
        if output.shape != x.shape:
            if output.shape != (x.shape[0], 2 * x.shape[1], *x.shape[2:]):
                raise ValueError(
                    f"the network returned shape {list(output.shape)} for a sample of {list(x.shape)}; expected the "
                    f"same, or twice the channels where it predicts a variance"
                )
            output = output[:, : x.shape[1]]
        u, w = self._pair(at)
        x0 = (x * u).add_(output.to(x.dtype), alpha=w)
        return x0 if self.bounds is None else self.bounds.predict(x0, at)

    def _pair(self, at: Node) -> tuple[float, float]:
        if not self.scales:
            u, w = self.prediction.x0(at.alpha, at.sigma)
            return float(u), float(w)
        total = at.sigma**2 + self.data**2
        out = at.sigma * self.data / math.sqrt(total)  # c_skip and c_out of Karras et al. 2022, Table 1
        return self.data**2 / total, -out if self.prediction.name == "v" else out


@dataclass(frozen=True)
class _Itself:
    """The model below `Thresholded` here: x0 is what it is given."""

    schedule: Schedule

    def predict(self, x: Tensor, node: Any, **condition: Any) -> Tensor:
        return x


def _bounds(schedule: Schedule, config: Config) -> Thresholded | None:
    itself = _Itself(schedule)
    if config.get("thresholding"):
        # diffusers bounds the quantile itself by sample_max_value: the same as clipping there first
        clipped = Thresholded(itself, limit=max(1.0, float(config.get("sample_max_value", 1.0))))
        return Thresholded(clipped, dynamic=float(config.get("dynamic_thresholding_ratio", 0.995)))
    if config.get("clip_sample"):
        return Thresholded(itself, limit=float(config.get("clip_sample_range", 1.0)))
    return None
