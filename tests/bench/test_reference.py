"""References and their files: what is kept, what is read of other libraries, what is refused."""

import contextlib
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastsample.bench import Features, Reference, frechet_distance

PLAIN = Features("plain", lambda images: images.flatten(1), sha256="ab" * 32, resize="none", shape=(None, 2, 3))


def images(n=40, seed=0):
    return torch.rand(n, 1, 2, 3, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("rows", [True, False])
def test_a_reference_comes_back_from_its_file_as_it_was(tmp_path, rows):
    made = Reference.of(images(), PLAIN, rows=rows)
    made.save(tmp_path / "r.npz")
    found = Reference.load(tmp_path / "r.npz", PLAIN)
    assert found.id == made.id
    assert (found.n, found.assumed) == (40, False)
    assert torch.equal(found.mean, made.mean)
    assert torch.equal(found.cov, made.cov)
    assert (found.rows is None) is not rows
    if rows:
        assert torch.equal(found.rows, made.rows)


def test_a_file_is_plain_arrays_that_others_can_read(tmp_path):
    Reference.of(images(), PLAIN, dataset="toys").save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz", allow_pickle=False) as file:
        flat = images().flatten(1).double().numpy()
        np.testing.assert_allclose(file["mu"], flat.mean(0), rtol=1e-12)
        np.testing.assert_allclose(file["sigma"], np.cov(flat.T), rtol=1e-12)
        assert int(file["n"]) == 40
        assert [str(file[key]) for key in ("extractor", "sha256", "resize", "dataset")] == [
            "plain", "ab" * 32, "none", "toys",
        ]  # fmt: skip
        assert file["rows"].dtype == np.float32  # which holds all digits of a float32 network


def test_rows_that_need_more_than_float32_keep_their_digits(tmp_path):
    fine = Features("fine", lambda images: images.flatten(1).double() / 3)
    made = Reference.of(images(), fine)
    made.save(tmp_path / "r.npz")
    assert torch.equal(Reference.load(tmp_path / "r.npz", fine).rows, made.rows)


def test_neither_batches_nor_kept_rows_change_a_reference():
    whole = Reference.of(images(), PLAIN)
    streamed = Reference.of(iter(images().split(7)), PLAIN, rows=False)
    assert streamed.id == whole.id
    torch.testing.assert_close(streamed.mean, whole.mean, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(streamed.cov, whole.cov, rtol=1e-12, atol=1e-13)
    assert Reference.of(images(seed=1), PLAIN).dataset != whole.dataset
    assert Reference.of(images().reshape(40, 2, 1, 3).transpose(1, 2), PLAIN).dataset == whole.dataset


def test_images_that_make_no_reference_are_refused():
    with pytest.raises(ValueError, match="at least 2 images, got 1"):
        Reference.of(images(1), PLAIN)
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        Reference.of([], PLAIN)
    with pytest.raises(ValueError, match=r"one size, got \[1, 2, 3\] and \[3, 2, 3\]"):
        Reference.of([images(), images().expand(-1, 3, -1, -1)], PLAIN)
    with pytest.raises(ValueError, match=r"of \[0, 1\] make 2 x - 1"):
        Reference.of((images() + 1) / 2, PLAIN)
    with pytest.raises(ValueError, match="any x 2 x 3, not 1 x 3 x 2"):
        Reference.of(images().transpose(2, 3), PLAIN)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"name": "other"}, "extractor 'plain', not 'other'"),
        ({"sha256": "cd" * 32}, "sha256 'abab"),
        ({"resize": "tf1-bilinear-299"}, "resize 'none', not 'tf1-bilinear-299'"),
    ],
)
def test_another_extractor_hash_or_resize_is_refused(tmp_path, change, said):
    made = Reference.of(images(), PLAIN)
    made.save(tmp_path / "r.npz")
    other = replace(PLAIN, **change)
    with pytest.raises(ValueError, match=said):
        made.check(other)
    with pytest.raises(ValueError, match=said):
        Reference.load(tmp_path / "r.npz", other)
    made.check(PLAIN)


def moments(d=6):
    flat = np.random.RandomState(0).standard_normal((50, d))
    return flat.mean(0), np.cov(flat.T)


@pytest.mark.parametrize(
    "keys",
    [("mu", "sigma"), ("ref_mu", "ref_sigma"), ("arr_0", "mu", "sigma", "mu_s", "sigma_s")],
    ids=["pytorch-fid", "EDM", "ADM"],
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_files_of_other_libraries_are_read_and_what_they_do_not_say_is_asked_for(tmp_path, keys, dtype):
    mu, sigma = (array.astype(dtype) for array in moments())
    arrays = {
        key: mu if key in ("mu", "ref_mu") else sigma if key in ("sigma", "ref_sigma") else sigma[0] for key in keys
    }
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(ValueError, match="does not say of how many images"):
        Reference.load(tmp_path / "s.npz", PLAIN)
    found = Reference.load(tmp_path / "s.npz", PLAIN, n=50_000)
    np.testing.assert_array_equal(found.mean.numpy(), mu.astype(np.float64))
    np.testing.assert_array_equal(found.cov.numpy(), sigma.astype(np.float64))
    assert found.n == 50_000
    assert found.id["assumed"] == "the extractor"
    assert found.dataset.startswith("file sha256:")
    assert Reference.load(tmp_path / "s.npz", PLAIN, n=50_000, dataset="toys").dataset == "toys"
    assert frechet_distance(PLAIN(images()), found.statistics).n_b == 50_000
    found.save(tmp_path / "ours.npz")
    assert Reference.load(tmp_path / "ours.npz", PLAIN).id == found.id


def test_a_pickle_is_refused_with_the_way_to_convert_it(tmp_path):
    """Whether it is one file, or an array of objects inside an .npz; neither is run."""
    mu, sigma = moments()
    with (tmp_path / "s.pkl").open("wb") as file:
        pickle.dump({"mu": mu, "sigma": sigma, "harm": Harm(tmp_path / "harmed")}, file)
    np.savez(tmp_path / "s.npz", mu=np.array([Harm(tmp_path / "harmed")], dtype=object), sigma=sigma)
    for path in (tmp_path / "s.pkl", tmp_path / "s.npz"):
        with pytest.raises(ValueError, match=r"holds a pickle.*numpy\.savez\('statistics\.npz', mu="):
            Reference.load(path, PLAIN, n=10)
    assert not (tmp_path / "harmed").exists()


class Harm:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return self.path.touch, ()


@pytest.mark.parametrize("kept", [0, 10, 0.5, 0.99])
@pytest.mark.parametrize("ours", [True, False])
def test_a_truncated_file_is_refused(tmp_path, kept, ours):
    path = tmp_path / "s.npz"
    if ours:
        Reference.of(images(), PLAIN).save(path)
    else:
        np.savez(path, **dict(zip(("mu", "sigma"), moments())))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else kept])
    with pytest.raises(ValueError, match=r"s\.npz is damaged or no \.npz"):
        Reference.load(path, PLAIN, n=50)


def test_a_page_of_text_saved_in_its_place_is_not_called_a_pickle(tmp_path):
    (tmp_path / "s.npz").write_text("<html>404 not found</html>")
    with pytest.raises(ValueError, match=r"s\.npz is damaged or no \.npz"):
        Reference.load(tmp_path / "s.npz", PLAIN, n=50)


def test_a_file_with_one_wrong_byte_is_refused(tmp_path):
    path = tmp_path / "s.npz"
    Reference.of(images(), PLAIN).save(path)
    data = bytearray(path.read_bytes())
    at = data.find(Reference.of(images(), PLAIN).cov.numpy().tobytes())
    data[at + 20] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        Reference.load(path, PLAIN)


def test_a_wrong_bit_anywhere_is_refused_or_changes_no_number(tmp_path):
    """Arrays have checksums; where the archive's own list of them is wrong, one that may be missing may be lost."""
    path, made = tmp_path / "s.npz", Reference.of(images(), PLAIN)
    made.save(path)
    data = path.read_bytes()
    for bit in range(0, 8 * len(data), 61):
        wrong = bytearray(data)
        wrong[bit // 8] ^= 1 << bit % 8
        path.write_bytes(wrong)
        with contextlib.suppress(ValueError):
            found = Reference.load(path, PLAIN)
            assert found.id == made.id
            assert torch.equal(found.mean, made.mean)
            assert torch.equal(found.cov, made.cov)
            assert found.rows is None or torch.equal(found.rows, made.rows)


@pytest.mark.parametrize("n", [0, -1, 1, 2.5])
def test_a_number_of_images_that_has_no_covariance_is_refused(tmp_path, n):
    mu, sigma = moments()
    np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=rf"s\.npz: n, .* whole number of at least 2, got {n}"):
        Reference.load(tmp_path / "s.npz", PLAIN, n=n)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("mu", None, "lacks mu"),
        ("sigma", None, "lacks sigma"),
        ("version", "x", "of version x, not"),
        ("n", np.array([40, 40]), "n, the number of its images"),
        ("n", 0, "n, the number of its images"),
        ("rows", np.array(["a"]), r"rows must be finite and \[40, 6\], got \[1\] of <U1"),
        ("rows", np.zeros((40, 6), complex), "rows must be finite .* complex128"),
    ],
)
def test_a_file_of_ours_with_something_else_in_it_is_refused_by_name(tmp_path, name, value, said):
    Reference.of(images(), PLAIN).save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz", allow_pickle=False) as file:
        arrays = {**file, name: value}
    np.savez(tmp_path / "r.npz", **{key: array for key, array in arrays.items() if array is not None})
    with pytest.raises(ValueError, match=rf"r\.npz.*{said}"):
        Reference.load(tmp_path / "r.npz", PLAIN)


def spoilt(mu, sigma):
    turned = sigma.copy()
    turned[0, 1] += 1
    negative = sigma - 10 * np.eye(len(mu))
    return {
        "sigma must be": (mu[:-1], sigma),
        "of 2 dimensions": (mu, sigma[0]),
        "real numbers": (mu.astype(int), sigma),
        "not symmetric, by 1": (mu, turned),
        "NaN or infinity": (mu * np.nan, sigma),
        "sigma holds NaN": (mu, sigma + np.inf),
        "the variance -": (mu, negative),
    }


@pytest.mark.parametrize("said", spoilt(*moments()))
def test_arrays_that_are_no_mean_and_covariance_are_refused(tmp_path, said):
    mu, sigma = spoilt(*moments())[said]
    np.savez(tmp_path / "s.npz", mu=mu, sigma=sigma)
    with pytest.raises(ValueError, match=said):
        Reference.load(tmp_path / "s.npz", PLAIN, n=50)


def test_other_files_and_versions_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="fastsample bench stats"):
        Reference.load(tmp_path / "none.npz", PLAIN)
    np.savez(tmp_path / "s.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match="its keys are images, not mu and sigma"):
        Reference.load(tmp_path / "s.npz", PLAIN)
    made = Reference.of(images(), PLAIN)
    made.save(tmp_path / "r.npz")
    with np.load(tmp_path / "r.npz", allow_pickle=False) as file:
        arrays = dict(file)
    np.savez(tmp_path / "r.npz", **{**arrays, "version": 7})
    with pytest.raises(ValueError, match=r"version 7, not fastsample\.statistics of version 1"):
        Reference.load(tmp_path / "r.npz", PLAIN)
    np.savez(tmp_path / "r.npz", **{**arrays, "rows": arrays["rows"][1:]})
    with pytest.raises(ValueError, match=r"\[40, 6\], got \[39, 6\]"):
        Reference.load(tmp_path / "r.npz", PLAIN)
    del arrays["dataset"]
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(ValueError, match="lacks dataset"):
        Reference.load(tmp_path / "r.npz", PLAIN)
    with pytest.raises(ValueError, match=r"write to stats\.npz"):
        made.save(tmp_path / "stats.pt")
