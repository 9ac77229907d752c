"""Inpainting: what is known stays, the rest follows it."""

from itertools import pairwise

import pytest
import torch

import fastsample as fs
from fastsample.zoo import GaussianMixture

from .toys import NOISY, ODE, SCHEDULES, ddim

VP = fs.VP.linear()
NODE = fs.node(VP, 500.0)
X = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IMAGE = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.zeros(4, 4)
MASK[:, 2:] = 1  # the right half is painted
KEPT, PAINTED = MASK == 0, MASK == 1
PLAN = fs.trace(ddim, fs.grid(VP, 8))


def gaussian(schedule=VP):
    """Two stripes of one brightness or the other: what is known of the left half says what the right half is."""
    means = torch.stack([torch.full((1, 4, 4), 1.0), torch.full((1, 4, 4), -1.0)])
    return GaussianMixture(schedule, torch.ones(2), means, torch.full((2, 1, 4, 4), 0.01))


def labelled():
    return fs.Denoiser(lambda x, t, label: torch.sin(x + label.view(-1, 1, 1, 1)), VP)


@pytest.mark.parametrize("solver", ODE + NOISY, ids=lambda f: f.__name__)
@pytest.mark.parametrize("schedule", ["linear", "edm", "flow"])
def test_the_known_part_is_the_image_and_the_rest_is_not(solver, schedule):
    schedule = SCHEDULES[schedule]
    plan = fs.trace(solver, fs.grid(schedule, 8, start=0.99 if isinstance(schedule, fs.Flow) else None))
    noise = fs.noise((1, 4, 4), seeds=range(3), dtype=torch.float64)
    x0 = fs.sample(fs.Inpainted(gaussian(schedule), IMAGE, MASK), plan, noise)
    if solver.__name__ in ("ddim", "two_step", "renoise"):  # their last state is their last x0
        assert torch.equal(x0[..., KEPT], IMAGE[..., KEPT])
    else:  # a sum that is the image but for rounding
        torch.testing.assert_close(x0[..., KEPT], IMAGE[..., KEPT])
    assert (x0[..., PAINTED] - IMAGE[..., PAINTED]).abs().max() > 0.1
    assert x0.isfinite().all()


def test_the_painted_part_follows_the_known_one():
    image = torch.ones(3, 1, 4, 4, dtype=torch.float64) * torch.tensor([1.0, -1.0, 1.0]).view(3, 1, 1, 1)
    plan = fs.trace(ddim, fs.grid(VP, 50))
    x0 = fs.sample(fs.Inpainted(gaussian(), image, MASK), plan, X)
    assert ((x0 - image).abs() < 0.5).all()  # five standard deviations of the 0.1 of each component
    assert torch.equal(x0, fs.sample(fs.Inpainted(gaussian(), image, MASK), plan, X))
    free = fs.sample(gaussian(), plan, X)
    assert ((free - image).abs() > 1.5).any()  # without the image the noise decides


def test_a_mask_of_ones_paints_all_and_of_zeros_nothing():
    free = fs.sample(gaussian(), PLAN, X)
    assert torch.equal(fs.sample(fs.Inpainted(gaussian(), IMAGE, torch.ones(1)), PLAN, X), free)
    assert torch.equal(fs.sample(fs.Inpainted(gaussian(), IMAGE, torch.zeros(4, 4)), PLAN, X), IMAGE)


def test_a_soft_mask_blends():
    half = fs.Inpainted(gaussian(), IMAGE, torch.full((4, 4), 0.25)).predict(X, NODE)
    torch.testing.assert_close(half, 0.25 * gaussian().predict(X, NODE) + 0.75 * IMAGE)


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (1, 1, 4, 4), (3, 1, 4, 4)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int64])
def test_a_mask_of_any_shape_that_broadcasts_and_any_dtype(shape, dtype):
    mask = MASK.expand(shape).to(dtype)
    ours = fs.Inpainted(gaussian(), IMAGE, mask).predict(X, NODE)
    assert torch.equal(ours, fs.Inpainted(gaussian(), IMAGE, MASK).predict(X, NODE))
    assert ours.dtype == torch.float64


def test_one_image_may_serve_with_a_mask_for_each_sample():
    masks = torch.stack([MASK, 1 - MASK, torch.ones(4, 4)])[:, None]
    x0 = fs.Inpainted(gaussian(), IMAGE[:1], masks).predict(X, NODE)
    for i in range(3):
        alone = fs.Inpainted(gaussian(), IMAGE[:1], masks[i]).predict(X[i : i + 1], NODE)
        torch.testing.assert_close(x0[i : i + 1], alone)


def test_with_ddim_from_the_image_it_is_the_blending_of_diffusers():
    """Their loop: after each step the kept part is the image with the first noise, at the level reached."""
    nodes = [row.node for row in PLAN.rows] + [PLAN.end]
    x = nodes[0].alpha * IMAGE + nodes[0].sigma * X
    for s, t in pairwise(nodes):
        stepped = fs.exponential_step(x, gaussian().predict(x, s), s, t)
        x = MASK * stepped + (1 - MASK) * (t.alpha * IMAGE + t.sigma * X)
    ours = fs.sample(fs.Inpainted(gaussian(), IMAGE, MASK), PLAN, X, init=IMAGE)
    torch.testing.assert_close(ours, x)


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("image", [IMAGE, IMAGE[:1]], ids=["each", "one"])
def test_it_goes_inside_guidance_and_around_it(image, batched):
    cond, uncond = {"label": torch.tensor([1.0, 2.0, 3.0])}, {"label": 0.0}
    outside = fs.Inpainted(fs.Guided(labelled(), uncond=uncond, scale=3.0, batched=batched), image, MASK)
    inside = fs.Guided(fs.Inpainted(labelled(), image, MASK), uncond=uncond, scale=3.0, batched=batched)
    one, other = (fs.sample(wrapped, PLAN, X, condition=cond) for wrapped in (outside, inside))
    torch.testing.assert_close(one, other)
    for x0 in (one, other):
        assert torch.equal(x0[..., KEPT], image.expand_as(X)[..., KEPT])
    deep = fs.Guided(fs.Thresholded(fs.Inpainted(labelled(), image, MASK), limit=1.0), uncond=uncond, scale=3.0)
    assert torch.equal(fs.sample(deep, PLAN, X, condition=cond)[..., KEPT], image.expand_as(X)[..., KEPT])


@pytest.mark.parametrize(
    "guide",
    [
        lambda inner: fs.ProjectedGuided(inner, uncond={"label": 0.0}, scale=3.0, momentum=-0.5),
        lambda inner: fs.Guided(inner, uncond={"label": 0.0}, scale=3.0, rescale=0.7, reuse=3),
        lambda inner: fs.Autoguided(inner, labelled(), scale=3.0),
    ],
)
def test_around_any_guidance_the_known_part_is_exact(guide):
    cond = {"label": torch.tensor([1.0, 2.0, 3.0])}
    x0 = fs.sample(fs.Inpainted(guide(labelled()), IMAGE, MASK), PLAN, X, condition=cond)
    assert torch.equal(x0[..., KEPT], IMAGE[..., KEPT])


def test_samples_at_their_own_times_are_painted_each_as_alone():
    t = torch.tensor([200.0, 500.0, 800.0], dtype=torch.float64)
    together = fs.Inpainted(gaussian(), IMAGE, MASK).predict(X, fs.nodes(VP, t))
    for i in range(3):
        alone = fs.Inpainted(gaussian(), IMAGE[i : i + 1], MASK).predict(X[i : i + 1], fs.node(VP, float(t[i])))
        torch.testing.assert_close(together[i : i + 1], alone)


def test_half_precision_images_fit_float32_samples():
    x0 = fs.Inpainted(gaussian(), IMAGE.half(), MASK).predict(X.float(), NODE)
    assert x0.dtype == torch.float32
    assert torch.equal(x0[..., KEPT], IMAGE.half().float()[..., KEPT])


def paint(image=IMAGE, mask=MASK):
    return fs.Inpainted(gaussian(), image, mask)


@pytest.mark.parametrize(
    ("error", "make", "says"),
    [
        (TypeError, lambda: paint(image=0.5), "image must be a tensor, got float"),
        (TypeError, lambda: paint(mask=[1, 0]), "mask must be a tensor, got list"),
        (ValueError, lambda: paint(image=torch.zeros(3, 1, 4, 4, dtype=torch.uint8)), "range of x0, got torch.uint8"),
        (ValueError, lambda: paint(image=IMAGE / 0), "finite numbers"),
        (ValueError, lambda: paint(mask=255 * MASK), r"0 \(keep\) to 1 \(paint\), got 0 to 255"),
        (ValueError, lambda: paint(mask=MASK / 0), "0 .keep. to 1"),
        (ValueError, lambda: paint(mask=torch.ones(5, 4)), r"\[5, 4\] does not fit an image of shape \[3, 1, 4, 4\]"),
        (ValueError, lambda: paint(mask=torch.ones(2, 3, 1, 4, 4)), "does not fit an image"),
        (ValueError, lambda: paint(mask=torch.ones(3, 2, 4, 4)), "does not fit an image"),
        (ValueError, lambda: paint(mask=torch.ones(2, 1, 4, 4)), "does not fit an image"),
        (ValueError, lambda: paint(image=IMAGE[0]).predict(X, NODE), r"image of shape \[1, 4, 4\].*or one for all as"),
        (ValueError, lambda: paint().predict(X[:2], NODE), r"image of shape \[3, 1, 4, 4\] does not fit samples"),
        (ValueError, lambda: paint().predict(X[..., :2], NODE), "does not fit samples"),
        (ValueError, lambda: paint(IMAGE[:1], MASK.expand(3, 1, 4, 4)).predict(X[:2], NODE), "mask of shape"),
        (ValueError, lambda: paint(mask=MASK.to("meta")), "image is on cpu and mask on meta"),
        (ValueError, lambda: paint().predict(X.to("meta"), NODE), "on cpu, the samples on meta"),
    ],
)  # fmt: skip
def test_images_and_masks_that_do_not_fit_are_refused(error, make, says):
    with pytest.raises(error, match=says):
        make()
