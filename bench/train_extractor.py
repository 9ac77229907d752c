"""How the shipped feature extractor was made:   python -m fastsample.bench.train_extractor OUT.safetensors

Run again it gives the same numbers on the same machine and versions, but not on all: the file shipped is the extractor.
"""

from __future__ import annotations

import hashlib
import sys

import torch
from safetensors.torch import save
from torch import Tensor, nn

from fastsample.files import write
from fastsample.zoo.data import digits

from .extractor import DigitsCNN


def train_extractor(seed: int = 0, *, epochs: int = 60, batch: int = 50, lr: float = 2e-3) -> DigitsCNN:
    """Train on the train split, one thread, images shifted by up to a pixel and noised a little."""
    images, labels = digits("train")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            network = DigitsCNN()
            adam = torch.optim.AdamW(network.parameters(), lr, weight_decay=1e-2)
            rates = torch.optim.lr_scheduler.CosineAnnealingLR(adam, epochs)
            for _ in range(epochs):
                for rows in torch.randperm(len(images)).split(batch):
                    loss = nn.functional.cross_entropy(network(_varied(images[rows])), labels[rows])
                    adam.zero_grad()
                    loss.backward()
                    adam.step()
                rates.step()
    finally:
        torch.set_num_threads(threads)
    return network.eval().requires_grad_(False)


def accuracy(network: DigitsCNN, images: Tensor, labels: Tensor) -> float:
    """The share of images whose digit it names rightly."""
    return float((network(images).argmax(1) == labels).double().mean())


def _varied(images: Tensor) -> Tensor:
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    down, right = (int(i) for i in torch.randint(3, (2,)))
    return padded[..., down : down + 8, right : right + 8] + 0.1 * torch.randn_like(images)


def main(out: str) -> None:
    network = train_extractor()
    data = save(network.state_dict())
    write(out, lambda path: path.write_bytes(data))
    print(f"{out}: test accuracy {accuracy(network, *digits('test')):.4f}, {len(data)} bytes")
    print(f"SHA-256 {hashlib.sha256(data).hexdigest()}, to stand in extractor.py beside a new name")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m fastsample.bench.train_extractor OUT.safetensors")
    main(sys.argv[1])
