"""A discriminator's head: it tells real images from samples by what a network under way makes of them.

Yin et al. 2024, arXiv:2405.14867, Sec. 4.3: a small head on the middle of the critic, both asked at noisy images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import softplus

from fastsample.adapters.diffusers import Sampled

from .method import unwrapped


def middle(network: Any) -> nn.Module:
    """The middle block of a diffusers UNet, wrapped or not. Raises ValueError where the network has none."""
    inner = network.network if isinstance(network, Sampled) else network
    block = getattr(unwrapped(inner), "mid_block", None)
    if not isinstance(block, nn.Module):
        raise ValueError(
            f"{type(inner).__name__} has no mid_block whose output a discriminator could read; name another of its "
            f"modules: Discriminator(channels, at=lambda network: network.layers[2])"
        )
    return block


class Discriminator(nn.Module):
    """A logit for each sample, [B], above 0 where it looks real: two layers on features, and their mean over places.

    channels: of the features [B, channels, ...]; of a diffusers UNet `network.config.block_out_channels[-1]`.
    at: which module of a network has them as its output, or as the first of its outputs.
    width: of the layer between.
    """

    def __init__(self, channels: int, *, at: Callable[[Any], nn.Module] = middle, width: int = 64):
        super().__init__()
        self.channels, self.at = channels, at
        self.layers = nn.Sequential(
            nn.Conv1d(channels, width, 1), nn.GroupNorm(1, width), nn.SiLU(), nn.Conv1d(width, 1, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        if features.dim() < 2 or features.shape[1] != self.channels:
            raise ValueError(
                f"the features have shape {list(features.shape)}, this discriminator reads [B, {self.channels}, ...]; "
                f"give it their channels, or another module by at="
            )
        logits: Tensor = self.layers(features.unsqueeze(-1).flatten(2).float())
        return logits.mean((1, 2))

    @contextmanager
    def reads(self, network: Any) -> Iterator[list[Tensor]]:
        """Inside, each evaluation of the network puts its features into this list."""
        found: list[Tensor] = []

        def hear(module: nn.Module, args: Any, output: Any) -> None:
            found.append(output if isinstance(output, Tensor) else output[0])

        hook = self.at(unwrapped(network)).register_forward_hook(hear)
        try:
            yield found
        finally:
            hook.remove()


def critic_loss(real: Tensor, fake: Tensor) -> Tensor:
    """-log D(real) - log(1 - D(fake)) of logits [B], as a mean. Goodfellow et al. 2014, arXiv:1406.2661, Eq. 1."""
    loss: Tensor = softplus(-real).mean() + softplus(fake).mean()
    return loss


def student_loss(fake: Tensor) -> Tensor:
    """-log D(fake), the non-saturating form, as a mean. Goodfellow et al. 2014, arXiv:1406.2661, Sec. 3."""
    loss: Tensor = softplus(-fake).mean()
    return loss
