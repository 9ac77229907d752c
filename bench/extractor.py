"""The feature extractor of `fd_digits`: a small network, trained once, shipped, and known by its hash.

A Frechet distance means something only beside others of the same extractor, so this one is never trained again in
silence: another network gets another name and another hash (`python -m fastsample.bench.train_extractor`).
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor, nn

NAME = "digits-cnn-1"
SHA256 = "af7965fd9d67f1fcf3038194d1e5c4423f39c90cba862230ce6013c61a4c911a"
FEATURES = 64


class DigitsCNN(nn.Module):
    """[B, 1, 8, 8] in [-1, 1] -> the scores of ten digits; `features` is its last layer but one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, FEATURES)
        self.scores = nn.Linear(FEATURES, 10)

    def features(self, x: Tensor) -> Tensor:
        """[B, 64], before the activation: after it, a third of the units would be dead."""
        x = self.conv1(x).relu()
        x = nn.functional.max_pool2d(self.conv2(x).relu(), 2)
        return self.hidden(x.flatten(1))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.scores(self.features(x).relu())  # type: ignore[no-any-return]


@torch.no_grad()
def digits_features(images: Tensor) -> Tensor:
    """Features [N, 64], float64, of images [N, 1, 8, 8] in [-1, 1]; on the CPU, so that devices agree."""
    if images.dim() != 4 or images.shape[1:] != (1, 8, 8):
        raise ValueError(f"fd_digits is for images [N, 1, 8, 8], got {list(images.shape)}; use fd_pixels")
    network = extractor()
    chunks = images.detach().to("cpu", torch.float32).clamp(-1, 1).split(1000)
    return torch.cat([network.features(chunk) for chunk in chunks]).double()


@cache
def extractor() -> DigitsCNN:
    """The shipped network, its file checked."""
    return load_extractor(Path(__file__).parent / "data" / f"{NAME}.safetensors")


def load_extractor(path: Path, sha256: str = SHA256) -> DigitsCNN:
    """Raises ValueError where the file is not the one with this hash."""
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise ValueError(
            f"{path} is damaged or not {NAME}: its SHA-256 is {found}, expected {sha256}; install fastsample again"
        )
    network = DigitsCNN()
    network.load_state_dict(load(data))
    return network.eval().requires_grad_(False)
