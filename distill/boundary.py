"""Boundary conditions: consistency functions that are the identity at the least noise, whatever their network says.

    f(x, t) = skip(t) x + out(t) x0(x, t),   x0 what the network predicts of the data.

Without one, f is x0 itself, and the condition holds at sigma = 0, where x0 = x for networks that predict eps, v or flow
and nobody asks. Networks that were trained with c_skip and c_out need theirs; so do those who want the papers' setting.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastsample.denoiser import Denoiser, TimeOf
from fastsample.grid import Node, Nodes, node
from fastsample.prediction import Prediction
from fastsample.schedule import EDM, Schedule
from fastsample.spacing import Spacing


@dataclass(frozen=True)
class Boundary:
    """Two factors at each time. A kind of boundary gives `factors` and `end`; its fields are numbers, for files."""

    name: ClassVar[str]

    def factors(self, schedule: Schedule, at: Node | Nodes) -> tuple[Any, Any]:
        """(skip, out) at a node, or at nodes as tensors [B], float64: f = skip x + out x0."""
        raise NotImplementedError(f"{type(self).__name__} must define factors(schedule, at)")

    def end(self, schedule: Schedule) -> float:
        """The time at and below which f is the state itself; where the path of training ends."""
        raise NotImplementedError(f"{type(self).__name__} must define end(schedule)")

    def settings(self) -> dict[str, Any]:
        """The boundary as JSON can hold it; `boundary` makes it again."""
        return {"name": self.name, **asdict(self)}


@dataclass(frozen=True)
class EDMBoundary(Boundary):
    """c_skip and c_out of Karras et al. 2022, arXiv:2206.00364, moved so that f is the state at `t_min`.

    With y = x / alpha, r = sigma / alpha, r_min that of t_min, and the network F as in EDM, D = a y + b F its x0,
        f = c_skip y + c_out F,   c_skip = sd^2 / ((r - r_min)^2 + sd^2),   c_out = sd (r - r_min) / sqrt(r^2 + sd^2)
    of Song et al. 2023, arXiv:2303.01469, App. C. Written over x0, as here, it serves networks of any prediction:
    F = (x0 - a y) / b, and c_out / b = 1 - r_min / r. At t_min f is y: x itself for EDM, x / alpha for others.

    sigma_data: the standard deviation of the data. t_min: None is that of the schedule.
    """

    name: ClassVar[str] = "edm"
    sigma_data: float = 0.5
    t_min: float | None = None

    def __post_init__(self) -> None:
        _check_positive("sigma_data", self.sigma_data)

    def end(self, schedule: Schedule) -> float:
        least = schedule.t_min if self.t_min is None else self.t_min
        if not schedule.t_zero < least < schedule.t_max:
            raise ValueError(
                f"t_min of a boundary must lie between {schedule.t_zero:g} and {schedule.t_max:g} of {schedule!r}, "
                f"got {least:g}; None takes the schedule's own"
            )
        return least

    def factors(self, schedule: Schedule, at: Node | Nodes) -> tuple[Any, Any]:
        least = node(schedule, self.end(schedule))
        inverse = least.alpha / least.sigma
        if isinstance(at, Nodes):
            skip, out = self._factors(at.alpha, at.sigma, inverse)
            inside, empty = at.t <= least.t, at.alpha == 0
            skip = torch.where(inside, 1 / at.alpha, torch.where(empty, 0, skip))
            return skip, torch.where(inside, 0, torch.where(empty, 1, out))
        if at.t <= least.t:  # by the time, not by sums that might miss 1 by a rounding
            return 1 / at.alpha, 0.0
        if at.alpha == 0:
            return 0.0, 1.0
        return self._factors(at.alpha, at.sigma, inverse)

    def _factors(self, alpha: Any, sigma: Any, inverse: float) -> tuple[Any, Any]:
        r, variance = sigma / alpha, self.sigma_data**2
        out = 1 - 1 / (r * inverse)
        skip = variance / ((r - 1 / inverse) ** 2 + variance) - out * variance / (r**2 + variance)
        return skip / alpha, out


@dataclass(frozen=True)
class LCMBoundary(Boundary):
    """That of latent consistency models, in the index of a VP schedule, 0 to 999: f = c_skip x + c_out x0 with
        c_skip = sd^2 / ((s index)^2 + sd^2),   c_out = s index / sqrt((s index)^2 + sd^2),   s = timestep_scaling
    so that f(x, 0) = x. Luo et al. 2023, arXiv:2310.04378, as their code and diffusers have it (s = 10, sd = 0.5).

    From index 1 on c_skip is below 0.0025: f is the network's x0 but for the very end.
    """

    name: ClassVar[str] = "lcm"
    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        _check_positive("sigma_data", self.sigma_data)
        _check_positive("timestep_scaling", self.timestep_scaling)

    def end(self, schedule: Schedule) -> float:
        schedule.index(schedule.t_max)  # which says why where there is none
        return schedule.t_min if float(schedule.index(schedule.t_min)) == 0 else schedule.t_zero

    def factors(self, schedule: Schedule, at: Node | Nodes) -> tuple[Any, Any]:
        t: Any = at.t
        index = schedule.index(t)
        variance = self.sigma_data**2
        if isinstance(index, Tensor):
            scaled = self.timestep_scaling * index.clamp(min=0)
            return variance / (scaled**2 + variance), scaled / (scaled**2 + variance).sqrt()
        far = self.timestep_scaling * max(index, 0.0)
        return variance / (far**2 + variance), far / math.sqrt(far**2 + variance)


BOUNDARIES: dict[str, type[Boundary]] = {kind.name: kind for kind in (EDMBoundary, LCMBoundary)}


def boundary(given: str | Boundary | Mapping[str, Any]) -> Boundary:
    """A boundary by name ("edm", "lcm"), or from its `settings`."""
    if isinstance(given, Boundary):
        return given
    numbers = {} if isinstance(given, str) else {key: value for key, value in given.items() if key != "name"}
    name = given if isinstance(given, str) else given.get("name")
    if name not in BOUNDARIES:
        raise ValueError(f"unknown boundary {name!r}; choose one of {', '.join(BOUNDARIES)}")
    kind = BOUNDARIES[str(name)]
    if unknown := numbers.keys() - {field.name for field in fields(kind)}:
        raise ValueError(f"boundary {name!r} has no {sorted(unknown)}; it has {[field.name for field in fields(kind)]}")
    return kind(**numbers)


class Bounded(Denoiser):
    """A network as a consistency function: `predict` is f(x, t) with a boundary, `output` what the network says.

    boundary: a `Boundary`, its name or its settings. The rest as for `Denoiser`. Sampled by `solvers.consistency` and
    by every other plan, like any model: f is its x0.
    """

    def __init__(
        self,
        network: Any,
        schedule: Schedule,
        predicts: str | Prediction = "eps",
        *,
        boundary: str | Boundary | Mapping[str, Any],
        time: str | TimeOf | None = None,
        dtype: torch.dtype | None = None,
        spacing: Spacing | None = None,
    ):
        super().__init__(network, schedule, predicts, time=time, dtype=dtype, spacing=spacing)
        self.boundary = _found(boundary)
        self.boundary.end(schedule)  # a schedule that does not fit is refused here

    def _pair(self, at: Node | Nodes) -> tuple[Any, Any]:
        u, w = super()._pair(at)
        skip, out = self.boundary.factors(self.schedule, at)
        return skip + out * u, out * w


_found = boundary  # the argument of `Bounded` has its name


def bounded(model: Denoiser, boundary: str | Boundary | Mapping[str, Any]) -> Bounded:
    """The same network, as a consistency function with this boundary."""
    return Bounded(
        model.network,
        model.schedule,
        model.prediction,
        boundary=boundary,
        time=model.time,
        dtype=model.dtype,
        spacing=model.spacing,
    )


def boundary_of(model: Any) -> Boundary | None:
    """The boundary of a model, or None: then f is its x0, and the path of training ends at sigma = 0."""
    return model.boundary if isinstance(model, Bounded) else None


class Scaled(nn.Module):
    """A network F as Karras et al. ask it, F(c_in x, c_noise), with c_in = 1 / sqrt(sigma^2 + sd^2).

    c_noise is noise_scale ln(sigma) / 4. Karras et al. 2022, arXiv:2206.00364, Table 1, where noise_scale is 1; the
    consistency models of Song et al. have 1000.
    """

    def __init__(self, network: nn.Module, *, sigma_data: float = 0.5, noise_scale: float = 1.0):
        super().__init__()
        _check_positive("sigma_data", sigma_data)
        self.network, self.sigma_data, self.noise_scale = network, sigma_data, noise_scale

    def forward(self, x: Tensor, sigma: Tensor, **condition: Any) -> Any:
        c_in = (sigma.square() + self.sigma_data**2).rsqrt()
        return self.network(
            c_in.to(x).view(-1, *[1] * (x.dim() - 1)) * x, self.noise_scale * sigma.log() / 4, **condition
        )


def karras_prediction(sigma_data: float = 0.5) -> Prediction:
    """F, of which x0 = sd^2 / (sigma^2 + sd^2) x + sigma sd / sqrt(sigma^2 + sd^2) F where alpha = 1.

    Karras et al. 2022, arXiv:2206.00364, Table 1. For other alpha x and sigma are divided by it.
    """
    variance = sigma_data**2

    def x0(a: Any, s: Any) -> tuple[Any, Any]:
        total = s * s + variance * a * a
        return variance * a / total, sigma_data * s / total**0.5

    def output(a: Any, s: Any) -> tuple[Any, Any]:
        u, w = x0(a, s)
        return -u / w, 1 / w

    return Prediction(f"karras({sigma_data:g})", output, x0)


def edm_model(
    network: nn.Module,
    schedule: Schedule | None = None,
    *,
    sigma_data: float = 0.5,
    noise_scale: float = 1.0,
    boundary: str | Boundary | Mapping[str, Any] | None = None,
) -> Denoiser:
    """A network F with c_in, c_noise, c_skip and c_out of EDM, and, with a boundary, those of a consistency model.

    schedule: an `fs.EDM`; None: one from 0.002 to 80. sigma_data, noise_scale: as for `Scaled`.
    Raises ValueError where alpha is not 1, as F knows x / alpha alone.
    """
    schedule = schedule or EDM()
    if not isinstance(schedule, EDM):
        raise ValueError(f"c_in of EDM is for alpha = 1, got {schedule!r}; take fs.EDM(), or a Bounded of the network")
    scaled = Scaled(network, sigma_data=sigma_data, noise_scale=noise_scale)
    predicts = karras_prediction(sigma_data)
    if boundary is None:
        return Denoiser(scaled, schedule, predicts, time="sigma")
    return Bounded(scaled, schedule, predicts, boundary=boundary, time="sigma")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} of a boundary must be positive and finite, got {value:g}")
