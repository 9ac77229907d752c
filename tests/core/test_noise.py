"""Noise by sample index."""

from itertools import product

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample.noise import mix


@pytest.mark.parametrize("shape", [(3, 32, 32), (5,), (1, 8, 8), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_first_draw_of_a_seed_is_what_torch_gives_for_it(shape, dtype):
    drawn = fs.noise(shape, seeds=[0, 7, 2**32 - 1], dtype=dtype).draw(0)
    assert (drawn.dtype, drawn.shape) == (dtype, (3, *shape))
    for one, seed in zip(drawn, [0, 7, 2**32 - 1]):
        assert torch.equal(one, torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype))


@pytest.mark.parametrize("k", [0, 1, 5])
def test_a_sample_has_its_noise_whatever_its_batch(k):
    many = fs.noise((3, 7), seeds=range(10)).draw(k)
    assert torch.equal(fs.noise((3, 7), seeds=[4]).draw(k)[0], many[4])
    assert torch.equal(fs.noise((3, 7), seeds=[9, 4]).draw(k), many[[9, 4]])


def test_draws_can_be_repeated_and_leave_the_generator_of_torch_alone():
    before = torch.random.get_rng_state()
    noise = fs.noise((4,), seeds=range(3))
    assert torch.equal(noise.draw(2), noise.draw(2))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_draw_of_every_seed_is_another():
    noise = fs.noise((4,), seeds=range(50))
    draws = torch.cat([noise.draw(k) for k in range(20)])
    assert len(draws.unique(dim=0)) == 50 * 20


def test_draws_are_unit_normal_and_not_correlated():
    noise = fs.noise((16, 16), seeds=range(200))
    first, second = (noise.draw(k).flatten() for k in (1, 2))
    n = len(first)  # 51200: the errors of mean, variance and correlation are 0.004, 0.006 and 0.004
    for z in (first, second):
        assert abs(float(z.mean())) < 4 / n**0.5
        assert abs(float(z.var()) - 1) < 4 * (2 / n) ** 0.5
        assert abs(float((z**4).mean()) - 3) < 4 * (96 / n) ** 0.5
    assert abs(float((first * second).mean())) < 4 / n**0.5
    assert abs(float((first[256:] * second[:-256]).mean())) < 4 / n**0.5


def test_mixed_seeds_do_not_meet():
    grid = list(product(range(300), range(30)))
    mixed = {mix(seed, k) for seed, k in grid}
    assert len(mixed) == len(grid)
    assert len({number & 0xFFFFFFFF for number in mixed}) == len(grid)  # all that torch's CPU generator keeps
    assert all(0 <= number < 2**63 for number in mixed)
    assert mix(1, 2) != mix(2, 1)


def test_numbers_of_numpy_and_torch_are_seeds():
    assert fs.noise((2,), seeds=np.arange(3)).seeds == (0, 1, 2)
    assert fs.noise((2,), seeds=torch.arange(3)).seeds == (0, 1, 2)


@pytest.mark.parametrize("seed", [-1, 2**32, 2**40])
def test_seeds_that_torch_would_fold_are_refused(seed):
    with pytest.raises(ValueError, match=rf"0 to 2\*\*32 - 1, got {seed}"):
        fs.noise((2,), seeds=[0, seed])


def test_noise_without_seeds_or_with_fractions_is_refused():
    with pytest.raises(ValueError, match="at least one seed"):
        fs.noise((2,), seeds=[])
    with pytest.raises(TypeError, match="float"):
        fs.noise((2,), seeds=[1.5])
    with pytest.raises(TypeError, match="float"):
        fs.noise((2.5,), seeds=[1])
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch\.int32"):
        fs.noise((2,), seeds=[1], dtype=torch.int32)


@pytest.mark.gpu
def test_noise_is_the_same_on_a_gpu():
    there = fs.noise((3, 8), seeds=range(4), device="cuda")
    assert torch.equal(there.draw(1).cpu(), fs.noise((3, 8), seeds=range(4)).draw(1))
