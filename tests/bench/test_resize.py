"""TensorFlow 1's bilinear resize: against its formula, and against the formula written as a loop."""

import numpy as np
import pytest
import torch

from fastsample.bench.resize import resize_tf1

SIZES = [(8, 8), (32, 32), (64, 48), (299, 299), (299, 31), (300, 598), (400, 257)]


def random_images(height, width):
    return torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).float()


def looped(image, height, width):
    """One channel [H, W], pixel by pixel: positions in float32, as there, all else in float64."""
    image = image.astype(np.float64)
    made = np.empty((height, width))
    down, right = np.float32(image.shape[0] / height), np.float32(image.shape[1] / width)
    for i in range(height):
        y = float(np.float32(i) * down)
        above, below = int(y), min(int(y) + 1, image.shape[0] - 1)
        for j in range(width):
            x = float(np.float32(j) * right)
            before, after = int(x), min(int(x) + 1, image.shape[1] - 1)
            top = image[above, before] * (1 - x % 1) + image[above, after] * (x % 1)
            bottom = image[below, before] * (1 - x % 1) + image[below, after] * (x % 1)
            made[i, j] = top * (1 - y % 1) + bottom * (y % 1)
    return made


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_it_is_the_formula_pixel_by_pixel(height, width):
    images = random_images(height, width)[:1, :1]
    made = resize_tf1(images, 40, 30)[0, 0].double()
    # a few roundings of numbers up to 255 in float32
    torch.testing.assert_close(made, torch.from_numpy(looped(images[0, 0].numpy(), 40, 30)), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_slope_is_read_at_i_h_by_299_and_flat_beyond_the_last_pixel(height, width):
    """Closed form; the half-pixel centres of torch's own resize would shift it by (h / 299 - 1) / 2 pixels."""
    slope = torch.arange(height)[:, None] * 0.5 + torch.arange(width) * 0.25
    y = (torch.arange(299).double() * height / 299).clamp_max(height - 1)
    x = (torch.arange(299).double() * width / 299).clamp_max(width - 1)
    wanted = y[:, None] * 0.5 + x * 0.25
    # positions up to 600 in float32 are off by up to 6e-5
    torch.testing.assert_close(resize_tf1(slope, 299, 299).double(), wanted, rtol=0, atol=1e-4)


def test_an_image_of_that_size_stays_as_it_is():
    images = random_images(299, 299)
    assert torch.equal(resize_tf1(images, 299, 299), images)


def test_twice_the_size_keeps_pixels_and_puts_their_means_between():
    images = random_images(5, 7)
    made = resize_tf1(images, 10, 14)
    assert torch.equal(made[..., ::2, ::2], images)
    assert torch.equal(made[..., ::2, 1:-1:2], (images[..., :-1] + images[..., 1:]) / 2)
    assert torch.equal(made[..., 9, 13], images[..., 4, 6])


def test_half_the_size_takes_every_other_pixel_and_smooths_nothing():
    images = random_images(598, 598)
    assert torch.equal(resize_tf1(images, 299, 299), images[..., ::2, ::2])


def test_it_stays_within_the_values_of_the_image():
    images = random_images(17, 23)
    made = resize_tf1(images, 299, 299)
    assert float(made.min()) >= float(images.min())
    assert float(made.max()) <= float(images.max())
