"""The built-in images: scikit-learn's handwritten digits, real, tiny, and there without a download."""

from __future__ import annotations

import hashlib
from typing import Literal

import torch
from torch import Tensor

TRAIN = 1500  # of the 1797 images


def digits(split: Literal["train", "test", "all"] = "train") -> tuple[Tensor, Tensor]:
    """Images [N, 1, 8, 8], float32 in [-1, 1] (17 grey levels), and their labels [N], int64.

    split: "train" (1500 images), "test" (the other 297) or "all" (1797, in the order of the data set). Which image
        is where follows from the SHA-256 of its index, so it is the same with every version of every package.
    Alpaydin and Kaynak 1998, Optical Recognition of Handwritten Digits, UCI Machine Learning Repository.
    """
    indices = {"train": _shuffled()[:TRAIN], "test": _shuffled()[TRAIN:], "all": list(range(1797))}
    if split not in indices:
        raise ValueError(f"split must be 'train', 'test' or 'all', got {split!r}")
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits come with scikit-learn: pip install 'fastsample[demo]'") from error
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    labels = torch.tensor(data.target, dtype=torch.int64)
    return images[indices[split]], labels[indices[split]]


def _shuffled() -> list[int]:
    return sorted(range(1797), key=lambda i: hashlib.sha256(str(i).encode()).digest())
