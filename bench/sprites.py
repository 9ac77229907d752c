"""Thumbnails: a strip of samples a case, small enough that a page can hold those of a hundred cases."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, pad

SIZES = ((16, 64), (16, 48), (16, 32), (16, 24), (12, 24), (8, 24), (8, 16), (4, 16), (4, 8))  # how many, pixels


@dataclass(frozen=True)
class Sprites:
    """data: key -> a PNG as a data: address, of `count` images of `size` pixels side by side."""

    data: dict[str, str]
    count: int = 0
    size: int = 0
    reduced: bool = False


def sprites(images: Mapping[str, Tensor], *, budget: int = 3_000_000) -> Sprites:
    """Strips of the first images of each key, all of the largest size whose strips together take `budget` characters.

    images: key -> [n, 1 or 3, H, W] in [-1, 1]. They are never enlarged, which is left to who shows them. With 100
    cases, images of noise at worst, 3 MB hold 16 gray images of 32 x 32 or 12 coloured ones of 24 x 24 of each.
    """
    if not images:
        return Sprites({})
    most, largest = min(len(stack) for stack in images.values()), max(stack.shape[-1] for stack in images.values())
    for count, size in SIZES:
        size = min(size, largest)
        count = min(count, most)
        some = list(images.values())[:: max(1, len(images) // 4)]  # of these the sum is foretold
        if sum(len(_strip(stack[:count], size)) for stack in some) * len(images) > budget * len(some) * 1.1:
            continue
        data = {key: _strip(stack[:count], size) for key, stack in images.items()}
        if sum(map(len, data.values())) <= budget:
            return Sprites(data, count, size, size < largest)
    return Sprites({})


def economical(picture: bytes) -> bytes:
    """The same PNG with a palette of 256 colours: a third of the size, and charts look the same."""
    from PIL import Image

    file = io.BytesIO()
    Image.open(io.BytesIO(picture)).convert("RGB").quantize(256).save(file, "PNG", optimize=True)
    return file.getvalue()


def _strip(images: Tensor, size: int) -> str:
    from PIL import Image

    scaled = (images.float().cpu().clamp(-1, 1) + 1) * 127.5
    if scaled.shape[-1] > size:
        scaled = adaptive_avg_pool2d(scaled, (max(1, round(size * scaled.shape[-2] / scaled.shape[-1])), size))
    opaque = torch.cat([scaled, torch.full_like(scaled[:, :1], 255)], 1)
    apart = pad(opaque, (0, max(1, size // 12)))  # transparent, behind each image, so that halves of a strip are alike
    n, channels, height, width = apart.shape
    pixels = apart.round().byte().permute(2, 0, 3, 1).reshape(height, n * width, channels).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
