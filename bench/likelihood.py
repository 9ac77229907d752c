"""The exact likelihood of samples under a model, by the probability-flow ODE.

Every schedule is turned onto one circle: z = x / r, r = (alpha^2 + sigma^2)^1/2, tan(theta) = sigma / alpha. There

    dz / du = cos(theta) z - x0,   d log p / du = -(D cos(theta) - r tr dx0/dx),   u = log tan(theta / 2),

which is finite at alpha = 0 (u = 0), as it is not in lam. Song et al. 2021, arXiv:2011.13456, Sec. 4.3 and App. D.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastsample.denoiser import Model
from fastsample.grid import Node, node
from fastsample.schedule import Schedule

from .measure import Score

Trace = Literal["exact", "hutchinson"]
TraceOf = Callable[[Tensor, Tensor], Tensor]  # x0 and x, [B, D] -> the trace of dx0/dx, or guesses of it, [B, P]


@dataclass(frozen=True)
class NegativeLogLikelihood:
    """The mean -log p, in nats, of samples under a known distribution: a quality measure, called on the samples.

    density: a model (then log p is that of `nll`, to `rtol`), or a function: samples [n, ...] -> log p [n].
    Its best value is the distribution's own entropy, which samples of it have: one below that sits too near the modes.
    """

    density: Model | Callable[[Tensor], Tensor]
    name: str = "nll"
    rtol: float = 1e-5

    def __call__(self, samples: Tensor) -> Score:
        if len(samples) < 2:
            raise ValueError(f"a standard error takes at least 2 samples, got {len(samples)}")
        nats = self._nats(samples).detach().double()
        if nats.shape != samples.shape[:1]:
            raise ValueError(f"the density must give log p [{len(samples)}], one a sample, got {list(nats.shape)}")
        if not bool(nats.isfinite().all()):
            raise ValueError(f"{int((~nats.isfinite()).sum())} of {len(nats)} samples have no finite likelihood")
        return Score(float(nats.mean()), float(nats.std()) / math.sqrt(len(nats)), n=len(nats))

    def _nats(self, samples: Tensor) -> Tensor:
        if isinstance(getattr(self.density, "schedule", None), Schedule):
            return nll(self.density, samples, rtol=self.rtol).nats  # type: ignore[arg-type]
        return -self.density(samples)  # type: ignore[operator]


@dataclass(frozen=True)
class Likelihood:
    """nats: -log p of each sample, [n], float64. se: of Hutchinson's guess of it, [n]; None where it is not known.

    latent: the noise end of each sample, [n, ...], the state at t_max. nfe: network evaluations of each sample, [n];
    products: of a vector with the network's Jacobian, [n], each about as costly as an evaluation again.
    """

    nats: Tensor
    se: Tensor | None
    latent: Tensor
    nfe: Tensor
    products: Tensor

    @property
    def bits_per_dim(self) -> Tensor:
        """[n]; of 8-bit images, which became x / 127.5 - 1, add log2(127.5) for the scale of bytes."""
        return self.nats / (self.latent[0].numel() * math.log(2))


def nll(
    model: Model,
    x: Tensor,
    *,
    trace: Trace = "exact",
    probes: int = 4,
    seed: int = 0,
    steps: int | None = None,
    rtol: float = 1e-6,
    batch: int = 64,
    condition: Mapping[str, Any] | None = None,
) -> Likelihood:
    """How unlikely x [n, ...] is where the model's flow ends, at t_min, in float64; at t_max it is N(0, sigma^2).

    The density at t_min is that of data with a noise of sigma(t_min); bytes must be made continuous (x + noise of one
    level's width) before they have one.

    trace: "exact" takes a product with the Jacobian for each of the D numbers of a sample at every evaluation,
        "hutchinson" one for each of `probes` Rademacher vectors, fixed along the way: unbiased, with a standard error
        from two probes on. Hutchinson 1989; Grathwohl et al. 2019, arXiv:1810.01367.
    seed: of the probes: sample i has its own, whatever n and `batch`.
    steps: so many steps of the classic Runge-Kutta method, 4 evaluations each, even in u; None: DOP853 with the
        relative tolerance rtol (for a network in float32 no less than 1e-5). batch: of samples that share steps.
    condition: handed to the model.
    """
    _check(x, trace, rtol, {"probes": probes, "batch": batch, "steps": 1 if steps is None else steps})
    schedule, given = model.schedule, dict(condition or {})
    device, x = x.device, x.detach().to("cpu", torch.float64)
    ends = node(schedule, schedule.t_min), node(schedule, schedule.t_max)
    if ends[1].alpha == 0:  # the last place that is visited: what cannot be asked there says so at once
        model.predict(x[:1].to(device), ends[1], **given)
    vectors = _rademacher(len(x), probes, x[0].numel(), seed) if trace == "hutchinson" else None

    pieces = []
    for first in range(0, len(x), batch):
        rows = slice(first, first + batch)
        tracer: TraceOf = _exact if vectors is None else _Hutchinson(vectors[rows])
        flow = _Flow(model, given, tracer, x[rows].shape, ends, device)
        columns = 1 if vectors is None else probes
        pieces.append(_run(flow, x[rows], columns, steps, rtol))
    latent, change, calls = (torch.cat(part) for part in zip(*pieces))
    each = x[0].numel()
    last = ends[1].sigma
    prior = 0.5 * (latent / last).square().flatten(1).sum(1) + each * (math.log(last) + 0.5 * math.log(2 * math.pi))
    scale = each * (math.log(_radius(ends[0])) - math.log(_radius(ends[1])))
    guesses = prior[:, None] + scale + change
    se = guesses.std(1) / math.sqrt(probes) if vectors is not None and probes > 1 else None
    return Likelihood(guesses.mean(1), se, latent, calls, calls * (each if vectors is None else probes))


def _check(x: Tensor, trace: str, rtol: float, counts: dict[str, int]) -> None:
    if trace not in ("exact", "hutchinson"):
        raise ValueError(f"trace must be 'exact' or 'hutchinson', got {trace!r}")
    if x.dim() < 2 or not len(x) or not bool(x.isfinite().all()):
        raise ValueError(f"x must be finite samples [n, ...], got shape {list(x.shape)}")
    for name, number in counts.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol is a relative tolerance between 0 and 1, got {rtol:g}")


def _run(flow: _Flow, x: Tensor, columns: int, steps: int | None, rtol: float) -> tuple[Tensor, Tensor, Tensor]:
    """From t_min to t_max: the latents, by how much log p of z changes, [n, columns], and the calls, [n]."""
    first, last = flow.ends
    z = x / _radius(first)
    state = torch.cat([z.flatten(), z.new_zeros(len(x) * columns)])
    span = _place(first), _place(last)
    done = _dop853(flow, state, span, rtol) if steps is None else _runge_kutta(flow, state, span, steps)
    z, change = done[: x.numel()].view_as(x), done[x.numel() :].view(len(x), columns)
    return z * _radius(last), change, torch.full((len(x),), flow.calls)


class _Flow:
    """The slope of z and, for each guess of the trace, of log p; flat float64 in and out. It counts its calls."""

    def __init__(
        self,
        model: Model,
        condition: dict[str, Any],
        trace: TraceOf,
        shape: torch.Size,
        ends: tuple[Node, Node],
        device: torch.device,
    ) -> None:
        self.model, self.condition, self.trace = model, condition, trace
        self.shape, self.ends, self.device = shape, ends, device
        self.calls = 0

    def __call__(self, u: float, state: Tensor) -> Tensor:
        self.calls += 1
        here = self._node(u)
        radius = _radius(here)
        cosine, each = here.alpha / radius, math.prod(self.shape[1:])
        z = state[: math.prod(self.shape)].view(self.shape)
        x = (radius * z).to(self.device).requires_grad_()
        with torch.enable_grad():
            x0 = self.model.predict(x, here, **self.condition)
            if not x0.requires_grad:
                raise ValueError("the model does not say how its x0 depends on x; let it run without torch.no_grad()")
            traces = self.trace(x0, x).cpu()
        slope = cosine * z - x0.detach().cpu()
        return torch.cat([slope.flatten(), (radius * traces - each * cosine).flatten()])

    def _node(self, u: float) -> Node:
        first, last = self.ends
        if u <= _place(first):
            return first
        if u >= _place(last):  # at alpha = 0, lam is infinite
            return last
        schedule = self.model.schedule
        return node(schedule, float(schedule.time(math.log(-math.sinh(u)))))


def _exact(x0: Tensor, x: Tensor) -> Tensor:
    """[B, 1]. A column of the Jacobian at a time, which any network allows; samples do not mix."""
    total = x.new_zeros(len(x))
    columns = x0.flatten(1).unbind(1)
    for k, column in enumerate(columns):
        (row,) = torch.autograd.grad(column.sum(), x, retain_graph=k + 1 < len(columns))
        total = total + row.flatten(1)[:, k]
    return total[:, None]


@dataclass(frozen=True)
class _Hutchinson:
    """[B, P]: v . J v for each of the vectors [B, P, D]."""

    vectors: Tensor

    def __call__(self, x0: Tensor, x: Tensor) -> Tensor:
        found, count = [], self.vectors.shape[1]
        for k, v in enumerate(self.vectors.unbind(1)):
            (product,) = torch.autograd.grad(x0.flatten(1), x, v.to(x0), retain_graph=k + 1 < count)
            found.append((product.flatten(1) * v.to(product)).sum(1))
        return torch.stack(found, dim=1)


def _rademacher(n: int, probes: int, each: int, seed: int) -> Tensor:
    """[n, probes, each] of -1 and 1; those of the first samples are the same for any n."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, (n, probes, each), generator=generator).double() * 2 - 1


def _radius(node: Node) -> float:
    return math.hypot(node.alpha, node.sigma)


def _place(node: Node) -> float:
    """u of a node: tan(theta / 2) = sigma / (r + alpha)."""
    return math.log(node.sigma / (_radius(node) + node.alpha))


def _dop853(flow: _Flow, state: Tensor, span: tuple[float, float], rtol: float) -> Tensor:
    from scipy.integrate import solve_ivp

    def slope(u: float, y: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        return flow(u, torch.from_numpy(y)).numpy()

    done = solve_ivp(slope, span, state.numpy(), "DOP853", rtol=rtol, atol=rtol)
    if not done.success:
        raise RuntimeError(
            f"the flow did not converge to rtol = {rtol:g}: {done.message}; take a larger one, or steps="
        )
    return torch.from_numpy(np.ascontiguousarray(done.y[:, -1]))


def _runge_kutta(flow: _Flow, state: Tensor, span: tuple[float, float], steps: int) -> Tensor:
    h = (span[1] - span[0]) / steps
    for k in range(steps):
        u = span[0] + k * h
        after = span[1] if k + 1 == steps else u + h
        first = flow(u, state)
        second = flow(u + h / 2, state + h / 2 * first)
        third = flow(u + h / 2, state + h / 2 * second)
        fourth = flow(after, state + h * third)
        state = state + h / 6 * (first + 2 * second + 2 * third + fourth)
    return state
