"""The resize that is part of what an FID is: other ways to resize move it by more than good models differ."""

from __future__ import annotations

import torch
from torch import Tensor


def resize_tf1(images: Tensor, height: int, width: int) -> Tensor:
    """images [..., H, W], float32 -> [..., height, width], as TensorFlow 1's resize_bilinear without aligned corners.

    Pixel i of the result lies at i H / height, where torch and TensorFlow 2 put (i + 1/2) H / height - 1/2; beyond the
    last pixel the image goes on as it is there. Nothing is smoothed before an image is made smaller.
    """
    left, right, dx = _neighbours(images.shape[-1], width, images.device)
    above, below, dy = _neighbours(images.shape[-2], height, images.device)
    rows = _between(images[..., left], images[..., right], dx)
    return _between(rows[..., above, :], rows[..., below, :], dy.unsqueeze(-1))


def _neighbours(size: int, wanted: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """For each pixel wanted: the pixel before it, the one after, and how far it is on the way, in [0, 1)."""
    place = torch.arange(wanted, dtype=torch.float32, device=device) * (size / wanted)  # in float32, as there
    before = place.long()
    return before, (before + 1).clamp_max(size - 1), place - before


def _between(a: Tensor, b: Tensor, way: Tensor) -> Tensor:
    return a + (b - a) * way
