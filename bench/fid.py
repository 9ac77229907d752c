"""The Frechet Inception Distance, and the features and logits of its network for other measures.

Heusel et al. 2017, arXiv:1706.08500. An FID is this network with these weights, this resize and this rounding; with
anything else it is another distance, so that nothing is ever put in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .images import quantise, read_reference
from .inception import Inception, load_inception
from .measure import Features
from .quality import FrechetTo
from .reference import Reference
from .resize import resize_tf1
from .weights import Weights

INCEPTION = Weights(
    what="the network of the FID",
    file="pt_inception-2015-12-05-6726825d.pth",
    url="https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth",
    sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    size=95_628_359,
    variable="FASTSAMPLE_INCEPTION",
)
SIZE = 299  # pixels


def fid(
    reference: Tensor | Reference | str | Path,
    *,
    n: int | None = None,
    path: str | Path | None = None,
    allow_download: bool = False,
    device: str | torch.device = "cpu",
    batch: int = 50,
) -> FrechetTo:
    """The FID to real images: RGB images [N, 3, H, W] in [-1, 1], a folder or an .npz of them, or their statistics.

    n: of how many images a statistics file is that does not say so itself.
    The other arguments and errors are those of `inception_features`. Published FIDs are of 50,000 samples.
    """
    features = inception_features(path, allow_download=allow_download, device=device, batch=batch)
    return FrechetTo("fid", features, _reference(reference, features, n))


def inception_features(
    path: str | Path | None = None, *, allow_download: bool = False, device: str | torch.device = "cpu", batch: int = 50
) -> Features:
    """The 2048 features of the FID, from RGB images of any size.

    path: of the weights; else they are looked for at $FASTSAMPLE_INCEPTION, else in the cache folder.
    batch: how many images go through the network at a time.
    Raises FileNotFoundError, naming the file, its URL, place and hash, where they are not there, and ValueError where
    they are damaged.
    """
    network = _network(path, allow_download, device, batch)
    return _features("inception-v3-fid", network, torch.device(device), batch)


def inception_logits(
    path: str | Path | None = None, *, allow_download: bool = False, device: str | torch.device = "cpu", batch: int = 50
) -> Features:
    """What the Inception Score is made of: 1008 logits, without the bias, which its authors' code leaves out.

    The arguments and errors are those of `inception_features`. Salimans et al. 2016, arXiv:1606.03498.
    """
    network = _network(path, allow_download, device, batch)

    def logits(images: Tensor) -> Tensor:
        network.fc.double()  # a product of matrices, which the flags of cudnn do not reach; TF32 leaves float64 alone
        return network.logits(network(images).double(), bias=False)

    return _features("inception-v3-logits", logits, torch.device(device), batch)


def prepared(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [-1, 1] -> [B, 3, 299, 299]: rounded to bytes, resized, (byte - 128) / 128."""
    return (resize_tf1(quantise(images).float(), SIZE, SIZE) - 128) / 128


def _network(path: str | Path | None, allow_download: bool, device: str | torch.device, batch: int) -> Inception:
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    return load_inception(INCEPTION.find(path, allow_download=allow_download)).to(device)


def _features(name: str, network: Callable[[Tensor], Tensor], device: torch.device, batch: int) -> Features:
    """TF32 and autocast, which would cost the features half of their digits, are off whatever the user has set."""

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        with (
            torch.autocast(device.type, enabled=False),
            torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False),
        ):
            return torch.cat([network(prepared(part.to(device))) for part in images.split(batch)])

    return Features(name, extract, INCEPTION.sha256, f"tf1-bilinear-{SIZE}", (3, None, None))


def _reference(given: Tensor | Reference | str | Path, features: Features, n: int | None) -> Reference:
    if isinstance(given, Reference):
        return given
    if isinstance(given, Tensor):
        return Reference.of(given, features)
    return read_reference(Path(given), features, n)
