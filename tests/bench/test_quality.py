"""Measures of quality on digits and toys: what they say, what they compare with, what they refuse."""

import pytest
import torch

from fastsample import bench
from fastsample.bench import Features, FrechetTo, Reference, frechet_distance
from fastsample.bench.quality import DIGITS, PIXELS
from fastsample.zoo.data import digits


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("measure", [bench.fd_digits, bench.fd_pixels])
def test_the_measures_of_digits_grow_with_noise(measure):
    images = digits("all")[0]
    quality = measure(images)
    noise = normal(*images.shape)
    scores = [quality((images + sigma * noise).clamp(-1, 1)) for sigma in (0.0, 0.2, 0.5, 1.0)]
    values = [score.value for score in scores]
    assert values[0] < 1e-9
    assert values == sorted(values)
    assert values[1] + 2 * scores[1].se < values[2] - 2 * scores[2].se
    assert scores[1].n == 1797
    assert quality.name == measure.__name__
    assert quality(1.2 * images) == quality((1.2 * images).clamp(-1, 1))  # what a picture can show


@pytest.mark.parametrize("measure", [bench.fd_digits, bench.fd_pixels])
def test_a_measure_says_the_same_of_samples_and_of_their_features(measure):
    images = digits("all")[0]
    quality = measure(images[:1000])
    assert isinstance(quality, bench.Measure)
    features = quality.features(images[1000:])
    assert quality(images[1000:]) == quality.score(features)
    spread = float(quality.influence(features).std()) / len(features) ** 0.5
    assert quality.score(features).se == pytest.approx(spread, rel=1e-9)


def test_digits_and_pixels_are_known_by_name_hash_and_shape():
    assert DIGITS.id["extractor"] == "digits-cnn-1"
    assert len(DIGITS.sha256) == 64
    with pytest.raises(ValueError, match="digits-cnn-1 takes images of 1 x 8 x 8, not 3 x 8 x 8"):
        DIGITS(torch.zeros(2, 3, 8, 8))
    assert PIXELS(torch.zeros(2, 3, 5, 4)).shape == (2, 60)


def test_a_reference_may_be_given_ready_and_must_be_of_the_same_extractor():
    images = digits("all")[0]
    samples = images[:500] * 0.9
    ready = Reference.of(images, PIXELS)
    assert bench.fd_pixels(ready)(samples) == bench.fd_pixels(images)(samples)
    with pytest.raises(ValueError, match="extractor 'pixels', not 'digits-cnn-1'"):
        bench.fd_digits(ready)
    other = Features("pixels", lambda images: images.flatten(1), resize="half")
    with pytest.raises(ValueError, match="resize 'none', not 'half'"):
        FrechetTo("fd", other, ready)


def test_the_floor_is_between_halves_that_hold_every_class():
    """Sorted by class, the first half of the images against the second would be far apart."""
    images, labels = digits("all")
    ordered = images[labels.argsort()]
    floor = bench.fd_digits(ordered).floor()
    apart = frechet_distance(DIGITS(ordered[:898]), DIGITS(ordered[898:])).value
    shuffled = images[torch.randperm(1797, generator=torch.Generator().manual_seed(0))]
    mixed = frechet_distance(DIGITS(shuffled[:898]), DIGITS(shuffled[898:])).value
    assert floor.n == 898
    assert floor.value < 2 * mixed < 0.2 * apart


def test_the_debiased_floor_is_what_perfect_samples_score():
    """Of 40 references of 1000 Gaussians; with a half in place of the whole, the floor would be twice that."""
    plain = Features("plain", lambda samples: samples, shape=(8,))
    generator = torch.Generator().manual_seed(0)
    floors, perfect = [], []
    for _ in range(40):
        rows = torch.randn(1000, 8, dtype=torch.float64, generator=generator)
        measure = FrechetTo("fd", plain, Reference(plain, rows.mean(0), torch.cov(rows.T), 1000, "Gaussians", rows))
        floors.append(measure.floor().debiased)
        perfect.append(measure.score(torch.randn(5000, 8, dtype=torch.float64, generator=generator)).debiased)
    floor, found = torch.tensor(floors), torch.tensor(perfect)
    assert float(floor.mean() - found.mean()) == pytest.approx(0, abs=3 * float((floor - found).std()) / 40**0.5)
    assert float(floor.mean()) < 1.5 * float(found.mean())


def test_there_is_no_floor_where_the_rows_are_unknown():
    images = digits("all")[0]
    assert bench.fd_pixels(Reference.of(images, PIXELS, rows=False)).floor() is None


def test_toward_the_converged_the_distance_is_that_of_pairs():
    images = digits("all")[0]
    quality = bench.fd_pixels(images)
    converged = PIXELS(images[:600] * 0.8)
    toward = quality.toward(converged)
    assert toward.name == "fd_pixels_converged"
    same = toward.score(converged)
    assert abs(same.value) < 1e-11
    assert abs(same.debiased) < 1e-10  # an unpaired jackknife makes it negative
    near = PIXELS(images[:600] * 0.81)
    score, alone = toward.score(near), frechet_distance(near, converged)
    assert score.value == pytest.approx(alone.value)
    assert score.se < 0.1 * alone.se
    assert float(toward.influence(near).std()) / 600**0.5 == pytest.approx(score.se)
    assert toward.floor() is None
    with pytest.raises(ValueError, match="599 and 600 features"):
        toward.score(near[1:])


def test_endpoint_error_is_the_root_mean_square_and_its_se_that_of_repeated_draws():
    zeros = torch.zeros(500, 1, 3, 3)
    assert bench.endpoint_rms(zeros + 0.25, zeros).value == pytest.approx(0.25)
    assert bench.endpoint_rms(zeros, zeros).value == 0
    source = torch.Generator()
    scales = [torch.rand(500, 1, 1, 1, generator=source.manual_seed(k)).expand(500, 1, 3, 3) for k in range(100)]
    found = [bench.endpoint_rms(scale, zeros) for scale in scales]
    spread = float(torch.tensor([f.value for f in found]).std())
    assert 0.75 * spread < sum(f.se for f in found) / 100 < 1.3 * spread
    with pytest.raises(ValueError, match="shape"):
        bench.endpoint_rms(zeros, zeros[:3])


def test_samples_that_are_no_pictures_have_no_distance():
    quality = bench.fd_pixels(digits("all")[0])
    with pytest.raises(ValueError, match="NaN or infinity"):
        quality(torch.full((100, 1, 8, 8), torch.nan))
    with pytest.raises(ValueError, match=r"must lie in \[-1, 1\]"):
        quality(255 * torch.rand(100, 1, 8, 8))
    with pytest.raises(ValueError, match="at least 2"):
        quality(torch.zeros(1, 1, 8, 8))
