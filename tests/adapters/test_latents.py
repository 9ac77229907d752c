"""Images to latents and back, with the scaling that each VAE's configuration says."""

import pytest
import torch

import fastsample as fs

from .networks import diffusers, random

SMALL = {"block_out_channels": (8, 8), "down_block_types": ("DownEncoderBlock2D",) * 2, "norm_num_groups": 4,
         "up_block_types": ("UpDecoderBlock2D",) * 2, "latent_channels": 4, "sample_size": 16}  # fmt: skip


def vae_of(**options):
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**{**SMALL, **options}).eval()


LATENTS = random(2, 4, 8, 8, seed=1)
IMAGES = random(2, 3, 16, 16, seed=2).tanh()
MEAN, STD = (0.1, -0.2, 0.3, 0.0), (1.5, 0.5, 1.0, 2.0)


def by_column(numbers):
    return torch.tensor(numbers).view(1, 4, 1, 1)


@pytest.mark.parametrize(
    ("options", "raw"),
    [
        ({"scaling_factor": 0.13025}, lambda z: z / 0.13025),  # Stable Diffusion XL
        ({"scaling_factor": 0.3611, "shift_factor": 0.1159}, lambda z: z / 0.3611 + 0.1159),  # FLUX
        ({"scaling_factor": 0.5, "latents_mean": MEAN, "latents_std": STD},
         lambda z: z * by_column(STD) / 0.5 + by_column(MEAN)),  # Playground v2.5
    ],
    ids=["factor", "shift", "mean and std"],
)  # fmt: skip
def test_latents_are_scaled_as_in_the_pipelines(options, raw):
    vae = vae_of(**options)
    with torch.no_grad():
        decoded = vae.decode(raw(LATENTS)).sample.clamp(-1, 1)
        posterior = vae.encode(IMAGES).latent_dist
    images, latents = fs.decode(vae, LATENTS), fs.encode(vae, IMAGES)
    torch.testing.assert_close(images, decoded)
    torch.testing.assert_close(raw(latents), posterior.mean)
    drawn = fs.encode(vae, IMAGES, noise=LATENTS)
    torch.testing.assert_close(raw(drawn), posterior.mean + posterior.std * LATENTS)


def test_latents_drawn_by_seed_do_not_depend_on_the_batch():
    vae = vae_of()
    both = fs.encode(vae, IMAGES, noise=fs.noise((4, 8, 8), seeds=[5, 6]))
    second = fs.encode(vae, IMAGES[1:], noise=fs.noise((4, 8, 8), seeds=[6]))
    torch.testing.assert_close(both[1:], second, rtol=0, atol=1e-6)  # convolutions of one and of two images


def test_images_are_clamped_to_their_range():
    assert float(fs.decode(vae_of(), 50 * LATENTS).abs().max()) <= 1


def test_tiles_are_used_for_one_call_alone(monkeypatch):
    vae = vae_of()
    seen = []
    plain = vae.tiled_decode
    monkeypatch.setattr(vae, "tiled_decode", lambda *a, **k: seen.append(vae.use_tiling) or plain(*a, **k))
    large = random(1, 4, 16, 16, seed=3)
    whole, tiled = fs.decode(vae, large), fs.decode(vae, large, tiled=True)
    assert (seen, vae.use_tiling) == ([True], False)
    assert whole.shape == tiled.shape == (1, 3, 32, 32)
    vae.enable_tiling()
    fs.decode(vae, large, tiled=True)
    assert vae.use_tiling


def test_tiling_is_turned_off_after_a_failure_too():
    vae = vae_of()
    vae.decode = None
    with pytest.raises(TypeError):
        fs.decode(vae, LATENTS, tiled=True)
    assert not vae.use_tiling


def test_a_vae_that_half_precision_breaks_runs_in_single_precision():
    """SDXL's VAE gives NaN in float16; `force_upcast` says so."""
    vae = vae_of(force_upcast=True).half()
    seen = []
    vae.decoder.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    images = fs.decode(vae, LATENTS.half())
    assert (seen, vae.dtype, images.dtype) == ([torch.float32], torch.float16, torch.float32)
    seen.clear()
    vae = vae_of(force_upcast=False).bfloat16()
    vae.decoder.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    assert fs.decode(vae, LATENTS).dtype == torch.float32
    assert seen == [torch.bfloat16]


def test_a_vae_without_a_distribution_decodes_and_encodes():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    ).eval()  # fmt: skip
    latents = fs.encode(vae, IMAGES)
    assert latents.shape == (2, 4, 8, 8)
    assert fs.decode(vae, latents).shape == IMAGES.shape
    with pytest.raises(ValueError, match="AutoencoderTiny has no distribution of latents to draw from"):
        fs.encode(vae, IMAGES, noise=LATENTS)


def test_the_latents_of_a_video_have_a_mean_for_each_channel():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False], latents_mean=list(MEAN),
        latents_std=list(STD),
    ).eval()  # fmt: skip
    latents = random(1, 4, 1, 8, 8, seed=4)
    with torch.no_grad():
        theirs = vae.decode(latents * by_column(STD)[..., None] + by_column(MEAN)[..., None]).sample
    torch.testing.assert_close(fs.decode(vae, latents), theirs.clamp(-1, 1))


@pytest.mark.parametrize(
    ("latents", "says"),
    [
        (LATENTS[:, :3], r"AutoencoderKL decodes latents \[B, 4, h, w\], got \[2, 3, 8, 8\]"),
        (fs.pack_latents(LATENTS), r"got \[2, 16, 16\]; FLUX's tokens need fs\.unpack_latents first"),
    ],
    ids=["channels", "tokens"],
)
def test_latents_of_another_shape_are_refused(latents, says):
    with pytest.raises(ValueError, match=says):
        fs.decode(vae_of(), latents)


@pytest.mark.parametrize(
    ("images", "says"),
    [
        (IMAGES[:, :1], r"encodes images \[B, 3, H, W\], got \[2, 1, 16, 16\]"),
        (255 * IMAGES, r"images must be floats in \[-1, 1\], got torch\.float32 from"),
        ((255 * IMAGES).byte(), r"got torch\.uint8 .*images / 127\.5 - 1"),
        (IMAGES[..., :15], r"multiples of 2 for this VAE, got \[2, 3, 16, 15\]"),
    ],
    ids=["channels", "range", "bytes", "size"],
)
def test_images_of_another_shape_or_range_are_refused(images, says):
    with pytest.raises(ValueError, match=says):
        fs.encode(vae_of(), images)


def test_noise_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"noise has shape \[1, 4, 8, 8\], the latents \[2, 4, 8, 8\]"):
        fs.encode(vae_of(), IMAGES, noise=LATENTS[:1])


def test_a_vae_whose_scale_is_not_known_is_refused():
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        **{key: value for key, value in SMALL.items() if key not in ("latent_channels",)}, latent_channels=4
    )
    with pytest.raises(ValueError, match=r"AutoencoderKLFlux2 has neither scaling_factor nor latents_mean"):
        fs.decode(vae, LATENTS)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: fs.pack_latents(torch.zeros(1, 4, 7, 8)), r"even h and w, got \[1, 4, 7, 8\]"),
        (lambda: fs.unpack_latents(torch.zeros(1, 12, 16), 8, 8), r"to 8 x 8 latents takes tokens \[B, 16, 4 C\]"),
        (lambda: fs.unpack_latents(torch.zeros(1, 16, 16), 64, 1), "even sizes"),
    ],
    ids=["odd", "another size", "flat"],
)
def test_sizes_that_cannot_be_packed_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()
