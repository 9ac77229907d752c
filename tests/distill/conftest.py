"""A toy that is learned in seconds: points in the plane, a small network, one thread."""

import math

import pytest
import torch
from torch import nn

import fastsample as fs
from fastsample import distill


class Toy(nn.Module):
    """An MLP on points [B, 2], t in indices 0..999, and two classes and a null class."""

    def __init__(self, seed=0, width=64, dropout=0.0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(3, 8)
            self.layers = nn.Sequential(
                nn.Linear(2 + 16 + 8, width), nn.SiLU(), nn.Dropout(dropout),
                nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2),
            )  # fmt: skip

    def forward(self, x, t, class_labels=None):
        labels = torch.full((len(x),), 2, device=x.device) if class_labels is None else class_labels
        angles = (t[:, None] / 1000) * (2.0 ** torch.arange(8, device=x.device))
        return self.layers(torch.cat([x, angles.sin(), angles.cos(), self.embedding(labels)], 1))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def toy():
    """toy(predicts, seed=0, dropout=0.0): a Denoiser of the small network."""

    def make(predicts="v", **options):
        return fs.Denoiser(Toy(**options), fs.VP.scaled_linear(), predicts)

    return make


@pytest.fixture
def ring():
    """Eight Gaussians of width 0.04 on a circle of radius 0.8; the class says in which half they lie."""
    generator = torch.Generator().manual_seed(1)
    which = torch.arange(1024) % 8
    angle = which * (math.pi / 4) + math.pi / 8
    centres = 0.8 * torch.stack([angle.cos(), angle.sin()], 1)
    points = (centres + 0.04 * torch.randn(1024, 2, generator=generator)).clamp(-1, 1)
    return points, (which >= 4).long()


@pytest.fixture
def loader(ring):
    return distill.Batches(ring[0], {"class_labels": ring[1]}, size=64)


@pytest.fixture
def weights():
    """weights(model): a copy of all parameters."""
    return lambda model: {key: value.detach().clone() for key, value in model.network.named_parameters()}
