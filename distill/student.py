"""Students on disk that are more than a network with a schedule: with a boundary, or with the scalings of EDM.

Importing this wing lets `fs.save_pretrained` and `fs.from_pretrained` know them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastsample.adapters.pretrained import FORMS, Form
from fastsample.adapters.scheduler_config import scheduler_config
from fastsample.denoiser import Denoiser
from fastsample.plan import Plan
from fastsample.prediction import prediction
from fastsample.schedule import Schedule

from .boundary import Bounded, Scaled, boundary_of, karras_prediction


def taken(model: Denoiser) -> tuple[Any, dict[str, Any]] | None:
    """The network below, and the numbers of its boundary and scalings; None where it has neither."""
    boundary, scaled = boundary_of(model), _scaled(model)
    if boundary is None and scaled is None:
        return None
    found: dict[str, Any] = {} if boundary is None else {"boundary": boundary.settings()}
    if scaled is None:
        return model.network, found
    return scaled.network, {**found, "sigma_data": scaled.sigma_data, "noise_scale": scaled.noise_scale}


def restored(network: Any, schedule: Schedule, predicts: str, time: str, settings: Mapping[str, Any]) -> Denoiser:
    """The model of `taken`."""
    if "sigma_data" in settings:
        data = float(settings["sigma_data"])
        network = Scaled(network, sigma_data=data, noise_scale=float(settings["noise_scale"])).eval()
        kind = karras_prediction(data)
        kind = kind if predicts == kind.name else prediction(predicts)
    else:
        kind = prediction(predicts)
    if "boundary" not in settings:
        return Denoiser(network, schedule, kind, time=time)
    return Bounded(network, schedule, kind, boundary=settings["boundary"], time=time)


def without_boundary(model: Denoiser, plan: Plan) -> Plan:
    """The plan that does for the network's x0 what this one does for f = skip x + out x0: p x + q f is of both."""
    boundary = boundary_of(model)
    if boundary is None:
        return plan
    rows = []
    for row in plan.rows:
        skip, out = boundary.factors(model.schedule, row.node)
        rows.append(replace(row, p=row.p + row.q * float(skip), q=row.q * float(out)))
    return replace(plan, rows=tuple(rows), remembers=f"{plan.remembers} within its boundary")


def scheduler(model: Denoiser, plan: Plan | None) -> dict[str, Any] | None:
    """A pipeline knows nothing of boundaries, so it has a plan that holds them, or none."""
    scaled = _scaled(model)
    if plan is None and boundary_of(model) is not None:
        return None
    if scaled is not None and (scaled.noise_scale != 1 or model.prediction.name in ("eps", "x0", "v", "flow")):
        return None
    folded = None if plan is None else without_boundary(model, plan)
    return scheduler_config(model, folded, sigma_data=None if scaled is None else scaled.sigma_data)


def _scaled(model: Denoiser) -> Scaled | None:
    return model.network if isinstance(model.network, Scaled) else None


FORMS["consistency"] = Form(taken, restored, scheduler)
