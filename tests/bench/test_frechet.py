"""The Frechet distance and its moments, against closed forms, other algorithms, other libraries and many digits."""

import json
import math
import os
import runpy
import subprocess
import sys
import warnings
from itertools import pairwise
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.linalg import sqrtm

from fastsample.bench import Moments, Statistics, frechet_by_svd, frechet_distance, gather, statistics
from fastsample.bench.frechet import influence
from fastsample.noise import mix

MANY = 10**6
PEERS = Path(__file__).parent / "frechet_peers.py"


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(d, seed=0):
    return torch.linalg.qr(normal(d, d, seed=seed))[0]


def gaussian(mean, values, axes):
    return Statistics(mean, axes * values @ axes.T, MANY)


@given(d=st.integers(1, 40), rank=st.integers(1, 40), seed=st.integers(0, 10**6))
@example(d=19, rank=1, seed=6214)
@settings(max_examples=40, deadline=None)
def test_commuting_gaussians_of_any_rank_match_the_closed_form(d, rank, seed):
    axes, shift = rotation(d, seed), normal(d, seed=seed + 1)
    a, b = (0.1 + normal(d, seed=seed + k).square() for k in (2, 3))
    a[rank:] = 0
    b[: max(0, d - rank)] = 0
    exact = shift.square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    of_a, of_b = gaussian(shift, a, axes), gaussian(torch.zeros_like(shift), b, axes)
    found = frechet_distance(of_a, of_b)
    # where the two do not overlap, the root of what rounding left of an eigenvalue zero may remain
    residue = 2 * math.sqrt(d * torch.finfo(torch.float64).eps * float(a.max() * b.max()))
    assert found.value == pytest.approx(float(exact), rel=1e-10, abs=residue)
    assert found.mean_term == pytest.approx(float(shift.square().sum()))
    assert found.value == pytest.approx(found.mean_term + found.cov_term)
    assert (found.rank_a, found.rank_b) == (min(d, rank), min(d, rank))
    assert frechet_by_svd(of_a, of_b) == pytest.approx(float(exact), rel=1e-10, abs=residue)


def test_full_rank_matches_scipy():
    a, b = normal(400, 12) @ normal(12, 12, seed=1), normal(300, 12, seed=2) + 0.3
    of_a, of_b = statistics(a), statistics(b)
    root = sqrtm(of_a.cov.numpy() @ of_b.cov.numpy()).real
    exact = (of_a.mean - of_b.mean).square().sum() + of_a.cov.trace() + of_b.cov.trace() - 2 * np.trace(root)
    assert frechet_distance(a, b).value == pytest.approx(float(exact), rel=1e-9)


def test_it_agrees_with_what_torch_fidelity_and_pytorch_fid_said_of_the_same_features():
    kept = json.loads((PEERS.parent / "data" / "frechet_peers.json").read_text(encoding="utf-8"))["values"]
    assert set(kept) == {"torch-fidelity", "pytorch-fid"}
    agree_with(kept)


@pytest.mark.slow
def test_it_agrees_with_torch_fidelity_and_pytorch_fid_as_they_are_installed():
    done = subprocess.run([sys.executable, str(PEERS), "--print"], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    if not found:
        pytest.skip("neither is installed: pip install --no-deps torch-fidelity pytorch-fid")
    agree_with(found)


def agree_with(values):
    made = runpy.run_path(str(PEERS))
    for case in made["CASES"]:
        a, b = map(torch.from_numpy, made["features"](case))
        for library, of in values.items():
            assert frechet_distance(a, b).value == pytest.approx(of[case], rel=1e-9), (library, case)


def test_a_rank_deficient_pair_matches_40_digits():
    """Five features that lie in two directions, against some that lie in three others: sqrtm is off by 1e-3 there."""
    a, b = normal(30, 2) @ normal(2, 5, seed=1), normal(40, 3, seed=2) @ normal(3, 5, seed=3) + 1.0
    found = frechet_distance(a, b)
    assert (found.rank_a, found.rank_b) == (2, 3)
    assert found.value == pytest.approx(forty_digits(a, b), rel=1e-8)
    assert frechet_by_svd(a, b) == pytest.approx(forty_digits(a, b), rel=1e-8)


def test_fewer_samples_than_dimensions_match_40_digits():
    a, b = 2 * normal(6, 12), normal(9, 12, seed=1) @ normal(12, 12, seed=2)
    with pytest.warns(UserWarning, match="mostly bias"):
        found = frechet_distance(a, b)
    assert (found.rank_a, found.rank_b) == (5, 8)
    assert found.value == pytest.approx(forty_digits(a, b), rel=1e-8)


def forty_digits(a, b):
    """From the data matrices: the shared term is the sum of the singular values of (A B^T) / sqrt((n - 1)(m - 1))."""
    with mpmath.workdps(40):
        sides = []
        for rows in (a, b):
            matrix = mpmath.matrix(rows.tolist())
            mean = [mpmath.fsum(matrix[:, j]) / matrix.rows for j in range(matrix.cols)]
            centred = mpmath.matrix(matrix.rows, matrix.cols)
            for i in range(matrix.rows):
                for j in range(matrix.cols):
                    centred[i, j] = (matrix[i, j] - mean[j]) / mpmath.sqrt(matrix.rows - 1)
            sides.append((mean, centred))
        (mean_a, of_a), (mean_b, of_b) = sides
        shared = mpmath.fsum(mpmath.svd_r(of_a * of_b.T, compute_uv=False))
        squares = mpmath.fsum(x**2 for x in of_a) + mpmath.fsum(x**2 for x in of_b)
        apart = mpmath.fsum((x - y) ** 2 for x, y in zip(mean_a, mean_b))
        return float(apart + squares - 2 * shared)


def test_it_is_symmetric_and_invariant_under_rotation_and_shift():
    a, b = normal(300, 10), 2 * normal(200, 10, seed=1) + 1
    turn = rotation(10, seed=5)
    value = frechet_distance(a, b).value
    assert frechet_distance(b, a).value == pytest.approx(value, rel=1e-10)
    turned = frechet_distance(a @ turn + 7, b @ turn + 7)
    assert turned.value == pytest.approx(value, rel=1e-9)
    assert turned.se == pytest.approx(frechet_distance(a, b).se, rel=1e-8)


@pytest.mark.parametrize("n", [200, 20])
def test_it_is_zero_between_a_set_and_itself_also_where_the_rank_is_not_full(n):
    a = normal(n, 30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert 0 <= frechet_distance(a, a).value < 1e-11
        assert 0 <= frechet_by_svd(a, a) < 1e-11


def test_it_converges_to_the_distance_of_the_distributions():
    values = 0.2 + normal(6, seed=3).square()
    exact = float((1 - values.sqrt()).square().sum()) + 6 * 0.04
    unit = gaussian(torch.zeros(6).double(), torch.ones(6).double(), torch.eye(6).double())
    errors = [
        abs(frechet_distance(normal(n, 6, seed=n) * values.sqrt() + 0.2, unit).value - exact)
        for n in (300, 3000, 30000)
    ]
    assert errors[2] < errors[0]
    assert errors[2] < 0.02 * exact


def test_the_standard_error_is_that_of_repeated_draws_and_the_jackknife_takes_the_bias_away():
    mixed = 0.3 * normal(8, 8) + 0.5 * torch.eye(8).double()
    zero = torch.zeros(8).double()
    reference = Statistics(zero, mixed @ mixed.T, MANY)
    true = frechet_distance(Statistics(zero + 0.2, mixed @ mixed.T * 2.0, MANY), reference).value
    draws = [normal(400, 8, seed=k) @ mixed.T * 2**0.5 + 0.2 for k in range(150)]
    found = [frechet_distance(draw, reference) for draw in draws]
    value, se, debiased = (torch.tensor([getattr(f, name) for f in found]) for name in ("value", "se", "debiased"))
    spread = float(value.std())
    assert 0.8 * spread < float(se.mean()) < 1.3 * spread  # sd of 150 draws is known to 6 percent
    assert abs(float(debiased.mean()) - true) < 4 * spread / 150**0.5
    assert abs(float(debiased.mean()) - true) < abs(float(value.mean()) - true)
    assert float(((debiased - true).abs() < 1.96 * se).double().mean()) > 0.88


def test_the_jackknife_is_that_of_distances_measured_anew_without_each_block():
    a, b = normal(83, 5) + torch.arange(83).double()[:, None] / 40, normal(200, 5, seed=1)
    found = frechet_distance(a, b)
    blocks = torch.tensor([mix(i) % 8 for i in range(83)])
    assert sorted(set(blocks.tolist())) == list(range(8))
    without = [frechet_distance(a[blocks != k], b).value * float((blocks != k).double().mean()) for k in range(8)]
    assert found.debiased == pytest.approx(8 * found.value - sum(without), rel=1e-9)


def test_the_influence_function_is_the_derivative_of_the_distance():
    """Doubling the weight of one sample moves the distance by its influence over n."""
    a, b = normal(4000, 5), 1.5 * normal(4000, 5, seed=1) + 0.3
    moves = influence(a, statistics(a), statistics(b))
    assert abs(float(moves.mean())) < 1e-2 * float(moves.std())
    i = int(moves.abs().argmax())
    moved = frechet_distance(torch.cat([a, a[i : i + 1]]), b).value - frechet_distance(a, b).value
    assert moved * 4001 == pytest.approx(float(moves[i]), rel=0.02)


def test_classes_that_take_turns_do_not_upset_the_jackknife():
    """Sample i has class i mod 10, as the demo draws them: blocks of i mod 8 would each hold half of the classes."""
    features = 3 * normal(10, 8)[torch.arange(4000) % 10] + normal(4000, 8, seed=1)
    distance = frechet_distance(features[:2000], features[2000:])
    assert abs(distance.debiased) < 4 * distance.se  # the truth is 0


def test_pairs_share_their_error_and_the_interval_says_so():
    """Features from the same noises that differ by little: the spread over draws is that of pairs, not of a side."""
    axes = rotation(4)
    values = torch.tensor([1.0, 2.0, 0.5, 0.1], dtype=torch.float64)
    wider = 1.05 * values + 0.01
    exact = float((wider.sqrt() - values.sqrt()).square().sum()) + 4 * 0.01**2
    pairs = []
    for k in range(100):
        z = normal(500, 4, seed=k)
        a, b = z * wider.sqrt() @ axes.T + 0.01, z * values.sqrt() @ axes.T
        pairs.append(frechet_distance(a, b, paired=True))
    unpaired = frechet_distance(a, b).se
    spread = float(torch.tensor([found.value for found in pairs]).std())
    assert 0.75 * spread < sum(found.se for found in pairs) / 100 < 1.3 * spread
    assert spread < 0.2 * unpaired
    covered = [abs(found.debiased - exact) < 1.96 * found.se for found in pairs]
    assert sum(covered) > 0.88 * 100


def test_a_solver_that_has_converged_is_at_no_distance_nor_below_it():
    a = normal(200, 6)
    found = frechet_distance(a, a.clone(), paired=True)
    assert abs(found.value) < 1e-12
    assert abs(found.debiased) < 1e-11
    assert found.se < 1e-7
    assert frechet_distance(a, a.clone()).debiased < -0.01  # what leaving out one side alone makes of it


def test_features_that_are_all_equal_are_a_distribution_too():
    """A sampler that makes one image: the covariance is 0, and the distance what is left of the other one."""
    a, b = torch.ones(100, 3), normal(200, 3)
    of_b = statistics(b)
    found = frechet_distance(a, b)
    assert (found.rank_a, found.rank_b, found.se) == (0, 3, 0.0)
    exact = float((1 - of_b.mean).square().sum() + of_b.cov.trace())
    assert found.value == pytest.approx(exact)
    assert found.debiased == pytest.approx(exact)
    assert frechet_distance(b, a).value == pytest.approx(exact)
    assert frechet_by_svd(a, b) == pytest.approx(exact)


def test_too_few_samples_warn_with_the_numbers():
    with pytest.warns(UserWarning, match="20 samples in 30 dimensions"):
        frechet_distance(normal(20, 30), normal(100, 30))


def test_what_has_no_distance_is_refused():
    with pytest.raises(ValueError, match="3 and 4 dimensions"):
        frechet_distance(normal(20, 3), normal(20, 4))
    with pytest.raises(ValueError, match="NaN"):
        statistics(torch.full((5, 2), torch.nan))
    with pytest.raises(ValueError, match="at least 2"):
        statistics(torch.zeros(1, 2))
    with pytest.raises(ValueError, match="20 and 21 features"):
        frechet_distance(normal(20, 3), normal(21, 3), paired=True)
    with pytest.raises(ValueError, match="two tensors"):
        frechet_distance(normal(20, 3), statistics(normal(20, 3)), paired=True)


def test_from_statistics_alone_there_is_no_standard_error_and_from_moments_no_less_a_jackknife():
    a, b = normal(150, 3), normal(60, 3, seed=1)
    found = frechet_distance(statistics(a), b)
    assert (found.se, found.debiased, found.n_a, found.n_b) == (None, None, 150, 60)
    streamed = frechet_distance(Moments.of(a), b)
    assert streamed.se is None
    assert streamed.debiased == pytest.approx(frechet_distance(a, b).debiased, rel=1e-10)


@given(
    cuts=st.lists(st.integers(0, 120), max_size=12),
    shift=st.sampled_from([0.0, 1e6]),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=20, deadline=None)
def test_moments_do_not_depend_on_how_the_samples_came(cuts, shift, order):
    rows = normal(120, 4) + shift * torch.tensor([1.0, -1.0, 0.0, 2.0])
    edges = sorted({0, *cuts, 120})
    shards = []
    for start, stop in pairwise(edges):
        shard = Moments(4)
        shard.add(rows[start:stop], range(start, stop))
        shards.append(Moments.from_state(shard.state()))
    order.shuffle(shards)
    found, whole = Moments.sum(shards), Moments.of(rows)
    found.check(120)
    # features near 1e6 are known to 1e-10, and so is what is left of them about their mean
    torch.testing.assert_close(found.statistics().cov, torch.cov(rows.T), rtol=1e-12, atol=1e-12 + 1e-15 * shift)
    torch.testing.assert_close(found.statistics().mean, rows.mean(0), rtol=1e-12, atol=1e-12)
    for k in range(8):
        torch.testing.assert_close(found.without(k).cov, whole.without(k).cov, rtol=1e-12, atol=1e-12 + 1e-15 * shift)


def test_moments_that_go_on_from_a_file_end_on_the_same_bits(tmp_path):
    rows = normal(100, 3)
    whole, begun = Moments(3), Moments(3)
    whole.add(rows[:40], range(40))
    begun.add(rows[:40], range(40))
    np.savez(tmp_path / "state.npz", **begun.state())
    with np.load(tmp_path / "state.npz", allow_pickle=False) as file:
        resumed = Moments.from_state(file)
    for moments in (whole, resumed):
        moments.add(rows[40:], torch.arange(40, 100))
    same(whole, resumed)


def same(a, b):
    for name, array in a.state().items():
        assert np.array_equal(array, b.state()[name]), name


def test_the_block_of_a_sample_follows_from_a_hash_of_its_index():
    moments = Moments(2)
    moments.add(normal(3, 2), [10, 700, 31])
    assert moments.count.tolist() == [sum(mix(i) % 8 == k for i in (10, 700, 31)) for k in range(8)]


def test_an_index_that_comes_twice_or_never_is_named():
    moments = Moments(2)
    moments.add(normal(10, 2), range(10))
    with pytest.raises(ValueError, match="index 7 occurs twice"):
        moments.add(normal(2, 2), [12, 7])
    with pytest.raises(ValueError, match="index 11 occurs twice"):
        moments.add(normal(2, 2), [11, 11])
    with pytest.raises(ValueError, match="index 0 occurs twice"):
        moments.merge(Moments.of(normal(3, 2)))
    assert moments.n == 10
    with pytest.raises(ValueError, match=r"2 are missing \(the first is 10\)"):
        moments.check(12)
    with pytest.raises(ValueError, match="1 lie beyond"):
        moments.check(9)
    with pytest.raises(ValueError, match="at least 0, got -1"):
        moments.add(normal(1, 2), [-1])


def test_moments_of_another_shape_or_of_nothing_are_refused():
    with pytest.raises(ValueError, match=r"must be \[3, 2\], got \[3, 5\]"):
        Moments(2).add(normal(3, 5), range(3))
    with pytest.raises(ValueError, match="of 2 and of 3 dimensions"):
        Moments(2).merge(Moments(3))
    with pytest.raises(ValueError, match="at least 2 features, got 0"):
        Moments(2).statistics()
    with pytest.raises(ValueError, match="no moments to sum"):
        Moments.sum([])
    state = Moments.of(normal(9, 2)).state()
    with pytest.raises(ValueError, match=r"scatter of torch\.float64"):
        Moments.from_state({**state, "scatter": state["scatter"][:3]})
    with pytest.raises(ValueError, match="counts 9 features of 8"):
        Moments.from_state({**state, "seen": state["seen"][:8]})


def test_one_process_gathers_what_is_there():
    shards = shards_of(range(0, 100, 20))
    same(gather(shards, 100), Moments.sum(shards))
    with pytest.raises(ValueError, match=r"20 are missing \(the first is 100\)"):
        gather(shards, 120)


def shards_of(starts, size=20):
    rows = normal(200, 5, seed=9) * 3 + 1
    shards = []
    for start in starts:
        shard = Moments(5)
        shard.add(rows[start : start + size], range(start, start + size))
        shards.append(shard)
    return shards


WORKER = """
import sys
import numpy as np
import torch.distributed as dist
from fastsample.bench import Moments, gather

rank, folder = int(sys.argv[1]), sys.argv[2]

def shards(*starts):
    return [Moments.from_state(np.load(f"{folder}/{start}.npz", allow_pickle=False)) for start in starts]

dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
found = gather(shards(*[(40, 0, 80), (60, 20)][rank]), 100)
np.savez(f"{folder}/rank-{rank}.npz", **found.state())
for name, starts, n in (
    ("twice", [(0, 20), (20, 40, 60, 80)], 100),
    ("missing", [(0, 20), (80,)], 100),
    ("beyond", [(0, 20), (40, 60, 80)], 90),
    ("unlike", [(0, 20), (40, 60, 80)], 100 + rank),
    ("idle", [(), (0, 20)], 40),
):
    try:
        gather(shards(*starts[rank]), n)
        print(name, "well")
    except ValueError as error:
        print(name, error)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_gather_the_bits_of_one_and_both_name_what_is_wrong(tmp_path):
    shards = shards_of(range(0, 100, 20))
    for shard in shards:
        np.savez(tmp_path / f"{shard.first}.npz", **shard.state())
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [worker.communicate(timeout=300) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], said
    for rank in range(2):
        with np.load(tmp_path / f"rank-{rank}.npz", allow_pickle=False) as file:
            same(Moments.sum(shards), Moments.from_state(file))
    assert said[0][0] == said[1][0]  # the same error on every rank
    for line in (
        "twice of the samples 0 .. 99, 20 occurred more than once (the first is 20)",
        "missing of the samples 0 .. 99, 40 are missing (the first is 40)",
        "beyond of the samples 0 .. 89, 10 lie beyond",
        "unlike the processes gather different numbers of samples, from 100 to 101",
        "idle well",
    ):
        assert line in said[0][0]
