"""Tiny random networks of every class, as diffusers' own tests build them, with conditions and how they are called."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

diffusers = pytest.importorskip("diffusers")

SMALL = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8, 16),
         "norm_num_groups": 4, "cross_attention_dim": 8}  # fmt: skip
BLOCKS = {"attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
          "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}  # fmt: skip
TIME_IDS = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
BATCH = 2


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(seed):
    return random(BATCH, 5, 8, seed=seed)


def pooled(seed):
    return random(BATCH, 6, seed=seed)


def flow(**options):
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


@dataclass(frozen=True)
class Case:
    """cond, uncond: conditions that guidance contrasts; shared: those it does not; time: what the network is told.

    options: of from_diffusers; by_hand: for the loop written by hand alone.
    """

    name: str
    config: dict[str, Any]
    scheduler: Callable[[], Any]
    cond: dict[str, Any] = field(default_factory=dict)
    uncond: dict[str, Any] = field(default_factory=dict)
    shared: dict[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = (4, 8, 8)
    time: Callable[[Any], float] = lambda node: node.t
    options: dict[str, Any] = field(default_factory=dict)
    by_hand: dict[str, Any] = field(default_factory=dict)

    def network(self, **changes):
        torch.manual_seed(0)
        return getattr(diffusers, self.name)(**{**self.config, **changes}).eval()


def embeds(seed):
    return {"encoder_hidden_states": text(seed)}


def sdxl(seed):
    return {**embeds(seed), "added_cond_kwargs": {"text_embeds": pooled(seed), "time_ids": TIME_IDS.expand(BATCH, 6)}}


def mm(seed):
    return {**embeds(seed), "pooled_projections": pooled(seed)}


ATTENTION = {"num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2, "patch_size": 2, "sample_size": 8,
             "in_channels": 4}  # fmt: skip
FLUX = {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
        "num_attention_heads": 2, "joint_attention_dim": 8, "pooled_projection_dim": 6, "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8)}  # fmt: skip
ROWS = torch.arange(3.0).view(3, 1, 1).expand(3, 4, 1)  # latents of 6 x 8 are 3 x 4 tokens
COLUMNS = torch.arange(4.0).view(1, 4, 1).expand(3, 4, 1)
IMG_IDS = torch.cat([torch.zeros(3, 4, 1), ROWS, COLUMNS], dim=2).reshape(12, 3)

CASES = {
    "sd15": Case("UNet2DConditionModel", {**SMALL, **BLOCKS},
                 lambda: diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1), embeds(1), embeds(2)),
    "lcm": Case("UNet2DConditionModel", {**SMALL, **BLOCKS, "time_cond_proj_dim": 16},
                lambda: diffusers.LCMScheduler(), embeds(1), embeds(2), {"timestep_cond": random(BATCH, 16, seed=3)}),
    "sdxl": Case("UNet2DConditionModel",
                 {**SMALL, **BLOCKS, "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
                  "projection_class_embeddings_input_dim": 6 * 4 + 6},
                 lambda: diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
                 sdxl(1), sdxl(2)),
    "dit": Case("DiTTransformer2DModel", {**ATTENTION, "out_channels": 8, "num_embeds_ada_norm": 10},
                lambda: diffusers.DDIMScheduler(), {"class_labels": torch.tensor([0, 7])},
                {"class_labels": torch.tensor([10, 10])}),
    "pixart": Case("PixArtTransformer2DModel",
                   {**ATTENTION, "out_channels": 8, "cross_attention_dim": 8, "caption_channels": 8,
                    "use_additional_conditions": False},
                   lambda: diffusers.DPMSolverMultistepScheduler(),
                   {**embeds(1), "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])},
                   {**embeds(2), "encoder_attention_mask": torch.tensor([[1, 0, 0, 0, 0], [1, 0, 0, 0, 0]])},
                   {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}),
    "sd3": Case("SD3Transformer2DModel",
                {**ATTENTION, "joint_attention_dim": 8, "caption_projection_dim": 8, "pooled_projection_dim": 6,
                 "out_channels": 4},
                lambda: flow(shift=3.0), mm(1), mm(2), time=lambda node: 1000 * node.sigma),
    "flux": Case("FluxTransformer2DModel", FLUX, lambda: flow(use_dynamic_shifting=True), mm(1), mm(2),
                 {"guidance": torch.full((BATCH,), 3.5),
                  "img_ids": IMG_IDS.expand(BATCH, 12, 3), "txt_ids": torch.zeros(BATCH, 5, 3)},
                 shape=(12, 16), time=lambda node: node.sigma, options={"image_seq_len": 12},
                 by_hand={"img_ids": IMG_IDS, "txt_ids": torch.zeros(5, 3)}),
    "motion": Case("UNetMotionModel",
                   {**SMALL, "num_attention_heads": 2, "motion_num_attention_heads": 2, "use_motion_mid_block": False,
                    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
                    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion")},
                   lambda: diffusers.DDIMScheduler(beta_schedule="linear"), embeds(1), embeds(2), shape=(4, 3, 8, 8),
                   by_hand={"encoder_hidden_states": text(1).repeat_interleave(3, dim=0)}),
    "video": Case("UNet3DConditionModel",
                  {**SMALL, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
                   "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
                  lambda: diffusers.DDIMScheduler(), embeds(1), embeds(2), shape=(4, 3, 8, 8)),
}  # fmt: skip
