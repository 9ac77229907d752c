"""References: what the features of real images are, with all that must agree before samples are compared with them.

A statistics file is an .npz of plain arrays: format, version, mu [d], sigma [d, d], n, extractor, sha256, resize,
dataset, and, where they were kept, rows [n, d]. Files of other libraries are read too; they say mu and sigma alone.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample.files import sha256, write

from .measure import Features
from .moments import Moments, Statistics, statistics

FORMAT, VERSION = "fastsample.statistics", 1
FOREIGN = [("mu", "sigma"), ("ref_mu", "ref_sigma")]  # pytorch-fid, clean-fid, ADM (beside arr_0, mu_s, sigma_s); EDM
# What numpy and zipfile raise at a file that is damaged or something else, by where the damage lies.
DAMAGED = (
    OSError, ValueError, EOFError, KeyError, TypeError, AttributeError, RuntimeError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Reference:
    """The features of n real images: their mean [d] and covariance [d, d], float64, and the rows [n, d], where known.

    features: the extractor that made them. dataset: an id of the images; equal ids mean equal images.
    assumed: that `features` made them is the caller's word alone, since the file did not say.
    """

    features: Features
    mean: Tensor
    cov: Tensor
    n: int
    dataset: str
    rows: Tensor | None = None
    assumed: bool = False

    @classmethod
    def of(
        cls,
        images: Tensor | Iterable[Tensor],
        features: Features,
        *,
        dataset: str | None = None,
        rows: bool = True,
        batch: int = 1000,
    ) -> Reference:
        """Of images [n, C, H, W] in [-1, 1], or of batches of them.

        dataset: its id; None: a hash of the images. rows: keep the features, which kernel distance, precision and
        recall and the floor need: 8 n d bytes.
        """
        digest, moments, kept, n, least = hashlib.sha256(), None, [], 0, math.inf
        shape: torch.Size | None = None
        for part in images.split(batch) if isinstance(images, Tensor) else images:
            if shape not in (None, part.shape[1:]):
                raise ValueError(f"images of one reference have one size, got {list(shape)} and {list(part.shape[1:])}")
            shape = part.shape[1:]
            found = features(part)
            if rows:
                kept.append(found)
            else:
                moments = moments or Moments(found.shape[1])
                moments.add(found, range(n, n + len(part)))
            digest.update(part.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
            n, least = n + len(part), min(least, float(part.min()))
        if n < 2 or shape is None:
            raise ValueError(f"a reference needs at least 2 images, got {n}")
        if least >= 0:
            raise ValueError(f"no value of the {n} images is below 0: they must lie in [-1, 1]; of [0, 1] make 2 x - 1")
        digest.update(str(tuple(shape)).encode())
        every: Tensor | None = None
        if moments:
            made = moments.statistics()
        else:
            every = torch.cat(kept)
            made = statistics(every)
        return cls(features, made.mean, made.cov, n, dataset or f"sha256:{digest.hexdigest()}", every)

    @cached_property
    def statistics(self) -> Statistics:
        return Statistics(self.mean, self.cov, self.n)

    @property
    def id(self) -> dict[str, str]:
        """What two runs must share for their scores to be compared."""
        return {**self.features.id, "dataset": self.dataset, "n": str(self.n)} | (
            {"assumed": "the extractor"} if self.assumed else {}
        )

    def check(self, features: Features) -> None:
        """Raises ValueError where these features are of another extractor, of other weights or resized otherwise."""
        _same(features.id, self.features.id, f"the reference {self.dataset}")

    def save(self, path: str | Path) -> None:
        """Write a statistics file."""
        arrays: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "mu": self.mean.numpy(),
            "sigma": self.cov.numpy(),
            "n": self.n,
            **self.features.id,
            "dataset": self.dataset,
            "assumed": self.assumed,
        }
        if self.rows is not None:
            half = self.rows.float()  # what a float32 network made needs no more
            arrays["rows"] = (half if torch.equal(half.double(), self.rows) else self.rows).numpy()
        write(npz(path), lambda temporary: np.savez(temporary, **arrays))

    @classmethod
    def load(
        cls, path: str | Path, features: Features, *, n: int | None = None, dataset: str | None = None
    ) -> Reference:
        """Read a statistics file: ours, or one of `mu, sigma`, `ref_mu, ref_sigma` or ADM's keys.

        features: the extractor it must be of; other libraries' files do not say theirs, so that it is then assumed.
        n, dataset: for such files alone: of how many images it is, which has no default, and an id (None: the hash of
        the file). Raises ValueError for a pickle, for a damaged file and for another extractor.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"there is no statistics file {path}; make one with `fastsample bench stats IMAGES`"
            )
        found = _read(path)
        if "format" in found:
            return _ours(path, found, features)
        if n is None:
            raise ValueError(f"{path} does not say of how many images it is; say n=...")
        mean, cov = _checked(path, found["mu"], found["sigma"])
        return cls(features, mean, cov, _count(path, n), dataset or f"file sha256:{sha256(path)}", assumed=True)


def npz(path: str | Path) -> Path:
    """Raises ValueError for a file of another name: numpy would add .npz to it."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"statistics are written to an .npz, got {path}; write to {path.with_suffix('.npz').name}")
    return path


def _ours(path: Path, found: dict[str, Any], features: Features) -> Reference:
    form, version = str(found["format"]), str(found.get("version"))
    if (form, version) != (FORMAT, str(VERSION)):
        raise ValueError(f"{path} is {form} of version {version}, not {FORMAT} of version {VERSION}; make it again")
    missing = {"mu", "sigma", "n", "extractor", "sha256", "resize", "dataset", "assumed"} - set(found)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(sorted(missing))}: not a whole statistics file; make it again")
    _same(features.id, {key: str(found[key]) for key in ("extractor", "sha256", "resize")}, str(path))
    mean, cov = _checked(path, found["mu"], found["sigma"])
    n, rows = _count(path, found["n"]), None
    if "rows" in found:
        array = found["rows"]
        if array.dtype.kind != "f" or array.shape != (n, len(mean)) or not np.isfinite(array).all():
            raise ValueError(
                f"{path}: rows must be finite and {[n, len(mean)]}, got {list(array.shape)} of {array.dtype}; make it "
                f"again"
            )
        rows = torch.from_numpy(array.astype(np.float64))
    return Reference(features, mean, cov, n, str(found["dataset"]), rows, bool(found["assumed"]))


def _read(path: Path) -> dict[str, Any]:
    """The arrays that are asked for, and no others: ADM's files hold thousands of images beside them."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "format" in file.files:
                return {name: file[name] for name in file.files}
            for mean, cov in FOREIGN:
                if mean in file.files and cov in file.files:
                    return {"mu": file[mean], "sigma": file[cov]}
            keys = ", ".join(file.files)
    except DAMAGED as error:
        raise _unreadable(path, error) from error
    raise ValueError(f"{path} has no statistics: its keys are {keys}, not mu and sigma or ref_mu and ref_sigma")


def _unreadable(path: Path, error: Exception) -> ValueError:
    with path.open("rb") as file:
        pickled = file.read(1) == b"\x80" or path.suffix in (".pkl", ".pickle")
    if pickled or "object array" in str(error).lower():  # numpy calls a pickle whatever it does not know
        return ValueError(
            f"{path} holds a pickle, which can run any code, and is not read; if you trust it, convert it once: "
            f"numpy.savez('statistics.npz', mu=s['mu'], sigma=s['sigma']) with s = pickle.load(open('{path}', 'rb'))"
        )
    return ValueError(f"{path} is damaged or no .npz ({error}); copy or make it again")


def _count(path: Path, n: Any) -> int:
    """Raises ValueError for what is no number of images that have a covariance."""
    count = np.asarray(n)
    if count.dtype.kind not in "iu" or count.ndim or int(count) < 2:
        raise ValueError(f"{path}: n, the number of its images, must be a whole number of at least 2, got {n}")
    return int(count)


def _checked(path: Path, mean: Any, cov: Any) -> tuple[Tensor, Tensor]:
    for name, array, dims in (("mu", mean, 1), ("sigma", cov, 2)):
        if array.dtype.kind != "f" or array.ndim != dims:
            raise ValueError(
                f"{path}: {name} must be real numbers of {dims} dimensions, got {array.dtype} {list(array.shape)}"
            )
        if not np.isfinite(array).all():
            raise ValueError(f"{path}: {name} holds NaN or infinity; make the file again")
    if cov.shape != (len(mean), len(mean)) or not len(mean):
        raise ValueError(f"{path}: mu is {list(mean.shape)} and sigma {list(cov.shape)}; sigma must be [d, d]")
    apart = float(np.abs(cov - cov.T).max())
    if apart > 1e-5 * float(np.abs(cov).max()):  # float32's rounding; a covariance differs by no more
        raise ValueError(f"{path}: sigma is not symmetric, by {apart:.3g}: not a covariance")
    if float(cov.diagonal().min()) < 0:
        raise ValueError(f"{path}: sigma has the variance {float(cov.diagonal().min()):.3g}: not a covariance")
    return torch.from_numpy(mean.astype(np.float64)), torch.from_numpy(cov.astype(np.float64))


def _same(want: dict[str, str], found: dict[str, str], what: str) -> None:
    wrong = [f"{key} {found[key] or 'none'!r}, not {want[key] or 'none'!r}" for key in want if want[key] != found[key]]
    if wrong:
        raise ValueError(
            f"{what} is of another extractor ({'; '.join(wrong)}): distances would mean nothing; make it anew"
        )
