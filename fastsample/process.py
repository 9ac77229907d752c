"""This process: how many threads it computes with, and whether it is the one of several that speaks and writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def first_process() -> bool:
    """Whether this process speaks and writes; the others work under the same launcher."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Inside, torch computes with this many threads; None: as many as before."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
