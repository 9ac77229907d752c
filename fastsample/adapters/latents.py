"""Between images and latents: a diffusers VAE with the scaling of its configuration, and FLUX's packing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..noise import Noise


@torch.no_grad()
def decode(vae: Any, latents: Tensor, *, tiled: bool = False) -> Tensor:
    """Latents as a network samples them, [B, C, h, w], as images in [-1, 1], [B, 3, H, W], float32, clamped.

    vae: a diffusers autoencoder; scaling_factor, shift_factor, latents_mean and latents_std are read from its config.
        Video ones take [B, C, F, h, w]. One that cannot run in float16 (`force_upcast`) is float32 for this call.
    tiled: decode overlapping tiles one by one, for images that do not fit in memory at once.
    """
    _check_latents(vae, latents)
    with _ready(vae, tiled) as (device, dtype):
        raw = _scaled(vae, latents.to(device, torch.promote_types(dtype, torch.float32)), back=True)
        images: Tensor = vae.decode(raw.to(dtype), return_dict=False)[0]
    return images.float().clamp(-1, 1)


@torch.no_grad()
def encode(vae: Any, images: Tensor, *, noise: Noise | Tensor | None = None, tiled: bool = False) -> Tensor:
    """Images in [-1, 1], [B, 3, H, W], as the latents a network is trained on, float32: what `fs.sample(init=)` takes.

    noise: draw the latents with this noise of their shape and unit variance; None: the mean of their distribution.
    vae, tiled: as for `decode`.
    """
    _check_images(vae, images)
    with _ready(vae, tiled) as (device, dtype):
        posterior = vae.encode(images.to(device, dtype), return_dict=False)[0]
        if isinstance(posterior, Tensor):
            if noise is not None:
                raise ValueError(f"{type(vae).__name__} has no distribution of latents to draw from; leave out noise")
            raw = posterior.float()
        else:
            raw = posterior.mean.float()
            if noise is not None:
                z = noise.draw(0) if isinstance(noise, Noise) else noise
                if z.shape != raw.shape:
                    raise ValueError(
                        f"noise has shape {list(z.shape)}, the latents {list(raw.shape)}; give both the same"
                    )
                raw = raw + posterior.std.float() * z.to(raw)
    return _scaled(vae, raw, back=False)


def pack_latents(latents: Tensor) -> Tensor:
    """[B, C, h, w] as FLUX's tokens, [B, h w / 4, 4 C]: each the 2 x 2 numbers of every channel."""
    if latents.dim() != 4 or latents.shape[2] % 2 or latents.shape[3] % 2:
        raise ValueError(f"packing takes latents [B, C, h, w] with even h and w, got {list(latents.shape)}")
    tokens = torch.nn.functional.pixel_unshuffle(latents, 2)
    return tokens.flatten(2).transpose(1, 2)


def unpack_latents(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack_latents`; height, width: h and w of the latents (the image's over 8 for FLUX)."""
    if tokens.dim() != 3 or 4 * tokens.shape[1] != height * width or tokens.shape[2] % 4 or height % 2 or width % 2:
        raise ValueError(
            f"unpacking to {height} x {width} latents takes tokens [B, {height * width // 4}, 4 C] and even sizes, got "
            f"{list(tokens.shape)}"
        )
    grid = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return torch.nn.functional.pixel_shuffle(grid, 2)


def latent_ids(height: int, width: int, *, device: str | torch.device = "cpu") -> Tensor:
    """FLUX's `img_ids` for latents of this height and width: [h w / 4, 3], the row and column of each token."""
    sides = (torch.arange(size // 2, device=device) for size in (height, width))
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


def guidance_embedding(scale: float | Tensor, size: int, *, batch: int = 1) -> Tensor:
    """`timestep_cond` of a network distilled with guidance (LCM), [batch, size]: sines of 1000 (scale - 1).

    scale: as in `fs.Guided`, so 1 is none; a number, or a tensor [B] in place of `batch`.
    size: the network's `config.time_cond_proj_dim`.
    Luo et al. 2023, arXiv:2310.04378, Sec. 4.2 (w there is scale - 1).
    """
    scale = scale.float().flatten() if isinstance(scale, Tensor) else torch.full((batch,), float(scale))
    half = size // 2
    if half < 2:
        raise ValueError(f"an embedding of the guidance scale has at least 4 numbers, got size {size}")
    rates = torch.exp(torch.arange(half, device=scale.device) * (-math.log(10_000) / (half - 1)))
    angles = 1000 * (scale - 1)[:, None] * rates
    embedding = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.nn.functional.pad(embedding, (0, size - 2 * half))


@contextmanager
def _ready(vae: Any, tiled: bool) -> Iterator[tuple[torch.device, torch.dtype]]:
    """The VAE in a dtype it can run in, tiling if asked, and as it was afterwards."""
    if tiled and not hasattr(vae, "enable_tiling"):
        raise ValueError(f"{type(vae).__name__} cannot decode in tiles; pass tiled=False")
    dtype, was_tiling = vae.dtype, getattr(vae, "use_tiling", False)
    upcast = dtype == torch.float16 and bool(vae.config.get("force_upcast"))
    try:
        if upcast:
            vae.to(torch.float32)
        if tiled:
            vae.enable_tiling()
        yield vae.device, torch.float32 if upcast else dtype
    finally:
        if upcast:
            vae.to(dtype)
        if tiled and not was_tiling:
            vae.disable_tiling()


def _scaled(vae: Any, latents: Tensor, *, back: bool) -> Tensor:
    """From the VAE's own scale to the one networks are trained on, or (back) the other way."""
    config = vae.config
    factor, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if factor is None and (mean is None or std is None):
        raise ValueError(
            f"the config of {type(vae).__name__} has neither scaling_factor nor latents_mean and latents_std, so the "
            f"scale of its latents is not known; call vae.decode or vae.encode yourself"
        )
    factor = 1.0 if factor is None else factor
    if mean is None or std is None:
        return latents / factor + shift if back else (latents - shift) * factor
    shape = (1, -1, *[1] * (latents.dim() - 2))
    mean, std = (torch.as_tensor(value).to(latents).view(shape) for value in (mean, std))
    return latents * std / factor + mean if back else (latents - mean) / std * factor


def _check_latents(vae: Any, latents: Tensor) -> None:
    channels = vae.config.get("latent_channels") or vae.config.get("z_dim")
    if latents.dim() < 4 or (channels and latents.shape[1] != channels):
        raise ValueError(
            f"{type(vae).__name__} decodes latents [B, {channels or 'C'}, h, w], got {list(latents.shape)}"
            + ("; FLUX's tokens need fs.unpack_latents first" if latents.dim() == 3 else "")
        )


def _check_images(vae: Any, images: Tensor) -> None:
    channels = vae.config.get("in_channels", 3)
    if images.dim() < 4 or images.shape[1] != channels:
        raise ValueError(f"{type(vae).__name__} encodes images [B, {channels}, H, W], got {list(images.shape)}")
    if not images.is_floating_point() or float(images.abs().max()) > 1.001:
        raise ValueError(
            f"images must be floats in [-1, 1], got {images.dtype} from {float(images.min()):g} to "
            f"{float(images.max()):g}; for bytes: images / 127.5 - 1"
        )
    blocks = vae.config.get("block_out_channels")
    size = 2 ** (len(blocks) - 1) if blocks else 1
    if type(vae).__name__ == "AutoencoderKL" and (images.shape[-1] % size or images.shape[-2] % size):
        raise ValueError(f"the sides of an image must be multiples of {size} for this VAE, got {list(images.shape)}")
