"""Solvers that add noise: exponential integrators of the reverse SDE, and ODE steps with noise put back ("ancestral").

The SDE with noise eta (0: the probability-flow ODE, 1: the reverse of the forward process, any number above) has, for
x0 held constant from s to t, h = t.lam - s.lam, the exact solution

    x_t = sigma_t / sigma_s e^(-eta h) x_s + alpha_t (1 - e^(-(1 + eta) h)) x0 + sigma_t sqrt(1 - e^(-2 eta h)) z

so a step is that of DPM-Solver++ with its mean of x0 under the weight e^((1 + eta) lam). Xue et al. 2023,
arXiv:2309.05019, Prop. 4.2, whose tau^2 is this eta; Lu et al. 2022, arXiv:2211.01095, App. D, has eta = 1. As
k-diffusion, in whose samplers it is `eta` too; `ddim` has another eta, equal to this one at 0 and 1 alone.

At sigma = 0, and from alpha = 0, h is infinite: such a step is of first order, and to sigma = 0 it adds no noise.
The error of the end's distribution falls as 1 / steps for solvers of order 1 and as 1 / steps^2 for all others, 3M
too: noise bounds the order (measured on a Gaussian, tests/solvers/test_stochastic.py).
"""

from __future__ import annotations

import math

from torch import Tensor

from fastsample.grid import Grid, Node, exponential_step

from .ddim import gained
from .exponential import moments
from .forms import check_number
from .types import Predictor


def sde_dpmpp_1(model: Predictor, x: Tensor, grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:
    """SDE-DPM-Solver++(1). One evaluation a step. Lu et al. 2022, arXiv:2211.01095, App. D. eta = 1 equals `ddpm`.

    eta: how much noise, at least 0; 0 is `dpmpp_1`. s_noise: the standard deviation of the noise, as in `heun`.
    """
    _check(eta, s_noise)
    for s, t in grid.steps():
        x = _noisy_step(model, x, model.predict(x, s), s, t, eta, s_noise)
    return x


def sde_dpmpp_2m(
    model: Predictor, x: Tensor, grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0, midpoint: bool = True
) -> Tensor:
    """SDE-DPM-Solver++(2M). One evaluation a step. Lu et al. 2022, arXiv:2211.01095, App. D. eta = 0 is `dpmpp_2m`.

    eta, s_noise: as for `sde_dpmpp_1`. midpoint: take x0 in the middle of the step, as the paper; False: its exact
        mean over the step ("heun" of k-diffusion and diffusers).
    """
    _check(eta, s_noise)
    old: tuple[Tensor, Node] | None = None
    for k, (s, t) in enumerate(grid.steps()):
        x0 = mean = model.predict(x, s)
        if old and t.sigma > 0 and grid.order(k, 2) == 2:
            h = t.lam - s.lam
            place = 0.5 if midpoint else moments((1 + eta) * h, 1)[0]
            mean = x0 + (place * h / (s.lam - old[1].lam)) * (x0 - old[0])
        x = _noisy_step(model, x, mean, s, t, eta, s_noise)
        old = x0, s
    return x


def sde_dpmpp_3m(
    model: Predictor, x: Tensor, grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0, curvature: float = 1.0
) -> Tensor:
    """SDE-DPM-Solver++(3M). One evaluation a step; with eta = 0 it is `dpmpp_3m`.

    Lu et al. 2022, arXiv:2211.01095, stops at 2M; this is the next member, "dpmpp_3m_sde" of k-diffusion.
    eta, s_noise: as for `sde_dpmpp_1`. curvature: as for `dpmpp_3m`; k-diffusion has 0.5.
    """
    _check(eta, s_noise)
    check_number("curvature", curvature, -math.inf)
    old: list[tuple[Tensor, Node]] = []  # newest first
    for k, (s, t) in enumerate(grid.steps()):
        x0 = mean = model.predict(x, s)
        known = old[: grid.order(k, 3) - 1] if t.sigma > 0 else []
        if known:
            (x1, n1), h = known[0], t.lam - s.lam
            u, u2 = moments((1 + eta) * h, 2)
            slope = (x0 - x1) * (h / (s.lam - n1.lam))  # Newton's divided differences, in units of h
            mean = x0 + u * slope
        if len(known) == 2:
            x2, n2 = known[1]
            bend = (slope - (x1 - x2) * (h / (n1.lam - n2.lam))) * (h / (s.lam - n2.lam))
            mean = mean + (u * (s.lam - n1.lam) / h + curvature * u2) * bend
        x = _noisy_step(model, x, mean, s, t, eta, s_noise)
        old = [(x0, s), *old[:1]]
    return x


def sde_dpmpp_2s(model: Predictor, x: Tensor, grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:
    """SDE-DPM-Solver++(2S). Two evaluations a step, one where it is infinite in lam; with eta = 0 it is `dpmpp_2s`.

    k-diffusion's "dpmpp_sde" at eta = 1, r = 1/2, but for its noises: here that of the whole step is made of those of
    its halves, as the SDE has it, where k-diffusion adds up a Brownian motion in sigma.
    eta, s_noise: as for `sde_dpmpp_1`.
    """
    _check(eta, s_noise)
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        middle = _between(grid, s, t)
        if middle is None:
            x = _noisy_step(model, x, x0, s, t, eta, s_noise)
            continue
        z: Tensor | float = model.noise() if eta > 0 else 0.0
        x0 = model.predict(_moved(x, x0, z, s, middle, eta, s_noise), middle)
        keep, gain, _ = reverse(s, t, eta)
        x = keep * x + gain * x0
        if eta > 0:
            kept, _, second = reverse(middle, t, eta)
            first = kept * reverse(s, middle, eta)[2]
            x = x + (s_noise * first) * z + (s_noise * second) * model.noise()
    return x


def euler_ancestral(model: Predictor, x: Tensor, grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:
    """Euler, to below t, then noise up to t. One evaluation a step. "euler_ancestral" of k-diffusion, any schedule.

    With s_noise = 1 it equals `ddim` of the same eta: Song et al. 2021, arXiv:2010.02502, Eq. 12 and 16.
    eta: how much of the noise at t is new; 0 is `euler`, 1 equals `ddpm`; above, all noise may be new.
    s_noise: the standard deviation of the new noise, as in `heun`.
    """
    _check(eta, s_noise)
    for s, t in grid.steps():
        below, fresh = _below(s, t, eta)
        x = _raised(model, exponential_step(x, model.predict(x, s), s, below), fresh * s_noise)
    return x


def euler_ancestral_flow(model: Predictor, x: Tensor, grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:
    """`euler_ancestral` as used for rectified flows ("Euler ancestral RF" of ComfyUI and diffusers' LTX scheduler).

    Euler to tau_t (1 + eta (tau_t / tau_s - 1)), then noise up to t, with tau = sigma / (alpha + sigma): sigma itself
    for `fs.Flow`; other schedules are taken in the frame of flow.py. Its eta = 1 adds less noise than that of
    `euler_ancestral`.
    eta: how much noise, in [0, 1]; 0 is `euler`. s_noise: as for `euler_ancestral`.
    """
    check_number("eta", eta, 0, 1, ": there is no noise level below 0 to step to")
    check_number("s_noise", s_noise)
    for s, t in grid.steps():
        before, tau = (node.sigma / (node.alpha + node.sigma) for node in (s, t))
        less = eta * (1 - tau / before)  # the share of tau_t to step further; exactly 0, and so no noise, at eta = 0
        kept = (1 - less) / (1 + less * t.sigma / t.alpha)  # of the level sigma / alpha
        x = exponential_step(x, model.predict(x, s), s, Node(t.t, t.alpha, kept * t.sigma))
        x = _raised(model, x, t.sigma * math.sqrt(1 - kept**2) * s_noise)
    return x


def dpm2_ancestral(model: Predictor, x: Tensor, grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:
    """DPM-Solver-2 of Karras' form (eps at the middle in lam), to below t, then noise up to t.

    "dpm_2_ancestral" of k-diffusion. Two evaluations a step, one where it is infinite in lam. eta, s_noise: as for
    `euler_ancestral`; eta = 0 has order 2.
    """
    _check(eta, s_noise)
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        below, fresh = _below(s, t, eta)
        middle = _between(grid, s, below)
        if middle is None:
            x = exponential_step(x, x0, s, below)
        else:
            there = exponential_step(x, x0, s, middle)
            eps = (there - middle.alpha * model.predict(there, middle)) / middle.sigma
            x = (below.alpha / s.alpha) * x + (below.sigma - below.alpha * s.sigma / s.alpha) * eps
        x = _raised(model, x, fresh * s_noise)
    return x


def dpmpp_2s_ancestral(model: Predictor, x: Tensor, grid: Grid, *, eta: float = 1.0, s_noise: float = 1.0) -> Tensor:
    """`dpmpp_2s` to below t, then noise up to t. "dpmpp_2s_ancestral" of k-diffusion.

    Two evaluations a step, one where it is infinite in lam. eta, s_noise: as for `euler_ancestral`; eta = 0 is
    `dpmpp_2s`.
    """
    _check(eta, s_noise)
    for s, t in grid.steps():
        x0 = model.predict(x, s)
        below, fresh = _below(s, t, eta)
        middle = _between(grid, s, below)
        if middle is not None:
            x0 = model.predict(exponential_step(x, x0, s, middle), middle)
        x = _raised(model, exponential_step(x, x0, s, below), fresh * s_noise)
    return x


def reverse(s: Node, t: Node, eta: float) -> tuple[float, float, float]:
    """(keep, gain, std) of the SDE's exact step for constant x0: x_t = keep x_s + gain x0 + std z."""
    h = t.lam - s.lam
    keep = t.sigma / s.sigma * (math.exp(-eta * h) if eta > 0 else 1.0)  # 0 times an infinite h would be NaN
    std = t.sigma * math.sqrt(-math.expm1(-2 * eta * h)) if eta > 0 else 0.0
    return keep, t.alpha * -math.expm1(-(1 + eta) * h), std


def _noisy_step(model: Predictor, x: Tensor, x0: Tensor, s: Node, t: Node, eta: float, s_noise: float) -> Tensor:
    z: Tensor | float = model.noise() if eta > 0 and t.sigma > 0 else 0.0
    return _moved(x, x0, z, s, t, eta, s_noise)


def _moved(x: Tensor, x0: Tensor, z: Tensor | float, s: Node, t: Node, eta: float, s_noise: float) -> Tensor:
    keep, gain, std = reverse(s, t, eta)
    return keep * x + gain * x0 + (s_noise * std) * z


def _below(s: Node, t: Node, eta: float) -> tuple[Node, float]:
    """Where an ODE step must end so that noise brings it to t, and that noise's standard deviation.

    The node has the alpha of t, so the noise is added without a scaling. No network is asked there.
    """
    fresh = min(t.sigma, eta * t.sigma * math.sqrt(gained(s, t)))
    return Node(t.t, t.alpha, math.sqrt(t.sigma**2 - fresh**2)), fresh


def _raised(model: Predictor, x: Tensor, std: float) -> Tensor:
    return x + std * model.noise() if std > 0 else x


def _between(grid: Grid, s: Node, t: Node) -> Node | None:
    """The node in the middle in lam; None where there is none: the step is infinite, or so long that none is finite."""
    if not (s.alpha > 0 and t.sigma > 0):
        return None
    middle = grid.node((s.lam + t.lam) / 2)
    return middle if s.lam < middle.lam < t.lam else None


def _check(eta: float, s_noise: float) -> None:
    check_number("eta", eta, hint=": 0 adds no noise")
    check_number("s_noise", s_noise)
