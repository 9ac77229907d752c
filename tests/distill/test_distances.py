"""Distances: their formulas, in float32 whatever the network's dtype, one number for each sample."""

import math

import pytest
import torch

from fastsample.distill.consistency import pseudo_huber
from fastsample.distill.distances import PseudoHuber, distance, l1, l2, measured


def pair(dtype=torch.float64, shape=(5, 3, 4)):
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))


def test_the_pseudo_huber_distance_has_one_c_for_the_whole_sample():
    """A known fault: c of the whole norm used for each number, which is another distance."""
    a, b = pair()
    norms = (a - b).flatten(1).norm(dim=1)
    c = 0.00054 * math.sqrt(12)
    torch.testing.assert_close(pseudo_huber(a, b), (norms**2 + c**2).sqrt() - c)
    torch.testing.assert_close(PseudoHuber(0.7)(a, b), (norms**2 + 0.49).sqrt() - 0.7)
    faulty = (((a - b) ** 2 + c**2).sqrt() - c).flatten(1).sum(1)
    assert (pseudo_huber(a, b) < 0.5 * faulty).all()


def test_l2_and_l1_are_means_over_the_numbers_of_a_sample():
    a, b = pair()
    for k in range(5):
        flat = (a[k] - b[k]).flatten().tolist()
        assert float(l2(a, b)[k]) == pytest.approx(sum(d * d for d in flat) / 12)
        assert float(l1(a, b)[k]) == pytest.approx(sum(abs(d) for d in flat) / 12)


@pytest.mark.parametrize("name", ["pseudo_huber", "l2", "l1"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_measured_in_float32(name, dtype):
    """Differences of 2^-14, whose squares float16 rounds to 0, keep their value and their gradient."""
    a = torch.full((2, 64), 2.0**-14, dtype=dtype, requires_grad=True)
    b = torch.zeros(2, 64, dtype=dtype)
    found = distance(name)(a, b)
    assert found.dtype == torch.float32
    expected = distance(name)(a.double(), b.double())
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=0)
    assert (found > 0).all()
    (2.0**14 * found.sum()).backward()  # the gradient itself must come back in half precision, as with a scaler
    assert a.grad.isfinite().all()
    assert (a.grad != 0).all()


@pytest.mark.parametrize("c", [1e-30, 1e-8, None])
def test_equal_samples_have_distance_zero_and_a_finite_gradient_however_small_c_is(c):
    a = torch.ones(3, 4, requires_grad=True)
    found = PseudoHuber(c)(a, torch.ones(3, 4))
    found.sum().backward()
    torch.testing.assert_close(found, torch.zeros(3), atol=1e-15, rtol=0)
    assert torch.equal(a.grad, torch.zeros(3, 4))


def test_float64_stays_float64():
    a, b = pair()
    assert pseudo_huber(a, b).dtype == l2(a, b).dtype == torch.float64


def test_a_function_of_the_user_is_taken_as_it_is():
    a, b = pair()
    own = distance(lambda a, b: (a - b).abs().amax((1, 2)))
    torch.testing.assert_close(measured(own, a, b), (a - b).abs().flatten(1).amax(1))
    lpips = distance(lambda a, b: (a - b).square().mean((1, 2)).view(-1, 1, 1, 1))  # the shape that LPIPS returns
    torch.testing.assert_close(measured(lpips, a, b), l2(a, b))


def test_wrong_distances_are_refused():
    a, b = pair()
    with pytest.raises(ValueError, match="unknown distance 'lpips'; choose one of pseudo_huber, l2, l1"):
        distance("lpips")
    with pytest.raises(ValueError, match=r"one number for each sample, shape \[5\], got \[\]"):
        measured(lambda a, b: (a - b).square().mean(), a, b)
    with pytest.raises(ValueError, match=r"shape \[5\], got \[5, 12\]"):
        measured(lambda a, b: (a - b).flatten(1), a, b)
    for c in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="c of the pseudo-Huber distance must be positive and finite"):
            PseudoHuber(c)
