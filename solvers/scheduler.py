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
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.outputs import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fastsample.grid import SPACINGS, Grid, Node, at_times, node, per_sample
from fastsample.grid import grid as make_grid
from fastsample.plan import Plan, Row
from fastsample.schedule import EDM, VP, Flow, Schedule
from fastsample.step import plan_step
from fastsample.tracing import trace

from . import get
from .diffusers_config import REPLACED, Network, prediction_for, schedule_for, spacing_for, spacing_given

DEFAULT = "dpmpp_2m"
FIXED = ("leading", "trailing", "linspace")  # spacings that know no other end


@dataclass
class PlanSchedulerOutput(BaseOutput):
    """The next state, and x0 as it was predicted, and bounded, at this evaluation. Do not write into x0."""

    prev_sample: Tensor
    pred_original_sample: Tensor


@dataclass
class _Run:
    """One run of a plan: `step` is the number of its next evaluation, `first` that of its first, in `timesteps`.

    kept, seen: what the last step, and the last scale_model_input, returned, its version, and the state itself.
    """

    plan: Plan
    first: int
    step: int
    memory: list[Tensor] = field(default_factory=list)
    noises: list[Tensor] = field(default_factory=list)
    kept: tuple[Tensor, int | None, Tensor] | None = None
    seen: tuple[Tensor, int | None, Tensor] | None = None

    @cached_property
    def widest(self) -> int:
        return max(len(row.c) for row in self.plan.rows)

    @cached_property
    def drawn(self) -> frozenset[int]:
        return self.plan.noises

    @cached_property
    def older(self) -> int:
        return self.plan.memory - 1

    @property
    def row(self) -> Row:
        return self.plan.rows[self.step - self.first]

    @property
    def enters(self) -> bool:
        """Whether the plan changes the state before it first shows it to the network, and is to do so now."""
        return self.step == self.first and not _plain(self.plan)

    def entered(self, x: Tensor) -> Tensor:
        if not self.enters:
            return x
        if self.plan.warm is not None:
            x = self.plan.warm.gaussian.move(x, self.plan.warm.start, self.plan.start)
        return x * self.plan.entry[0]


class PlanScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc, unused-ignore]
    """A plan as a diffusers scheduler; make it with `from_config(pipe.scheduler.config, solver=...)`.

    solver: a name in `fastsample.solvers.SOLVERS`; dpmpp_2m if neither it nor a plan is given. solver_options: its
        keywords, such as {"eta": 0.5}.
    spacing: a name in `fs.SPACINGS`; None: the times of the scheduler whose configuration this is (timestep_spacing,
        use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, the sigmas of a flow).
    lower_order_final: see `fs.grid`. A configuration that has it hands it on; the rule of diffusers' DPM-Solver to do
        so below 15 steps only is left out.
    final_sigmas_type: "zero", where the last step returns x0, or "sigma_min": end at the least noise trained at.
        `set_alpha_to_one` of DDIM and PNDM is not read.
    unit_start: False begins at sigma noise, as `fs.sample` does; True at noise of variance alpha^2 + sigma^2, which is
        1 for tables of betas, as most of diffusers' schedulers do. `init_noise_sigma` says which. DDPMPipeline and
        DiTPipeline do not ask, and begin at 1.
    plan: a ready plan in place of all these: an fs.Plan, a file, or the content of one. It becomes part of the
        configuration, and is saved with it. `num_inference_steps` must be its number of evaluations.
    replaces: the class of the scheduler whose configuration this is. `from_config` reads it there, or knows it by the
        keys; where neither tells, a configuration is read as DDIM's, or as FlowMatchEuler's.

    The rest of the configuration says what the network is: its betas or flow, `prediction_type`, and `clip_sample` or
    `thresholding`, which bound x0 as `fs.Thresholded` does (as with `use_clipped_model_output` of diffusers' DDIM).

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
        self.plan: Plan | None = None
        self.grid: Grid | None = None
        self.timesteps = self.sigmas = torch.empty(0)
        self._told: list[float] = []
        self._begin_index: int | None = None
        self._run: _Run | None = None

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
        own = set(_parameters(cls)) - {"kwargs"}
        known = own.union(config, *(_parameters(other) for other in cls._get_compatibles()))
        if unknown := sorted(kwargs.keys() - known):
            raise TypeError(
                f"from_config got {unknown[0]!r}, which is neither one of {', '.join(sorted(own))} nor a key of a "
                f"scheduler's configuration"
            )
        dropped = {"solver": ("solver_options", "plan"), "plan": ("solver", "solver_options", "spacing")}
        stale = {key for name, keys in dropped.items() if kwargs.get(name) is not None for key in keys}
        config = {key: value for key, value in _whole(config).items() if key not in stale}
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
        times, levels = _numbers(timesteps), _numbers(sigmas)
        levels = None if levels is None else levels[levels > 0]
        steps = _count(num_inference_steps, times, levels)
        own = "a plan" if self._ready else self.config["spacing"]
        if own and levels is not None and isinstance(schedule, Flow) and _is_default(levels):
            levels = None
        if own and not (times is None and levels is None):
            raise ValueError(
                f"this scheduler was made with {own} and is given {'sigmas' if times is None else 'timesteps'} too; "
                f"choose one of them"
            )
        if self._ready is not None:
            if steps != self._ready.nfe:
                raise ValueError(
                    f"the plan has {self._ready.nfe} evaluations and the pipeline asks for {steps} steps; call it with "
                    f"num_inference_steps={self._ready.nfe}"
                )
            grid, plan, order = None, self._ready, 1
            _check_fit(plan, schedule)
        else:
            grid = self._grid(schedule, steps, times, levels)
            plan = self._trace(grid)
            order = self._evaluations(grid)
        network = Network(schedule, self.config)
        _check(plan, network)
        told = torch.tensor([network.told(row.node) for row in plan.rows], dtype=torch.float32)
        self.num_inference_steps, self.grid, self.plan, self.order = steps, grid, plan, order
        self._base = None  # the configuration may have been changed
        self._network, self._told, self.timesteps = network, told.tolist(), told.to(device)
        self.sigmas = torch.tensor([_level(schedule, at) for at in (*(row.node for row in plan.rows), plan.end)])
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
        if _plain(self._set()) and not self._network.scales:
            return sample
        run = self._running(timestep)
        if not (self._network.scales or run.enters):
            return sample
        x = run.entered(_exact(sample))
        seen = (x * self._network.scale(run.row.node)).to(sample.dtype)
        run.seen = seen, _version(seen), x
        return seen

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
        **kwargs: Any,
    ) -> PlanSchedulerOutput | tuple[Tensor, Tensor]:
        """One row of the plan: from `sample`, at which the network said `model_output`, to where it is asked next.

        model_output: [B, C, ...], or [B, 2 C, ...] where the network also predicts a variance (left out).
        generator: of the noises of a stochastic solver; one, or one for each sample.
        kwargs: `variance_noise`, unit noise in place of a drawn one; `eta` and `use_clipped_model_output`, which
            DDIMPipeline passes: eta must be 0 (its default) or what the plan was made with.

        The state is kept in float32 where `sample` is of half precision and the very tensor that the last step
        returned, not written to since. Nothing here waits for the device but the search for the first time of a run,
        where neither `begin_index` nor the place of the time in `timesteps` tells it. A time out of turn begins a run
        there.
        """
        drawn = self._extra(kwargs)
        run = self._running(timestep)
        row, x = run.row, self._state(run, sample)
        x0 = self._network.x0(x, model_output, row.node)
        if run.widest:
            z = x  # stands where the factor is 0
            if run.step - run.first in run.drawn:
                z = drawn.to(x) if drawn is not None else _draw(x, generator)
            run.noises = [z, *run.noises][: run.widest]
        x, m = plan_step(x, x0, run.memory, run.noises, row)
        if run.older:
            run.memory = [m, *run.memory][: run.older]
        after = x.to(sample.dtype)
        run.kept, run.seen = (after, _version(after), x), None
        run.step += 1
        if run.step == len(self._told):
            self._run = None
        x0 = x0.to(sample.dtype)
        return PlanSchedulerOutput(prev_sample=after, pred_original_sample=x0) if return_dict else (after, x0)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma noise at times [B], whether or not they are of this run."""
        alpha, sigma = self._levels(timesteps, original_samples)
        return (alpha * _exact(original_samples) + sigma * _exact(noise)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor | None = None) -> Tensor:
        """`add_noise`, as the pipelines of flows call it."""
        if noise is None:
            raise ValueError("scale_noise needs the noise to add")
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha noise - sigma x0, what a v network is trained on."""
        alpha, sigma = self._levels(timesteps, sample)
        return (alpha * _exact(noise) - sigma * _exact(sample)).to(sample.dtype)

    def _levels(self, timesteps: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        x, t = _exact(like), torch.as_tensor(timesteps).flatten()
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

    def _grid(self, schedule: Schedule, steps: int, times: Any, levels: Any) -> Grid:
        end = schedule.t_min if self.config["final_sigmas_type"] == "sigma_min" else None
        if times is not None or levels is not None:
            spacing = spacing_given(schedule, self.config, times, levels)
        elif self.config["spacing"] is not None:
            spacing = SPACINGS[self.config["spacing"]]
        else:
            spacing = spacing_for(schedule, self.config, self.config["replaces"])
        name = spacing.__name__
        if end is not None and (self.config["spacing"] is None or self.config["spacing"] in FIXED):
            points = [*spacing(schedule, steps, schedule.t_max, None), end]
            if not points[-2] > end:
                raise ValueError(
                    f"final_sigmas_type 'sigma_min' ends at t = {end:g}, and the last evaluation of {name} already "
                    f"stands at {points[-2]:g}; use 'zero' or another spacing"
                )
            spacing = at_times(points)
        made = make_grid(schedule, steps, spacing, end=end, lower_order_final=self.config["lower_order_final"])
        return replace(made, spacing=made.spacing.replace("at_times", name))

    def _trace(self, grid: Grid) -> Plan:
        return _traced(self.config["solver"], json.dumps(self.config["solver_options"], sort_keys=True), grid)

    def _evaluations(self, grid: Grid) -> int:
        """How many evaluations the first interval takes."""
        if len(grid) == 1:
            return self._trace(grid).nfe
        whole, rest = (self._trace(replace(grid, nodes=grid.nodes[k:4])).nfe for k in (0, 1))
        return max(1, whole - rest)

    def _tail(self, begin: int) -> Plan:
        """The plan that begins at this evaluation, without what came before."""
        whole = self._set()
        if begin == 0:
            return whole
        left, reason = whole.nfe - begin, "it stands within an interval"
        if not 0 < left < whole.nfe:
            reason = f"there are {whole.nfe}"
        elif self.grid is None:
            rows = whole.rows[begin:]
            if all(max(len(row.b), len(row.c)) <= k + 1 for k, row in enumerate(rows)):
                return replace(whole, rows=rows, start=rows[0].node, entry=(1.0, 0.0), warm=None)
            reason = "the ready plan remembers evaluations before it; give the solver's name in place of the plan"
        else:
            k = min(begin // self.order, len(self.grid) - 1)
            while k < len(self.grid) - 1 and self._after(k).nfe > left:
                k += 1
            while k > 0 and self._after(k).nfe < left:
                k -= 1
            plan = self._after(k)
            if [row.node for row in plan.rows] == [row.node for row in whole.rows[begin:]] and _plain(plan):
                return plan
        raise ValueError(f"{whole.solver} cannot begin at evaluation {begin}: {reason}")

    def _after(self, interval: int) -> Plan:
        assert self.grid is not None
        return self._trace(replace(self.grid, nodes=self.grid.nodes[interval:]))

    def _set(self) -> Plan:
        if self.plan is None:
            raise ValueError("call set_timesteps before the first step")
        return self.plan

    def _running(self, timestep: float | Tensor | None) -> _Run:
        """The run that is on, or one that begins with this time."""
        self._set()
        place = self._place(timestep)
        if self._run is None or (place is not None and place != self._run.step):
            if place is None:
                place = self._begin_index
            if place is None:
                if timestep is None:
                    raise ValueError("the first call of a run needs its timestep, or set_begin_index before it")
                place = self.index_for_timestep(timestep)
            self._run = None
            self._run = _Run(self._tail(place), place, place)
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

    def _state(self, run: _Run, sample: Tensor) -> Tensor:
        """The state in full precision: what was computed, where `sample` is only its rounding."""
        if run.seen is None and (self._network.scales or run.enters):
            raise ValueError(
                "the network must be shown another tensor than the state, but scale_model_input was not called before "
                "this step; call it, or use a plan without a warm start"
            )
        for returned, version, x in filter(None, (run.seen, run.kept)):  # DiTPipeline passes on what the network saw
            if returned is sample and version is not None and _version(sample) == version:
                return x
        return run.entered(_exact(sample))

    def _extra(self, kwargs: dict[str, Any]) -> Tensor | None:
        if not kwargs:
            return None
        eta, has = kwargs.pop("eta", None), self.config["solver_options"].get("eta", 0.0)
        if eta and eta != has:
            raise ValueError(
                f"the pipeline asks for eta = {eta:g}, and the plan was made with {has:g}; make the scheduler with "
                f"solver='ddim', solver_options={{'eta': {eta:g}}}"
            )
        kwargs.pop("use_clipped_model_output", None)
        noise: Tensor | None = kwargs.pop("variance_noise", None)
        if kwargs:
            raise TypeError(
                f"step of PlanScheduler does not know {', '.join(sorted(kwargs))}; what a solver can be told goes into "
                f"solver_options"
            )
        return noise


@lru_cache(maxsize=64)
def _traced(solver: str, options: str, grid: Grid) -> Plan:
    """A pipeline asks for the same plan at every call."""
    return trace(get(solver), grid, **json.loads(options))


def _check(plan: Plan, network: Network) -> None:
    if plan.predicts and plan.predicts != network.prediction.name:
        raise ValueError(
            f"the plan was tuned for networks that predict {plan.predicts}, this one predicts "
            f"{network.prediction.name}; tune one for it"
        )
    if plan.entry[1]:
        raise ValueError(
            f"{plan.solver} adds noise before its first evaluation, where a pipeline has no place for it; for churn "
            f"choose s_tmax below the first level, {math.exp(-plan.start.lam):.4g}"
        )
    blind = [row.node.t for row in plan.rows if row.node.alpha == 0]
    if blind and network.prediction.name == "eps":
        raise ValueError(
            f"an eps network says nothing of x0 at alpha = 0 (t = {blind[0]:g}); use timestep_spacing='leading', or a "
            f"network that predicts v"
        )


def _check_fit(plan: Plan, schedule: Schedule) -> None:
    """A plan made for another schedule would sample in silence, and badly."""
    for at in (row.node for row in plan.rows):
        here = node(schedule, at.t)
        if not (_close(at.alpha, here.alpha) and _close(at.sigma, here.sigma)):
            raise ValueError(
                f"the plan was made for {plan.schedule} and does not fit this scheduler's {schedule!r}: at "
                f"t = {at.t:g} sigma is {at.sigma:.6g} in the plan, {here.sigma:.6g} in the schedule"
            )


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-7)  # as in `fs.sample`


def _plain(plan: Plan) -> bool:
    return plan.warm is None and plan.entry == (1.0, 0.0)


def _level(schedule: Schedule, at: Node) -> float:
    """sigma of a flow, sigma / alpha of the rest: what `sigmas` of diffusers' schedulers hold."""
    return at.sigma if isinstance(schedule, Flow) else (at.sigma / at.alpha if at.alpha > 0 else math.inf)


def _count(steps: int | None, times: Any, levels: Any) -> int:
    if times is not None and levels is not None:
        raise ValueError("timesteps and sigmas say the same thing twice; pass one of them")
    given = times if times is not None else levels
    if given is None:
        if steps is None or steps < 1:
            raise ValueError(f"set_timesteps needs num_inference_steps of at least 1, timesteps or sigmas, got {steps}")
        return int(steps)
    if len(given) < 1 or (steps is not None and steps != len(given)):
        raise ValueError(f"num_inference_steps is {steps}, but {len(given)} times were given; pass one of them")
    return len(given)


def _is_default(levels: Any) -> bool:
    """What the pipelines of flows ask for where the user did not."""
    steps = len(levels)
    return bool(np.allclose(levels, np.linspace(1, 1 / steps, steps), atol=1e-6))


def _numbers(values: Any) -> Any:
    if values is None:
        return None
    return np.asarray(values.tolist() if isinstance(values, Tensor) else values, dtype=float)


def _draw(x: Tensor, generator: torch.Generator | list[torch.Generator] | None) -> Tensor:
    z: Tensor = randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return z


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version  # torch counts no writes to tensors of inference mode


def _parameters(scheduler: Any) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(scheduler.__init__).parameters.items() if name != "self"}


def _whole(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with every value it stands for: a file of an older diffusers leaves out what it did not know."""
    name = config.get("_class_name") or config.get("replaces") or _kind(config)
    scheduler = getattr(diffusers, name, None)
    unset = {} if scheduler is None else _parameters(scheduler)
    defaults = {key: value for key, value in unset.items() if value is not inspect.Parameter.empty}
    kind = {} if name in ("", PlanScheduler.__name__) else {"replaces": name}
    return {**defaults, **{key: value for key, value in config.items() if key != "_use_default_values"}, **kind}


def _kind(config: Mapping[str, Any]) -> str:
    """Whose configuration this is, by its keys: those of a scheduler that was never saved do not name its class."""
    keys = {key for key in config if not key.startswith("_")}
    fits = [name for name in REPLACED if set(_parameters(getattr(diffusers, name, object))) == keys]
    return min(fits, key=len, default="")


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
