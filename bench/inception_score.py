"""The Inception Score: exp of how far p(class | image) lies from p(class). Without a reference, and blind to one.

IS = exp(mean_i KL(p_i || q)),  p_i = softmax(logits_i),  q = mean_i p_i        Salimans et al. 2016, arXiv:1606.03498
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from .measure import Features, Score


@dataclass(frozen=True)
class InceptionScore:
    """A `Measure` of logits: features must be a classifier's scores before softmax. Inception's make it comparable.

    "all" is the score of all samples at once. "split" is what papers print, the mean over `splits` parts in the order
    of the samples, lower by their small size: its error is their standard deviation over sqrt(splits).
    """

    name: str
    features: Features
    splits: int = 10

    def score(self, features: Tensor) -> dict[str, Score]:
        n, found = len(features), inception_score(features, splits=self.splits)
        se = found.split_sd / math.sqrt(self.splits - 1)  # their sd divides by the number of parts, not by one less
        return {
            "all": Score(found.value, found.se, found.debiased, n, "more"),
            "split": Score(found.split_mean, se, n=n, better="more"),
        }

    def influence(self, features: Tensor) -> dict[str, Tensor]:
        """[n], of the score of all samples: how much each moves it."""
        return {"all": inception_score(features, splits=self.splits).influence}


@dataclass(frozen=True)
class Confidence:
    """An Inception Score. debiased: less the bias of order 1/n. influence: [n].

    split_mean, split_sd: over the parts, the sd that of the parts themselves, as in the authors' code.
    """

    value: float
    se: float
    debiased: float
    split_mean: float
    split_sd: float
    influence: Tensor = field(repr=False, compare=False)


def inception_score(logits: Tensor, *, splits: int = 10) -> Confidence:
    """Of logits [n, classes], in float64.

    The influence of sample i on log IS is KL(p_i || q) less its mean: that q moves too has no effect to first order.
    To second order it has one, the bias: q of n samples is too near to each of them, by sum_c var(p_c) / (2 n q_c).
    """
    if splits < 2:
        raise ValueError(f"splits must be at least 2, got {splits}; all samples at once are scored in any case")
    if logits.dim() != 2 or logits.shape[1] < 2 or len(logits) < 2 * splits:
        raise ValueError(
            f"logits must be [n, classes], of two classes and {2 * splits} samples at least for {splits} splits, "
            f"got {list(logits.shape)}"
        )
    if not bool(logits.isfinite().all()):
        raise ValueError("logits hold NaN or infinity")
    logs = logits.detach().to("cpu", torch.float64).log_softmax(1)
    n = len(logs)
    away = _divergence(logs)
    value = math.exp(float(away.mean()))
    influence = value * (away - away.mean())
    se = float(influence.std()) / math.sqrt(n)
    p = logs.exp()
    low = float((p.var(0) / p.mean(0).clamp(min=torch.finfo(p.dtype).tiny)).sum()) / (2 * n)
    # exp of a number with an error is too large on average, by half of its variance
    debiased = value * (1 + low - 0.5 * (se / value) ** 2)
    bounds = [k * n // splits for k in range(splits + 1)]
    parts = torch.stack([_divergence(logs[a:b]).mean().exp() for a, b in pairwise(bounds)])
    return Confidence(value, se, debiased, float(parts.mean()), float(parts.std(correction=0)), influence)


def _divergence(logs: Tensor) -> Tensor:
    """KL(p_i || q), [n], from log p [n, classes]; the mean of p in the log, so that no class underflows."""
    q = logs.logsumexp(0) - math.log(len(logs))
    return (logs.exp() * (logs - q)).sum(1)
