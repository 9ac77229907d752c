"""The README's code runs as it is printed, and its solver table is complete."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastsample import solvers

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
SMALLER = {r"steps=400": "steps=2", r"steps=1000": "steps=2", r"n=2000": "n=150", r"steps=\[4, 8, 16\]": "steps=[2, 3]"}

diffusers = pytest.importorskip("diffusers")


class Prompted:
    """A pipeline that takes a prompt; tests/solvers/test_pipelines.py has the real ones."""

    def __init__(self):
        self.scheduler = diffusers.PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True)

    def __call__(self, prompt, num_inference_steps):
        self.scheduler.set_timesteps(num_inference_steps)
        x = torch.ones(1, 4, 8, 8)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(0.1 * x, t, x).prev_sample
        return SimpleNamespace(images=[x])


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_of_code_runs(number, monkeypatch, tmp_path):
    network = diffusers.UNet2DModel(
        sample_size=32, layers_per_block=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    pipe = diffusers.DDPMPipeline(network, diffusers.DDPMScheduler())
    monkeypatch.setattr(diffusers.DDPMPipeline, "from_pretrained", lambda name: pipe)  # no hub in a test
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda name: Prompted(), raising=False)
    monkeypatch.chdir(tmp_path)
    code = BLOCKS[number]
    for wanted, smaller in SMALLER.items():
        code = re.sub(wanted, smaller, code)
    exec(compile(code, f"README block {number}", "exec"), {})


def test_the_blocks_that_are_made_smaller_are_there():
    for wanted in SMALLER:
        assert re.search(wanted, README), f"{wanted} is no longer in the README: the test would run it in full"


def test_every_solver_is_named():
    assert set(solvers.SOLVERS) <= set(re.findall(r"`(\w+)`", README))


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)]+)\)", README))
def test_links_lead_somewhere(target):
    assert (ROOT / target).exists()
