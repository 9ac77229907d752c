"""Weights that are not shipped: where they are looked for, and proof that they are the right ones."""

from __future__ import annotations

import http.client
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from fastsample import files
from fastsample.progress import track

BLOCK = 1 << 20


@dataclass(frozen=True)
class Weights:
    """A file that others publish. what: for messages. variable: of the environment, a path. size: in bytes."""

    what: str
    file: str
    url: str
    sha256: str
    size: int
    variable: str

    def find(self, path: str | Path | None = None, *, allow_download: bool = False) -> Path:
        """The file, its hash checked: at `path`, else where the variable says, else in the cache folder.

        Raises FileNotFoundError where it is not there, unless allow_download, which puts it there; ValueError where
        its hash is another, before and after a download; OSError where the download fails.
        """
        place, said_by = self._place(path)
        if not place.exists():
            if not allow_download:
                raise FileNotFoundError(
                    f"{self.what} is not at {place} ({said_by}): put {self.file} there, {self.size / 1e6:.0f} MB from "
                    f"{self.url} with SHA-256 {self.sha256}; or say where it is by path= or ${self.variable}; or let "
                    f"it be downloaded by allow_download=True (--allow-download)"
                )
            files.write(place, self._download)
        else:
            self._check(place, f"remove it and put {self.file} from {self.url} there")
        return place

    def _place(self, path: str | Path | None) -> tuple[Path, str]:
        if path is not None:
            return Path(path).expanduser(), "by path="
        if os.environ.get(self.variable):
            return Path(os.environ[self.variable]).expanduser(), f"by ${self.variable}"
        return cache_folder() / self.file, "the cache folder"

    def _download(self, temporary: Path) -> None:
        try:
            with urllib.request.urlopen(self.url, timeout=60) as response, temporary.open("wb") as file:
                for _ in track(range(0, self.size, BLOCK), f"Downloading {self.file}"):
                    file.write(response.read(BLOCK))
        except (OSError, http.client.HTTPException) as error:
            raise OSError(
                f"cannot download {self.url} ({error}); fetch it on another machine and say where it is by path= or "
                f"${self.variable}"
            ) from error
        self._check(temporary, f"the download of {self.url} broke off or was changed on its way; try again")

    def _check(self, path: Path, remedy: str) -> None:
        if not path.is_file():
            raise ValueError(f"{path} is no file; give the path of {self.file} itself")
        found = files.sha256(path)
        if found != self.sha256:
            raise ValueError(
                f"{path} is damaged or not {self.file}: its SHA-256 is {found}, expected {self.sha256}; {remedy}"
            )


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/fastsample, which is ~/.cache/fastsample where that is not set."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastsample"
