"""A denoiser's schedule, prediction and plan as a diffusers scheduler's configuration: the way back of `schedulers`.

`solvers.PlanScheduler.from_pretrained(folder)` reads it, plan and all. diffusers' own DDIMScheduler reads it too, as
DDIM on `fs.trailing`.
"""

from __future__ import annotations

import json
from typing import Any

from ..denoiser import TIMES, Denoiser
from ..plan import Plan
from ..schedule import EDM, VP, Flow
from .diffusers import PREDICTS, Sampled, _time

NAME = "scheduler_config.json"
DDIM = {  # under which diffusers' DDIM has the steps of `fs.trailing`, to the end at sigma = 0, and does not clip
    "timestep_spacing": "trailing",
    "steps_offset": 0,
    "set_alpha_to_one": True,
    "clip_sample": False,
    "thresholding": False,
    "rescale_betas_zero_snr": False,  # where it is so, the betas say it
}


def scheduler_config(
    model: Denoiser, plan: Plan | None = None, *, sigma_data: float | None = None
) -> dict[str, Any] | None:
    """The configuration, or None where no pipeline could ask this network: then there is no scheduler for it.

    sigma_data: of a network with the scalings of EDM, which the scheduler then applies.
    """
    found = _network(model, sigma_data)
    if found is None:
        return None
    return {
        "_class_name": "PlanScheduler",
        **found,
        "solver": None,
        "solver_options": {},
        "spacing": None,
        "lower_order_final": False,
        "final_sigmas_type": "zero",
        "unit_start": False,
        "plan": None if plan is None else json.loads(plan.to_json()),
    }


def _network(model: Denoiser, sigma_data: float | None) -> dict[str, Any] | None:
    schedule, steps = model.schedule, {"num_train_timesteps": 1000}
    if sigma_data is not None:
        if not isinstance(schedule, EDM):
            return None
        ends = {"sigma_min": schedule.sigma_min, "sigma_max": schedule.sigma_max, "sigma_data": sigma_data}
        return {"replaces": "EDMEulerScheduler", **steps, **ends, "prediction_type": "epsilon"}
    predicts = {ours: theirs for theirs, ours in PREDICTS.items()}.get(model.prediction.name)
    if predicts is None or not isinstance(model.network, Sampled):
        return None
    if model.time is not TIMES[_time(model.network.kind, model.network.config, {})]:
        return None  # diffusers' pipeline would tell it another time
    if isinstance(schedule, VP):
        steps = {"num_train_timesteps": len(schedule.betas)}
        return {"replaces": "DDIMScheduler", **steps, **_betas(schedule), **DDIM, "prediction_type": predicts}
    if isinstance(schedule, Flow) and predicts == "flow_prediction" and schedule.t_max == 1:
        return {"replaces": "FlowMatchEulerDiscreteScheduler", **steps, "shift": schedule.shift}
    return None


def _betas(schedule: VP) -> dict[str, Any]:
    """By name where it has one, which is short; else as they are."""
    first, last, count = schedule.betas[0], schedule.betas[-1], len(schedule.betas)
    ends = {"beta_start": first, "beta_end": last}
    for name, made in (("linear", VP.linear), ("scaled_linear", VP.scaled_linear)):
        if last < 1 and _close(made(first, last, count), schedule):
            return {**ends, "beta_schedule": name, "trained_betas": None}
    if schedule == VP.cosine(count):
        return {**ends, "beta_schedule": "squaredcos_cap_v2", "trained_betas": None}
    return {**ends, "beta_schedule": "linear", "trained_betas": list(schedule.betas)}


def _close(a: VP, b: VP) -> bool:
    return max(abs(one - other) for one, other in zip(a.betas, b.betas)) < 1e-15
