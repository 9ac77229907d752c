"""The samplers that fastsample is measured beside, each run by its own code where a package index has it.

diffusers and k-diffusion come from PyPI. What is not there (the official DPM-Solver and UniPC code, iPNDM and DEIS of
the AMED-Solver toolbox) is in `peer_forms`. A peer runs a method of its code on a spacing of its code. The methods of
`peer_forms` on the spacings of others, and those that their authors show on one spacing alone (`RARE`) on the rest, are
"crossed": nobody runs them so, yet anyone could.

Every peer starts at x = sigma noise of index 999 and asks the same model. What counts as an evaluation is counted, at
the model.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import peer_forms as forms
import torch
from torch import Tensor

import fastsample as fs
from fastsample.zoo.problems import End, Problem

INSTALL = "pip install diffusers k-diffusion torchsde torchdiffeq tqdm"


class Counted:
    """A problem's model, in the frame y = x / alpha, counting its calls."""

    def __init__(self, problem: Problem):
        self.model, self.schedule, self.calls = problem.model, problem.schedule, 0

    def denoise(self, y: Tensor, level: float) -> Tensor:
        """x0 at the level sigma / alpha, in the dtype of y; computed in float64."""
        self.calls += 1
        alpha = 1 / math.sqrt(1 + level * level)
        node = fs.Node(math.nan, alpha, level * alpha)
        return self.model.predict(alpha * y.double(), node).to(y.dtype)

    def level(self, t: float) -> float:
        return math.exp(-float(self.schedule.lam(t)))


Run = Callable[[Counted, Tensor, int], Tensor | None]  # (model, y at the start, nfe) -> y at the end; None: cannot


@dataclass(frozen=True)
class Peer:
    """name: source/method/spacing. end: where it stops. run: as above; it may take fewer evaluations, never more."""

    name: str
    end: End
    run: Run
    crossed: bool = False


# Forms that their authors show on steps even in log-SNR alone; on their other spacings they are "crossed".
RARE = ("unipc/eps", "unipc/x0-bh1", "unipc/x0-bh2-4", "dpm-solver/eps")


def official(crossed: bool) -> Iterator[Peer]:
    """The multistep methods of `peer_forms`, which stop at sigma of index 0."""
    theirs = {"time_uniform": fs.uniform_t, "time_quadratic": fs.quadratic_t, "logSNR": fs.uniform_lam}
    toolbox = {"time_uniform": fs.uniform_t, "polynomial": fs.karras, "logsnr": fs.uniform_lam}
    every = {"time_uniform": fs.uniform_t, "time_quadratic": fs.quadratic_t, "logSNR": fs.uniform_lam,
             "polynomial": fs.karras}  # fmt: skip
    for name, own, method in _official_methods():
        shipped = theirs if own == "official" else toolbox
        names = {spacing.__name__ for spacing in shipped.values()}
        chosen = {k: s for k, s in every.items() if s.__name__ not in names} if crossed else shipped
        for spacing_name, spacing in chosen.items():
            rare = own == "official" and name.startswith(RARE)
            if rare and not crossed and spacing_name != "logSNR":
                continue
            yield Peer(f"{name}/{spacing_name}", "min", _on_grid(method, spacing), crossed)
        if crossed and own == "official" and name.startswith(RARE):
            for spacing_name in ("time_uniform", "time_quadratic"):
                yield Peer(f"{name}/{spacing_name}", "min", _on_grid(method, theirs[spacing_name]), True)


Method = Callable[[Counted, Tensor, list[float], list[float]], Tensor]


def _official_methods() -> Iterator[tuple[str, str, Method]]:
    def dpm(order: int, data: bool) -> Method:
        return lambda model, y, levels, times: forms.dpm_solver(model.denoise, y, levels, order=order, data=data)

    def uni(order: int, data: bool, form: int) -> Method:
        return lambda model, y, levels, times: forms.unipc(model.denoise, y, levels, order=order, data=data, form=form)

    def falling(order: int) -> Method:
        return lambda model, y, levels, times: forms.dpm_solver(model.denoise, y, levels, order=order, lower_final=True)

    def equal(order: int) -> Method:
        return lambda model, y, levels, times: forms.ipndm(model.denoise, y, levels, order=order)

    def variable(order: int) -> Method:
        return lambda model, y, levels, times: forms.ipndm_v(model.denoise, y, levels, order=order)

    def tab(order: int) -> Method:
        return lambda model, y, levels, times: forms.deis(
            model.denoise, y, levels, times, order=order, level_at=model.level
        )

    for order in (2, 3):
        yield f"dpm-solver/++multi{order}", "official", dpm(order, True)
        yield f"dpm-solver/eps-multi{order}", "official", dpm(order, False)
        yield f"unipc/x0-bh2-{order}", "official", uni(order, True, 2)
        yield f"unipc/x0-bh1-{order}", "official", uni(order, True, 1)
        yield f"unipc/eps-bh1-{order}", "official", uni(order, False, 1)
        yield f"diff-sampler/dpmpp{order}", "toolbox", falling(order)
        yield f"diff-sampler/unipc{order}", "toolbox", uni(order, True, 2)
        yield f"diff-sampler/deis_tab{order}", "toolbox", tab(order)
    yield "unipc/x0-bh2-4", "official", uni(4, True, 2)
    for order in (2, 3, 4):
        yield f"diff-sampler/ipndm{order}", "toolbox", equal(order)
        yield f"diff-sampler/ipndm_v{order}", "toolbox", variable(order)


def _on_grid(method: Method, spacing: fs.Spacing) -> Run:
    def run(model: Counted, y: Tensor, nfe: int) -> Tensor:
        nodes = fs.grid(model.schedule, nfe, spacing, end=model.schedule.t_min).nodes
        return method(model, y, [math.exp(-node.lam) for node in nodes], [node.t for node in nodes])

    return run


def diffusers() -> Iterator[Peer]:
    """diffusers' schedulers on their own spacings, in float32, as they compute.

    A network is asked at the whole index that the scheduler names; "exact-t" asks at the scheduler's own level instead.
    """
    spacings: dict[str, dict[str, Any]] = {
        "linspace": {"timestep_spacing": "linspace"},
        "leading": {"timestep_spacing": "leading", "steps_offset": 1},
        "trailing": {"timestep_spacing": "trailing"},
        "karras": {"use_karras_sigmas": True},
        "exp": {"use_exponential_sigmas": True},
        "beta": {"use_beta_sigmas": True},
    }
    lu = {"lu": {"use_lu_lambdas": True}}
    at_min = {"final_sigmas_type": "sigma_min"}
    for order in (2, 3):
        dpm = {"solver_order": order}
        for name, options in {**spacings, **lu}.items():
            label = f"diffusers/DPMMulti{order}/{name}"
            yield _vp(label, "DPMSolverMultistepScheduler", "zero", {**dpm, **options})
            if name not in ("linspace", "leading", "trailing"):
                yield _vp(f"{label}/exact-t", "DPMSolverMultistepScheduler", "zero", {**dpm, **options}, exact=True)
            yield _vp(f"{label}/end-sigma_min", "DPMSolverMultistepScheduler", "min", {**dpm, **options, **at_min})
        yield _vp(f"diffusers/DPMMulti{order}/ays", "DPMSolverMultistepScheduler", "zero", dpm, ays=True)
        yield _vp(f"diffusers/DPMSingle{order}/linspace", "DPMSolverSinglestepScheduler", "zero", dpm)
        yield _vp(f"diffusers/DEIS{order}/linspace", "DEISMultistepScheduler", "min", dpm)
        yield _vp(f"diffusers/DEIS{order}/karras", "DEISMultistepScheduler", "min", {**dpm, **spacings["karras"]})
        for name, options in spacings.items():
            label = f"diffusers/UniPC{order}/{name}"
            yield _vp(label, "UniPCMultistepScheduler", "zero", {**dpm, **options})
            yield _vp(f"{label}/end-sigma_min", "UniPCMultistepScheduler", "min", {**dpm, **options, **at_min})
        for name in ("karras", "exponential"):
            yield _edm(f"diffusers/EDMMulti{order}/{name}", {"solver_order": order, "sigma_schedule": name})
    yield _vp(
        "diffusers/DPMMulti2/karras/euler_at_final",
        "DPMSolverMultistepScheduler",
        "zero",
        {**spacings["karras"], "euler_at_final": True},
    )
    for name in ("linspace", "leading", "trailing"):
        options = spacings[name]
        yield _vp(f"diffusers/DDIM/{name}", "DDIMScheduler", "zero", {**options, "clip_sample": False})
        yield _vp(f"diffusers/PNDM/{name}", "PNDMScheduler", "zero", {**options, **_PLMS}, extra=1)
        yield _scaled(f"diffusers/LMS/{name}", "LMSDiscreteScheduler", options)
        yield _scaled(f"diffusers/Euler/{name}", "EulerDiscreteScheduler", options)
        yield _scaled(f"diffusers/Heun/{name}", "HeunDiscreteScheduler", options)
    yield _scaled("diffusers/LMS/karras", "LMSDiscreteScheduler", spacings["karras"])
    yield _scaled("diffusers/Heun/karras", "HeunDiscreteScheduler", spacings["karras"])


_PLMS = {"skip_prk_steps": True, "set_alpha_to_one": True}
_BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
# the ten-step table for Stable Diffusion 1.5 of Sabour et al. 2024, arXiv:2404.14507, as diffusers has it, at its ends
AYS_INDICES = (999, 850, 736, 645, 545, 455, 343, 233, 124, 24, 0)


def _scheduler(name: str, options: dict[str, Any]) -> Any:
    try:
        package = importlib.import_module("diffusers")
    except ImportError as error:
        raise ImportError(f"the study runs diffusers beside us: {INSTALL}") from error
    return getattr(package, name)(**_BETAS, **options)


def _vp(
    label: str,
    name: str,
    end: End,
    options: dict[str, Any],
    *,
    exact: bool = False,
    ays: bool = False,
    extra: int = 0,
) -> Peer:
    """A scheduler whose state is x = alpha x0 + sigma eps; extra: evaluations it takes beyond the steps asked for."""

    def run(model: Counted, y: Tensor, nfe: int) -> Tensor | None:
        scheduler = _scheduler(name, options)
        if ays:
            table = np.interp(np.linspace(0, 10, nfe + 1), range(11), np.log([model.level(i) for i in AYS_INDICES]))
            times = [round(float(model.schedule.time(-value))) for value in table][:-1]
            scheduler.set_timesteps(timesteps=[int(t) for t in times])
        else:
            scheduler.set_timesteps(nfe - extra)
        x = (y / math.sqrt(1 + model.level(999.0) ** 2)).float()
        for k, t in enumerate(scheduler.timesteps):
            level = float(scheduler.sigmas[k]) if exact else model.level(float(t))
            state = x * math.sqrt(1 + level**2)
            x = scheduler.step((state - model.denoise(state, level)) / level, t, x).prev_sample
        return x * math.sqrt(1 + model.level(0.0) ** 2) if end == "min" else x

    return Peer(label, end, run)


def _scaled(label: str, name: str, options: dict[str, Any]) -> Peer:
    """A scheduler whose state is x / alpha."""

    def run(model: Counted, y: Tensor, nfe: int) -> Tensor | None:
        scheduler = _scheduler(name, options)
        for steps in (nfe, (nfe + 1) // 2):  # Heun takes 2 N - 1 evaluations
            scheduler.set_timesteps(steps)
            if len(scheduler.timesteps) <= nfe:
                break
        if len(scheduler.timesteps) != nfe:
            return None
        x = y.float() * (float(scheduler.sigmas[0]) / model.level(999.0))
        for k, t in enumerate(scheduler.timesteps):
            scheduler.scale_model_input(x, t)
            level = float(scheduler.sigmas[k])
            x = scheduler.step((x - model.denoise(x, level)) / level, t, x).prev_sample
        return x

    return Peer(label, "zero", run)


def _edm(label: str, options: dict[str, Any]) -> Peer:
    def run(model: Counted, y: Tensor, nfe: int) -> Tensor | None:
        package = importlib.import_module("diffusers")
        first, last = model.level(999.0), model.level(0.0)
        scheduler = package.EDMDPMSolverMultistepScheduler(sigma_min=last, sigma_max=first, sigma_data=0.5, **options)
        scheduler.set_timesteps(nfe)
        x, data = y.float(), 0.5
        for k, t in enumerate(scheduler.timesteps):
            level = float(scheduler.sigmas[k])
            total = level**2 + data**2
            output = (model.denoise(x, level) - data**2 / total * x) * (math.sqrt(total) / (level * data))
            x = scheduler.step(output, t, x).prev_sample
        return x

    return Peer(label, "zero", run)


def k_diffusion() -> Iterator[Peer]:
    """k-diffusion's samplers; those of two evaluations a step take the most steps that the budget allows."""
    methods = {
        "euler": "sample_euler",
        "heun": "sample_heun",
        "dpm_2": "sample_dpm_2",
        "lms": "sample_lms",
        "dpmpp_2m": "sample_dpmpp_2m",
        "dpmpp_2s": "sample_dpmpp_2s_ancestral",
    }
    for name, function in methods.items():
        for spacing in ("karras", "exponential", "discrete"):
            yield Peer(f"k-diffusion/{name}/{spacing}", "zero", _k(function, spacing))
    yield Peer("k-diffusion/dpm_fast/exp", "min", _dpm_fast)


def _k(function: str, spacing: str) -> Run:
    def run(model: Counted, y: Tensor, nfe: int) -> Tensor | None:
        sampling = k_sampling()
        twice = function in ("sample_heun", "sample_dpm_2", "sample_dpmpp_2s_ancestral")
        steps = (nfe + 1) // 2 if twice else nfe  # two evaluations a step, but one to sigma = 0
        if twice and 2 * steps - 1 != nfe:
            return None
        first, last = model.level(999.0), model.level(0.0)
        if spacing == "discrete":
            levels = [model.level(float(t)) for t in np.linspace(999, 0, steps)]
            sigmas = torch.tensor([*levels, 0.0], dtype=torch.float64)
        else:
            sigmas = getattr(sampling, f"get_sigmas_{spacing}")(steps, last, first)
        options = {"eta": 0.0} if "ancestral" in function else {}

        def denoise(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
            return model.denoise(x, float(sigma.flatten()[0]))

        found: Tensor = getattr(sampling, function)(denoise, y, sigmas.to(y), disable=True, **options)
        return found

    return run


def _dpm_fast(model: Counted, y: Tensor, nfe: int) -> Tensor:
    def denoise(x: Tensor, sigma: Tensor, **_: Any) -> Tensor:
        return model.denoise(x, float(sigma.flatten()[0]))

    ends = model.level(0.0), model.level(999.0)
    found: Tensor = k_sampling().sample_dpm_fast(denoise, y, *ends, nfe, disable=True)
    return found


def k_sampling() -> Any:
    """k_diffusion.sampling without the package's face, which loads packages for images and training."""
    if "k_diffusion.sampling" in sys.modules:
        return sys.modules["k_diffusion.sampling"]
    spec = importlib.util.find_spec("k_diffusion")
    if spec is None:
        raise ImportError(f"the study runs k-diffusion beside us: {INSTALL}")
    package = types.ModuleType("k_diffusion")
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or [])
    sys.modules["k_diffusion"] = package
    missing = [name for name in _UNUSED if importlib.util.find_spec(name.partition(".")[0]) is None]
    for name in missing:
        sys.modules[name] = types.ModuleType(name)
    try:
        if "torchvision.transforms" in missing:
            sys.modules["torchvision"].transforms = sys.modules["torchvision.transforms"]  # type: ignore[attr-defined]
            sys.modules["torchvision.transforms"].functional = None  # type: ignore[attr-defined]
        return importlib.import_module("k_diffusion.sampling")
    finally:
        for name in missing:
            del sys.modules[name]


_UNUSED = ("torchvision", "torchvision.transforms")


def peers(crossed: bool = True) -> list[Peer]:
    """All of them; crossed: with the official methods on spacings of the others."""
    found = [*official(False), *diffusers(), *k_diffusion()]
    return found + list(official(True)) if crossed else found
