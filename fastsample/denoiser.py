"""Denoisers: any network, asked for x0.

A model, for every solver and for `sample`, is whatever has a `schedule` and `predict(x, node, **condition) -> x0`.
Those here also answer at `Nodes`, where each sample has its own time, as training asks.
`Denoiser` makes one of a network; guidance and thresholding wrap one in another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .card import Card
from .grid import Node, Nodes, per_sample
from .plan import Plan
from .prediction import Prediction, prediction
from .schedule import Schedule
from .spacing import Spacing


class Model(Protocol):
    """What `sample` and `solve` run. node: a `Node`; what is trained against is asked at `Nodes` too.

    The tensor that `predict` returns is remembered as it is, not copied: a model must not write to it again.
    """

    @property
    def schedule(self) -> Schedule: ...

    def predict(self, x: Tensor, node: Any, **condition: Any) -> Tensor: ...


def begin(model: Model) -> Model:
    """The model as one run sees it: a wrapper that remembers evaluations has `begin()`, which gives a fresh copy.

    So nothing is kept between two runs, and one model may serve several at once.
    """
    fresh: Callable[[], Model] | None = getattr(model, "begin", None)
    return model if fresh is None else fresh()


TimeOf = Callable[[Schedule, Any], Any]  # (schedule, Node) -> float, or (schedule, Nodes) -> [B]

TIMES: dict[str, TimeOf] = {
    "t": lambda schedule, node: node.t,
    "index": lambda schedule, node: schedule.index(node.t),
    "unit": lambda schedule, node: schedule.unit(node.t),
    "sigma": lambda schedule, node: _finite(node).sigma / node.alpha,
    "log_sigma": lambda schedule, node: -_finite(node).lam / 4,  # c_noise of EDM, Table 1
}


def _finite(node: Any) -> Any:
    if isinstance(node, Node) and node.alpha == 0:
        raise ValueError(f"sigma / alpha, the time of this network, is infinite at t = {node.t:g}; start below it")
    return node


@dataclass
class Count:
    """What a run really cost: calls of the network, and rows of a batch summed over them.

    A run that is compiled as a whole is not counted: the numbers would be constants of its graph, which torch.compile
    would then make anew for every run. A model whose network alone is compiled counts.
    """

    calls: int = 0
    rows: int = 0


class Denoiser:
    """A network as a model: x0 at (x, node), in float32 (or float64 where x is).

    network: `network(x, t, **condition)` -> its prediction, [B, C, ...] like x, or [B, 2 C, ...] where it also
        predicts a variance (that half is split off; `variance.predict_with_variance` has it). t: [B], in the units of
        `time`.
    predicts: "eps", "x0", "v" or "flow".
    time: "index" (0..999), "unit" ([0, 1]), "sigma" (sigma / alpha), "log_sigma" (ln(sigma / alpha) / 4), "t" (the
        schedule's own), or a function (schedule, node) -> time, of node.t, alpha, sigma or lam; None: what networks of
        this schedule usually take.
    dtype: of x as the network sees it (t stays float32); None: that of its first floating-point parameter.
    spacing: the spacing this network's own sampler uses, for those who want the same; no other effect.

    `card` is what `fs.from_pretrained` found beside the weights, and `plan` the plan on it; None for others.
    """

    card: Card | None = None

    def __init__(
        self,
        network: Callable[..., Any],
        schedule: Schedule,
        predicts: str | Prediction = "eps",
        *,
        time: str | TimeOf | None = None,
        dtype: torch.dtype | None = None,
        spacing: Spacing | None = None,
    ):
        self.network, self.schedule = network, schedule
        self.prediction = prediction(predicts)
        time = time or schedule.default_time
        if isinstance(time, str) and time not in TIMES:
            raise ValueError(f"unknown time {time!r}; choose one of {', '.join(TIMES)} or pass a function")
        self.time: TimeOf = TIMES[time] if isinstance(time, str) else time
        self.dtype = dtype or _dtype_of(network)
        self.spacing = spacing
        self.count = Count()

    @property
    def plan(self) -> Plan | None:
        """What a distilled network is to be sampled by: `fs.sample(model, model.plan, noise)`."""
        return None if self.card is None else self.card.plan

    def predict(self, x: Tensor, node: Node | Nodes, **condition: Any) -> Tensor:
        """x0 at x [B, ...] and node, in the dtype of x; condition: handed to the network.

        Raises ValueError where an eps network is asked at a `Node` of alpha = 0. `Nodes` are not looked at, which
        would wait for the device: there that sample is NaN.
        """
        u, w = self._pair(node)
        output = self.output(x, node, **condition)
        if isinstance(node, Nodes):
            x0: Tensor = per_sample(u, x) * x + per_sample(w, x) * output
            return x0
        return (x * u).add_(output, alpha=w) if u else output.mul(w)  # never the network's own tensor: it may reuse it

    def affine(self, x: Tensor, node: Node, **condition: Any) -> tuple[Tensor, float, float]:
        """(output, u, w) with x0 = u x + w output: what a step can take as it is, without the two sums of `predict`.

        Raises ValueError like `predict`.
        """
        u, w = self._pair(node)
        return self.output(x, node, **condition), u, w

    def output(self, x: Tensor, node: Node | Nodes, **condition: Any) -> Tensor:
        """What the network itself says at x and node, in the dtype of x."""
        seen = x if self.dtype is None or self.dtype == x.dtype else x.to(self.dtype)
        t = _rows(self.time(self.schedule, node), seen)
        if not torch.compiler.is_compiling():
            self.count.calls += 1
            self.count.rows += x.shape[0]
        output = self.network(seen, t, **condition)
        if not isinstance(output, Tensor):
            raise TypeError(
                f"the network returned {type(output).__name__}, not a tensor; wrap it, for example "
                f"lambda x, t, **c: network(x, t, **c).sample, or use fs.from_diffusers"
            )
        output = self._mean(output, x)
        return output if output.dtype == x.dtype else output.to(x.dtype)

    def _mean(self, output: Tensor, x: Tensor) -> Tensor:
        return output if output.shape == x.shape else _without_variance(output, x)

    def _pair(self, node: Node | Nodes) -> tuple[Any, Any]:
        if isinstance(node, Node) and node.alpha == 0 and self.prediction.name == "eps":
            raise ValueError(
                f"an eps network says nothing of x0 at alpha = 0 (t = {node.t:g}); start the grid below "
                f"t = {node.t:g} or use a network that predicts v, x0 or flow"
            )
        return self.prediction.x0(node.alpha, node.sigma)


def _without_variance(output: Tensor, x: Tensor) -> Tensor:
    """The first half of the channels. Nichol and Dhariwal 2021, arXiv:2102.09672, Sec. 3.1."""
    twice = (x.shape[0], 2 * x.shape[1], *x.shape[2:]) if x.dim() > 1 else None
    if output.shape != twice:
        raise ValueError(
            f"the network returned shape {tuple(output.shape)} for x of shape {tuple(x.shape)}; expected the same, "
            f"or twice the channels where it predicts a variance"
        )
    return output[:, : x.shape[1]]


def _rows(time: float | Tensor, seen: Tensor) -> Tensor:
    """The time of every sample; half precision would round 999 to 1000."""
    dtype = torch.float64 if seen.dtype == torch.float64 else torch.float32
    if isinstance(time, Tensor):
        if time.numel() not in (1, len(seen)):
            raise ValueError(f"{time.numel()} times for a batch of {len(seen)}; give one for each sample")
        return time.to(seen.device, dtype).expand(len(seen))
    return seen.new_full((seen.shape[0],), time, dtype=dtype)


def _dtype_of(network: Any) -> torch.dtype | None:
    parameters = network.parameters() if isinstance(network, torch.nn.Module) else ()
    return next((p.dtype for p in parameters if p.dtype.is_floating_point), None)
