"""What torch-fidelity's network makes of given images with random weights, kept in data/inception_peer.npz.

    pip install --no-deps torch-fidelity
    python tests/bench/inception_peer.py            # writes the file

The names and shapes in data/inception_layout.txt are proven by its strict loading. As a package it imports torchvision,
which its network does not need, so that an empty package stands in for it.
"""

import importlib
import sys
import tempfile
import types
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

DATA = Path(__file__).parent / "data"
KEPT = DATA / "inception_peer.npz"
KINDS = ["2048", "logits", "logits_unbiased"]


def layout():
    """Layer -> shape of its weight."""
    lines = (DATA / "inception_layout.txt").read_text(encoding="utf-8").splitlines()
    return {name: tuple(map(int, shape)) for name, *shape in map(str.split, lines) if not name.startswith("#")}


def random_weights():
    """A state dict. Variance is kept from layer to layer, so that images still differ behind the last.

    RandomState's stream is the same in every numpy.
    """
    source = np.random.RandomState(0)

    def uniform(shape, low, high):
        return torch.from_numpy(source.uniform(low, high, shape).astype(np.float32))

    weights = {}
    for name, shape in layout().items():
        bound = (6 / np.prod(shape[1:])) ** 0.5
        if name == "fc":
            weights |= {"fc.weight": uniform(shape, -bound, bound), "fc.bias": uniform(shape[:1], -1, 1)}
            continue
        weights[f"{name}.conv.weight"] = uniform(shape, -bound, bound)
        for of, low, high in (("weight", 0.7, 1), ("bias", -0.5, 0.5), ("running_mean", -0.5, 0.5)):
            weights[f"{name}.bn.{of}"] = uniform(shape[:1], low, high)
        weights[f"{name}.bn.running_var"] = uniform(shape[:1], 0.05, 2)  # where it is small, epsilon is seen
        weights[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    return weights


def random_images(height, width):
    """Bytes [2, 3, height, width]: coarse patches, by which images differ, and fine noise on them."""
    source = np.random.RandomState(height)
    patches = source.randint(30, 226, (2, 3, 4, 4))
    coarse = patches[:, :, np.arange(height)[:, None] * 4 // height, np.arange(width) * 4 // width]
    return torch.from_numpy((coarse + source.randint(-30, 31, coarse.shape)).astype(np.uint8))


def peer(name):
    """A module of torch-fidelity; ModuleNotFoundError where that is not installed."""
    spec = find_spec("torch_fidelity")
    if spec is None:
        raise ModuleNotFoundError("needs torch-fidelity: pip install --no-deps torch-fidelity")
    package = sys.modules.setdefault("torch_fidelity", types.ModuleType("torch_fidelity"))
    package.__path__ = spec.submodule_search_locations
    return importlib.import_module(f"torch_fidelity.{name}")


def peer_features(images, weights_path):
    """Kind -> what its network makes of bytes [n, 3, H, W]."""
    made = peer("feature_extractor_inceptionv3").FeatureExtractorInceptionV3
    network = made("fid", KINDS, feature_extractor_weights_path=str(weights_path))
    with torch.no_grad():
        return dict(zip(KINDS, network(images)))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.save(random_weights(), Path(folder) / "random.pth")
        found = peer_features(random_images(33, 57), Path(folder) / "random.pth")
    arrays = {kind: values.numpy() for kind, values in found.items()}
    np.savez_compressed(KEPT, **arrays, torch_fidelity=version("torch-fidelity"), torch=torch.__version__)
