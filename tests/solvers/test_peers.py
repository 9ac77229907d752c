"""Agreement with other people's samplers: their stored ends on a known problem.

The official DPM-Solver, UniPC and EDM code, k-diffusion, diff-sampler (the toolbox of AMED-Solver) and diffusers.
diff-sampler's `ipndm_v` is not among them: its weights for orders 3 and 4 are right on equal steps alone.
"""

import math
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


def lower(steps):
    return fs.grid(VP, steps, fs.uniform_lam, end=0.0, lower_order_final=True)


def polynomial(steps):
    return fs.grid(VP, steps, fs.karras, end=0.0)


def deis_linspace(steps):
    """N + 1 rounded indices from 999 to 0; its order falls at the end of fewer than 15 steps."""
    times = np.linspace(0, 999, steps + 1).round()[::-1].tolist()
    return fs.grid(VP, steps, fs.at_times(times), end=0.0, lower_order_final=steps < 15)


def time_of_diff_sampler(schedule, lam):
    """diff-sampler's t: of the VP schedule that has levels 0.002 and 80 at t = 0.001 and 1, whatever the grid's."""
    least, most = math.log1p(0.002**2), math.log1p(80**2)
    rise = 2 * (least / 1e-3 - most) / (1e-3 - 1)
    start = most - rise / 2
    return (np.sqrt(start**2 + 2 * rise * np.log1p(np.exp(-2 * lam))) - start) / rise


UNIPC = {"variant": "bh1"}
DEIS = {"variable": time_of_diff_sampler, "order": 4}
# (the peer, our solver, its grid, intervals for an evaluation of the peer, our options, the tolerance)
PEERS = [
    ("dpm-solver.++multi2.logSNR", solvers.dpmpp_2m, uniform_lam, 1, {}, FLOAT64),
    ("dpm-solver.++single2.logSNR", solvers.dpmpp_2s, uniform_lam, 1 / 2, {}, FLOAT64),
    ("dpm-solver.eps-multi2.logSNR", solvers.dpm_solver_2m, uniform_lam, 1, {}, FLOAT64),
    ("edm.heun.karras", solvers.heun, karras, 1 / 2, {}, FLOAT64),  # 2 N - 1 calls for N intervals
    ("unipc.x0-bh2-2.logSNR", solvers.unipc_2, lower, 1, {}, MIXED),
    ("unipc.x0-bh2-3.logSNR", solvers.unipc_3, lower, 1, {}, MIXED),
    ("unipc.x0-bh1-3.logSNR", solvers.unipc_3, lower, 1, UNIPC, MIXED),
    ("unipc.eps-bh1-3.logSNR", solvers.unipc_3, lower, 1, {**UNIPC, "predicts": "eps"}, MIXED),
    ("k-diffusion.euler.karras", solvers.euler, karras, 1, {}, SIGMA32),
    ("k-diffusion.dpmpp_2m.karras", solvers.dpmpp_2m, karras, 1, {}, SIGMA32),
    ("k-diffusion.lms.karras", solvers.lms, karras, 1, {}, SIGMA32),
    ("k-diffusion.dpm_2.karras", solvers.dpm_solver_2, karras, 1 / 2, {}, 3 * SIGMA32),
    ("diff-sampler.ipndm4.polynomial", solvers.ipndm, polynomial, 1, {}, FLOAT64),
    ("diffusers.DDIM.trailing", solvers.ddim, trailing, 1, {}, SIGMA32),
    # eps in lam, where the paper has t; float32 weights
    ("diffusers.DEIS2.linspace", solvers.multistep, deis_linspace, 1, {"variable": "lam", "order": 2}, 5 * SIGMA32),
    # its weights are sums over 10,000 points and of a cubic, though it is named 3
    ("diff-sampler.deis_tab3.polynomial", solvers.multistep, polynomial, 1, DEIS, 1e-4),
    # their second step takes half the slope where ours takes the Taylor term; otherwise the same
    ("dpm-solver.++multi3.logSNR", solvers.dpmpp_3m, uniform_lam, 1, {"curvature": 0.5}, 5e-5),
    ("dpm-solver.eps-multi3.logSNR", solvers.dpm_solver_3m, uniform_lam, 1, {"curvature": 0.5}, 5e-5),
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
    ("peer", "solver", "last"),
    [
        ("dpm-solver.eps-single3.logSNR", solvers.dpm_solver_3, (solvers.dpm_solver_1, solvers.dpm_solver_2)),
        ("dpm-solver.++single3.logSNR", solvers.dpmpp_3s, (solvers.dpmpp_1, solvers.dpmpp_2s)),
    ],
)
def test_three_stage_solvers_end_where_the_official_code_ends(problem, peer, solver, last):
    """It spends 6 evaluations as steps of order 3, 2 and 1; 10 as 3, 3, 3 and 1; 20 as six of 3 and one of 2."""

    def with_another_at_the_end(model, x, grid):
        head, tail = (fs.Grid(VP, nodes) for nodes in (grid.nodes[:-1], grid.nodes[-2:]))
        return last[evaluations == 20](model, solver(model, x, head), tail)

    for evaluations, steps in ((6, 3), (10, 4), (20, 7)):
        used, grid = (solver, lower) if evaluations == 6 else (with_another_at_the_end, uniform_lam)
        assert fs.trace(used, grid(steps)).nfe == evaluations
        ours = end(problem, used, grid(steps), {})
        torch.testing.assert_close(ours, problem[f"{peer}|{evaluations}"], rtol=0, atol=FLOAT64)


def test_plms_ends_where_diffusers_ends(problem):
    """Six evaluations for five steps. Where steps do not divide the table, theirs go where they do not ask."""
    ours = end(problem, solvers.plms, trailing(5), {})
    torch.testing.assert_close(ours, problem["diffusers.PNDM.trailing|6"], rtol=0, atol=2e-5)  # float32, 157 noises


@pytest.mark.parametrize(
    ("solver", "spacing", "evaluations", "published"),
    [  # the RMS over 512 start noises that was measured for the peer; here 16, whose mean square varies by a half
        (solvers.unipc_2, fs.quadratic_t, 12, 0.0201777),
        (solvers.unipc_2, fs.quadratic_t, 20, 0.00427587),
        (solvers.unipc_3, fs.quadratic_t, 50, 0.000125283),
    ],
)
def test_the_error_is_what_was_measured_for_the_peer(problem, solver, spacing, evaluations, published):
    ours = end(problem, solver, fs.grid(VP, evaluations, spacing, end=0.0, lower_order_final=True), {})
    error = float((ours - problem["y_sigma_min"]).square().mean().sqrt())
    assert published / 2 < error < published * 2


@pytest.mark.parametrize(
    "case",
    [
        "dpmpp_2m",
        "unipc_3",
        "heun",
        "dpmpp_3s",
        "dpm_solver_3",
        "dpm_solver_3m",
        "multistep",
        "lms",
        "deis",
        "ipndm",
        "plms",
    ],
)
def test_solvers_converge_to_the_exact_end_of_the_problem(problem, case):
    grid = fs.grid(VP, 400, fs.uniform_lam, end=0.0)
    error = (end(problem, solvers.get(case), grid, {}) - problem["y_sigma_min"]).abs().max()
    assert error < 2e-4  # order 2 at 400 steps


def end(problem, solver, grid, options):
    """x / alpha at the end; the noise of the problem is x itself at index 999, where ours is x / sigma."""
    model = GaussianMixture(VP, problem["mix_logw"].exp(), problem["mix_mean"], problem["mix_var"])
    return fs.solve(model, solver, grid, problem["noise"] / grid.nodes[0].sigma, **options) / grid.nodes[-1].alpha
