"""Cells: what is sampled once for several cases and measures, what is read, what is kept in memory."""

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import bench
from fastsample.bench import cells as cells_module
from fastsample.bench.measure import Features
from fastsample.bench.neighbours import Neighbours
from fastsample.bench.quality import PIXELS
from fastsample.bench.record import read_influence


class Mean:
    """A measure of features that looks at nothing but their mean."""

    def __init__(self, name, features, parts=()):
        self.name, self.features, self.parts = name, features, parts

    def score(self, features):
        self.seen = features
        return {part: float(features.mean()) for part in self.parts} or float(features.mean())


def counted(name, factor=1.0, **given):
    """An extractor and the numbers of images that it was given."""

    def extract(images):
        asked.append(len(images))
        return images.flatten(1) * factor

    asked = []
    return Features(name, extract, **given), asked


def one_case(toys, network=lambda x, t: 0.5 * x, **how):
    return bench.Case.product(model={"m": toys["toy"](network)}, solver=toys["ddim"], steps=2, **how)


def test_cases_that_differ_in_their_batch_alone_are_sampled_once(sweep, toys, tmp_path):
    def network(x, t):
        rows.append(len(x))
        return 0.5 * x

    rows = []
    first, second = sweep(cases=one_case(toys, network, batch=[3, 5]), floor=False)
    assert sum(rows) == 40 * 2
    assert (first.scores, first.quality) == (second.scores, second.quality)
    assert first.key != second.key
    assert len(list((tmp_path / "out" / "samples").iterdir())) == 1


def test_their_latencies_are_of_their_own_batch(sweep, toys):
    how = bench.latency(rounds=2, warmup=0, batch=7, baseline="m/ddim/2/batch=3")
    records = sweep(cases=one_case(toys, batch=[3, None]), floor=False, latency=how)
    assert [record.timing.batch for record in records] == [3, 7]
    timing = records[1].timing
    beside = records[0].timing.steady.samples_s
    ratios = [case / 7 / (other / 3) for case, other in zip(timing.steady.samples_s, beside)]
    assert sorted(timing.ratio.ratios) == pytest.approx(sorted(ratios))


def test_features_of_one_kind_are_taken_once_for_all_measures(sweep, toys):
    shared, asked = counted("mine")
    other, asked_too = counted("mine", 2.0, sha256="0123456789abcdef")
    measures = [Mean("a", shared), Mean("b", shared), Mean("c", other)]
    (record,) = sweep(cases=one_case(toys), quality=measures, shard=15)
    assert asked == asked_too == [15, 15, 10]
    assert record.scores["a"] == record.scores["b"]
    assert record.scores["c"].value == pytest.approx(2 * record.scores["a"].value)


def test_features_come_in_float64_in_the_order_of_the_indices(sweep, toys):
    measure = Mean("a", PIXELS)
    sweep(cases=one_case(toys), quality=measure, shard=7, batch=3)
    plan = fs.trace(toys["ddim"], fs.grid(toys["toy"]().schedule, 2))
    expected = fs.sample(toys["toy"](), plan, fs.noise((1, 4, 4), range(40))).clamp(-1, 1).flatten(1)
    assert measure.seen.dtype == torch.float64
    torch.testing.assert_close(measure.seen, expected.double())


def test_features_that_float32_cannot_hold_are_kept_in_float64(sweep, toys):
    extractor = Features("third", lambda images: images.double().flatten(1) / 3)
    measure = Mean("a", extractor)
    sweep(cases=one_case(toys), quality=measure)
    assert not torch.equal(measure.seen, measure.seen.float().double())


def test_scores_do_not_depend_on_the_shards(sweep, toys):
    found = []
    for shard in (1, 7, 40, 1000):
        (record,) = sweep(cases=one_case(toys), quality=Mean("a", PIXELS), shard=shard, batch=1, resume=False)
        found.append(record.scores["a"].value)
    assert len(set(found)) == 1


def test_a_measure_of_several_numbers_names_each(sweep, toys):
    (record,) = sweep(cases=one_case(toys), quality={"mine": Mean("other", PIXELS, parts=("x", "y"))})
    assert list(record.scores) == ["mine_x", "mine_y"]
    assert record.scores["mine_x"].n == 40


def test_the_influence_of_each_number_is_kept(sweep, toys, tmp_path):
    reference = bench.Reference.of(0.1 * torch.randn(60, 1, 4, 4), PIXELS)
    measures = [Neighbours("near", PIXELS, reference), bench.fd_pixels(reference)]
    record = sweep(cases=one_case(toys), quality=measures)[-1]
    kept = read_influence(tmp_path / "out", record)
    assert {"near_precision", "near_recall", "near_density", "near_coverage", "fd_pixels"} == set(kept)
    for name in kept:  # the standard error is the spread of the influence
        assert float(kept[name].std()) / 40**0.5 == pytest.approx(record.scores[name].se, rel=1e-6, abs=1e-12)


def test_a_plain_function_is_given_all_samples_in_order_and_features_need_none(sweep, toys, tmp_path, monkeypatch):
    written = []
    write = cells_module.write_arrays
    monkeypatch.setattr(
        cells_module, "write_arrays", lambda path, arrays: written.append(set(arrays)) or write(path, arrays)
    )
    sweep(cases=one_case(toys), quality=Mean("a", PIXELS), shard=10, keep=15)
    assert ["samples" in names for names in written] == [True, True, False, False]  # those for pictures alone
    got = []
    sweep(cases=one_case(toys), quality={"seen": lambda x: got.append(x) or 0.0}, shard=10, keep=15, resume=False)
    assert got[0].shape == (40, 1, 4, 4)


@pytest.mark.parametrize("keep", [0, 1, 16, 39, 40, 90])
def test_as_many_samples_are_kept_as_asked_for_and_as_there_are(sweep, toys, tmp_path, keep):
    (record,) = sweep(cases=one_case(toys), quality=Mean("a", PIXELS), shard=16, keep=keep)
    assert record.samples == min(keep, 40)
    if keep:
        assert len(bench.read_samples(tmp_path / "out", record)) == record.samples


def test_only_what_is_asked_for_is_read_from_a_shard(sweep, toys, monkeypatch):
    read = []
    original = cells_module.read_arrays
    monkeypatch.setattr(
        cells_module, "read_arrays", lambda path, names=None: read.append(names) or original(path, names)
    )
    sweep(cases=one_case(toys), quality=Mean("a", PIXELS), shard=20, keep=0)
    assert None not in [names for names in read[3:] if names]  # the first look for shards that are there
    assert sum(names is not None and any("features" in name for name in names) for names in read) == 2  # each once


def test_models_and_copies_are_given_back_after_their_last_use(sweep, toys, monkeypatch):
    import gc
    import weakref

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = torch.nn.Parameter(torch.tensor(0.5))

        def forward(self, x, t):
            return self.factor * x

        def __deepcopy__(self, memo):
            made = Network()
            alive.append(weakref.ref(made))
            return made

    alive = []
    cases = bench.Case.product(
        model={"m": toys["toy"](Network())}, solver=[toys["ddim"], toys["heun"]], steps=[1, 2, 3], dtype=torch.bfloat16
    )
    sweep(cases=cases, latency=bench.latency(rounds=1, warmup=0, batch=2))
    gc.collect()
    assert len(alive) == 1  # one copy for six cases
    assert alive[0]() is None  # and none once the run is over


def test_two_models_share_one_converged_solution(sweep, toys):
    def network(x, t):
        rows.append(len(x))
        return 0.5 * x

    rows, teacher = [], toys["toy"](network)
    cases = bench.Case.product(model={"teacher": teacher, "student": teacher}, solver=toys["ddim"], steps=2)
    truth = bench.Case("teacher", teacher, "heun", toys["heun"], 5)
    _, a, b = sweep(cases=cases, converged={"teacher": truth, "student": truth})
    assert sum(rows) == 40 * (2 + 2 + 9)
    assert a.scores["endpoint_rms"] == b.scores["endpoint_rms"]


def test_the_endpoint_error_is_that_of_the_samples_themselves(sweep, toys):
    truth = bench.Case("m", toys["toy"](), "heun", toys["heun"], 20)
    got = []
    (record,) = sweep(
        cases=one_case(toys), converged={"m": truth}, shard=9, quality={"seen": lambda x: got.append(x) or 0.0}
    )
    exact = fs.sample(toys["toy"](), truth.plan, fs.noise((1, 4, 4), range(40)))
    apart = got[0].double() - exact.double()
    assert record.scores["endpoint_rms"].value == pytest.approx(float(apart.square().mean().sqrt()), rel=1e-6)
    of_all = bench.endpoint_rms(got[0], exact)
    assert record.scores["endpoint_rms"].se == pytest.approx(of_all.se, rel=1e-5)  # float32's rounding
    assert record.scores["endpoint_rms"].n == 40


def test_numbers_of_numpy_become_pythons(sweep, toys):
    (record,) = sweep(cases=one_case(toys), quality={"a": lambda x: bench.Score(np.float32(0.5), n=np.int64(3))})
    assert type(record.scores["a"].value) is float
    assert type(record.scores["a"].n) is int


def test_arrays_with_a_wrong_byte_anywhere_are_read_right_or_refused_by_name(tmp_path):
    import numpy as np

    from fastsample.bench.record import read_arrays, write_arrays

    true = {"features": np.arange(6.0).reshape(3, 2), "indices": np.arange(3)}
    write_arrays(tmp_path / "shard.npz", true)
    whole, refused = (tmp_path / "shard.npz").read_bytes(), []
    for place in range(len(whole)):
        for flip in (0x01, 0x80):
            (tmp_path / "shard.npz").write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
            try:
                found = read_arrays(tmp_path / "shard.npz")
            except ValueError as error:
                refused.append(str(error))
                continue
            for name in found.keys() & true.keys():
                assert np.array_equal(found[name], true[name])
    assert refused
    assert all("shard.npz" in message for message in refused)
