"""Samplers of other people's code that is on no package index, written anew from their formulas.

The official code of DPM-Solver (Lu et al. 2022, arXiv:2206.00927, arXiv:2211.01095) and UniPC (Zhao et al. 2023,
arXiv:2302.04867), and iPNDM, iPNDM_v and DEIS-tAB (Zhang and Chen 2023, arXiv:2204.13902) as the toolbox of AMED-Solver
(Zhou et al. 2024, arXiv:2312.00094) has them, with their own quirks: a peer is what people run, not what its paper
says. tests/bench/test_solver_study.py holds each to stored outputs of the original code.

All move y = x / alpha over levels sigma / alpha; `denoise(y, level)` is x0. levels, times: N + 1 numbers from the start
to the end, for N evaluations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]
Numbers = Sequence[float]


def dpm_solver(
    denoise: Denoise, y: Tensor, levels: Numbers, *, order: int, data: bool = True, lower_final: bool | None = None
) -> Tensor:
    """Multistep DPM-Solver++ (data) or DPM-Solver. Its third order halves the second difference: order 2 in truth.

    lower_final: let the order fall to 1 over the last steps; None: with less than ten of them, as the official code.
    """
    lam = [-math.log(level) for level in levels]
    known: list[tuple[Tensor, float]] = []
    count = len(levels) - 1
    lower_final = count < 10 if lower_final is None else lower_final
    for k in range(count):
        x0 = denoise(y, levels[k])
        value = x0 if data else (y - x0) / levels[k]
        known = [(value, lam[k]), *known][:3]
        used = min(order, len(known), count - k if lower_final else order)
        y = _dpm_step(y, known[:used], lam[k + 1], data)
    return y


def _dpm_step(y: Tensor, known: list[tuple[Tensor, float]], target: float, data: bool) -> Tensor:
    (m0, lam0), *others = known
    h = target - lam0
    scale = math.exp(-target)  # sigma / alpha there
    if data:
        kept, first = math.exp(-h), -math.expm1(-h)
        second, third = 1 - first / h, 0.5 - (1 - first / h) / h
        gain = 1.0
    else:
        kept, first = 1.0, -math.expm1(h)
        second, third = -(math.expm1(h) / h - 1), -((math.expm1(h) / h - 1) / h - 0.5)
        gain = scale
    y = kept * y + gain * first * m0
    if not others:
        return y
    m1, lam1 = others[0]
    r0 = (lam0 - lam1) / h
    d0 = (m0 - m1) / r0
    if len(others) == 1:
        return y + gain * 0.5 * first * d0
    m2, lam2 = others[1]
    r1 = (lam1 - lam2) / h
    d1 = (m1 - m2) / r1
    bend = (d0 - d1) / (r0 + r1)
    return y + gain * (second * (d0 + r0 * bend) + third * bend)


def unipc(
    denoise: Denoise,
    y: Tensor,
    levels: Numbers,
    *,
    order: int,
    data: bool = True,
    form: int = 2,
    lower_final: bool = True,
) -> Tensor:
    """UniPC with B_1(h) = h or B_2(h) = e^h - 1 (form), predictor and corrector; the last step is not corrected."""
    lam = [-math.log(level) for level in levels]
    known: list[tuple[Tensor, float]] = []
    before, count = y, len(levels) - 1
    used = 1
    for k in range(count):
        x0 = denoise(y, levels[k])
        value = x0 if data else (y - x0) / levels[k]
        if known:
            y = _unipc_step(before, known[:used], lam[k], data, form, value)
        before = y
        known = [(value, lam[k]), *known][:order]
        used = min(order, k + 1, count - k if lower_final else order)
        y = _unipc_step(before, known[:used], lam[k + 1], data, form, None)
    return y


def _unipc_step(
    y: Tensor, known: list[tuple[Tensor, float]], target: float, data: bool, form: int, new: Tensor | None
) -> Tensor:
    """known: newest first; new: the value at the target itself, which makes this a corrector."""
    (m0, lam0), *others = known
    h = target - lam0
    hh = -h if data else h
    level = math.exp(-target)
    gain = 1.0 if data else level
    factor = hh if form == 1 else math.expm1(hh)
    ratios = [(lam_i - lam0) / h for _, lam_i in others]
    differences = [(m - m0) / r for (m, _), r in zip(others, ratios)]
    y = (math.exp(-h) if data else 1.0) * y - gain * math.expm1(hh) * m0
    if new is not None:
        ratios, differences = [*ratios, 1.0], [*differences, new - m0]
    if not ratios:
        return y
    for weight, difference in zip(_unipc_weights(ratios, hh, factor), differences):
        y = y - gain * factor * weight * difference
    return y


def _unipc_weights(ratios: list[float], hh: float, factor: float) -> list[float]:
    if len(ratios) == 1:
        return [0.5]  # of any form: what makes the two differ at order 2
    right, phi, factorial = [], math.expm1(hh) / hh - 1, 1.0
    for i in range(1, len(ratios) + 1):
        right.append(phi * factorial / factor)
        factorial *= i + 1
        phi = phi / hh - 1 / factorial
    matrix = np.vander(np.array(ratios), increasing=True).T
    return [float(weight) for weight in np.linalg.solve(matrix, np.array(right))]


ADAMS = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def ipndm(denoise: Denoise, y: Tensor, levels: Numbers, *, order: int) -> Tensor:
    """iPNDM: Adams-Bashforth in sigma / alpha with the weights of equal steps, whatever the steps are."""
    known: list[Tensor] = []
    for s, t in pairwise(levels):
        known = [(y - denoise(y, s)) / s, *known][:order]
        for weight, eps in zip(ADAMS[len(known)], known):
            y = y + (t - s) * weight * eps
    return y


def ipndm_v(denoise: Denoise, y: Tensor, levels: Numbers, *, order: int) -> Tensor:
    """iPNDM_v: Adams-Bashforth for unequal steps, with the two slips of the toolbox.

    The second difference takes (1 - a b) / 2 where (1 - a) b / 2 is right, and the last value of the third h1 / h2
    where h2 / h3 is right. With equal steps both are right.
    """
    known: list[Tensor] = []
    for k in range(len(levels) - 1):
        s, h = levels[k], levels[k + 1] - levels[k]
        known = [(y - denoise(y, s)) / s, *known][:order]
        past = [levels[k - i] - levels[k - i - 1] for i in range(len(known) - 1)]
        f = known
        change = f[0]
        if len(f) > 1:
            h1 = past[0]
            change = change + h / h1 / 2 * (f[0] - f[1])
        if len(f) > 2:
            h2 = past[1]
            a, b = h / (3 * (h + h1)), h * (h + h1) / (h1 * (h1 + h2))
            change = change + (1 - a * b) / 2 * (f[0] - f[1] - h1 / h2 * (f[1] - f[2]))
        if len(f) > 3:
            h3 = past[2]
            share = (1 - a) / 2 + (1 - h / (2 * (h + h1))) * h / (6 * (h + h1 + h2))
            share *= h * (h + h1) * (h + h1 + h2) / (h1 * (h1 + h2) * (h1 + h2 + h3))
            q = h1 * (h1 + h2) / (h2 * (h2 + h3))
            third = f[0] - (1 + h1 / h2 + q) * f[1] + (h1 / h2 + q * (1 + h2 / h3)) * f[2] - q * h1 / h2 * f[3]
            change = change + share * third
        y = y + h * change
    return y


def deis(
    denoise: Denoise, y: Tensor, levels: Numbers, times: Numbers, *, order: int, level_at: Callable[[float], float]
) -> Tensor:
    """DEIS-tAB: eps as a polynomial of degree `order` in t through the last evaluations.

    level_at: sigma / alpha at a time. The weights are integrals over the level, by Gauss-Legendre quadrature.
    """
    known: list[tuple[Tensor, float]] = []
    points, weights = np.polynomial.legendre.leggauss(16)
    for k in range(len(levels) - 1):
        s, t = times[k], times[k + 1]
        known = [((y - denoise(y, levels[k])) / levels[k], s), *known][: order + 1]
        at = (s + t) / 2 + (t - s) / 2 * points
        # the integral of a polynomial over the level, by parts: the level is known at any time, its slope is not
        for j, (eps, tj) in enumerate(known):
            others = [ti for i, (_, ti) in enumerate(known) if i != j]
            value = np.ones_like(at)
            slope = np.zeros_like(at)
            for ti in others:
                slope = slope * (at - ti) / (tj - ti) + value / (tj - ti)
                value = value * (at - ti) / (tj - ti)
            ends = [math.prod((moment - ti) / (tj - ti) for ti in others) for moment in (s, t)]
            inner = float((weights * slope * np.array([level_at(float(u)) for u in at])).sum()) * (t - s) / 2
            y = y + (levels[k + 1] * ends[1] - levels[k] * ends[0] - inner) * eps
    return y
