"""Batches: of tensors in memory, and the same stream of them however often a run is stopped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsample.noise import mix

from .method import Batch


class Batches:
    """Images that fit in memory, in shuffled batches: a loader without the cost of one image at a time.

    x0: [N, ...] in [-1, 1]. condition: the network's conditions by keyword, [N, ...] each.
    The last images of an epoch that do not fill a batch are left out; each epoch shuffles anew, with torch's generator.
    """

    def __init__(self, x0: Tensor, condition: Mapping[str, Tensor] | None = None, *, size: int = 128):
        condition = dict(condition or {})
        wrong = [key for key, value in condition.items() if len(value) != len(x0)]
        if wrong:
            raise ValueError(f"condition {wrong[0]!r} has {len(condition[wrong[0]])} rows for {len(x0)} images")
        if "x0" in condition:
            raise ValueError("'x0' names the images and cannot be a condition too")
        if size < 1:
            raise ValueError(f"size of a batch must be at least 1, got {size}")
        self.tensors: Batch = {"x0": x0, **condition}
        self.size = min(size, len(x0))

    def __len__(self) -> int:
        return len(self.tensors["x0"]) // self.size if self.size else 0

    def __iter__(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.tensors["x0"]))
        for k in range(len(self)):
            chosen = order[k * self.size : (k + 1) * self.size]
            yield {key: value[chosen] for key, value in self.tensors.items()}


@dataclass
class Stream:
    """The batches of all epochs, one after another; each is drawn under a seed of its own."""

    loader: Iterable[Batch]
    seed: int
    epoch: int = 0
    used: int = 0
    iterator: Iterator[Batch] | None = None

    def next(self) -> Batch:
        batch = self._draw()
        if batch is None:
            self.epoch, self.used, self.iterator = self.epoch + 1, 0, None
            batch = self._draw()
        if batch is None:
            raise ValueError(f"the loader gave no batch in epoch {self.epoch}; it must give them anew each time")
        return batch

    def go_to(self, epoch: int, used: int) -> None:
        self.epoch, self.used, self.iterator = epoch, 0, None
        for _ in range(used):
            self._draw()

    def first(self) -> Batch:
        """The first batch, checked; then everything begins anew."""
        if isinstance(self.loader, Iterator):
            raise TypeError("the loader can be iterated once only; pass a DataLoader, a list or distill.Batches")
        batch = self._draw()
        if batch is None:
            raise ValueError("the loader gives no batch: the data set is empty, or smaller than a batch with drop_last")
        kinds = {k: type(v).__name__ for k, v in batch.items()} if isinstance(batch, dict) else type(batch).__name__
        if not isinstance(batch, dict) or "x0" not in batch or not all(isinstance(v, Tensor) for v in batch.values()):
            raise TypeError(
                f"the loader gives {kinds}, not a dictionary of tensors with the images as 'x0'; use "
                f"distill.Batches(images, {{'class_labels': labels}}) or a collate_fn that returns one"
            )
        x0 = batch["x0"]
        if not bool(x0.isfinite().all()):
            raise ValueError("the images of the first batch hold NaN or infinity; look at how they are loaded")
        low, high = float(x0.min()), float(x0.max())
        if not (low >= -1.001 and high <= 1.001):
            raise ValueError(
                f"images must lie in [-1, 1], the first batch lies in [{low:g}, {high:g}]; scale it: "
                f"{'x / 127.5 - 1' if low >= 0 and high > 2 else f'x / {max(-low, high):g}'}"
            )
        if x0.dtype != torch.float32:
            raise TypeError(f"images must be float32, got {x0.dtype}; call .float()")
        self.epoch, self.used, self.iterator = 0, 0, None
        return batch

    def _draw(self) -> Batch | None:
        torch.manual_seed(mix(self.seed, self.epoch, self.used))  # before iter(): loaders draw their order there
        if self.iterator is None:
            self.iterator = iter(self.loader)
        batch = next(self.iterator, None)
        self.used += 1
        return batch
