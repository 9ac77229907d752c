"""The FID, without its weights: what goes into the network, what comes out, and that no other takes its place."""

import hashlib
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastsample.bench.fid import INCEPTION, fid, inception_features, inception_logits, prepared
from fastsample.bench.frechet import frechet_distance
from fastsample.bench.inception import load_inception
from fastsample.bench.reference import Reference

MODULE = sys.modules["fastsample.bench.fid"]  # `bench.fid` is the function


def images_of(n, *shape, seed=0):
    """Images [n, 3, ...] that bytes can hold."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, *shape), generator=generator) / 127.5 - 1


@pytest.fixture
def weights(inception_file, monkeypatch):
    """The file of random weights, taken for the published one."""
    sha256 = hashlib.sha256(inception_file.read_bytes()).hexdigest()
    monkeypatch.setattr(MODULE, "INCEPTION", replace(INCEPTION, sha256=sha256))
    return inception_file


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A network of 4 features in place of the real one, for what does not depend on which."""

    class Small(torch.nn.Module):
        def forward(self, x):
            found = torch.cat([x.mean((2, 3)), x.std((1, 2, 3))[:, None]], 1)
            return found @ (torch.eye(4) / 3)  # which autocast would round

    path = tmp_path / "small.pth"
    path.write_bytes(b"small")
    monkeypatch.setattr(MODULE, "load_inception", lambda path: Small())
    monkeypatch.setattr(MODULE, "INCEPTION", replace(INCEPTION, sha256=hashlib.sha256(b"small").hexdigest()))
    return path


@pytest.fixture
def absent(monkeypatch, tmp_path):
    monkeypatch.delenv("FASTSAMPLE_INCEPTION", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_the_file_is_the_published_one_by_its_whole_hash():
    assert INCEPTION.file == "pt_inception-2015-12-05-6726825d.pth"
    assert INCEPTION.url.endswith(f"/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION.file}")
    assert len(INCEPTION.sha256) == 64
    assert INCEPTION.sha256.startswith("6726825d")  # as its name says


def test_images_are_rounded_to_bytes_and_scaled_by_128():
    """At 299 pixels the resize does nothing, so that (byte - 128) / 128 is seen itself."""
    levels = torch.arange(256.0)
    images = torch.zeros(1, 3, 299, 299)
    images[0, :, 0, :256] = levels / 127.5 - 1 + 0.9 / 255 * torch.linspace(-1, 1, 256)  # off by less than half a level
    images[0, :, 1, :2] = torch.tensor([-1.2, 1.2])
    made = prepared(images)
    assert torch.equal(made[0, 1, 0, :256], (levels - 128) / 128)
    assert made[0, 2, 1, :2].tolist() == [-1, 127 / 128]


def test_the_features_are_those_of_the_network_and_do_not_depend_on_the_batch(weights):
    images = images_of(3, 40, 24)
    features = inception_features(weights, batch=2)
    found = features(images)
    assert found.shape == (3, 2048)
    assert found.dtype == torch.float64
    wanted = load_inception(weights)(prepared(images)).double()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.max()))  # float32, 48 layers


def test_the_logits_are_without_their_bias(weights):
    images = images_of(2, 20, 20)
    network = load_inception(weights)
    wanted = (network(prepared(images)) @ network.fc.weight.T).double()
    found = inception_logits(weights)(images)
    assert found.shape == (2, 1008)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_no_setting_of_the_user_rounds_the_product_that_makes_the_logits(weights):
    """On a GPU float32_matmul_precision would; here it is seen that the product is none of float32."""
    images = images_of(2, 20, 20)
    network = load_inception(weights)
    wanted = network(prepared(images)).double() @ network.fc.weight.double().T
    assert torch.equal(inception_logits(weights)(images), wanted)


@pytest.mark.gpu
def test_tf32_does_not_reach_the_logits(weights):
    images, extract = images_of(4, 20, 20), inception_logits(weights, device="cuda")
    before = torch.get_float32_matmul_precision()
    found = []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        found.append(extract(images))
    torch.set_float32_matmul_precision(before)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


def test_autocast_does_not_reach_the_features(small):
    images = images_of(5, 30, 30)
    features = inception_features(small)
    plain = features(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(features(images), plain)


def test_the_features_are_known_by_hash_and_resize(small):
    assert inception_features(small).id == {
        "extractor": "inception-v3-fid",
        "sha256": hashlib.sha256(b"small").hexdigest(),
        "resize": "tf1-bilinear-299",
    }
    assert inception_logits(small).name == "inception-v3-logits"


def test_gray_images_are_refused_with_the_remedy(small):
    features = inception_features(small)
    with pytest.raises(ValueError, match=r"takes images of 3 x any x any, not 1 x 28 x 28; .*expand\(-1, 3, -1, -1\)"):
        features.check((1, 28, 28))
    features.check((3, 64, 48))


@pytest.mark.parametrize("make", [inception_features, inception_logits, lambda: fid(images_of(4, 8, 8))])
def test_without_the_file_nothing_is_measured(make, absent):
    with pytest.raises(FileNotFoundError) as caught:
        make()
    for part in (INCEPTION.file, INCEPTION.url, INCEPTION.sha256, "$FASTSAMPLE_INCEPTION", "allow_download=True"):
        assert part in str(caught.value)


def test_other_weights_of_the_same_layout_are_refused_with_both_hashes(inception_file):
    with pytest.raises(ValueError, match="damaged or not") as caught:
        inception_features(inception_file)
    assert INCEPTION.sha256 in str(caught.value)
    assert hashlib.sha256(inception_file.read_bytes()).hexdigest() in str(caught.value)


def test_a_batch_of_none_is_refused_before_the_file_is_looked_for(absent):
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        inception_features(batch=0)


@pytest.fixture
def real():
    return images_of(12, 8, 8)


@pytest.fixture
def wanted(small, real):
    """The FID of other images, by hand."""
    features = inception_features(small)
    fake = images_of(12, 8, 8, seed=1)
    return fake, frechet_distance(features(fake), features(real)).value


def test_the_fid_is_the_frechet_distance_of_these_features(small, real, wanted):
    measure = fid(real, path=small)
    assert measure.name == "fid"
    assert measure.features.id == inception_features(small).id
    assert measure(wanted[0]).value == pytest.approx(wanted[1], rel=1e-9)


def test_a_reference_may_be_images_or_statistics_in_a_file(small, real, wanted, tmp_path):
    fake, value = wanted
    features = inception_features(small)
    made = Reference.of(real, features)
    made.save(tmp_path / "statistics.npz")
    pixels = ((real + 1) * 127.5).round().to(torch.uint8).numpy()
    np.savez(tmp_path / "images.npz", images=pixels)
    mean, cov = made.mean.numpy(), made.cov.numpy()
    np.savez(tmp_path / "adm.npz", arr_0=pixels[:0], mu=mean, sigma=cov)  # images beside statistics, as ADM has it
    for reference in (made, tmp_path / "statistics.npz", str(tmp_path / "images.npz")):
        assert fid(reference, path=small)(fake).value == pytest.approx(value, rel=1e-9)
    assert fid(tmp_path / "adm.npz", n=12, path=small)(fake).value == pytest.approx(value, rel=1e-9)


def test_a_reference_may_be_a_folder_of_images(small, real, wanted, tmp_path):
    image = pytest.importorskip("PIL.Image")
    for k, pixels in enumerate(((real + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()):
        image.fromarray(pixels).save(tmp_path / f"{k:03}.png")
    assert fid(tmp_path, path=small)(wanted[0]).value == pytest.approx(wanted[1], rel=1e-9)


def test_a_reference_of_another_extractor_is_refused(small, real):
    features = replace(inception_features(small), resize="pil-bicubic-299")
    with pytest.raises(ValueError, match="'pil-bicubic-299', not 'tf1-bilinear-299'"):
        fid(Reference.of(real, features), path=small)
