"""Problems with a known answer: models in closed form, noises by seed, and the converged end of each sample's flow.

What separates a sampler's end from `Problem.exact` is its error alone. Used by the study of solvers
(bench/studies/solver_errors.py), by tests, and for trying plans where the truth is known.

All five share DDPM's frame: 1000 linear betas from 1e-4 to 0.02, started at index 999 from sigma times unit noise.
(The start of a network's sampler is often the unit noise itself: here sigma = 0.99998, and the difference moves every
method's start and the exact solution alike.)
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastsample.denoiser import Model
from fastsample.files import write
from fastsample.grid import Node, Nodes, node
from fastsample.guidance import Guided
from fastsample.noise import noise
from fastsample.schedule import VP, Schedule

from .exact import Empirical, GaussianMixture

End = Literal["min", "zero"]
HELD_OUT = range(3_000_000, 3_004_096)  # seeds that results are reported on; picking and tuning use those below
NEAR_ZERO = 1e-5  # sigma at which x0 is the end at sigma = 0 to about its square, 1e-10


@dataclass(frozen=True)
class Problem:
    """A model in closed form on samples of `shape`.

    `exact` is the end of the probability-flow ODE to about 1e-8, at sigma of index 0 ("min") or at sigma = 0 ("zero").
    """

    name: str
    shape: tuple[int, ...]
    build: Callable[[], Model] = field(repr=False)

    @property
    def model(self) -> Model:
        return _built(self.build)

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule

    def noise(self, seeds: Iterable[int]) -> Tensor:
        """Unit noise [len(seeds), *shape], float64, one seed a sample; `HELD_OUT` for what is reported."""
        return noise(self.shape, seeds, dtype=torch.float64).draw(0)

    def end_time(self, end: End) -> float | None:
        """What `fs.grid` takes as its `end`."""
        if end not in ("min", "zero"):
            raise ValueError(f"end is 'min' (sigma of index 0) or 'zero' (sigma = 0), got {end!r}")
        return self.schedule.t_min if end == "min" else None

    def exact(self, noise: Tensor, end: End = "min", *, cache: str | Path | None = None) -> Tensor:
        """Where the flow takes each noise, [B, ...], float64: DOP853 in lam, with a relative tolerance of 1e-9.

        cache: a folder that keeps the answers, by a hash of the problem and the noises; None keeps nothing.
        """
        stop = self.end_time(end)
        noise = noise.detach().double().cpu().contiguous()
        if cache is None:
            return _flow(self.model, noise, stop)
        path = Path(cache) / f"{self.name}-{end}-{self._digest(noise)}.safetensors"
        if not path.exists():
            found = _flow(self.model, noise, stop)
            write(path, lambda temporary: save_file({"x": found}, temporary))
        return load_file(path)["x"]

    def _digest(self, noise: Tensor) -> str:
        """Of the noises and, through one of its predictions, of the model."""
        seen = self.model.predict(noise[:1], node(self.schedule, 0.5 * self.schedule.t_max))
        rounded = (seen * 1e6).round().to(torch.int64)
        return hashlib.sha256(
            f"{rounded.tolist()} {tuple(noise.shape)}".encode() + noise.numpy().tobytes()
        ).hexdigest()[:16]


def _flow(model: Model, noise: Tensor, stop: float | None, piece: int = 64) -> Tensor:
    """Pieces of a batch apart, so that one sample's sharp turn costs small steps to its neighbours alone."""
    return torch.cat([_integrate(model, rows, stop) for rows in noise.split(piece)])


def _integrate(model: Model, noise: Tensor, stop: float | None) -> Tensor:
    """dx / dlam = alpha (x0 - alpha x), which is the flow of a variance-preserving schedule in lam."""
    from scipy.integrate import solve_ivp

    schedule = model.schedule
    first = schedule.t_max
    lam_end = -math.log(NEAR_ZERO) if stop is None else float(schedule.lam(stop))
    shape = noise.shape

    def at(lam: float) -> Node:
        return Node(math.nan, (1 + math.exp(-2 * lam)) ** -0.5, (1 + math.exp(2 * lam)) ** -0.5)

    def slope(lam: float, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        node, state = at(lam), torch.from_numpy(x).view(shape)
        # x moves by sigma^2 x as the noise shrinks, and towards x0: alpha' = alpha sigma^2, sigma' = -sigma alpha^2
        moved = node.alpha * (model.predict(state, node) - node.alpha * state)
        return moved.flatten().numpy()

    start = float(schedule.sigma(first)) * noise
    done = solve_ivp(
        slope, (float(schedule.lam(first)), lam_end), start.flatten().numpy(), "DOP853", rtol=1e-9, atol=1e-10
    )
    if not done.success:
        raise RuntimeError(f"the exact flow did not converge: {done.message}")
    x = torch.from_numpy(np.ascontiguousarray(done.y[:, -1])).view(shape)
    return model.predict(x, at(lam_end)) if stop is None else x


@cache
def _built(build: Callable[[], Model]) -> Model:
    return build()


def gmm2() -> GaussianMixture:
    """Eight Gaussians of unequal weight and shape on a circle of radius 1.3: `zoo/gmm2.json`."""
    numbers = json.loads((Path(__file__).parent / "gmm2.json").read_text(encoding="utf-8"))
    means, variances, logs = (torch.tensor(numbers[key], dtype=torch.float64) for key in ("mean", "var", "logw"))
    return GaussianMixture(VP.linear(), logs.exp(), means, variances)


def gmm64() -> GaussianMixture:
    """Eight Gaussians in 64 dimensions whose means and variances fall as a power law, as spectra of images do.

    Our own instance, not that of another study: the numbers of those that we know of are not published. Its errors are
    of the size of theirs. Coordinate d = 1 .. 64 has means 1.4 d^(-1/4) times unit normals and variances 1.44 / d times
    log-uniform numbers in [1/2, 2]; weights are uniform in [1, 3] before they are normalised. All from numpy's MT19937
    with seed 64, a stream that numpy promises not to change.
    """
    draw = np.random.RandomState(64)
    d = np.arange(1.0, 65.0)
    weights = 1 + 2 * draw.random_sample(8)
    means = 1.4 * d**-0.25 * draw.standard_normal((8, 64))
    variances = 1.44 / d * 2 ** (2 * draw.random_sample((8, 64)) - 1)
    return GaussianMixture(VP.linear(), *(torch.from_numpy(numbers) for numbers in (weights, means, variances)))


@dataclass(frozen=True)
class Labelled:
    """A mixture with a condition `label`: a component alone, or all of them for None."""

    mixture: GaussianMixture

    @property
    def schedule(self) -> Schedule:
        return self.mixture.schedule

    def predict(self, x: Tensor, node: Node | Nodes, *, label: int | None = None, **condition: Any) -> Tensor:
        if label is None:
            return self.mixture.predict(x, node)
        one = slice(label, label + 1)
        whole = self.mixture
        part = GaussianMixture(whole.schedule, whole.weights[one], whole.means[one], whole.variances[one])
        return part.predict(x, node)


def gmm64_guided() -> Guided:
    """`gmm64` with classifier-free guidance of scale 4 towards its first component. One evaluation is two rows."""
    return Guided(Labelled(gmm64()), {"label": 0}, {"label": None}, scale=4.0, batched=False)


def digits_exact() -> Empirical:
    """The optimal denoiser of scikit-learn's 1797 digits, 64 numbers each, in [-1, 1]."""
    return Empirical(VP.linear(), _digits(), limit=2**20)


def digits_blurred() -> Empirical:
    """The same with N(0, 0.2^2) added to the images: a density, where the digits themselves are points."""
    return Empirical(VP.linear(), _digits(), limit=2**20, blur=0.2)


def _digits() -> Tensor:
    from .data import digits

    return digits("all")[0].flatten(1).double()


PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (
        Problem("gmm2", (2,), gmm2),
        Problem("gmm64", (64,), gmm64),
        Problem("gmm64cfg4", (64,), gmm64_guided),
        Problem("digits", (64,), digits_exact),
        Problem("digits_h0.2", (64,), digits_blurred),
    )
}


def get(name: str) -> Problem:
    """The problem of this name."""
    if name not in PROBLEMS:
        raise ValueError(f"unknown problem {name!r}; choose one of {', '.join(PROBLEMS)}")
    return PROBLEMS[name]
