"""The examples run as they are, and say what to do where they cannot."""

import importlib.util
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
