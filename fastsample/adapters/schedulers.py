"""diffusers schedulers' configurations as schedules and spacings. diffusers itself is not imported."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from ..schedule import VP, Flow, Schedule
from ..spacing import SPACINGS, Spacing, karras, leading, linspace, trailing
from ..spacing import exponential as exponential_spacing

Levels = np.ndarray[Any, np.dtype[np.float64]]

# Who places its timesteps alike; each scheduler of diffusers has a copy of its own.
DDIM = (
    *("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler"),
    *("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler"),
)
EULER = (
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler"),
    *("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"),
)
CLIPPED = ("DPMSolverMultistepScheduler", "SASolverScheduler", "DPMSolverSinglestepScheduler")
MULTISTEP = (*CLIPPED, "UniPCMultistepScheduler", "DEISMultistepScheduler")
CONSISTENCY = ("LCMScheduler", "TCDScheduler")
FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
CURVED = frozenset((*EULER, *MULTISTEP, *FLOW)) - {"EulerAncestralDiscreteScheduler"}  # have use_karras_sigmas, ...
KNOWN = frozenset((*DDIM, *EULER, *MULTISTEP, *CONSISTENCY, *FLOW))


def config_of(scheduler: Any) -> tuple[dict[str, Any], str]:
    """A scheduler's configuration and the name of its class; "" where a bare configuration does not say it.

    A `PlanScheduler` stands for the class that it replaced.
    """
    config = getattr(scheduler, "config", scheduler)
    if not isinstance(config, Mapping):
        raise TypeError(f"scheduler must be a diffusers scheduler or its config, got {type(scheduler).__name__}")
    if config.get("replaces"):
        return dict(config), str(config["replaces"])
    if scheduler is config:
        return dict(config), str(config.get("_class_name", ""))
    names = [kind.__name__ for kind in type(scheduler).__mro__]
    return dict(config), next((name for name in names if name in KNOWN), names[0])


def schedule_of(
    config: Mapping[str, Any], kind: str = "", *, image_seq_len: int | None = None, mu: float | None = None
) -> Schedule:
    """The schedule of a diffusers scheduler's configuration, in float64 (diffusers makes it in float32).

    kind: the scheduler's class, where known: diffusers keeps options of another class that a configuration came from.
    image_seq_len, mu: for `use_dynamic_shifting`, see `from_diffusers`.
    """
    if "num_train_timesteps" not in config:
        raise ValueError(f"the scheduler's configuration lacks num_train_timesteps; it has {', '.join(sorted(config))}")
    flow = _is_flow(config, kind)
    if not (flow and config.get("use_dynamic_shifting")) and (image_seq_len is not None or mu is not None):
        raise ValueError(
            "image_seq_len and mu are for a scheduler with use_dynamic_shifting, and this one has a fixed schedule; "
            "leave them out"
        )
    if flow:
        return _flow(config, image_seq_len, mu)
    if "beta_start" not in config:
        raise ValueError("neither betas nor a shift in the scheduler's configuration; make an fs.Denoiser")
    steps, start, end = (config[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
    name = config.get("beta_schedule", "linear")
    made: dict[str, Callable[[], VP]] = {
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
    if (shift := float(config.get("snr_shift_scale") or 1.0)) != 1:
        schedule = _shifted(schedule, shift)
    return schedule.zero_terminal_snr() if config.get("rescale_betas_zero_snr") else schedule


def _is_flow(config: Mapping[str, Any], kind: str) -> bool:
    if kind in FLOW or ("beta_start" not in config and "shift" in config):
        return True
    return bool(config.get("use_flow_sigmas")) and (kind in MULTISTEP or kind not in KNOWN)


def _shifted(schedule: VP, shift: float) -> VP:
    """The signal-to-noise ratio over `shift` at every time (CogVideoX). Yang et al. 2024, arXiv:2408.06072."""
    bar = np.cumprod(1 - np.asarray(schedule.betas))
    bar = np.concatenate([[1.0], bar / (shift + (1 - shift) * bar)])
    return VP(tuple(1 - bar[1:] / bar[:-1]))


def _flow(config: Mapping[str, Any], image_seq_len: int | None, mu: float | None) -> Flow:
    if config["num_train_timesteps"] != 1000 or config.get("invert_sigmas"):
        raise ValueError(
            f"flow networks are told 1000 sigma, but num_train_timesteps is {config['num_train_timesteps']} and "
            f"invert_sigmas {config.get('invert_sigmas', False)} in the scheduler's configuration; make an fs.Denoiser "
            f"with a `time=` of your own"
        )
    if not config.get("use_dynamic_shifting"):
        return Flow(shift=float(config.get("flow_shift" if config.get("use_flow_sigmas") else "shift", 1.0)))
    if (image_seq_len is None) == (mu is None):
        raise ValueError(
            "the scheduler shifts its schedule with the size of the image (use_dynamic_shifting); pass one of "
            "image_seq_len, the number of the network's tokens ((height // 16) * (width // 16) for FLUX and SD 3.5), "
            f"or mu, the shift's exponent itself; got image_seq_len={image_seq_len} and mu={mu}"
        )
    if image_seq_len is not None:
        mu = dynamic_mu(image_seq_len, config)
    kind = config.get("time_shift_type", "exponential")
    if kind not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type {kind!r} of the scheduler is not exponential or linear; make an fs.Denoiser")
    assert mu is not None
    return Flow(shift=math.exp(mu) if kind == "exponential" else float(mu))


def dynamic_mu(image_seq_len: int, config: Mapping[str, Any]) -> float:
    """The shift's exponent, a line in the number of tokens: base_shift at base_image_seq_len, max_shift at the maximum.

    Esser et al. 2024, arXiv:2403.03206, Sec. 5.3.2, as FLUX fits it; the defaults are those of diffusers' pipelines.
    """
    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    given = (default if config.get(name) is None else config[name] for name, default in defaults.items())
    base_tokens, max_tokens, base, most = given
    return float(base + (image_seq_len - base_tokens) * (most - base) / (max_tokens - base_tokens))


def spacing_of(config: Mapping[str, Any], kind: str = "DDIMScheduler", *, even: bool = False) -> Spacing | None:
    """The times of `scheduler.set_timesteps(steps)` for a scheduler of this class; None for one not known here.

    Of a `PlanScheduler`: its `spacing`, or that of the class it replaced.

    kind: the scheduler's class; "" is read as DDIM's, or as FlowMatchEuler's where there are no betas.
    even: a flow's times are 1, 1 - 1 / steps, ..., as FLUX's pipeline asks of its scheduler.

    They are diffusers' up to its rounding to whole indices (where it rounds times but not noise levels), its single
    step from t = 0 ("linspace"), and times it repeats for a solver's inner evaluations.
    """
    if config.get("spacing"):  # of a PlanScheduler
        return SPACINGS[config["spacing"]]
    flow = _is_flow(config, kind)
    if not kind and not config.get("use_flow_sigmas"):
        kind = "FlowMatchEulerDiscreteScheduler" if flow else "DDIMScheduler"
    curved = [name for name in CURVES if kind in CURVED and config.get(name)]
    if kind not in KNOWN or (flow and kind in MULTISTEP and curved):  # those bend the levels of their betas instead
        return None
    if flow:
        return _fixed(partial(_at_levels, _flow_levels(config, kind, even)), kind, curved)
    if config.get("interpolation_type") == "log_linear" and not curved:  # that tells times of other noise levels
        return None
    placed = _placed(config, kind)
    if not curved:
        return placed
    whole = kind not in EULER  # Euler's family bends what its timestep_spacing gave, the others the whole table
    ends = (config.get("sigma_max"), config.get("sigma_min"))
    return _fixed(partial(_curved, None if whole else placed, curved[0], ends), kind, curved)


def _placed(config: Mapping[str, Any], kind: str) -> Spacing:
    """The spacing without `use_..._sigmas`."""
    offset = int(config.get("steps_offset") or 0)
    if kind in CONSISTENCY:
        return _fixed(partial(_consistency, int(config["original_inference_steps"])), kind, [])
    # the singlestep solver has no such option; the others have a default, which differs
    name = "linspace" if kind == "DPMSolverSinglestepScheduler" else config.get("timestep_spacing", _default(kind))
    if name == "trailing" and kind not in CLIPPED:
        return trailing
    ours = {"leading": _named(partial(leading, offset=offset), "leading"), "linspace": linspace, "trailing": trailing}
    if name not in ours:
        raise ValueError(f"timestep_spacing {name!r} of the scheduler is not one of {', '.join(ours)}")
    if kind in DDIM or (kind in EULER and name == "leading"):
        return ours[name]
    if kind in EULER:
        return _fixed(_unrounded, kind, ["linspace"])
    clip = float(config.get("lambda_min_clipped", -math.inf)) if kind in CLIPPED else -math.inf
    return _fixed(partial(_multistep, name, offset, clip), kind, [name])


def _default(kind: str) -> str:
    return "leading" if kind in DDIM else "linspace"


def _unrounded(schedule: Schedule, steps: int) -> list[float]:
    """Evenly from T - 1 to 0, both evaluated."""
    top = schedule.t_max
    return [float(t) for t in np.linspace(0, top, max(steps, 2))[::-1][:steps]]  # one step starts at the noise


def _multistep(name: str, offset: int, clip: float, schedule: Schedule, steps: int) -> list[float]:
    """As for DDIM but for steps + 1 points, of which the last, 0, is not evaluated.

    clip: times with a smaller lam are left out.
    """
    size = int(schedule.t_max) + 1
    count = size - int((schedule.lam(torch.arange(size)) < clip).sum())
    if name == "linspace":
        points = np.linspace(0, count - 1, steps + 1).round()[:0:-1]
    elif name == "leading":
        points = np.arange(1, steps + 1)[::-1] * (count // (steps + 1)) + offset
    else:
        points = np.round(count - np.arange(steps) * (size / steps)) - 1
    return [float(t) for t in points]


def _consistency(original: int, schedule: Schedule, steps: int) -> list[float]:
    """A choice of the `original` times the student was trained at. Luo et al. 2023, arXiv:2310.04378."""
    if steps > original:
        raise ValueError(
            f"the scheduler has original_inference_steps = {original}, fewer than {steps} steps; take less"
        )
    gap = (int(schedule.t_max) + 1) // original
    return [float((original - int(k * original / steps)) * gap - 1) for k in range(steps)]


def _quantiles(first: float, last: float, count: int) -> Levels:
    """Quantiles of Beta(0.6, 0.6), of the noise level as in diffusers; those of the time are `fs.beta`."""
    from scipy.special import betaincinv

    shares: Levels = np.asarray(betaincinv(0.6, 0.6, np.linspace(1, 0, count)))
    return last + shares * (first - last)


CURVES: dict[str, Callable[[float, float, int], Levels]] = {
    "use_karras_sigmas": lambda first, last, count: np.linspace(first ** (1 / 7), last ** (1 / 7), count) ** 7,
    "use_exponential_sigmas": lambda first, last, count: np.geomspace(first, last, count),
    "use_lu_lambdas": lambda first, last, count: np.geomspace(first, last, count),
    "use_beta_sigmas": _quantiles,
}


def _curved(
    placed: Spacing | None, curve: str, ends: tuple[float | None, float | None], schedule: Schedule, steps: int
) -> list[float]:
    """`steps` levels sigma / alpha along a curve between those of the first and the last time."""
    times = placed(schedule, steps, schedule.t_max, None) if placed else [schedule.t_max, schedule.t_min]
    table = math.exp(-float(schedule.lam(schedule.t_min))), math.exp(-float(schedule.lam(schedule.t_max)))
    # where alpha is 0 at the end diffusers takes 2^-24 for its square
    first, last = (min(math.exp(-float(schedule.lam(t))), 4096.0) for t in (times[0], times[-1]))
    first, last = ends[0] or first, ends[1] or last
    for name, level in (("sigma_max", first), ("sigma_min", last)):
        if not table[0] * (1 - 1e-6) <= level <= table[1] * (1 + 1e-6):
            raise ValueError(
                f"{name} = {level:g} of the scheduler lies outside its betas' {table[0]:.4g} to {table[1]:.4g}; choose "
                f"a spacing yourself, such as fs.karras, or make an fs.Denoiser with fs.EDM"
            )
    if steps == 1:
        return [float(schedule.time(-math.log(first)))]
    if curve != "use_beta_sigmas":
        top, low = (float(schedule.time(-math.log(level))) for level in (first, last))
        spacing = karras if curve == "use_karras_sigmas" else exponential_spacing
        return [float(t) for t in spacing(schedule, steps - 1, top, low)]
    return [float(schedule.time(-math.log(level))) for level in CURVES[curve](first, last, steps)]


def _flow_levels(config: Mapping[str, Any], kind: str, even: bool) -> Callable[[Flow, int], Levels]:
    """The levels sigma of a flow scheduler for a number of steps, highest first."""
    terminal = config.get("shift_terminal")
    curve = next((CURVES[name] for name in CURVES if config.get(name)), None)

    def levels(schedule: Flow, steps: int) -> Levels:
        least = 1 / config["num_train_timesteps"]
        if even:
            t = 1 - np.arange(steps) / steps
        elif kind in FLOW:  # a fixed shift is made twice at the last time: there sigma_min is shifted already
            t = np.linspace(1, least if config.get("use_dynamic_shifting") else schedule.unit(least), steps)
        elif kind == "UniPCMultistepScheduler":
            t = np.linspace(1, least, steps + 1)[:-1]
        else:
            t = np.linspace(0, 1 - least, steps + 1)[:0:-1]
        sigma = np.array([schedule.unit(float(one)) for one in t])
        if terminal and steps > 1:
            sigma = 1 - (1 - sigma) * (1 - terminal) / (1 - sigma[-1])
        return curve(float(sigma[0]), float(sigma[-1]), steps) if curve and steps > 1 else sigma

    return levels


def _at_levels(levels: Callable[[Flow, int], Levels], schedule: Schedule, steps: int) -> list[float]:
    assert isinstance(schedule, Flow)
    sigma, shift = levels(schedule, steps), schedule.shift
    return [float(t) for t in sigma / (shift - (shift - 1) * sigma)]  # the inverse of the shift, exact at both ends


def _fixed(times: Callable[[Schedule, int], list[float]], kind: str, names: list[str]) -> Spacing:
    """Times that are given by the number of steps alone, as a spacing."""
    name = f"{names[0].removeprefix('use_').split('_')[0] if names else 'times'} of {kind}"

    def spaced(schedule: Schedule, steps: int, start: float, end: float | None) -> list[float]:
        if end is not None or start != schedule.t_max:
            raise ValueError(f"spacing {name!r} has fixed times; for another start or end use fs.uniform_t")
        return times(schedule, steps)

    return _named(spaced, name)


def _named(spacing: Any, name: str) -> Spacing:
    spacing.__name__ = name
    return spacing  # type: ignore[no-any-return]
