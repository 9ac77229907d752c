"""Inpainting with any model: what is known of x0 is put in its place at every evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .grid import Node, Nodes
from .wrapper import Wrapper, altered, twice


@dataclass(frozen=True, eq=False)
class Inpainted(Wrapper):
    """x0 = mask x0 + (1 - mask) image: paint where the mask is 1, keep the image where it is 0.

    image: [B, ...], or [1, ...] for every sample; in latents for a latent model. mask: 0 to 1, or bool, of a shape that
        broadcasts to samples, such as [1, 1, H, W]. Both on the device of the samples.

    Where the plan ends at sigma = 0 with its last x0, as most do, the kept part of a sample is the image exactly;
    where it ends with a sum of several x0, to rounding. With `fs.sample(..., init=image)` and DDIM the kept part is
    alpha image + sigma noise on all the way, with the noise it began with: the blending of diffusers' inpainting
    pipelines. RePaint (Lugmayr et al. 2022, arXiv:2201.09865) draws that noise anew and goes back and forth in time:
    the seam is better, for several times the evaluations. A network trained to inpaint takes the mask as a condition
    and needs none of this.

    Put it around guidance: within, `rescale` and `ProjectedGuided` would move the kept part again.
    """

    image: Tensor
    mask: Tensor

    def __post_init__(self) -> None:
        for name, given in (("image", self.image), ("mask", self.mask)):
            if not isinstance(given, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
        image, mask = self.image, self.mask
        if image.device != mask.device:
            raise ValueError(f"image is on {image.device} and mask on {mask.device}; move one of them")
        if not image.is_floating_point() or not bool(image.isfinite().all()):
            raise ValueError(f"image must hold finite numbers of the range of x0, got {image.dtype} or a NaN")
        if not bool(((mask >= 0) & (mask <= 1)).all()):
            raise ValueError(f"mask must be 0 (keep) to 1 (paint), got {float(mask.min()):g} to {float(mask.max()):g}")
        try:
            broadcast = torch.broadcast_shapes(mask.shape, image.shape)
        except RuntimeError:
            broadcast = torch.Size()
        if broadcast[1:] != image.shape[1:]:
            raise ValueError(f"a mask of shape {list(mask.shape)} does not fit an image of shape {list(image.shape)}")
        mask = mask.to(image.dtype).reshape([1] * (image.dim() - mask.dim()) + list(mask.shape))
        object.__setattr__(self, "mask", mask)

    def predict(self, x: Tensor, node: Node | Nodes, **condition: Any) -> Tensor:
        for name, given in (("image", self.image), ("mask", self.mask)):
            if given.dim() != x.dim() or len(given) not in (1, len(x)) or self.image.shape[1:] != x.shape[1:]:
                raise ValueError(
                    f"{name} of shape {list(given.shape)} does not fit samples of shape {list(x.shape)}; give one a "
                    f"sample, or one for all as [1, ...]"
                )
        if self.image.device != x.device:
            raise ValueError(f"image and mask are on {self.image.device}, the samples on {x.device}; move them there")
        image, mask = self.image.to(x.dtype), self.mask.to(x.dtype)
        x0: Tensor = mask * self.model.predict(x, node, **condition) + (1 - mask) * image
        return x0

    def twice(self) -> Inpainted:
        image, mask = (given if len(given) == 1 else torch.cat([given, given]) for given in (self.image, self.mask))
        return altered(self, model=twice(self.model), image=image, mask=mask)
