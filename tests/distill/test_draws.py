"""Random numbers of a batch do not depend on how it is split."""

from itertools import pairwise

import pytest
import torch

from fastsample.distill import draws


def made(first, count, total, seed=3):
    generator = torch.Generator().manual_seed(seed)
    with draws.part(generator, first=first, count=count, total=total):
        x = torch.zeros(count, 2, 3, dtype=torch.float64)
        return (
            draws.randn_like(x),
            draws.rand(count),
            draws.randint(7, count, 4),
            draws.randn(count, dtype=torch.float64),
        )


@pytest.mark.parametrize("edges", [(0, 5, 12), (0, 1, 2, 11, 12), (0, 12)])
def test_parts_of_a_batch_draw_what_the_whole_draws(edges):
    parts = [made(low, high - low, 12) for low, high in pairwise(edges)]
    for whole, pieces in zip(made(0, 12, 12), zip(*parts)):
        assert torch.equal(whole, torch.cat(pieces))


def test_the_whole_draws_what_torch_draws():
    generator = torch.Generator().manual_seed(3)
    x, u, i, y = made(0, 12, 12)
    assert torch.equal(x, torch.randn(12, 2, 3, dtype=torch.float64, generator=generator))
    assert torch.equal(u, torch.rand(12, generator=generator))
    assert torch.equal(i, torch.randint(7, (12, 4), generator=generator))
    assert torch.equal(y, torch.randn(12, dtype=torch.float64, generator=generator))
    torch.manual_seed(3)
    alone = draws.randn(12, 2, 3, dtype=torch.float64), draws.rand(12), draws.randint(7, 12, 4)
    for one, other in zip((x, u, i), alone):
        assert torch.equal(one, other)


def test_numbers_for_another_batch_are_refused_inside_a_part():
    with draws.part(torch.Generator(), first=0, count=4, total=8):
        with pytest.raises(ValueError, match="numbers for 3 samples were asked for, the batch has 4; draw for all"):
            draws.rand(3)
        with pytest.raises(ValueError, match="numbers on meta were asked for, the batch is on cpu"):
            draws.randn_like(torch.zeros(4, device="meta"))
    assert draws.rand(3).shape == (3,)
