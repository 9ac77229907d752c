"""Distribution matching: the student's samples are moved to where the teacher finds them likelier than a critic does.

Yin et al. 2024, arXiv:2311.18828 (DMD) and arXiv:2405.14867 (DMD2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fastsample.denoiser import Denoiser, Model
from fastsample.grid import Grid, Nodes, grid, nodes, per_sample
from fastsample.schedule import EDM, VP, Schedule
from fastsample.spacing import Spacing, uniform_t

from . import draws
from .consistency import check_pair, check_starts
from .discriminator import Discriminator, critic_loss, student_loss
from .method import Batch, Method, asked, check_drop, conditions, dropped, plain
from .times import noisy, random_nodes
from .weights import Weight


def alike(at: Nodes) -> Tensor:
    """1: samples are moved as far at every noise level, in units of the teacher's own correction of them."""
    return torch.ones_like(at.alpha)


def by_alpha(at: Nodes) -> Tensor:
    """alpha: w_t alpha_t of DMD, Eqs. 7 and 8, once the two scores are written as x0. 1 on the EDM schedule."""
    return at.alpha


@dataclass(frozen=True)
class DistributionMatching(Method):
    """The student follows the gradient of KL(student || teacher) at all noise levels: real score minus fake score.

    Yin et al. 2024 (DMD), arXiv:2311.18828, Eq. 7, normalised as in Eq. 8, without its regression loss (DMD2,
    arXiv:2405.14867, Sec. 4.1). The fake score is the critic's: a denoiser trained on what the student makes, `ratio`
    times as often as the student (DMD2, Sec. 4.2). With both scores written as x0, the sample moves along

        weight (x0_fake - x0_real) / mean |x0 - x0_real|

    The loss is half the squared length of that step, its target held constant, so its gradient is the step.

    student: predicts v, x0 or flow; critic: any. Start both from the teacher's weights, see `student_of`.
    teacher: a denoiser, or a guided one.
    steps, spacing: the student's grid. The inputs of its later steps are its own samples, noised again (DMD2, Secs. 4.4
        and 4.5). Sample it by `solvers.consistency` on `grid`.
    ratio: updates of the critic for each of the student, which comes at steps ratio - 1, 2 ratio - 1, ...: of 1000
        steps of `train` the student has 1000 / ratio.
    weight: a function Nodes -> [B], `alike` or `by_alpha`.
    normalise: False leaves out the mean; with weight (alpha / sigma)^2 the gradient is then that of the KL itself.
    low, high: where the scores are compared, as shares of the way from t_min to t_max (DMD, Sec. 3.2).
    head: a discriminator on the critic's features, which then needs real images as x0 (DMD2, Sec. 4.3). Without it, x0
        gives the shape alone.
    gan, critic_gan: weights of its loss for the student and for the critic.
    drop, null: as for `Diffusion`.

    Raises ValueError where the three models do not fit, or start at alpha = 0 with a student that predicts eps.
    """

    student: Denoiser
    teacher: Model
    critic: Denoiser
    steps: int = field(default=1, kw_only=True)
    spacing: Spacing = field(default=uniform_t, kw_only=True)
    ratio: int = field(default=5, kw_only=True)
    weight: Weight = field(default=alike, kw_only=True)
    normalise: bool = field(default=True, kw_only=True)
    low: float = field(default=0.02, kw_only=True)
    high: float = field(default=0.98, kw_only=True)
    head: Discriminator | None = field(default=None, kw_only=True)
    gan: float = field(default=3e-3, kw_only=True)
    critic_gan: float = field(default=1e-2, kw_only=True)
    drop: float = field(default=0.0, kw_only=True)
    null: Mapping[str, float | Tensor] = field(default_factory=dict, kw_only=True)

    def __post_init__(self) -> None:
        check_drop(self.drop, self.null)
        check_pair(self.student, self.teacher)
        check_critic(self.critic, self.student, self.teacher)
        check_starts(self.student, self.student, self.grid.nodes[0])  # the teacher is not asked there
        if self.ratio < 1:
            raise ValueError(f"ratio must be at least 1 update of the critic for each of the student, got {self.ratio}")
        if not 0 <= self.low < self.high <= 1:
            raise ValueError(f"need 0 <= low < high <= 1, got low = {self.low:g}, high = {self.high:g}")
        if self.gan < 0 or self.critic_gan < 0:
            raise ValueError(f"the weights of the discriminator are not negative, got {self.gan} and {self.critic_gan}")
        if self.head is not None:
            with self.head.reads(self.critic.network):
                pass  # the module it reads is there

    @property
    def roles(self) -> dict[str, Denoiser]:
        return {"student": self.student, "critic": self.critic}

    @property
    def frozen(self) -> list[Denoiser]:
        return asked(self.teacher)

    @property
    def helpers(self) -> Mapping[str, nn.Module]:
        return {} if self.head is None else {"critic": self.head}

    def turns(self, step: int) -> Sequence[str]:
        return ("critic", "student") if (step + 1) % self.ratio == 0 else ("critic",)

    @cached_property
    def grid(self) -> Grid:
        """The nodes of the student."""
        return grid(self.student.schedule, self.steps, self.spacing)

    def loss(self, role: str, batch: Batch, step: int) -> Tensor:
        condition = dropped(conditions(batch), self.null, self.drop)
        x, at = self.inputs(batch["x0"], **condition)
        if role == "critic":
            with torch.no_grad():
                x0 = plain(self.student).predict(x, at, **condition)
            return self._critic_loss(x0, batch["x0"], condition)
        return self._student_loss(self.student.predict(x, at, **condition), condition)

    @torch.no_grad()
    def inputs(self, like: Tensor, **condition: Any) -> tuple[Tensor, Nodes]:
        """What the student is asked at, shape and device of `like`: a random step of its own sampling for each sample.

        The way there is walked without gradient: x0 by the student, then noised to the next node (DMD2, Sec. 4.5).
        """
        student = plain(self.student)
        chosen = draws.randint(self.steps, len(like), device=like.device)
        table = torch.tensor([[n.t, n.alpha, n.sigma] for n in self.grid.nodes[:-1]], dtype=torch.float64).T
        at = Nodes(*(row.to(like.device)[chosen] for row in table))
        state = self.grid.nodes[0].sigma * draws.randn_like(like)
        x = state
        for k, (s, t) in enumerate(list(self.grid.steps())[:-1], 1):
            state = t.alpha * student.predict(state, s, **condition) + t.sigma * draws.randn_like(like)
            x = torch.where((chosen == k).view(-1, *[1] * (like.dim() - 1)), state, x)
        return x, at

    def _critic_loss(self, x0: Tensor, real: Tensor, condition: Batch) -> Tensor:
        """DMD, Eq. 6, in the critic's own prediction; of all denoisers the student's own has the least."""
        at = random_nodes(self.critic.schedule, len(x0), x0.device)
        eps = draws.randn_like(x0)
        p, q = self.critic.prediction.output(at.alpha, at.sigma)
        target: Tensor = per_sample(p * at.alpha + q, x0) * x0 + per_sample(p * at.sigma, x0) * eps  # see `Diffusion`
        x = noisy(x0, eps, at)
        if self.head is None:
            return (self.critic.output(x, at, **condition) - target).square().mean()
        # one evaluation of both halves: processes that share gradients count on one for each loss
        x = torch.cat([x, noisy(real, draws.randn_like(real), at)])
        both = Nodes(*(torch.cat([row, row]) for row in (at.t, at.alpha, at.sigma)))
        with self.head.reads(self.critic.network) as features:
            output = self.critic.output(x, both, **{key: torch.cat([value, value]) for key, value in condition.items()})
        fakes, reals = self.head(features[0]).chunk(2)
        error: Tensor = (output[: len(x0)] - target).square().mean()
        return error + self.critic_gan * critic_loss(reals, fakes)

    def _student_loss(self, x0: Tensor, condition: Batch) -> Tensor:
        at = self._compared(x0)
        x = noisy(x0, draws.randn_like(x0), at)
        adversarial = None
        if self.head is None or not self.gan:
            with torch.no_grad():
                fake = self.critic.predict(x, at, **condition)
        else:
            with self.head.reads(self.critic.network) as features:
                fake = self.critic.predict(x, at, **condition).detach()
            adversarial = student_loss(self.head(features[0]))
        with torch.no_grad():
            real = self.teacher.predict(x, at, **condition)
            step = self.step(x0, real, fake, at)
        loss: Tensor = 0.5 * (x0 - (x0 - step).detach()).square().mean()
        return loss if adversarial is None else loss + self.gan * adversarial

    def step(self, x0: Tensor, real: Tensor, fake: Tensor, at: Nodes) -> Tensor:
        """The gradient of the loss in each number of x0, but for their count; real, fake: x0 of teacher and critic."""
        weight = self.weight(at)
        if self.normalise:
            size = (x0 - real).flatten(1).abs().mean(1)
            weight = weight / size.double().clamp(min=1e-8)
        step: Tensor = per_sample(weight, x0) * (fake - real)
        return step

    def _compared(self, x0: Tensor) -> Nodes:
        share = draws.rand(len(x0), device=x0.device, dtype=torch.float64)
        return nodes(self.student.schedule, between(self.student.schedule, self.low + share * (self.high - self.low)))


def between(schedule: Schedule, share: Tensor) -> Tensor:
    """Times at these shares of the way from t_min to t_max: equal steps of t, rounded for VP to the indices that were
    trained; for EDM equal steps of t^(1/7) (Karras et al. 2022, arXiv:2206.00364, Eq. 5).
    """
    low, high = schedule.t_min, schedule.t_max
    if isinstance(schedule, EDM):
        root: Tensor = low ** (1 / 7) + share * (high ** (1 / 7) - low ** (1 / 7))
        return root**7
    t: Tensor = low + share * (high - low)
    return t.round() if isinstance(schedule, VP) else t


def check_critic(critic: Denoiser, student: Denoiser, teacher: Model) -> None:
    """The critic is a third network, on the same schedule. Raises ValueError."""
    for name, networks in (("student", [student.network]), ("teacher", [m.network for m in asked(teacher)])):
        if any(critic.network is network for network in networks):
            raise ValueError(f"critic and {name} are one network; make a copy: student_of(teacher)")
    if critic.schedule != teacher.schedule:
        raise ValueError(f"the critic's schedule {critic.schedule!r} is not the teacher's {teacher.schedule!r}")
