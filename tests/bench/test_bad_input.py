"""What is wrong with what a sweep is given: said before anything is sampled, or at the case by name."""

import errno
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import bench, files
from fastsample.bench import record as records_module
from fastsample.bench.measure import Features
from fastsample.bench.quality import PIXELS
from fastsample.bench.writing import Unwritable


@pytest.fixture
def untouched(toys):
    """Cases whose network must not be called, and the calls there were."""
    called = []
    model = toys["toy"](lambda x, t: called.append(1) or 0.5 * x)
    yield bench.Case.product(model={"m": model}, solver=toys["ddim"], steps=[2, 4])
    assert not called


def gray(images):
    return images.flatten(1)


COLOUR = Features("colours", gray, shape=(3, None, None))


class Colours:
    name, features = "fd_colours", COLOUR

    def score(self, features):
        return 0.0


def test_gray_samples_for_an_extractor_of_colours_are_refused_before_sampling(sweep, untouched, tmp_path):
    with pytest.raises(
        ValueError, match=r"fd_colours cannot measure .* colours takes images of 3 x any x any, not 1 x 4"
    ):
        sweep(cases=untouched, quality=Colours())
    assert not (tmp_path / "out").exists()


def test_one_sample_is_too_few_for_a_measure_of_features_and_enough_for_a_function(sweep, untouched, model, toys):
    with pytest.raises(ValueError, match=r"n = 1: of one sample there is no spread.*at least 2"):
        sweep(cases=untouched, n=1)
    cases = bench.Case.product(model={"m": model}, solver=toys["ddim"], steps=2)
    (record,) = sweep(cases=cases, n=1, quality={"level": lambda samples: float(samples.mean())})
    assert record.scores["level"].n == 1


@pytest.mark.parametrize("n", [0, -3])
def test_no_samples_are_refused(sweep, untouched, n):
    with pytest.raises(ValueError, match=f"n must be at least 1, got {n}"):
        sweep(cases=untouched, n=n)


def test_an_unknown_baseline_is_refused_with_the_names_there_are(sweep, untouched):
    with pytest.raises(ValueError, match="baseline 'm/dim/2' of the latency is none of the cases: m/ddim/2, m/ddim/4"):
        sweep(cases=untouched, latency=bench.latency(baseline="m/dim/2"))


def test_two_cases_of_one_name_are_refused_also_where_their_parts_differ(sweep, untouched, toys, model):
    again = bench.Case.product(model={"m": model}, solver={"ddim": toys["heun"]}, steps=2)
    with pytest.raises(ValueError, match="two cases are named m/ddim/2; give"):
        sweep(cases=untouched + again)
    slashes = [
        bench.Case("a/b", model, "c", toys["ddim"], 2),
        bench.Case("a", model, "b/c", toys["ddim"], 2),
    ]
    with pytest.raises(ValueError, match="two cases are named a/b/c/2; give"):
        sweep(cases=slashes)


def test_two_extractors_of_one_name_and_no_hash_are_refused(sweep, untouched):
    class Other:
        name, features = "other", Features("pixels", lambda images: images.flatten(1) * 2)

        def score(self, features):
            return 0.0

    with pytest.raises(ValueError, match="two extractors are called pixels; give them different names, or the sha256"):
        sweep(cases=untouched, quality=[bench.fd_pixels(torch.randn(9, 1, 4, 4)), Other()])


def test_a_reference_that_is_missing_or_truncated_fails_where_it_is_read(tmp_path):
    path = tmp_path / "real.npz"
    with pytest.raises(FileNotFoundError, match=r"there is no statistics file .*real\.npz; make one"):
        bench.Reference.load(path, PIXELS)
    bench.Reference.of(torch.randn(9, 1, 4, 4), PIXELS).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"real\.npz is damaged"):
        bench.Reference.load(path, PIXELS)


def test_a_floor_that_cannot_be_had_stops_the_run_before_sampling_and_names_its_measure(sweep, untouched):
    class Floorless:
        name, features = "mine", PIXELS

        def score(self, features):
            return 0.0

        def floor(self):
            raise ValueError("the reference is empty")

    with pytest.raises(RuntimeError, match="the floor of mine: ValueError: the reference is empty"):
        sweep(cases=untouched, quality=Floorless())


def test_nan_in_a_few_samples_fails_the_case_and_says_which_sample(sweep, toys, model):
    class Late:  # fs.sample sees the whole batch; what comes after it is seen by the sweep
        schedule = model.schedule

        def predict(self, x, node):
            x0 = model.predict(x, node)
            return torch.where(x.flatten(1).mean(1).view(-1, 1, 1, 1) > limit, x0 * math.nan, x0)

    limit = float(fs.noise((1, 4, 4), range(40)).draw(0).flatten(1).mean(1).max()) * 3 * 0.99
    cases = bench.Case.product(model={"late": Late(), "whole": model}, solver=toys["ddim"], steps=1)
    with pytest.warns(UserWarning, match="1 of 2 cases failed"):
        _, bad, good = sweep(cases=cases)
    assert bad.error.startswith("late/ddim/1: ")
    assert "NaN" in bad.error
    assert good.error is None


def test_samples_of_another_range_fail_the_case_by_name(sweep, toys, model):
    loud = toys["toy"](lambda x, t: 127.5 * (0.5 * x + 1))
    cases = bench.Case.product(model={"loud": loud, "whole": model}, solver=toys["ddim"], steps=1)
    with pytest.warns(UserWarning, match=r"loud/ddim/1: ValueError: images reach from .* they must lie in \[-1, 1\]"):
        _, bad, good = sweep(cases=cases)
    assert not bad.scores
    assert good.scores


def test_a_network_that_makes_another_shape_fails_its_case_by_name(sweep, toys, model):
    odd = toys["toy"](lambda x, t: x.repeat(1, 3, 1, 1))
    cases = bench.Case.product(model={"odd": odd, "whole": model}, solver=toys["ddim"], steps=1)
    with pytest.warns(UserWarning, match="odd/ddim/1: ValueError: the network returned shape"):
        sweep(cases=cases)


def test_a_folder_below_a_file_is_refused_before_sampling(sweep, untouched, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match=r"cannot write into .*file/out"):
        sweep(cases=untouched, out=tmp_path / "file" / "out")


def test_a_full_disk_stops_the_run_at_a_named_cell_and_it_can_go_on(sweep, toys, model, tmp_path, monkeypatch, quick):
    """At every single write of the run: what was written stays, what was not is not there, and the rest follows."""

    def measured(out):
        return sweep(
            cases=bench.Case.product(model={"m": model}, solver=toys["ddim"], steps=2),
            converged={"m": bench.Case("m", model, "ddim", toys["ddim"], 9)},
            latency=bench.latency(rounds=1, warmup=0),
            shard=25,
            out=out,
        )

    def full(k):
        def write(path, fill):
            nonlocal count
            count += 1
            if count == k:

                def fails(temporary):
                    temporary.write_bytes(b"half a fi")
                    raise OSError(errno.ENOSPC, "No space left on device")

                return original(path, fails)
            return original(path, fill)

        count = 0
        return write

    whole, original, k = [record.scores for record in measured(tmp_path / "whole")], files.write, 0
    told = []
    while k := k + 1:
        out = tmp_path / str(k)
        with monkeypatch.context() as patch:
            write = full(k)
            patch.setattr(files, "write", write)
            patch.setattr(records_module, "write", write)
            try:
                measured(out)
                break
            except Unwritable as error:
                told.append((error.errno, str(error)))
        assert not [path for path in out.rglob("*") if path.is_file() and b"half" in path.read_bytes()]
        assert [record.scores for record in measured(out)] == whole
        assert bench.read_run(out)[0]["finished"]
    assert len(told) == k - 1
    stopped = set()
    for number, text in told:
        assert number == errno.ENOSPC
        assert "make room or mend the rights and run again, which goes on from what is done" in text
        stopped |= set(re.findall(r"the results of (.*) cannot be written", text))
    assert stopped == {"m/ddim/2", "m/ddim/9", "real images", "the latency", "the run"}


def test_a_truncated_npz_of_a_run_is_named_with_the_remedy(sweep, tmp_path):
    record = sweep()[-1]
    path = tmp_path / "out" / "samples" / record.quality / "samples.npz"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match=r"samples\.npz is damaged .*; remove it and run again"):
        bench.read_samples(tmp_path / "out", record)
    sweep()
    assert len(bench.read_samples(tmp_path / "out", record)) == record.samples


def test_an_npz_that_holds_a_pickle_is_never_loaded(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "went off",))

    np.savez(tmp_path / "bomb.npz", samples=np.array([Bomb()], dtype=object))
    with pytest.raises(ValueError, match=r"damaged or no .npz of plain arrays"):
        records_module.read_arrays(tmp_path / "bomb.npz")
    assert not (tmp_path / "went off").exists()
