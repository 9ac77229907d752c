"""Continuous-time consistency models: the student's derivative along the path takes the place of a second time."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fastsample.denoiser import Denoiser, Model
from fastsample.grid import Node, node, nodes, per_sample
from fastsample.wrapper import remembers

from . import draws
from .boundary import boundary_of
from .consistency import check_start, same_dropout, warn_of_eps
from .method import Batch, Method, asked, check_drop, conditions, dropped, plain

LARGEST = 1e4  # of sigma / alpha, where a schedule ends without data


@dataclass(frozen=True)
class ContinuousConsistency(Method):
    """sCM: f(x_t, t) is not to change along the path, in the limit of steps of no length.

        L = mean over samples of  e^w(t) / D |F - F_stop - g / (|g| + c)|^2 - w(t)
        g = -cos(t)^2 (sd F_stop - dx/dt) - r cos(t) sin(t) (x + sd dF_stop/dt),   r = min(1, step / warmup)
    in TrigFlow, x_t = cos(t) x0 + sin(t) z, z of standard deviation sd, f = cos(t) x - sin(t) sd F(x / sd, t), where D
    is how many numbers a sample has and |g| the norm over all of them.
    Lu and Song 2024, arXiv:2410.11081, Sec. 4 and Alg. 1.

    The student keeps its own schedule and prediction: f is its x0 at the node of equal sigma / alpha, and F what f is
    written by. So f(x, sigma = 0) is x, and it is sampled like any consistency model. Where alpha ends in 0, levels
    sigma / alpha stop at 1e4.

    Fast sines of the time in a network, as of an index to 1000, make dF/dt so large that it drowns what is learned
    (their Sec. 4.1): the digits network, told an index, was ruined by 1000 updates, and a toy in the plane told
    sin(128 t / 1000) learned little, where one told sines of arctan(sigma / alpha) reached its teacher. So take a
    student that is told t itself, `fs.Denoiser(network, fs.TrigFlow(), "v")`, and train it by `Diffusion` first. That
    is shown on the toy alone; for images on a small budget `ConsistencyDistillation` is what is measured.

    student: predicts v, flow or x0; start it from the diffusion model, see `student_of` and `Conversion`. Its times
        must be continuous: VP networks are asked between their indices.
    teacher: gives dx/dt (sCD); None: data and noise do (sCT). Any schedule, asked no farther than that reaches; it may
        be guided.
    sigma_data: sd, the standard deviation of the data.
    mean, std: of ln(sigma / alpha), normal. Theirs are -1 and 1.4 for CIFAR-10.
    warmup: steps until r is 1; 0 begins there.
    c: of the normalisation; None leaves it out, which is better in few dimensions: there the mean of normalised
        tangents may vanish elsewhere than their mean.
    weight: "adaptive" trains w(t) with the student, "uniform" has w = 0.
    tangent: "jvp", by forward-mode differentiation, or "finite_difference", central, of two more evaluations and less
        exact, for networks that have no such derivative.
    difference: half of what it moves in ln(tan(t)); at 5e-3 the sines of an index move too far to be differenced.
    drop, null: as for `Diffusion`.
    """

    student: Denoiser
    teacher: Model | None = None
    sigma_data: float = field(default=0.5, kw_only=True)
    mean: float = field(default=-1.0, kw_only=True)
    std: float = field(default=1.4, kw_only=True)
    warmup: int = field(default=10_000, kw_only=True)
    c: float | None = field(default=0.1, kw_only=True)
    weight: str = field(default="adaptive", kw_only=True)
    tangent: str = field(default="jvp", kw_only=True)
    difference: float = field(default=3e-4, kw_only=True)
    drop: float = field(default=0.0, kw_only=True)
    null: Mapping[str, float | Tensor] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        check_drop(self.drop, self.null)
        for name in ("sigma_data", "std", "difference"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name):g}")
        if self.c is not None and not 0 < self.c < math.inf:
            raise ValueError(f"c must be positive and finite, got {self.c:g}; None leaves the normalisation out")
        if self.warmup < 0 or not math.isfinite(self.mean):
            raise ValueError(
                f"need warmup of at least 0 and a finite mean, got warmup = {self.warmup}, mean = {self.mean:g}"
            )
        _check_choice("weight", self.weight, ("adaptive", "uniform"))
        _check_choice("tangent", self.tangent, ("jvp", "finite_difference"))
        if boundary_of(self.student) is not None:
            raise ValueError("the student has a boundary, which sCM does not need: its x0 is f; take it without")
        first = _last_asked(self.student)
        check_start("student", self.student, first)
        if self.teacher is not None:
            check_teacher(self.student, self.teacher)
        warn_of_eps(self.student, first)

    @property
    def roles(self) -> dict[str, Denoiser]:
        return {"student": self.student}

    @property
    def frozen(self) -> list[Denoiser]:
        return [] if self.teacher is None else asked(self.teacher)

    @property
    def helpers(self) -> dict[str, nn.Module]:
        return {"student": self.adaptive} if self.weight == "adaptive" else {}

    @cached_property
    def adaptive(self) -> AdaptiveWeight:
        return AdaptiveWeight()

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        data = batch["x0"]
        t = self.times(draws.randn(len(data), device=data.device, dtype=torch.float64))
        z = self.sigma_data * draws.randn_like(data)
        condition = dropped(conditions(batch), self.null, self.drop)
        cos, sin = per_sample(t.cos(), data), per_sample(t.sin(), data)
        x = cos * data + sin * z
        with torch.no_grad():
            velocity = self.velocity(x, t, condition) if self.teacher is not None else cos * z - sin * data
            rate = min(1.0, step / self.warmup) if self.warmup else 1.0
            g = self.tangents(x, t, velocity, rate, condition)
        found = trig_network(self.student, x, t, self.sigma_data, condition)
        error: Tensor = (found - found.detach() - g).flatten(1).square().mean(1)
        if self.weight == "uniform":
            return error.mean()
        w: Tensor = self.adaptive(t.tan().log())
        return (w.exp() * error - w).mean()

    def times(self, normal: Tensor) -> Tensor:
        """Times of TrigFlow in (0, pi/2) from unit normal numbers, [B], float64, within the student's schedule."""
        low, high = levels(self.student)
        level = (self.mean + self.std * normal).exp().clamp(low, high)
        return (level / self.sigma_data).atan()

    def velocity(self, x: Tensor, t: Tensor, condition: Mapping[str, Any]) -> Tensor:
        """dx/dt of the teacher at x [B, ...] of TrigFlow, t [B]."""
        assert self.teacher is not None
        x0, eps = x0_and_eps(self.teacher, x, t.cos(), self.sigma_data * t.tan(), condition)
        moved: Tensor = per_sample(self.sigma_data * t.cos(), x) * eps - per_sample(t.sin(), x) * x0
        return moved

    def tangents(self, x: Tensor, t: Tensor, velocity: Tensor, rate: float, condition: Mapping[str, Any]) -> Tensor:
        """g / (|g| + c) of each sample, without gradient."""
        model, sd = plain(self.student), self.sigma_data
        cos, sin = per_sample(t.cos(), x), per_sample(t.sin(), x)
        both = t.cos() * t.sin()  # of the derivative as well, where dF/dt grows near 0 and pi/2

        def network(x: Tensor, t: Tensor) -> Tensor:
            return trig_network(model, x, t, sd, condition)

        moved = (per_sample(both, x) * velocity, both)
        with torch.no_grad(), same_dropout(x.device):
            if self.tangent == "jvp":
                found, change = derivative(network, (x, t), moved, model.network)
            else:
                h = self.difference
                with same_dropout(x.device):
                    found = network(x, t)
                with same_dropout(x.device):
                    after = network(x + h * moved[0], t + h * moved[1])
                change = (after - network(x - h * moved[0], t - h * moved[1])) / (2 * h)
        g = -cos.square() * (sd * found - velocity) - rate * (cos * sin * x + sd * change)
        if self.c is None:
            return g
        size = g.flatten(1).norm(dim=1)
        normalised: Tensor = g / per_sample(size + self.c, g)
        return normalised


class AdaptiveWeight(nn.Module):
    """w(t), a linear layer on sines and cosines of ln(tan(t)): at its best, w = -ln of the mean squared error at t.

    It begins at 0. Karras et al. 2023, arXiv:2312.02696, Sec. 2.3, which Lu and Song 2024, arXiv:2410.11081, follow;
    theirs has random frequencies.
    """

    def __init__(self, size: int = 64):
        super().__init__()
        self.register_buffer("frequencies", torch.logspace(-2, 0.5, size // 2, dtype=torch.float32))
        self.frequencies: Tensor
        self.out = nn.Linear(size, 1)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, log_tan: Tensor) -> Tensor:
        """w [B] at ln(tan(t)) [B]."""
        angles = log_tan.to(self.frequencies)[:, None] * self.frequencies
        found: Tensor = self.out(torch.cat([angles.sin(), angles.cos()], 1)).squeeze(1)
        return found


def x0_at(model: Model, x: Tensor, alpha: Tensor, level: Tensor, condition: Mapping[str, Any]) -> Tensor:
    """x0 at x = alpha (x0 + level eps), [B, ...], by a model of any schedule: asked where sigma / alpha is `level`.

    alpha, level: [B], float64, positive.
    """
    at = nodes(model.schedule, model.schedule.time(-level.log()))
    return model.predict(per_sample(at.alpha / alpha, x) * x, at, **condition)


def x0_and_eps(
    model: Model, x: Tensor, alpha: Tensor, level: Tensor, condition: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """What a model holds x = alpha (x0 + level eps) to be made of, at the nearest level that it was trained at.

    Beyond the largest, x is scaled down to the noise there: the data in it was next to nothing.
    """
    low, high = levels(model)
    near = level.clamp(low, high)
    seen = per_sample((high / level).clamp(max=1.0), x) * x
    x0 = x0_at(model, seen, alpha, near, condition)
    return x0, (seen / per_sample(alpha, x) - x0) / per_sample(near, x)


def trig_network(model: Model, x: Tensor, t: Tensor, sigma_data: float, condition: Mapping[str, Any]) -> Tensor:
    """F of TrigFlow, of a model of any schedule: cos(t) x - sin(t) sd F is its x0. x: [B, ...]; t: [B] in (0, pi/2).

    dx/dt of the model's path is sd F.
    """
    x0 = x0_at(model, x, t.cos(), sigma_data * t.tan(), condition)
    return (per_sample(t.cos(), x) * x - x0) / per_sample(sigma_data * t.sin(), x)


def derivative(
    function: Callable[..., Tensor], at: tuple[Tensor, ...], along: tuple[Tensor, ...], network: Any
) -> tuple[Tensor, Tensor]:
    """The value of a function of a network, and its derivative along a direction, by forward-mode differentiation.

    Attention runs by torch's own sums (SDPBackend.MATH): the fused kernels have no such derivative.
    Raises RuntimeError where an operation has none, or the parameters are sharded.
    """
    remedy = "take tangent='finite_difference' (sCM), or a network of operations that have one"
    if isinstance(network, nn.Module) and any(isinstance(value, DTensor) for value in network.parameters()):
        raise RuntimeError(
            f"the parameters of {type(network).__name__} are sharded (FSDP), which forward-mode derivatives do not "
            f"support; train under DDP, or {remedy}"
        )
    try:
        with sdpa_kernel(SDPBackend.MATH), _ContiguousNorms():
            found: Any = torch.func.jvp(function, at, along)
    except (NotImplementedError, RuntimeError) as error:
        said = str(error).lower()
        if not isinstance(error, NotImplementedError) and not any(
            word in said for word in ("forward ad", "forward-mode", "jvp", "functorch", "vmap")
        ):
            raise
        raise RuntimeError(
            f"{type(network).__name__} has no forward-mode derivative ({str(error).splitlines()[0]}); {remedy}"
        ) from error
    value, slope = found
    return value, slope


class _ContiguousNorms(TorchFunctionMode):
    """Group norms of contiguous copies: torch's forward-mode rule fails where the derivative of x lies otherwise in
    memory than x, as behind some convolutions. A copy puts both in order, `contiguous` would look at x alone.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (nn.functional.group_norm, torch.group_norm) and args:
            args = (args[0].clone(memory_format=torch.contiguous_format), *args[1:])
        return func(*args, **(kwargs or {}))


def levels(model: Model) -> tuple[float, float]:
    """The least and the largest sigma / alpha to train a model at."""
    low, high = (math.exp(-float(model.schedule.lam(t))) for t in (model.schedule.t_min, model.schedule.t_max))
    return low, min(high, LARGEST)


def check_teacher(student: Denoiser, teacher: Model) -> None:
    """A teacher of any schedule, which must answer at any of its times.

    Raises ValueError, or TypeError where the teacher is neither a denoiser nor made of one.
    """
    if any(student.network is one.network for one in asked(teacher)):
        raise ValueError("student and teacher are one network; make a copy: student_of(teacher, predicts='v')")
    if remembers(teacher):
        raise ValueError(
            f"the teacher remembers earlier evaluations ({type(teacher).__name__}), so it answers only within a run; "
            f"take one that does not, such as fs.Guided(..., reuse=1)"
        )
    check_start("teacher", teacher, _last_asked(teacher))


def _last_asked(model: Model) -> Node:
    return node(model.schedule, float(model.schedule.time(-math.log(levels(model)[1]))))


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
