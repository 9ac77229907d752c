"""The built-in images and their split."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch
from sklearn.datasets import load_digits

from fastsample.zoo.data import digits


def rows(images):
    return sorted(tuple(row) for row in images.flatten(1).tolist())


def test_the_splits_are_disjoint_and_complete():
    train, test, everything = (digits(split)[0] for split in ("train", "test", "all"))
    assert [len(train), len(test)] == [1500, 297]
    assert rows(torch.cat([train, test])) == rows(everything)
    assert not set(rows(train)) & set(rows(test))  # also no image twice under two indices


def test_the_images_are_those_of_scikit_learn_in_minus_one_to_one():
    images, labels = digits("all")
    data = load_digits()
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.float32
    assert labels.dtype == torch.int64
    assert [float(images.min()), float(images.max())] == [-1.0, 1.0]
    torch.testing.assert_close((images[:, 0] + 1) * 8, torch.tensor(data.images, dtype=torch.float32))
    assert labels.tolist() == data.target.tolist()


def test_the_test_split_is_the_297_indices_with_the_greatest_hashes():
    hashes = {hashlib.sha256(b"%d" % i).hexdigest(): i for i in range(1797)}
    indices = [hashes[text] for text in sorted(hashes)][-297:]
    images, labels = digits("all")
    torch.testing.assert_close(digits("test")[0], images[indices])
    torch.testing.assert_close(digits("test")[1], labels[indices])


def test_every_digit_is_in_both_splits_in_its_share():
    for split in ("train", "test"):
        labels = digits(split)[1]
        share = labels.bincount(minlength=10) / len(labels)
        assert ((share > 0.06) & (share < 0.14)).all(), share


def test_another_process_with_another_hash_seed_gives_the_same_split():
    code = "from fastsample.zoo.data import digits; print(digits('test')[1].tolist())"
    env = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert done.stdout.strip() == str(digits("test")[1].tolist())


def test_an_unknown_split_is_named():
    with pytest.raises(ValueError, match="'train', 'test' or 'all', got 'valid'"):
        digits("valid")


def test_without_scikit_learn_the_error_gives_the_pip_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install 'fastsample\[demo\]'"):
        digits()
