"""The built-in network: a class-conditional denoiser of the 8x8 handwritten digits, small enough for any laptop.

Conditions: class_labels [B], 0 to 9, or `NULL` for none, which is what guidance needs.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..adapters.diffusers import Sampled
from ..adapters.pretrained import from_pretrained
from ..denoiser import Denoiser
from ..schedule import VP

NULL = 10
WEIGHTS = Path(__file__).parent / "weights" / "digits"


def digits() -> Denoiser:
    """The trained network: predicts eps, in evaluation mode. It is made by `distill.train_digits()`.

    Raises ValueError where its file is damaged.
    """
    return from_pretrained(WEIGHTS)


def digits_network(predicts: str = "eps", *, seed: int = 0) -> Denoiser:
    """An untrained network of the same shape; the same seed gives the same weights.

    A UNet of two resolutions without attention: 160 thousand parameters. Betas are scaled-linear: at the noisy end
    they leave alpha = 0.068, ten times what linear betas leave, so eps still says something of x0 there.
    """
    try:
        from diffusers import UNet2DModel
    except ImportError as error:
        raise ImportError("the digits network is a diffusers model: pip install 'fastsample[demo]'") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = UNet2DModel(  # type: ignore[no-untyped-call]
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
            add_attention=False,
            num_class_embeds=NULL + 1,
        )
    return Denoiser(Sampled(network, null=NULL), VP.scaled_linear(), predicts, time="index")
