"""Processes of one sweep: who makes which shard, and what all of them must agree on.

Under `accelerate launch` or `torchrun` every process runs the same script; they share the run folder, and each writes
shards of its own. Sample i is the same wherever it is made, and the scores are made of all shards in the order of the
indices, so that they are bit for bit those of one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .writing import Unwritable

T = TypeVar("T")


class Lost(RuntimeError):
    """Another process of the run is gone, so the run stops, to be resumed."""


@dataclass(frozen=True)
class Ranks:
    """This process among `world`. group: of torch.distributed, on CPUs; None where there is one process."""

    rank: int = 0
    world: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mine(self, number: int) -> bool:
        """Whether this process makes the shard of this number."""
        return number % self.world == self.rank

    def all(self, mine: T) -> list[T]:
        """What each process brought, in the order of the ranks; waits for all of them."""
        if self.group is None:
            return [mine]
        found: list[Any] = [None] * self.world
        with self._others():
            dist.all_gather_object(found, mine, group=self.group)
        return found

    def together(self, work: Callable[[], T]) -> T:
        """What work gives here, once it is done in every process.

        Where it fails in one it raises in all, so that none waits for another: here what it raised, elsewhere
        RuntimeError; but Unwritable everywhere where one of them raised it, since that stops the run.
        """
        failed: Exception | None = None
        try:
            found = work()
        except Lost:
            raise
        except Exception as error:
            failed = error
        told = self.all((isinstance(failed, Unwritable), None if failed is None else f"{_kind(failed)}{failed}"))
        stops = next((f"process {rank}: {reason}" for rank, (stop, reason) in enumerate(told) if stop), None)
        if stops is not None:
            raise failed if isinstance(failed, Unwritable) else Unwritable(stops)
        if failed is not None:
            raise failed
        for rank, (_, reason) in enumerate(told):
            if reason is not None:
                raise RuntimeError(f"process {rank} failed: {reason}")
        return found

    def once(self, n: int, mine: Iterable[range]) -> None:
        """Raises RuntimeError, in every process, unless all of 0 .. n - 1 occurred, each once, over all processes."""
        count = torch.zeros(n, dtype=torch.int64)
        for indices in mine:
            count[indices.start : indices.stop] += 1
        if self.group is not None:
            with self._others():
                dist.all_reduce(count, group=self.group)
        wrong = (count != 1).nonzero().flatten().tolist()
        if wrong:
            raise RuntimeError(
                f"{len(wrong)} of {n} samples were not made exactly once over {self.world} processes, such as index "
                f"{wrong[0]} ({int(count[wrong[0]])} times); give every process the same n, batch and shard"
            )

    @contextmanager
    def _others(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise Lost(
                f"process {self.rank} lost the others of this run: one of them ended; start all of them again, which "
                f"goes on from what is done"
            ) from error


@contextmanager
def ranks() -> Iterator[Ranks]:
    """The processes that a launcher started; one where there is none.

    A process group that is there is joined, and left as it is; else one is made for the run.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ours = dist.is_available() and not dist.is_initialized() and world > 1
    if ours:
        dist.init_process_group("gloo")
    try:
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            yield Ranks()
            return
        # A group of its own: on CPUs whatever the backend, and patient, since all wait while one measures latency.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=7))
        try:
            yield Ranks(dist.get_rank(), dist.get_world_size(), group)
        finally:
            dist.destroy_process_group(group)
    finally:
        if ours:
            dist.destroy_process_group()


def _kind(error: Exception) -> str:
    return "" if isinstance(error, OSError) else f"{type(error).__name__}: "
