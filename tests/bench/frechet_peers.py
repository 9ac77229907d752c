"""What the distance functions of torch-fidelity and pytorch-fid say of given features, kept in data/frechet_peers.json.

    pip install --no-deps torch-fidelity pytorch-fid
    python tests/bench/frechet_peers.py            # writes the file; with --print, to the screen what is installed

Both packages import torchvision, which their distance functions do not use: an empty module stands in for it, and so
this runs in a process of its own.
"""

import json
import sys
import types
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np

KEPT = Path(__file__).parent / "data" / "frechet_peers.json"
CASES = {"near": (8, 300, 0.1), "far": (64, 1500, 2.0), "wide": (200, 1000, 0.5)}  # d, n, how far


def features(case):
    """Two sets [n, d], full rank, with correlated columns. RandomState's stream is the same in every numpy."""
    d, n, apart = CASES[case]
    source = np.random.RandomState(d)
    columns = source.standard_normal((d, d)) / d**0.5
    a = source.standard_normal((n, d)) @ columns
    b = (1 + apart) * source.standard_normal((n + 50, d)) @ columns + apart * source.standard_normal(d)
    return a, b


def peers():
    """Name of a library that is installed -> function of two sets of features."""
    torchvision = Empty("torchvision")
    for name in ("transforms", "transforms.functional", "datasets", "models", "models.inception"):
        module = sys.modules[f"torchvision.{name}"] = Empty(name)
        parent, _, child = name.rpartition(".")
        setattr(getattr(torchvision, parent) if parent else torchvision, child, module)
    sys.modules["torchvision"] = torchvision
    found = {}
    if find_spec("torch_fidelity"):
        from torch_fidelity.metric_fid import fid_statistics_to_metric

        def torch_fidelity(a, b):
            sides = [dict(zip(("mu", "sigma"), moments(side))) for side in (a, b)]
            (value,) = fid_statistics_to_metric(*sides, verbose=False).values()
            return value

        found["torch-fidelity"] = torch_fidelity
    if find_spec("pytorch_fid"):
        from pytorch_fid.fid_score import calculate_frechet_distance

        found["pytorch-fid"] = lambda a, b: float(calculate_frechet_distance(*moments(a), *moments(b)))
    return found


class Empty(types.ModuleType):
    """A module that has everything, as long as nobody uses it."""

    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def moments(rows):
    return rows.mean(0), np.cov(rows, rowvar=False)


def main():
    found = peers()
    values = {name: {case: function(*features(case)) for case in CASES} for name, function in found.items()}
    versions = {name: version(name) for name in [*found, "numpy", "scipy"]}
    if "--print" in sys.argv:
        print(json.dumps(values))
    elif len(found) < 2:
        sys.exit(f"only {', '.join(found) or 'neither'} of the two libraries is installed")
    else:
        KEPT.write_text(json.dumps({"versions": versions, "values": values}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
