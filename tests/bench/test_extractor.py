"""The shipped feature extractor: good at its task, and never another one in silence."""

import hashlib
from pathlib import Path

import pytest
import torch

from fastsample.bench import extractor
from fastsample.bench.train_extractor import accuracy, train_extractor
from fastsample.zoo.data import digits

SHIPPED = Path(extractor.__file__).parent / "data" / f"{extractor.NAME}.safetensors"


def test_the_shipped_network_reads_the_test_digits():
    assert accuracy(extractor.extractor(), *digits("test")) >= 0.985


def test_its_features_are_64_and_none_is_dead():
    features = extractor.digits_features(digits("test")[0])
    assert features.shape == (297, 64)
    assert features.dtype == torch.float64
    assert float(features.std(0).min()) > 0.1


def test_features_do_not_depend_on_the_batch():
    images = digits("all")[0]
    together = extractor.digits_features(images)[1000:1010]
    torch.testing.assert_close(together, extractor.digits_features(images[1000:1010]), rtol=1e-5, atol=1e-5)


def test_a_damaged_file_is_refused_with_both_hashes(tmp_path):
    data = bytearray(SHIPPED.read_bytes())
    data[-1] ^= 1
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(data)
    with pytest.raises(ValueError, match="damaged") as caught:
        extractor.load_extractor(damaged)
    for part in (str(damaged), extractor.SHA256, hashlib.sha256(data).hexdigest()):
        assert part in str(caught.value)


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"got \[2, 3, 8, 8\]; use fd_pixels"):
        extractor.digits_features(torch.zeros(2, 3, 8, 8))


def test_training_is_deterministic_and_leaves_the_global_random_state_alone():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    first, second = (train_extractor(3, epochs=1) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    for a, b in zip(first.parameters(), second.parameters()):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_the_training_code_makes_a_network_as_good_as_the_shipped_one():
    assert accuracy(train_extractor(), *digits("test")) >= 0.985
