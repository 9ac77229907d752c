"""Flow maps: networks of two times, which jump from any noise level to any lower one in one evaluation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsample.adapters.pretrained import FORMS, Form
from fastsample.denoiser import Denoiser, Model, TimeOf, _rows
from fastsample.grid import Grid, Node, Nodes, nodes, per_sample
from fastsample.noise import Noise
from fastsample.schedule import Flow, Schedule

from . import draws
from .consistency import same_dropout
from .continuous import check_teacher, derivative, x0_and_eps
from .method import Batch, Method, asked, check_drop, conditions, dropped, plain
from .times import noisy


class FlowMap(Denoiser):
    """A network of two times: u(x, t, r), the mean velocity of the path from sigma = t down to r, so that
        x_r = x_t - (t - r) u(x_t, t, r)
    Geng et al. 2025, arXiv:2505.13447, Eq. 3 and 12.

    network: `network(x, t, r, **condition)`, both times [B] in the units of `time`.
    schedule: an `fs.Flow`, shifted or not.

    As a model it is its jump to sigma = 0, so one step of any solver and `solvers.consistency` sample it;
    `sample_flow_map` jumps from node to node. `fs.save_pretrained` and `fs.from_pretrained` know it.
    """

    def __init__(
        self,
        network: Any,
        schedule: Flow | None = None,
        *,
        time: str | TimeOf | None = None,
        dtype: torch.dtype | None = None,
    ):
        schedule = Flow() if schedule is None else schedule
        if not isinstance(schedule, Flow):
            raise ValueError(f"a mean velocity is of straight paths, fs.Flow(), got {schedule!r}")
        super().__init__(network, schedule, "flow", time=time, dtype=dtype)

    def output(self, x: Tensor, node: Node | Nodes, **condition: Any) -> Tensor:
        """The mean velocity from a node to sigma = 0."""
        return self.velocity(x, node, _clean(node), **condition)

    def velocity(self, x: Tensor, s: Node | Nodes, t: Node | Nodes, **condition: Any) -> Tensor:
        """The mean velocity over sigma from node s to node t, at x [B, ...] at s, in the dtype of x."""
        seen = x if self.dtype is None or self.dtype == x.dtype else x.to(self.dtype)
        times = [_rows(self.time(self.schedule, at), seen) for at in (s, t)]
        self.count.calls += 1
        self.count.rows += len(x)
        output: Tensor = self.network(seen, *times, **condition)
        if output.shape != x.shape:
            raise ValueError(f"the network returned shape {tuple(output.shape)} for x of shape {tuple(x.shape)}")
        return output.to(x.dtype)

    def jump(self, x: Tensor, s: Node | Nodes, t: Node | Nodes, **condition: Any) -> Tensor:
        """x at node t, from x [B, ...] at node s, by one evaluation."""
        moved: Tensor = x - per_sample(s.sigma - t.sigma, x) * self.velocity(x, s, t, **condition)
        return moved


@torch.no_grad()
def sample_flow_map(
    model: FlowMap, noise: Noise | Tensor, grid: Grid, condition: Mapping[str, Any] | None = None
) -> Tensor:
    """Jump along a grid, one evaluation a step. Geng et al. 2025, arXiv:2505.13447, Eq. 12.

    noise: `fs.noise(...)`, or a tensor [B, ...] of unit variance.
    Raises ValueError where the grid is of another schedule.
    """
    if grid.schedule != model.schedule:
        raise ValueError(f"the grid is of {grid.schedule!r}, the model of {model.schedule!r}; make it for the model")
    x = grid.nodes[0].sigma * (noise.draw(0) if isinstance(noise, Noise) else noise)
    for s, t in grid.steps():
        x = model.jump(x, s, t, **(condition or {}))
    return x


@dataclass(frozen=True)
class MeanFlow(Method):
    """u(x_t, t, r) is to be v - (t - r) (v du/dx + du/dt), which is a stopped target.

    Geng et al. 2025, arXiv:2505.13447, Alg. 1, with the weight 1 / (|error|^2 + c)^p of their Sec. 4.3.

    student: a `FlowMap`.
    teacher: gives v, of any schedule, asked no farther than that reaches; it may be guided. None: v = eps - x0.
    equal: the share of samples with r = t, which learn v itself.
    mean, std: of the logit of both sigmas; the larger is t.
    p, c: of the weight; p = 0 is the plain square.
    scale: guidance in the target, v = scale v + (1 - scale) u(x, t, t | null), as in their Eq. 19; 1 is none. The
        student is then sampled without guidance. It needs `null`.
    drop, null: as for `Diffusion`.
    """

    student: FlowMap
    teacher: Model | None = None
    equal: float = field(default=0.75, kw_only=True)
    mean: float = field(default=-0.4, kw_only=True)
    std: float = field(default=1.0, kw_only=True)
    p: float = field(default=1.0, kw_only=True)
    c: float = field(default=1e-3, kw_only=True)
    scale: float = field(default=1.0, kw_only=True)
    drop: float = field(default=0.0, kw_only=True)
    null: Mapping[str, float | Tensor] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        check_drop(self.drop, self.null)
        if not isinstance(self.student, FlowMap):
            raise TypeError(f"the student needs a network of two times, distill.FlowMap, got {self.student!r}")
        if not (0 <= self.equal <= 1 and 0 < self.std < math.inf and math.isfinite(self.mean)):
            raise ValueError(
                f"need 0 <= equal <= 1, std > 0 and a finite mean, got equal = {self.equal:g}, std = {self.std:g}, "
                f"mean = {self.mean:g}"
            )
        if not (self.p >= 0 and self.c > 0):
            raise ValueError(f"need p >= 0 and c > 0 in the weight, got p = {self.p:g} and c = {self.c:g}")
        if self.scale != 1 and (not self.null or self.teacher is not None):
            raise ValueError(
                f"scale = {self.scale:g} needs null, the values of no condition, and no teacher; guide a teacher "
                f"itself: fs.Guided(teacher, ...)"
            )
        if self.teacher is not None:
            check_teacher(self.student, self.teacher)

    @property
    def roles(self) -> dict[str, Denoiser]:
        return {"student": self.student}

    @property
    def frozen(self) -> list[Denoiser]:
        return [] if self.teacher is None else asked(self.teacher)

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        data = batch["x0"]
        logits = self.mean + self.std * draws.randn(len(data), 2, device=data.device, dtype=torch.float64)
        same = draws.rand(len(data), device=data.device) < self.equal
        eps = draws.randn_like(data)
        t = torch.sigmoid(logits).amax(1)
        r = torch.where(same, t, torch.sigmoid(logits).amin(1))
        condition = dropped(conditions(batch), self.null, self.drop)
        at = self.nodes(t)
        x = noisy(data, eps, at)
        target = self.target(x, t, r, self._velocity(x, t, eps - data, condition), condition)
        error = self.student.velocity(x, at, self.nodes(r), **condition) - target
        square = error.flatten(1).square().sum(1)
        return (square / (square.detach() + self.c) ** self.p).mean()

    def nodes(self, sigma: Tensor) -> Nodes:
        """The nodes of the student where sigma is this, [B]."""
        shift = self.student.schedule.shift  # type: ignore[attr-defined]
        return nodes(self.student.schedule, sigma / (shift - (shift - 1) * sigma))

    def target(self, x: Tensor, t: Tensor, r: Tensor, velocity: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """velocity - (t - r) du/dt along the path, [B, ...], without gradient. t, r: sigma, [B]. Eq. 10 and 11."""
        model = plain(self.student)

        def network(x: Tensor, t: Tensor) -> Tensor:
            found: Tensor = model.velocity(x, self.nodes(t), self.nodes(r), **condition)
            return found

        with torch.no_grad(), same_dropout(x.device):
            _, change = derivative(network, (x, t), (velocity, torch.ones_like(t)), model.network)
        target: Tensor = velocity - per_sample(t - r, x) * change
        return target

    @torch.no_grad()
    def _velocity(self, x: Tensor, t: Tensor, drawn: Tensor, condition: Batch) -> Tensor:
        if self.teacher is not None:
            x0, eps = x0_and_eps(self.teacher, x, 1 - t, t / (1 - t), condition)
            return eps - x0
        if self.scale == 1:
            return drawn
        nothing = {**condition, **{key: _filled(condition[key], value) for key, value in self.null.items()}}
        at = self.nodes(t)
        with same_dropout(x.device):
            uncond = plain(self.student).velocity(x, at, at, **nothing)
        guided: Tensor = self.scale * drawn + (1 - self.scale) * uncond
        return guided


def _filled(condition: Tensor, null: float | Tensor) -> Tensor:
    return torch.as_tensor(null, dtype=condition.dtype, device=condition.device).expand_as(condition)


def _clean(at: Node | Nodes) -> Node | Nodes:
    """The end of the path, sigma = 0."""
    if isinstance(at, Node):
        return Node(0.0, 1.0, 0.0)
    return Nodes(torch.zeros_like(at.t), torch.ones_like(at.alpha), torch.zeros_like(at.sigma))


def _taken(model: Denoiser) -> tuple[Any, dict[str, Any]] | None:
    return (model.network, {}) if isinstance(model, FlowMap) else None


def _restored(network: Any, schedule: Schedule, predicts: str, time: str, settings: Mapping[str, Any]) -> FlowMap:
    return FlowMap(network, schedule, time=time)  # type: ignore[arg-type]


FORMS["flow_map"] = Form(_taken, _restored, lambda model, plan: None)  # no scheduler tells a network two times
