"""The examples run as they are, and say what to do where they cannot."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

diffusers = pytest.importorskip("diffusers")
EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_pipeline():
    torch.manual_seed(0)
    network = diffusers.UNet2DModel(
        sample_size=16, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    return diffusers.DDPMPipeline(network, diffusers.DDPMScheduler())


def test_fewer_steps_loads_and_samples_a_saved_pipeline(tmp_path, monkeypatch):
    tiny_pipeline().save_pretrained(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    images = load("fewer_steps").main(str(tmp_path / "pipe"), steps=3)
    assert images.shape == (16, 3, 16, 16)
    assert len(list(tmp_path.glob("sample-*.png"))) == 16


def test_fewer_steps_says_what_to_do_without_a_model(tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)could not load .*Pass the folder"):
        load("fewer_steps").main(str(tmp_path / "nothing"))


def test_own_network_counts_the_doubled_rows(capsys):
    points = load("own_network").main(count=8, steps=6)
    assert points.shape == (8, 2)
    assert "6 calls of the network, 96 rows" in capsys.readouterr().out


def tokenizer(folder):
    """CLIP's, of single letters."""
    transformers = pytest.importorskip("transformers")
    letters = [
        *map(chr, range(97, 123)),
        *(f"{chr(k)}</w>" for k in range(97, 123)),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({letter: k for k, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def text_encoder(projected=False):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=52, eos_token_id=53, pad_token_id=53, projection_dim=8,
    )  # fmt: skip
    return (transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel)(config).eval()


SMALL_UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def stable_diffusion(request, tmp_path_factory):
    """The folder of a tiny random pipeline, built as in diffusers' own tests."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
    )  # fmt: skip
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
    if request.param == "sd":
        unet = diffusers.UNet2DConditionModel(**SMALL_UNET, cross_attention_dim=8)
        pipe = diffusers.StableDiffusionPipeline(
            vae, text_encoder(), tokenizer(folder / "words"), unet,
            diffusers.PNDMScheduler(skip_prk_steps=True, **betas), None, None, requires_safety_checker=False,
        )  # fmt: skip
    else:
        unet = diffusers.UNet2DConditionModel(
            **SMALL_UNET, cross_attention_dim=16, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 * 4 + 8,
        )  # fmt: skip
        words = tokenizer(folder / "words")
        pipe = diffusers.StableDiffusionXLPipeline(
            vae, text_encoder(), text_encoder(projected=True), words, words, unet,
            diffusers.EulerDiscreteScheduler(timestep_spacing="leading", **betas), add_watermarker=False,
        )  # fmt: skip
    pipe.save_pretrained(folder / "pipe")
    return folder / "pipe"


ASKED = ["a lighthouse", "--negative", "fog", "--count", "2", "--steps", "4", "--scale", "3", "--seed", "7"]


def test_stable_diffusion_loads_and_samples_a_saved_pipeline(stable_diffusion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    example = load("stable_diffusion")
    images = example.main([*ASKED, "--model", str(stable_diffusion)])
    assert images.shape == (2, 3, 16, 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image-7.png", "image-8.png"]
    other = example.main([*ASKED, "--model", str(stable_diffusion), "--negative", "rain"])
    assert not torch.equal(images, other)
    alone = example.main([*ASKED, "--model", str(stable_diffusion), "--seed", "8", "--count", "1"])
    torch.testing.assert_close(alone, images[1:], rtol=0, atol=1e-4)  # networks of one and of two images


def test_stable_diffusion_is_the_pipeline_of_diffusers_with_our_scheduler(stable_diffusion, tmp_path, monkeypatch):
    """From the same noise; so what the network, the guidance and the VAE are told is the same too."""
    monkeypatch.chdir(tmp_path)
    example = load("stable_diffusion")
    theirs = example.main([*ASKED, "--model", str(stable_diffusion), "--pipeline"])
    ours = example.main([*ASKED, "--model", str(stable_diffusion)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def test_stable_diffusion_says_what_to_do_without_a_model(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        load("stable_diffusion").main(["a lighthouse", "--model", str(tmp_path / "nothing")])
    said = str(stopped.value)
    assert "could not load" in said
    assert "Pass --model with the folder" in said
    assert "\n" not in said
