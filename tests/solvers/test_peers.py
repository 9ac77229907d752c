"""Agreement with the official DPM-Solver, UniPC and EDM code and k-diffusion: stored ends on a known problem."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import solvers
from fastsample.zoo.exact import GaussianMixture

VP = fs.VP.linear()
FLOAT64 = 1e-12  # the peer computes in float64, as we do
MIXED = 1e-7  # UniPC's official code solves for its weights in float32
SIGMA32 = 1e-6  # a float32 table of sigma, or of alpha, under a float64 state


def uniform_lam(steps):
    return fs.grid(VP, steps, fs.uniform_lam, end=0.0)  # to index 0, sigma = 0.01


def karras(steps):
    return fs.grid(VP, steps, fs.karras)


def trailing(steps):
    return fs.grid(VP, steps, fs.trailing)


LOWER = {"lower_order_final": True}
# (the peer, our solver, its grid, intervals for an evaluation of the peer, our options, the tolerance)
PEERS = [
    ("dpm-solver.++multi2.logSNR", solvers.dpmpp_2m, uniform_lam, 1, {}, FLOAT64),
    ("dpm-solver.++single2.logSNR", solvers.dpmpp_2s, uniform_lam, 1 / 2, {}, FLOAT64),
    ("edm.heun.karras", solvers.heun, karras, 1 / 2, {}, FLOAT64),  # 2 N - 1 calls for N intervals
    ("unipc.x0-bh2-2.logSNR", solvers.unipc_2, uniform_lam, 1, LOWER, MIXED),
    ("unipc.x0-bh2-3.logSNR", solvers.unipc_3, uniform_lam, 1, LOWER, MIXED),
    ("k-diffusion.euler.karras", solvers.euler, karras, 1, {}, SIGMA32),
    ("k-diffusion.dpmpp_2m.karras", solvers.dpmpp_2m, karras, 1, {}, SIGMA32),
    ("diffusers.DDIM.trailing", solvers.ddim, trailing, 1, {}, SIGMA32),
    # its second step takes half the slope where ours takes the Taylor term; otherwise the same
    ("dpm-solver.++multi3.logSNR", solvers.dpmpp_3m, uniform_lam, 1, {"curvature": 0.5}, 5e-5),
]


@pytest.fixture(scope="module")
def problem():
    with np.load(Path(__file__).parent / "data" / "gmm2.npz", allow_pickle=False) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


@pytest.mark.parametrize("evaluations", [10, 20])
@pytest.mark.parametrize(("peer", "solver", "grid", "share", "options", "tolerance"), PEERS)
def test_solvers_end_where_their_peers_end(problem, peer, solver, grid, share, options, tolerance, evaluations):
    ours = end(problem, solver, grid(round(evaluations * share)), options)
    torch.testing.assert_close(ours, problem[f"{peer}|{evaluations}"], rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("solver", "spacing", "evaluations", "published"),
    [  # the RMS over 512 start noises that was measured for the peer; here 16, whose mean square varies by a half
        (solvers.unipc_2, fs.quadratic_t, 12, 0.0201777),
        (solvers.unipc_2, fs.quadratic_t, 20, 0.00427587),
        (solvers.unipc_3, fs.quadratic_t, 50, 0.000125283),
    ],
)
def test_the_error_is_what_was_measured_for_the_peer(problem, solver, spacing, evaluations, published):
    ours = end(problem, solver, fs.grid(VP, evaluations, spacing, end=0.0), LOWER)
    error = float((ours - problem["y_sigma_min"]).square().mean().sqrt())
    assert published / 2 < error < published * 2


@pytest.mark.parametrize("case", ["dpmpp_2m", "dpmpp_3m", "dpmpp_2s", "unipc_2", "unipc_3", "heun"])
def test_solvers_converge_to_the_exact_end_of_the_problem(problem, case):
    grid = fs.grid(VP, 400, fs.uniform_lam, end=0.0)
    error = (end(problem, solvers.get(case), grid, {}) - problem["y_sigma_min"]).abs().max()
    assert error < 2e-4  # order 2 at 400 steps


def end(problem, solver, grid, options):
    """x / alpha at the end; the noise of the problem is x itself at index 999, where ours is x / sigma."""
    model = GaussianMixture(VP, problem["mix_logw"].exp(), problem["mix_mean"], problem["mix_var"])
    return fs.solve(model, solver, grid, problem["noise"] / grid.nodes[0].sigma, **options) / grid.nodes[-1].alpha
