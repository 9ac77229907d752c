"""Exact denoisers: models that know E[x0 | x] in closed form, for tests and for measuring solvers.

With x = alpha x0 + sigma eps and a known distribution of x0 there is nothing to train and nothing to blame: what
separates a sample from the exact endpoint of the probability-flow ODE is the solver's error alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsample.gaussian import Gaussian
from fastsample.grid import Node, Nodes, per_sample
from fastsample.schedule import Schedule


@dataclass(frozen=True)
class GaussianMixture:
    """The denoiser of a mixture of Gaussians with diagonal covariances; one component is a Gaussian.

    weights: [K], positive; they are normalised. means: [K, ...], one mean of the shape of a sample for each
    component. variances: like means, or what broadcasts to them, such as [K, 1] for vectors.

    `predict` computes in the dtype of x and ignores conditions: E[x0 | x] = sum_k r_k (m_k + g_k (x - alpha m_k)) with
    g_k = alpha v_k / (alpha^2 v_k + sigma^2), r_k the posterior weight of component k.
    """

    schedule: Schedule
    weights: Tensor
    means: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        weights, means = (torch.as_tensor(a, dtype=torch.float64) for a in (self.weights, self.means))
        if weights.dim() != 1 or means.dim() < 2 or len(weights) != len(means):
            raise ValueError(
                f"weights must be [K] and means [K, ...], got shapes {tuple(weights.shape)} and {tuple(means.shape)}"
            )
        if not bool((weights > 0).all()):
            raise ValueError(f"weights must be positive, got {weights.tolist()}")
        variances = torch.as_tensor(self.variances, dtype=torch.float64).to(means.device)
        if not bool((variances >= 0).all()):
            raise ValueError(f"variances must not be negative, got {float(variances.min()):g}")
        object.__setattr__(self, "weights", weights / weights.sum())
        object.__setattr__(self, "means", means)
        object.__setattr__(self, "variances", variances.expand(means.shape))

    def predict(self, x: Tensor, node: Node | Nodes, **condition: Any) -> Tensor:
        m, v = (a.to(x).flatten(1) for a in (self.means, self.variances))
        rows = x.flatten(1).unsqueeze(1)
        alpha, sigma = per_sample(node.alpha, rows), per_sample(node.sigma, rows)
        total = alpha**2 * v + sigma**2  # the variance of x in each component, [K, D] or [B, K, D]
        away = rows - alpha * m  # [B, K, D]
        logits = self.weights.to(x).log() - 0.5 * (away**2 / total + total.log()).sum(-1)
        x0 = m + alpha * v / total * away
        return (logits.softmax(-1).unsqueeze(-1) * x0).sum(1).view_as(x)

    def sample(self, n: int, seed: int) -> Tensor:
        """n samples of the distribution, [n, ...], float64, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        k = torch.multinomial(self.weights.cpu(), n, replacement=True, generator=generator).to(self.means.device)
        eps = torch.randn((n, *self.means.shape[1:]), generator=generator, dtype=torch.float64)
        return self.means[k] + self.variances[k].sqrt() * eps.to(self.means.device)


def gaussian_flow(x: Tensor, s: Node, t: Node, mean: Tensor | float, variance: Tensor | float) -> Tensor:
    """Where the probability-flow ODE takes x from node s to node t if the data is Gaussian: the exact map.

    x: [B, ...]; mean, variance: of the data, broadcast to a sample. Finite at alpha = 0 and at sigma = 0. Each
    coordinate keeps its distance to the mean in standard deviations of its marginal, sqrt(alpha^2 v + sigma^2).
    """
    return Gaussian(torch.as_tensor(mean), torch.as_tensor(variance)).move(x, s, t)


@dataclass(frozen=True)
class Empirical:
    """The optimal denoiser of a data set: its mean, weighted by how likely each point would have become x.

    data: [N, ...]; `predict` computes in the dtype of x, also under autocast, and ignores conditions. The best that any
    network trained on `data` could learn; it samples the training points themselves. Karras et al. 2022,
    arXiv:2206.00364, App. B.3.
    blur: the standard deviation of Gaussian noise added to each point: a mixture with a component for each of them.

    A batch is worked on in pieces of at most `limit` distances (and so many numbers of memory), or one sample.
    """

    schedule: Schedule
    data: Tensor
    limit: int = 2**22
    blur: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        if self.data.dim() < 2 or not len(self.data):
            raise ValueError(f"data must be [N, ...] with N of at least 1, got shape {tuple(self.data.shape)}")
        if not 0 <= self.blur < math.inf:
            raise ValueError(f"blur is a standard deviation, at least 0, got {self.blur:g}")

    def predict(self, x: Tensor, node: Node | Nodes, **condition: Any) -> Tensor:
        if not len(x):
            return x.clone()
        if isinstance(node, Nodes):
            each = zip(x.split(1), node.t.tolist(), node.alpha.tolist(), node.sigma.tolist())
            return torch.cat([self.predict(row, Node(*numbers)) for row, *numbers in each])
        with torch.autocast(x.device.type, enabled=False):
            data = self.data.to(x).flatten(1)
            pieces = x.flatten(1).split(max(1, self.limit // len(data)))
            return torch.cat([self._mean(piece, data, node) for piece in pieces]).view_as(x)

    def _mean(self, x: Tensor, data: Tensor, node: Node) -> Tensor:
        alpha, variance = node.alpha, self.blur**2
        total = alpha**2 * variance + node.sigma**2  # the variance of x around alpha times a point
        if x.dtype == torch.float64:  # |x|^2 is the same for all points and drops out
            logits = torch.addmm(data.square().sum(-1) * (-0.5 * alpha**2 / total), x, data.T, alpha=alpha / total)
        else:  # distances from differences: the products cancel, and are divided by a small sigma^2
            away = torch.cdist(x, alpha * data, compute_mode="donot_use_mm_for_euclid_dist")
            logits = -0.5 * away.square() / total
        point = logits.softmax(-1) @ data
        if not variance:
            return point
        return point + (alpha * variance / total) * (x - alpha * point)
