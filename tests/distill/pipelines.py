"""Tiny random Stable Diffusion: components as diffusers' own tests build them."""

import json

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 4, "cross_attention_dim": 8, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
SIZE = 32  # of the embedding of the scale


def unet(seed=0, **changes):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return diffusers.UNet2DConditionModel(**{**UNET, **changes}).eval()


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def text(batch, seed=1):
    return {"encoder_hidden_states": random(batch, 5, 8, seed=seed)}


def stable_diffusion(folder, network=None):
    """A whole pipeline with words of single letters, as it was saved in `folder`."""
    letters = [*map(chr, range(97, 123)), *(f"{chr(k)}</w>" for k in range(97, 123)), "<|startoftext|>"]
    words = folder / "words"
    words.mkdir(parents=True)
    vocabulary = {letter: k for k, letter in enumerate([*letters, "<|endoftext|>"])}
    (words / "vocab.json").write_text(json.dumps(vocabulary))
    (words / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=16)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = diffusers.AutoencoderKL(
            block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
            norm_num_groups=4, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
        )  # fmt: skip
        encoder = transformers.CLIPTextModel(
            transformers.CLIPTextConfig(
                vocab_size=54, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                max_position_embeddings=16, bos_token_id=52, eos_token_id=53, pad_token_id=53, projection_dim=8,
            )
        )  # fmt: skip
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=True, steps_offset=1, **BETAS)
    pipe = diffusers.StableDiffusionPipeline(
        vae, encoder.eval(), tokenizer, network or unet(), scheduler, None, None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder / "pipe")
    return folder / "pipe"


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe
