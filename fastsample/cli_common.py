"""What the commands share: models by name, and packages that are missing."""

from __future__ import annotations

import importlib.metadata
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

import fastsample as fs

from .process import first_process

MODEL_HELP = "digits (built in), or a folder written by fs.save_pretrained, such as the model/ that train leaves."
OPTIONAL = {
    "diffusers": "diffusers",
    "accelerate": "train",
    "peft": "lora",
    "matplotlib": "bench",
    "scikit-learn": "demo",
    "triton": "kernels",
    "onnx": "export",
    "onnxruntime": "export",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt-rtx",
}


def missing(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return True
    return False


def need(*packages: str) -> None:
    """Raise ImportError, with one line that installs all that is missing, before work starts."""
    lacking = [package for package in packages if missing(package)]
    if lacking:
        extras = ",".join(dict.fromkeys(OPTIONAL[package] for package in lacking))
        raise ImportError(f"this needs {', '.join(lacking)}: pip install 'fastsample[{extras}]'")


def load(name: str) -> fs.Denoiser:
    """The model of this name, or in this folder."""
    from fastsample import zoo

    if name == "digits":
        return zoo.digits()
    if not Path(name).is_dir():
        raise ValueError(f"no model {name!r}: neither built in (digits) nor a folder")
    return fs.from_pretrained(name)


def sample_shape(model: fs.Denoiser) -> tuple[int, ...]:
    """Of one sample, as the network's configuration says. Raises ValueError where it does not."""
    config = _config(model)
    size = config.get("sample_size")
    if not size:
        raise ValueError("the model's configuration does not say how large its images are (sample_size)")
    return (config["in_channels"], *((size, size) if isinstance(size, int) else size))


def class_count(model: fs.Denoiser) -> int | None:
    """How many class labels the network knows, that of no class included; None: it takes none."""
    count: int | None = _config(model).get("num_class_embeds")
    return count


def say(text: str, nl: bool = True) -> None:
    """Print it, once, however many processes work."""
    if first_process():
        typer.echo(text, nl=nl)


@contextmanager
def said_shortly(but: str | None = None) -> Iterator[None]:
    """Inside, warnings are one line each, by the process that speaks; those that begin like `but` are left out."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if first_process():
            print(f"warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        if but is not None:
            warnings.filterwarnings("ignore", but, UserWarning)
        warnings.showwarning = show
        yield


def _config(model: fs.Denoiser) -> dict[str, Any]:
    found: dict[str, Any] = getattr(getattr(model.network, "network", None), "config", {})
    return found
