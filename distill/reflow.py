"""Reflow: a flow is trained anew on the pairs it makes itself; its paths then cross less and so are straighter.

Liu et al. 2022, arXiv:2209.03003. There time runs from noise at 0 to data at 1, here from noise at t = 1 down.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastsample.denoiser import Denoiser, Model
from fastsample.grid import Grid, nodes
from fastsample.prediction import FLOW
from fastsample.schedule import Flow

from . import draws
from .method import Batch, Method, check_drop, dropped
from .times import noisy


@dataclass(frozen=True)
class Reflow(Method):
    """The flow along the straight line between the noise and the sample of a pair is to be noise - sample.

    Liu et al. 2022, arXiv:2209.03003, Eq. 1, on the pairs of a teacher: with a flow as teacher the student is its
    2-rectified flow. Of the teacher nothing but the pairs counts (`make_pairs`, `Pairs`), so it may have any schedule
    and prediction. Sample the student by Euler steps: `solvers.ddim` on a grid of `fs.uniform_t`.

    student: predicts flow on fs.Flow; where the teacher does too, start it from the teacher's weights.
    least: sigma is uniform from here to 1. At 1, pure noise alone, this is the distillation into one step that follows
        reflow in the paper.
    drop, null: as for `Diffusion`.

    Raises ValueError where the student is no flow.
    """

    student: Denoiser
    least: float = field(default=0.0, kw_only=True)
    drop: float = field(default=0.0, kw_only=True)
    null: Mapping[str, float | Tensor] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        check_drop(self.drop, self.null)
        check_flow(self.student)
        if self.student.prediction is not FLOW:
            raise ValueError(
                f"reflow trains the flow itself, the student predicts {self.student.prediction.name}; take one that "
                f"predicts flow"
            )
        if not 0 <= self.least <= 1:
            raise ValueError(f"least is a sigma from 0 to 1, got {self.least:g}")

    @property
    def roles(self) -> dict[str, Denoiser]:
        return {"student": self.student}

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        if "noise" not in batch:
            raise ValueError(
                f"reflow needs the noise that each sample was made of, the batch has {sorted(batch)}; use "
                f"distill.Pairs(folder) of what distill.make_pairs wrote"
            )
        x0, noise = batch["x0"], batch["noise"]
        # never 0, where no path is left; 1, where every path begins, is among them
        sigma = 1 - (1 - self.least) * draws.rand(len(x0), device=x0.device, dtype=torch.float64)
        at = nodes(self.student.schedule, self.student.schedule.time((1 - sigma).log() - sigma.log()))
        condition = {key: value for key, value in batch.items() if key not in ("x0", "noise")}
        output = self.student.output(noisy(x0, noise, at), at, **dropped(condition, self.null, self.drop))
        return (output - (noise - x0)).square().mean()


@torch.no_grad()
def straightness(model: Model, grid: Grid, noise: Tensor, **condition: Any) -> float:
    """The mean over samples and time of |(z_1 - z_0) - dz/dt|^2; 0 for straight paths. S(Z) of Liu et al. 2022.

    Of the paths that Euler's steps on the grid take from this noise [B, ...], from sigma = 1 to 0. The square is summed
    over the numbers of a sample. One step is always straight: take a grid as fine as the paths are to be known.
    Raises ValueError where the schedule is no fs.Flow, or the grid does not go all the way.
    """
    check_flow(model)
    first, last = grid.nodes[0], grid.nodes[-1]
    if first.sigma != 1 or last.sigma != 0:
        raise ValueError(f"a path goes from sigma = 1 to 0, the grid from {first.sigma:g} to {last.sigma:g}")
    x, slopes = noise, []
    for s, t in grid.steps():
        slopes.append((x - model.predict(x, s, **condition)) / s.sigma)
        x = x + (t.sigma - s.sigma) * slopes[-1]
    whole = noise - x
    each = [
        (s.sigma - t.sigma) * (whole - slope).flatten(1).double().square().sum(1).mean()
        for (s, t), slope in zip(grid.steps(), slopes)
    ]
    return float(sum(each))


def check_flow(model: Model) -> None:
    if not isinstance(model.schedule, Flow):
        raise ValueError(
            f"straight paths are those of fs.Flow, the model's schedule is {model.schedule!r}; train a flow on this "
            f"model's pairs: fs.Denoiser(network, fs.Flow(), 'flow')"
        )
