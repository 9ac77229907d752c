"""Batches: of tensors in memory, and the same stream of them however often a run is stopped, on any number of
processes.

A loader gives the whole batch of one update. Each process takes its rows of it, and loads no others where the loader
is `Batches`, another `Drawn`, or a DataLoader over a data set with indices.
"""

from __future__ import annotations

import random
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, Sampler, Subset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from fastsample.noise import mix

from .method import Batch

T = TypeVar("T")
Part = tuple[Batch, int, int]  # some rows of a batch, the place of the first of them, and the rows of the whole batch


class Drawn:
    """A loader that chooses its batches before it makes them: a run that goes on passes over the old ones for nothing,
    and a process makes its own rows alone.

    bounded: whether x0 lies in [-1, 1], as images do; latents do not.
    """

    bounded: bool = True

    def chosen(self) -> Iterator[Batch]:
        """Of each batch of an epoch, all that is random, [B, ...] each, by torch's generator."""
        raise NotImplementedError(f"{type(self).__name__} must define chosen()")

    def made(self, chosen: Batch) -> Batch:
        """The batch of what was chosen, or of some rows of it; draws nothing."""
        raise NotImplementedError(f"{type(self).__name__} must define made(chosen)")

    def __iter__(self) -> Iterator[Batch]:
        return map(self.made, self.chosen())


class Batches(Drawn):
    """Images that fit in memory, in shuffled batches: a loader without the cost of one image at a time.

    x0: [N, ...], float32 in [-1, 1], or uint8, which becomes that. condition: the network's conditions by keyword,
        [N, ...] each.
    size: of a batch; for several processes or accumulation it is the whole batch of an update.
    flip: mirror each image, left and right, with a chance of one half.
    bounded: False says that x0 are latents, which do not lie in [-1, 1].
    The last images of an epoch that do not fill a batch are left out; each epoch shuffles anew, with torch's generator.
    """

    def __init__(
        self,
        x0: Tensor,
        condition: Mapping[str, Tensor] | None = None,
        *,
        size: int = 128,
        flip: bool = False,
        bounded: bool = True,
    ):
        condition = dict(condition or {})
        for key, value in {"x0": x0, **condition}.items():
            if not isinstance(value, Tensor) or not value.dim():
                got = "one number" if isinstance(value, Tensor) else type(value).__name__
                raise TypeError(f"{key!r} must be a tensor with a row for each image, got {got}; use torch.as_tensor")
        wrong = [key for key, value in condition.items() if len(value) != len(x0)]
        if wrong:
            raise ValueError(f"condition {wrong[0]!r} has {len(condition[wrong[0]])} rows for {len(x0)} images")
        if "x0" in condition:
            raise ValueError("'x0' names the images and cannot be a condition too")
        if size < 1:
            raise ValueError(f"size of a batch must be at least 1, got {size}")
        if flip and x0.dim() < 4:
            raise ValueError(f"flip mirrors the columns of images [N, C, H, W], got x0 of shape {list(x0.shape)}")
        self.tensors: Batch = {"x0": x0, **condition}
        self.size = min(size, len(x0))
        self.flip, self.bounded = flip, bounded

    def __len__(self) -> int:
        return len(self.tensors["x0"]) // self.size if self.size else 0

    def chosen(self) -> Iterator[Batch]:
        order = torch.randperm(len(self.tensors["x0"]))
        for k in range(len(self)):
            rows = order[k * self.size : (k + 1) * self.size]
            yield {"rows": rows, "flip": torch.rand(len(rows)) < 0.5} if self.flip else {"rows": rows}

    def made(self, chosen: Batch) -> Batch:
        batch = {key: value[chosen["rows"].to(value.device)] for key, value in self.tensors.items()}
        x0 = batch["x0"]
        batch["x0"] = x0.float() / 127.5 - 1 if x0.dtype == torch.uint8 else x0
        return {**batch, "x0": flipped(batch["x0"], chosen["flip"])} if self.flip else batch


def flipped(x0: Tensor, which: Tensor) -> Tensor:
    """x0 [B, C, H, W] with the images where `which` [B] is true mirrored, left and right."""
    return torch.where(which.to(x0.device).view(-1, *[1] * (x0.dim() - 1)), x0.flip(-1), x0)


def part_of(total: int, rank: int, world: int) -> tuple[int, int]:
    """The rows [first, last) of a batch of `total` that fall to part `rank` of `world`, as even as can be.

    Raises ValueError where there are fewer rows than parts.
    """
    if total < world:
        raise ValueError(
            f"a batch of {total} cannot be shared by {world} parts (processes times accumulation): make the batches "
            f"larger, or leave out a short last one by drop_last=True"
        )
    return total * rank // world, total * (rank + 1) // world


def check_parts(loader: Iterable[Batch], parts: int) -> None:
    """Raises ValueError where the last batch of an epoch, as far as is known, has fewer rows than there are parts."""
    batches = loader.batch_sampler if isinstance(loader, DataLoader) and _by_index(loader) else None
    if isinstance(batches, BatchSampler) and isinstance(batches.sampler, Sized) and not batches.drop_last:
        part_of(len(batches.sampler) % batches.batch_size or batches.batch_size, 0, parts)


@dataclass
class Stream:
    """The batches of all epochs, one after another; each is drawn under a seed of its own.

    rank, world: this process, and how many there are: it gets its rows of each batch. torch's, numpy's and Python's
    generators are seeded, so random transforms go on as they would have. In a DataLoader over a data set with indices
    they are seeded for each item, so that its transforms depend neither on the workers nor on the processes. What is
    drawn for a batch at once does: in a `collate_fn`, or in the data set's own `__getitems__`.
    """

    loader: Iterable[Batch]
    seed: int
    rank: int = 0
    world: int = 1
    epoch: int = 0
    used: int = 0
    shard: Shard = field(init=False, repr=False)
    parts: Iterator[Part] | None = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        self.shard = shard(self.loader, self.rank, self.world)

    def next(self) -> Batch:
        """The rows of this process of the next batch: of one process, the batch."""
        return self.next_part()[0]

    def next_part(self) -> Part:
        """The rows of this process of the next batch, the place of the first in it, and the rows of the whole."""
        part = self._draw()
        if part is None:
            self.go_to(self.epoch + 1, 0)
            part = self._draw()
        if part is None:
            raise ValueError(f"the loader gave no batch in epoch {self.epoch}; it must give them anew each time")
        return part

    def go_to(self, epoch: int, used: int) -> None:
        """To where `used` batches of an epoch have been drawn."""
        self.epoch, self.used, self.parts = epoch, used, None

    def first(self) -> Batch:
        """The first batch, whole on every process, checked; then everything begins anew."""
        if isinstance(self.loader, Iterator):
            raise TypeError("the loader can be iterated once only; pass a DataLoader, a list or distill.Batches")
        self.go_to(0, 0)
        part = replace(self, rank=0, world=1)._draw()
        if part is None:
            raise ValueError("the loader gives no batch: the data set is empty, or smaller than a batch with drop_last")
        batch = part[0]
        kinds = {k: type(v).__name__ for k, v in batch.items()} if isinstance(batch, dict) else type(batch).__name__
        if not isinstance(batch, dict) or "x0" not in batch or not all(isinstance(v, Tensor) for v in batch.values()):
            raise TypeError(
                f"the loader gives {kinds}, not a dictionary of tensors with the images as 'x0'; use "
                f"distill.Batches(images, {{'class_labels': labels}}) or a collate_fn that returns one"
            )
        part_of(_rows(batch), self.rank, self.world)
        check_images(batch["x0"], bounded=_bounded(self.loader))
        return batch

    def _draw(self) -> Part | None:
        if self.parts is None:
            self.parts = self.shard(self.seed, self.epoch, self.used)
        part = next(self.parts, None)
        self.used += 1
        return part


def check_images(x0: Tensor, *, bounded: bool = True) -> None:
    """Raises ValueError or TypeError for what no training can be fed with."""
    if not bool(x0.isfinite().all()):
        raise ValueError("the images of the first batch hold NaN or infinity; look at how they are loaded")
    low, high = float(x0.min()), float(x0.max())
    if bounded and not (low >= -1.001 and high <= 1.001):
        raise ValueError(
            f"images must lie in [-1, 1], and of latents, which need not, the loader must say bounded=False "
            f"(distill.Batches(latents, bounded=False), or loader.bounded = False); the first batch lies in "
            f"[{low:g}, {high:g}]; scale it: {'x / 127.5 - 1' if low >= 0 and high > 2 else f'x / {max(-low, high):g}'}"
        )
    if x0.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"images must be float32 (or float64), got {x0.dtype}; call .float()")
    if bounded and low >= 0 < high:
        warnings.warn(
            f"images are expected in [-1, 1] and the first batch lies in [{low:g}, {high:g}]; where it was made for "
            f"[0, 1], as by torchvision's ToTensor, give 2 * x - 1",
            stacklevel=2,
        )


Shard = Callable[[int, int, int], Iterator[Part]]  # (seed, epoch, used) -> the parts of an epoch after those used


def shard(loader: Iterable[Batch], rank: int = 0, world: int = 1) -> Shard:
    """What gives process `rank` of `world` its rows of the batches of an epoch, for a seed, after some that are used.

    Rows of other processes, and batches that are used, are not loaded where the loader is `Drawn`, or a DataLoader over
    a data set with indices; any other is iterated as it is, and its batches are cut.
    Raises ValueError for loaders that cut their batches themselves, or whose order no seed can bring back.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank must be from 0 to world - 1, got rank {rank} of {world}")
    _check_loader(loader)
    check_parts(loader, world)
    if isinstance(loader, Drawn) and type(loader).__iter__ is Drawn.__iter__:
        return partial(_of_drawn, loader, rank, world)
    if isinstance(loader, DataLoader) and _by_index(loader):
        return _Loaded(loader, rank, world)
    return partial(_of_any, loader, rank, world)


def _of_drawn(loader: Drawn, rank: int, world: int, seed: int, epoch: int, used: int) -> Iterator[Part]:
    for k, chosen in enumerate(_seeded(loader.chosen, seed, epoch)):
        if k >= used:
            own, first, total = _cut(chosen, rank, world)
            yield loader.made(own), first, total


def _of_any(loader: Iterable[Batch], rank: int, world: int, seed: int, epoch: int, used: int) -> Iterator[Part]:
    for k, batch in enumerate(_seeded(lambda: loader, seed, epoch)):
        if k >= used:
            yield _cut(batch, rank, world) if world > 1 else (batch, 0, _rows(batch))


class _Loaded:
    """A DataLoader that loads the rows of one process; each item under a seed of its own."""

    def __init__(self, loader: DataLoader[Any], rank: int, world: int):
        self.indices = _Indices(loader.batch_sampler, rank, world)  # type: ignore[arg-type]  # batches of indices
        self.loader: DataLoader[Any] = DataLoader(
            _Items(loader.dataset),
            batch_sampler=self.indices,
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=partial(_begin_worker, loader.worker_init_fn),
            multiprocessing_context=loader.multiprocessing_context,
            prefetch_factor=loader.prefetch_factor if loader.num_workers else None,
            persistent_workers=loader.persistent_workers,
        )

    def __call__(self, seed: int, epoch: int, used: int) -> Iterator[Part]:
        self.indices.begin(seed, epoch, used)
        for batch in _seeded(lambda: self.loader, seed, epoch):
            yield batch, *self.indices.places.popleft()


class _Indices(Sampler[Any]):
    """The batches of indices of another sampler: of each the rows of one process, each with a seed for its item."""

    def __init__(self, batches: Iterable[Sequence[Any]], rank: int, world: int):
        self.batches, self.rank, self.world = batches, rank, world
        self.begin(0, 0, 0)

    def begin(self, seed: int, epoch: int, used: int) -> None:
        self.seed, self.epoch, self.used = seed, epoch, used
        self.places: deque[tuple[int, int]] = deque()  # workers are sent for batches before they are wanted

    def __iter__(self) -> Iterator[list[tuple[Any, int]]]:
        for k, batch in enumerate(_seeded(lambda: self.batches, self.seed, self.epoch)):
            if k >= self.used:
                rows = list(batch)
                first, last = part_of(len(rows), self.rank, self.world)
                self.places.append((first, len(rows)))
                yield [(rows[j], mix(self.seed, self.epoch, k, j)) for j in range(first, last)]


class _Items(Dataset[Any]):
    """The items of another data set, each got under a seed."""

    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __getitems__(self, rows: Sequence[tuple[Any, int]]) -> Any:
        if hasattr(_whole(self.dataset), "__getitems__"):
            _seed(rows[0][1])
            return self.dataset.__getitems__([index for index, _ in rows])
        return [self[row] for row in rows]

    def __getitem__(self, row: tuple[Any, int]) -> Any:
        index, seed = row
        _seed(seed)
        return self.dataset[index]


def _whole(dataset: Any) -> Any:
    """What a subset is of: torch's `Subset` gets many items at once, one after another where the whole cannot."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    return dataset


def _begin_worker(begin: Callable[[int], None] | None, worker: int) -> None:
    """In a worker: what the user's own function sees is the user's own data set."""
    info = get_worker_info()
    object.__setattr__(info, "dataset", info.dataset.dataset)  # type: ignore[union-attr]
    if begin:
        begin(worker)


def _seeded(make: Callable[[], Iterable[T]], seed: int, epoch: int) -> Iterator[T]:
    """The items of an iterable, each drawn under a seed of its own, the first with what iter() draws."""
    iterator = None
    for k in count():
        with _generators_kept():
            torch.manual_seed(mix(seed, epoch, k))  # before iter(): loaders draw their order there
            _seed(mix(seed, epoch, k))
            iterator = iter(make()) if iterator is None else iterator
            try:
                item = next(iterator)
            except StopIteration:
                return
        yield item


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Those of Python and of numpy; torch's are the trainer's to keep."""
    before = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # what transforms draw from is the global one


def _cut(batch: Batch, rank: int, world: int) -> Part:
    total = _rows(batch)
    first, last = part_of(total, rank, world)
    return {key: value[first:last] for key, value in batch.items()}, first, total


def _rows(batch: Any) -> int:
    if not isinstance(batch, Mapping):
        return len(batch)
    rows = {key: len(value) if getattr(value, "shape", None) != () else None for key, value in batch.items()}
    if len(set(rows.values())) != 1 or None in rows.values():
        raise ValueError(
            f"the tensors of a batch must have a row for each image, got "
            f"{', '.join(f'{key!r} with {number}' for key, number in rows.items())}"
        )
    return int(next(iter(rows.values())) or 0)


def _bounded(loader: Iterable[Batch]) -> bool:
    return bool(getattr(loader, "bounded", getattr(getattr(loader, "dataset", None), "bounded", True)))


def _by_index(loader: DataLoader[Any]) -> bool:
    """Whether it is iterated as DataLoader does it, by batches of indices."""
    own = type(loader).__iter__ is not DataLoader.__iter__
    return not own and not isinstance(loader.dataset, IterableDataset) and loader.batch_sampler is not None


def _check_loader(loader: Iterable[Batch]) -> None:
    if type(loader).__module__.startswith("accelerate."):
        raise ValueError("the loader was prepared by accelerate; pass it as it was: train cuts its batches itself")
    if not isinstance(loader, DataLoader):
        return
    samplers = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
        raise ValueError(
            "the loader has a DistributedSampler, which cuts the data for each process; leave it out and give the "
            "size of the whole batch: train cuts the batches itself"
        )
    if any(getattr(sampler, "generator", None) is not None for sampler in samplers):
        raise ValueError(
            "the loader has a generator of its own, whose state no checkpoint holds; leave it out: train seeds the "
            "order of the data by its own seed"
        )
    if loader.persistent_workers and not _by_index(loader):
        raise ValueError(
            "the loader streams with persistent_workers=True: its workers keep their random numbers from one epoch to "
            "the next, and no checkpoint holds those; leave it out"
        )
    if loader.num_workers and not getattr(loader, "in_order", True):
        raise ValueError("the loader has in_order=False, so no two runs see the same order of batches; leave it out")
