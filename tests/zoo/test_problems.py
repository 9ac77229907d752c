"""Problems with a known answer: the answers against independent ones, the noises, the cache."""

from pathlib import Path

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import solvers
from fastsample.zoo.problems import HELD_OUT, PROBLEMS, get

GOLDEN = Path(__file__).parents[1] / "solvers" / "data" / "gmm2.npz"  # made by others' code, see the README beside it


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN, allow_pickle=False) as data:
        return {key: torch.from_numpy(data[key]) for key in data.files}


@pytest.mark.parametrize("end", ["min", "zero"])
def test_the_exact_solution_is_the_stored_one_of_other_code(golden, end):
    problem = get("gmm2")
    start = golden["noise"] / float(problem.schedule.sigma(problem.schedule.t_max))  # theirs starts at x = noise
    alpha = float(problem.schedule.alpha(0.0)) if end == "min" else 1.0
    expected = golden["y_sigma_min" if end == "min" else "y_sigma_0"]
    # a relative tolerance of 1e-9 over some hundred steps, and theirs of 1e-11
    torch.testing.assert_close(problem.exact(start, end) / alpha, expected, rtol=0, atol=1e-8)


def test_gmm2_is_the_mixture_of_the_stored_answers(golden):
    model = get("gmm2").model
    torch.testing.assert_close(model.means, golden["mix_mean"])
    torch.testing.assert_close(model.variances, golden["mix_var"])
    torch.testing.assert_close(model.weights, golden["mix_logw"].softmax(0))


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_many_steps_of_a_solver_reach_the_exact_solution(name):
    """A second way to the answer: another method, on a grid of its own, in the schedule's own terms."""
    if name.startswith("digits"):
        pytest.importorskip("sklearn")
    problem = get(name)
    noise = problem.noise(range(2))
    for end in ("min", "zero"):
        grid = fs.grid(problem.schedule, 200, fs.uniform_lam, end=problem.end_time(end))
        found = fs.sample(problem.model, fs.trace(solvers.dpmpp_2m, grid), noise)
        # order 2 at 200 steps; between digits the flow turns sharply, and to sigma = 0 the last step is long
        torch.testing.assert_close(found, problem.exact(noise, end), rtol=0, atol=2e-2)


def test_noises_depend_on_their_seeds_alone_and_the_held_out_ones_are_apart():
    problem = get("gmm64")
    noise = problem.noise([3, 7])
    assert noise.shape == (2, 64)
    assert noise.dtype == torch.float64
    assert torch.equal(noise[1:], problem.noise([7]))
    assert len(HELD_OUT) == 4096
    assert min(HELD_OUT) > 100_000


def test_guidance_is_the_difference_of_the_component_and_the_whole():
    problem, whole = get("gmm64cfg4"), get("gmm64").model
    x, node = problem.noise(range(3)), fs.node(problem.schedule, 400.0)
    first = fs.zoo.GaussianMixture(whole.schedule, whole.weights[:1], whole.means[:1], whole.variances[:1])
    expected = 4 * first.predict(x, node) - 3 * whole.predict(x, node)
    torch.testing.assert_close(problem.model.predict(x, node), expected)


def test_the_cache_answers_only_for_the_same_noises_problem_and_end(tmp_path):
    problem = get("gmm2")
    noise = problem.noise(range(3))
    made = problem.exact(noise, cache=tmp_path)
    (path,) = tmp_path.iterdir()
    stamp = path.stat().st_mtime_ns
    assert torch.equal(problem.exact(noise, cache=tmp_path), made)
    assert path.stat().st_mtime_ns == stamp
    assert not torch.equal(problem.exact(problem.noise([5, 6, 7]), cache=tmp_path), made)
    problem.exact(noise, "zero", cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def test_wrong_names_and_ends_are_named():
    with pytest.raises(ValueError, match=r"unknown problem 'gmm3'; choose one of gmm2, gmm64, gmm64cfg4, digits"):
        get("gmm3")
    with pytest.raises(ValueError, match="end is 'min'"):
        get("gmm2").exact(get("gmm2").noise([0]), "end")
