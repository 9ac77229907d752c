"""Noise by sample index: sample i has the same noise whatever the batch size, the rank or the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor


def mix(*numbers: int) -> int:
    """A 63-bit seed from several whole numbers (the finaliser of SplitMix64, Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


@dataclass(frozen=True)
class Noise:
    """Unit normal noises for samples of one shape, one seed a sample; `draw(0)` starts a run, `draw(k)` is step k's.

    Drawn on the CPU and moved, so that a seed means the same on every device. draw(0) of seed s is what
    `torch.randn(shape, generator=torch.Generator().manual_seed(s))` gives: diffusers' pipelines draw the same.
    """

    sample_shape: tuple[int, ...]
    seeds: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.seeds), *self.sample_shape)

    def draw(self, k: int) -> Tensor:
        pinned = self.device.type == "cuda"  # only from pinned memory may a copy run on while we go on
        out = torch.empty(self.shape, dtype=self.dtype, pin_memory=pinned)
        generator = torch.Generator()
        for i, seed in enumerate(self.seeds):
            generator.manual_seed(seed if k == 0 else mix(seed, k))
            torch.randn(self.sample_shape, generator=generator, dtype=self.dtype, out=out[i])
        return out.to(self.device, non_blocking=pinned)


def noise(
    shape: Sequence[int],
    seeds: Iterable[int],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Noise:
    """Noise for one sample of `shape` for each seed: `fs.noise((3, 32, 32), seeds=range(16))` is a batch of 16."""
    seeds = tuple(index(seed) for seed in seeds)
    if not seeds:
        raise ValueError("noise needs at least one seed: one sample is drawn for each")
    wrong = [seed for seed in seeds if not 0 <= seed < 2**32]
    if wrong:  # torch's CPU generator keeps the low 32 bits: others would repeat a sample in silence
        raise ValueError(f"seeds must be whole numbers from 0 to 2**32 - 1, got {wrong[0]}")
    if not dtype.is_floating_point:
        raise ValueError(f"noise needs a floating-point dtype, got {dtype}")
    return Noise(tuple(index(size) for size in shape), seeds, torch.device(device), dtype)
