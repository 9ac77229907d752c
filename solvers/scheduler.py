"""PlanScheduler: every solver of this package, by its name, inside a diffusers pipeline.

    from fastsample.solvers import PlanScheduler
    pipe.scheduler = PlanScheduler.from_config(pipe.scheduler.config, solver="dpmpp_2m")

A step of the pipeline is a row of the plan. From the same noise, a pipeline ends where `fs.sample` does with
`fs.from_diffusers(pipe.unet, pipe.scheduler)`, guided alike, and `pipe.scheduler.plan`. The state is
alpha x0 + sigma eps with alpha^2 + sigma^2 = 1 for tables of betas, (1 - sigma) x0 + sigma eps for flows, and
x0 + sigma eps for EDM and Stable Video Diffusion.

`DiffusionPipeline.from_pretrained` finds the class of a saved pipeline again if `PlanScheduler` was imported before;
else, and on the Hub, pass `scheduler=PlanScheduler.from_pretrained(folder, subfolder="scheduler")`. DDIMPipeline makes
a DDIMScheduler of whatever it is built or loaded with: set `pipe.scheduler` afterwards.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastsample.grid import Grid, node, per_sample
from fastsample.plan import Plan
from fastsample.sampling import check_schedule
from fastsample.schedule import EDM, VP, Flow, Schedule
from fastsample.spacing import SPACINGS

from . import get
from .diffusers_config import REPLACED, Asked, Network, grid_for, parameters, prediction_for, schedule_for, whole
from .diffusers_run import Course, Run, check, course, exact, plain

DEFAULT = "dpmpp_2m"


@dataclass
class PlanSchedulerOutput(BaseOutput):
    """The next state, and x0 as it was predicted, and bounded, at this evaluation. Do not write into x0."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc, unused-ignore]
    """A plan as a diffusers scheduler; make it with `from_config(pipe.scheduler.config, solver=...)`.

    solver: a name in `fastsample.solvers.SOLVERS`; dpmpp_2m if neither it nor a plan is given. solver_options: its
        keywords, such as {"eta": 0.5}.
    spacing: a name in `fs.SPACINGS`; None: the times of the scheduler whose configuration this is (timestep_spacing,
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, the sigmas of a flow).
    lower_order_final: see `fs.grid`. A configuration that has it hands it on; the rule of diffusers' DPM-Solver to do
        so below 15 steps only is left out.
    final_sigmas_type: "zero", where the last step returns x0, or "sigma_min": end at the least noise trained at.
        `set_alpha_to_one` of DDIM and PNDM is not read: False there is "sigma_min" here.
    unit_start: False begins at sigma noise, as `fs.sample` does; True at noise of variance alpha^2 + sigma^2, which is
        1 for tables of betas, as most of diffusers' schedulers do. `init_noise_sigma` says which. DDPMPipeline and
        DiTPipeline do not ask, and begin at 1.
    plan: a ready plan in place of all these: an fs.Plan, a file, or the content of one. It becomes part of the
        configuration, and is saved with it. `num_inference_steps` must be its number of evaluations.
    replaces: the class of the scheduler whose configuration this is. `from_config` reads it there, or knows it by the
        keys; where neither tells, a configuration is read as DDIM's, or as FlowMatchEuler's.

    The rest of the configuration says what the network is: its betas or flow, `prediction_type`, and `clip_sample` or
    `thresholding`, which bound x0 as `fs.Thresholded` does (as with `use_clipped_model_output` of diffusers' DDIM).
    What it says of its solver (solver_order, algorithm_type, euler_at_final, variance_type, stochastic_sampling, ...)
    gives way to `solver` and is not read.

    After `set_timesteps`: `timesteps` has one entry for each evaluation, `plan` is what will be computed, `grid` its
    intervals, and `order` the evaluations of one interval.
    """

    _compatibles = REPLACED

    def __init__(
        self,
        solver: str | None = None,
        *,
        solver_options: Mapping[str, Any] | None = None,
        spacing: str | None = None,
        lower_order_final: bool = False,
        final_sigmas_type: str = "zero",
        unit_start: bool = False,
        plan: Plan | str | Path | Mapping[str, Any] | None = None,
        replaces: str = "",
        **kwargs: Any,
    ):
        options = dict(solver_options or {})
        self._ready = None if plan is None else _load(plan)
        if self._ready is None:
            solver = solver or DEFAULT
            _check_options(solver, options)
        elif solver is not None or options or spacing is not None:
            raise ValueError(
                f"a ready plan says all by itself, but solver = {solver}, solver_options = {options} and spacing = "
                f"{spacing} were given with it; give either the plan or these"
            )
        if spacing is not None and spacing not in SPACINGS:
            raise ValueError(f"spacing {spacing!r} is not one of {', '.join(SPACINGS)}; for another give a ready plan")
        if final_sigmas_type not in ("zero", "sigma_min"):
            raise ValueError(f"final_sigmas_type must be 'zero' or 'sigma_min', got {final_sigmas_type!r}")
        if replaces and replaces not in REPLACED:
            raise ValueError(
                f"PlanScheduler does not know the networks of {replaces}; if they are those of another, say so: "
                f"replaces='DDIMScheduler' (it knows {', '.join(REPLACED)})"
            )
        self._configure(
            **{key: value for key, value in kwargs.items() if not key.startswith("_")},
            solver=solver,
            solver_options=options,
            spacing=spacing,
            lower_order_final=bool(lower_order_final),
            final_sigmas_type=final_sigmas_type,
            unit_start=unit_start,
            plan=None if self._ready is None else json.loads(self._ready.to_json()),
            replaces=replaces,
        )
        self.num_inference_steps: int | None = None
        self.order = 1
        self._base: Schedule | None = None
        self._course: Course | None = None
        self.plan: Plan | None = None
        self.grid: Grid | None = None
        self.timesteps = self.sigmas = torch.empty(0)
        self._told: list[float] = []
        self._begin_index: int | None = None
        self._run: Run | None = None

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A PlanScheduler for the network of this configuration, which may be of any usual scheduler.

        kwargs: the arguments of the class, or keys of the configuration to change.
        Raises ValueError for a configuration that cannot be read, TypeError for a keyword that means nothing.
        """
        if not isinstance(config, Mapping):
            raise TypeError(
                f"from_config takes the config of a scheduler, got {type(config).__name__}; for a folder or the name "
                f"of a model use PlanScheduler.from_pretrained(folder, subfolder='scheduler')"
            )
        own = set(parameters(cls)) - {"kwargs"}
        known = own.union(config, *(parameters(other) for other in cls._get_compatibles()))
        if unknown := sorted(kwargs.keys() - known):
            raise TypeError(
                f"from_config got {unknown[0]!r}, which is neither one of {', '.join(sorted(own))} nor a key of a "
                f"scheduler's configuration"
            )
        dropped = {"solver": ("solver_options", "plan"), "plan": ("solver", "solver_options", "spacing")}
        stale = {key for name, keys in dropped.items() if kwargs.get(name) is not None for key in keys}
        config = {key: value for key, value in whole(config).items() if key not in stale}
        config |= {key: value for key, value in kwargs.items() if key not in own}
        given = {key: value for key, value in kwargs.items() if key in own}
        inherited: Any = super().from_config  # diffusers leaves it untyped
        made, unused = inherited(config, return_unused_kwargs=True, **given)
        prediction_for(made.config, made._schedule())  # what cannot be read is said now
        return (made, unused) if return_unused_kwargs else made

    def _configure(self, **values: Any) -> None:
        register: Any = self.register_to_config
        register(**values)

    def __len__(self) -> int:
        return int(self.config["num_train_timesteps"])

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the noise that a pipeline begins at; see `unit_start`."""
        if self.plan is not None:
            first = self.plan.start if self.plan.warm is None else self.plan.warm.start
        else:
            schedule = self._schedule()
            first = node(schedule, schedule.t_max)
        return math.hypot(first.alpha, first.sigma) if self.config["unit_start"] else first.sigma

    @property
    def step_index(self) -> int | None:
        """The number of the next evaluation; None before the first and after the last of a run."""
        return None if self._run is None else self._run.step

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at this entry of `timesteps`: with an image and less than all noise.

        The solver begins anew there, knowing nothing of earlier evaluations, as on `fs.grid(..., strength=...)`.
        """
        self._begin_index, self._run = begin_index, None

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha^2 at every index of a table of betas."""
        schedule = self._schedule()
        if not isinstance(schedule, VP):
            raise AttributeError(f"PlanScheduler has no alphas_cumprod for {schedule!r}, which is no table of betas")
        return schedule.alpha(torch.arange(len(schedule.betas))).square().float()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        original_inference_steps: int | None = None,
    ) -> None:
        """Make the plan of `num_inference_steps` intervals, and begin anew.

        timesteps: the times of the intervals, noisiest first, as the network is told them.
        sigmas: in their place, levels sigma / alpha; for flows sigma before the shift. A 0 at the end is left out.
            Pipelines of flows pass linspace(1, 1 / N, N) by themselves: a `spacing` or a plan of yours takes its place;
            other sigmas beside these are an error.
        mu: the shift of a flow with `use_dynamic_shifting` is e^mu (mu itself where `time_shift_type` is linear); else
            not read.
        original_inference_steps: of the configuration of LCM and TCD, whose pipeline passes it.
        """
        if original_inference_steps is not None:
            self._configure(original_inference_steps=original_inference_steps)
        schedule = schedule_for(self.config, self.config["replaces"], mu)
        asked = Asked.of(num_inference_steps, timesteps, sigmas)
        if own := "a plan" if self._ready else self.config["spacing"]:
            asked = asked.without_times(own, schedule)
        made, network = self._made(schedule, asked), Network(schedule, self.config)
        check(made.plan, network)
        nodes = [row.node for row in made.plan.rows]
        told = torch.tensor([network.told(at) for at in nodes], dtype=torch.float32)
        self.num_inference_steps, self._course, self.order = asked.steps, made, made.order
        self.plan, self.grid = made.plan, made.grid
        self._base = None  # the configuration may have been changed
        self._network, self._told, self.timesteps = network, told.tolist(), told.to(device)
        self.sigmas = torch.tensor([network.level(at) for at in (*nodes, made.plan.end)])
        self._begin_index = self._run = None

    def index_for_timestep(
        self, timestep: float | Tensor, schedule_timesteps: Sequence[float] | Tensor | None = None
    ) -> int:
        """Where this time stands in `timesteps`; of two places the later, where an interval begins.

        Waits for the device where the time is a tensor there.
        """
        times = self._told if schedule_timesteps is None else torch.as_tensor(schedule_timesteps).tolist()
        asked = set(torch.as_tensor(timestep, dtype=torch.float32).flatten().tolist())
        if len(asked) != 1:
            raise ValueError(f"a step takes one time for the whole batch, got {sorted(asked)}")
        wanted = asked.pop()
        found = [k for k, time in enumerate(times) if time == wanted]
        if not found:
            raise ValueError(
                f"time {wanted:g} is not one of this run's, {', '.join(f'{time:g}' for time in times[:3])} ...; call "
                f"set_timesteps and pass the entries of scheduler.timesteps"
            )
        return found[-1]

    def scale_model_input(self, sample: Tensor, timestep: float | Tensor | None = None) -> Tensor:
        """The state as the network sees it: unchanged for tables of betas and flows, where the start is not warm."""
        if plain(self._set().plan) and not self._network.scales:
            return sample
        run = self._running(timestep)
        if not (self._network.scales or run.enters):
            return sample
        return run.show(sample, self._network.scale(run.row.node))

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        *,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        variance_noise: Tensor | None = None,
    ) -> PlanSchedulerOutput | tuple[Tensor, Tensor]:
        """One row of the plan: from `sample`, at which the network said `model_output`, to where it is asked next.

        model_output: [B, C, ...], or [B, 2 C, ...] where the network also predicts a variance (left out).
        generator: of the noises of a stochastic solver; one, or one for each sample.
        eta: what the pipeline was called with: 0, its default, or what the plan was made with.
        use_clipped_model_output: not read; x0 is bounded as the configuration says, and eps follows it.
        variance_noise: unit noise in place of a drawn one.

        The state is kept in float32 where `sample` is of half precision and the very tensor that the last step
        returned, not written to since. Nothing here waits for the device but the search for the first time of a run,
        where neither `begin_index` nor the place of the time in `timesteps` tells it. A time out of turn begins a run
        there.
        """
        self._check_eta(eta)
        run = self._running(timestep)
        if run.seen is None and (self._network.scales or run.enters):
            raise ValueError(
                "the network must be shown another tensor than the state, but scale_model_input was not called before "
                "this step; call it, or use a plan without a warm start"
            )
        x = run.state(sample)
        x0 = self._network.x0(x, model_output, run.row.node)
        z = None
        if run.draws:
            z = _draw(x, generator) if variance_noise is None else variance_noise.to(x)
        after = run.advance(x, x0, z, sample.dtype)
        if run.step == len(self._told):
            self._run = None
        x0 = x0.to(sample.dtype)
        return PlanSchedulerOutput(prev_sample=after, pred_original_sample=x0) if return_dict else (after, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at times [B], whether or not they are of this run."""
        alpha, sigma = self._levels(timesteps, original_samples)
        return (alpha * exact(original_samples) + sigma * exact(noise)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """`add_noise`, as the pipelines of flows call it."""
        if noise is None:
            raise ValueError("scale_noise needs the noise to add")
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha noise - sigma x0, what a v network is trained on."""
        alpha, sigma = self._levels(timesteps, sample)
        return (alpha * exact(noise) - sigma * exact(sample)).to(sample.dtype)

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        x, t = exact(like), torch.as_tensor(timesteps).flatten()
        t = t.cpu() if like.device.type == "mps" else t.to(like.device)  # which has no float64
        schedule = self._schedule()
        if isinstance(schedule, Flow):  # the network is told 1000 sigma, whatever the shift
            sigma = t.double() / 1000
            return per_sample(1 - sigma, x), per_sample(sigma, x)
        if isinstance(schedule, EDM):
            sigma = (4 * t.double()).exp()
            return per_sample(torch.ones_like(sigma), x), per_sample(sigma, x)
        return per_sample(schedule.alpha(t), x), per_sample(schedule.sigma(t), x)

    def _schedule(self) -> Schedule:
        """The schedule; of a flow whose shift only `set_timesteps` is told, one that has none."""
        if self._base is None:
            dynamic = self.config.get("use_dynamic_shifting")
            self._base = Flow() if dynamic else schedule_for(self.config, self.config["replaces"])
        return self._base

    def _made(self, schedule: Schedule, asked: Asked) -> Course:
        """What this configuration makes of what the pipeline asks."""
        if self._ready is None:
            return course(self.config["solver"], self.config["solver_options"], grid_for(schedule, self.config, asked))
        if asked.steps != self._ready.nfe:
            raise ValueError(
                f"the plan has {self._ready.nfe} evaluations and the pipeline asks for {asked.steps} steps; call it "
                f"with num_inference_steps={self._ready.nfe}"
            )
        check_schedule(self._ready, schedule)
        return Course(self._ready)

    def _set(self) -> Course:
        if self._course is None:
            raise ValueError("call set_timesteps before the first step")
        return self._course

    def _running(self, timestep: float | Tensor | None) -> Run:
        """The run that is on, or one that begins with this time."""
        made = self._set()
        place = self._place(timestep)
        if self._run is None or (place is not None and place != self._run.step):
            if place is None:
                place = self._begin_index
            if place is None:
                if timestep is None:
                    raise ValueError("the first call of a run needs its timestep, or set_begin_index before it")
                place = self.index_for_timestep(timestep)
            self._run = None
            self._run = Run(made.tail(place), place)
        return self._run

    def _place(self, timestep: float | Tensor | None) -> int | None:
        """Where in `timesteps` this is, as far as the host knows: a number, or an entry of that very tensor."""
        if timestep is None:
            return None
        if isinstance(timestep, Tensor):
            if timestep.is_meta or not (timestep.numel() == 1 or set(timestep.stride()) == {0}):
                return None
            same = timestep.untyped_storage().data_ptr() == self.timesteps.untyped_storage().data_ptr()
            return int(timestep.storage_offset() - self.timesteps.storage_offset()) if same else None
        if self._run is not None and self._told[self._run.step] == float(np.float32(timestep)):
            return self._run.step
        return self.index_for_timestep(timestep)

    def _check_eta(self, eta: float | None) -> None:
        if eta and eta != self._eta():
            raise ValueError(
                f"the pipeline asks for eta = {eta:g}, and the plan is {self._set().plan.solver}; leave eta out there, "
                f"and give it to the scheduler: solver_options={{'eta': {eta:g}}} of ddim, 'gamma' of tcd"
            )

    def _eta(self) -> float:
        if self.config["solver"] is None:
            return 0.0
        taken = inspect.signature(get(self.config["solver"])).parameters
        default = taken["eta"].default if "eta" in taken else 0.0
        return float(self.config["solver_options"].get("eta", default))


def _draw(x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    z: Tensor = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return z


def _check_options(solver: str, options: Mapping[str, Any]) -> None:
    taken = list(inspect.signature(get(solver)).parameters)[3:]
    try:
        json.dumps(options)
    except TypeError as error:
        raise ValueError(f"solver_options are saved as JSON, and {options} cannot be: {error}; give a ready plan, "
                         f"plan=fs.trace({solver}, ...)") from error  # fmt: skip
    if unknown := sorted(options.keys() - set(taken)):
        raise ValueError(f"{solver} has no option {unknown[0]!r}; it has {', '.join(taken) or 'none'}")


def _load(plan: Plan | str | Path | Mapping[str, Any]) -> Plan:
    if isinstance(plan, Plan):
        return plan
    if isinstance(plan, str | Path):
        return Plan.load(plan)
    return Plan.from_json(json.dumps(plan))
