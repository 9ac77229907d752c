"""Pairs of noise and sample in files: exact, resumable, and refused by name where they are damaged or foreign."""

import errno
import json
import math
import os

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fastsample as fs
from fastsample import distill, files, solvers


class Halves(nn.Module):
    """A deterministic eps, with dropout and a class: cheap, and unlike for every sample."""

    def __init__(self, weight=0.5):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, class_labels=None):
        shift = 0 if class_labels is None else 0.1 * class_labels[:, None]
        return self.dropout(self.weight * x + shift)


@pytest.fixture
def teacher():
    return fs.Denoiser(Halves(), fs.VP.scaled_linear(), "eps")


@pytest.fixture
def plan(teacher):
    return fs.trace(solvers.ddim, fs.grid(teacher.schedule, 3, fs.uniform_t))


@pytest.fixture
def make(teacher, plan, tmp_path):
    """make(**changes): 10 pairs in shards of 4, in tmp_path / "pairs"."""

    def made(*, model=teacher, steps=plan, out=tmp_path / "pairs", **changes):
        options = {"shape": (2,), "count": 10, "shard": 4, "batch": 3, "clip": math.inf, **changes}
        return distill.make_pairs(model, steps, out, **options)

    return made


LABELS = {"class_labels": torch.arange(10)}


def contents(folder):
    """All files of a folder by name; hidden ones, which a failed writing would leave, included."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_pair_i_is_what_the_plan_makes_of_the_noise_of_seed_i(teacher, plan, make):
    pairs = distill.Pairs(make(condition=LABELS, seed=7))
    found = pairs.rows(torch.arange(10))
    z = fs.noise((2,), seeds=range(7, 17))
    assert torch.equal(found["noise"], z.draw(0))
    assert torch.equal(found["class_labels"], LABELS["class_labels"])
    teacher.network.eval()
    torch.testing.assert_close(found["x0"], fs.sample(teacher, plan, z, condition=LABELS))
    assert found["x0"].abs().max() > 1


def test_pairs_do_not_depend_on_the_batch_and_a_network_stays_in_its_mode(make, tmp_path, teacher):
    teacher.network.train()
    first, second = (make(out=tmp_path / str(k), batch=k) for k in (1, 10))
    assert teacher.network.training
    assert teacher.network.dropout.training
    torch.testing.assert_close(*(distill.Pairs(out).rows(torch.arange(10)) for out in (first, second)))


def test_an_epoch_gives_every_pair_once_and_each_epoch_another_order(make):
    make(condition=LABELS)
    pairs = distill.Pairs(make(condition=LABELS), size=5)
    assert len(pairs) == 2
    torch.manual_seed(0)
    orders = [torch.cat([batch["class_labels"] for batch in pairs]) for _ in range(2)]
    assert all(torch.equal(order.sort().values, torch.arange(10)) for order in orders)
    assert not torch.equal(*orders)
    torch.manual_seed(0)
    assert torch.equal(torch.cat([batch["class_labels"] for batch in pairs]), orders[0])
    whole = pairs.rows(torch.arange(10))
    for batch in pairs:  # what belongs together stays together
        for key, value in batch.items():
            assert torch.equal(value, whole[key][batch["class_labels"]])


def test_samples_alone_are_data_for_other_methods_and_clipped(make):
    pairs = distill.Pairs(make(clip=0.25, condition=LABELS), noise=False, size=10)
    (batch,) = pairs
    assert set(batch) == {"x0", "class_labels"}
    assert batch["x0"].abs().max() == 0.25


def test_a_batch_may_be_larger_than_the_set(make):
    assert [len(batch["x0"]) for batch in distill.Pairs(make(), size=64)] == [10]


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("calls", [1, 4, 7])
def test_what_was_interrupted_goes_on_and_ends_with_the_same_files(make, tmp_path, teacher, calls):
    """After the evaluation of this number: within the first shard, and within the second."""
    whole = contents(make(out=tmp_path / "whole", condition=LABELS))
    asked = 0

    def stop(module, args):
        nonlocal asked
        asked += 1
        if asked > calls:
            raise Interrupted

    hook = teacher.network.register_forward_pre_hook(stop)
    with pytest.raises(Interrupted):
        make(condition=LABELS)
    hook.remove()
    before = teacher.count.calls
    kept = [name for name in contents(tmp_path / "pairs") if name.endswith(".safetensors")]
    assert contents(make(condition=LABELS)) == whole
    missing = [4, 4, 2][len(kept) :]
    assert teacher.count.calls - before == 3 * sum(math.ceil(rows / 3) for rows in missing)
    assert len(kept) == (calls >= 6)


def test_pairs_that_were_not_finished_are_no_data_yet(make, tmp_path, teacher):
    teacher.network.register_forward_pre_hook(lambda module, args: 1 / 0 if teacher.count.calls > 7 else None)
    with pytest.raises(ZeroDivisionError):
        make()
    with pytest.raises(ValueError, match=r"pairs holds 4 of 10 pairs; call make_pairs again as it was called"):
        distill.Pairs(tmp_path / "pairs")


def test_a_full_disk_leaves_the_earlier_shards_and_says_so(make, tmp_path, monkeypatch):
    """At each writing of a run in turn: shards and manifests."""
    whole, original = contents(make(out=tmp_path / "whole")), files.write

    def full(k):
        count = 0

        def write(path, fill):
            nonlocal count
            count += 1

            def fails(temporary):
                temporary.write_bytes(b"half")
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            original(path, fails if count == k else fill)

        return write

    for k in range(1, 7):  # three shards, and a manifest after each
        out = tmp_path / str(k)
        monkeypatch.setattr(files, "write", full(k))
        with pytest.raises(OSError, match="No space left on device") as told:
            make(out=out)
        monkeypatch.setattr(files, "write", original)
        assert told.value.errno == errno.ENOSPC
        if k % 2:
            assert f"{4 * (k // 2)} pairs are there and stay: make room, and call make_pairs again" in str(told.value)
        assert b"half" not in contents(out).values()
        assert all(data == whole[name] for name, data in contents(out).items() if name.endswith(".safetensors"))
        assert contents(make(out=out)) == whole


def test_a_folder_that_cannot_be_written_is_refused_before_any_sampling(make, tmp_path, teacher):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot write into .*file.*; choose another or mend its rights"):
        make(out=tmp_path / "file" / "pairs")
    assert teacher.count.calls == 0


def test_pairs_of_another_teacher_plan_or_setting_are_refused_by_name(make, plan, teacher):
    before = contents(make(condition=LABELS))
    calls = teacher.count.calls
    longer = fs.trace(solvers.ddim, fs.grid(teacher.schedule, 4, fs.uniform_t))
    other = fs.Denoiser(Halves(0.6), teacher.schedule, "eps")
    wrong = {
        r"teacher\.networks": {"model": other},
        r"plan\.sha256": {"steps": longer},
        "seed was 0, now 1": {"seed": 1},
        r"clip was \"inf\", now \"1\.0\"": {"clip": 1.0},
        r"conditions\.class_labels": {"condition": {"class_labels": torch.ones(10)}},
        "count was 10, now 11": {"count": 11, "condition": {"class_labels": torch.arange(11)}},
    }
    for message, changes in wrong.items():
        with pytest.raises(ValueError, match=rf"pairs that were made otherwise: .*{message}.*Choose another folder"):
            make(**{"condition": LABELS, **changes})
    assert contents(make(condition=LABELS)) == before
    assert teacher.count.calls == calls


def test_damaged_and_foreign_files_are_refused_by_name_and_made_anew(make, tmp_path):
    folder = make()
    whole = contents(folder)
    name = "pairs-000000004.safetensors"

    def restore():
        for file, data in whole.items():
            (folder / file).write_bytes(data)

    flipped = bytearray(whole[name])
    flipped[-1] ^= 1
    for data in (bytes(flipped), whole[name][:-9], b"", whole["pairs-000000000.safetensors"]):
        (folder / name).write_bytes(data)
        for read in (distill.Pairs, lambda folder: make()):
            with pytest.raises(ValueError, match=rf"{name} is damaged: .*; remove it, and call make_pairs again"):
                read(folder)
        restore()
    (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{name} is missing, pairs.json names it; call make_pairs again"):
        distill.Pairs(folder)
    assert contents(make()) == whole

    manifest = json.loads(whole["pairs.json"])
    edited = {**manifest, "settings": {**manifest["settings"], "seed": 5}}
    texts = {
        "its checksum does not match": json.dumps(edited),
        "it is plan of version 1, expected fastsample.pairs 1": '{"format": "plan", "version": 1}',
        "it lacks 'format'": "{}",
        "Expecting value": "",
    }
    for message, text in texts.items():
        (folder / "pairs.json").write_text(text)
        with pytest.raises(ValueError, match=rf"pairs\.json is damaged or no manifest of pairs: {message}"):
            distill.Pairs(folder)
        with pytest.raises(ValueError, match="is damaged or no manifest of pairs"):
            make()
    with pytest.raises(FileNotFoundError, match=r"holds no pairs\.json; give a folder written by distill\.make_pairs"):
        distill.Pairs(tmp_path)


def test_the_files_hold_tensors_alone_and_the_manifest_says_how_to_make_them(make, plan):
    folder = make(condition=LABELS)
    assert set(contents(folder)) == {f"pairs-{first:09d}.safetensors" for first in (0, 4, 8)} | {"pairs.json"}
    assert set(load_file(folder / "pairs-000000008.safetensors")) == {"x0", "noise", "class_labels"}
    settings = json.loads((folder / "pairs.json").read_text())["settings"]
    assert fs.Plan.from_json(json.dumps(settings["plan"])) == plan == distill.Pairs(folder).plan


def test_a_plan_that_adds_noise_makes_samples_and_no_pairs(make, teacher):
    noisy = fs.trace(solvers.consistency, fs.grid(teacher.schedule, 2, fs.uniform_t))
    folder = make(steps=noisy)
    with pytest.raises(ValueError, match=r"made by consistency, which adds noise at its steps.*or pass noise=False"):
        distill.Pairs(folder)
    assert len(distill.Pairs(folder, noise=False).rows(torch.arange(10))["x0"]) == 10


def test_wrong_arguments_are_refused_before_any_sampling(make, teacher, tmp_path):
    foreign = fs.trace(solvers.ddim, fs.grid(fs.Flow(), 3, fs.uniform_t))
    wrong = [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"shard": 0}, "shard must be at least 1, got 0"),
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"clip": 0.0}, r"clip must be positive, got 0; math\.inf clips nothing"),
        ({"seed": 2**32 - 9}, r"the seeds 4294967287 to 4294967296 must lie in 0 \.\. 2\*\*32 - 1"),
        ({"condition": {"noise": torch.ones(10)}}, "'noise' names a part of each pair"),
        ({"condition": {"text": torch.ones(9)}}, "'text' has 9 rows for 10 pairs; give one for each"),
        ({"condition": {"text": torch.tensor(1.0)}}, "'text' has 0 rows for 10 pairs"),
        ({"steps": foreign}, r"the plan was made for Flow.* and does not fit this model's VP"),
    ]
    for changes, message in wrong:
        with pytest.raises(ValueError, match=message):
            make(**changes)
    with pytest.raises(TypeError, match=r"condition 'scale' must be a tensor .*, got float; .*fs\.Guided"):
        make(condition={"scale": 3.0})
    assert teacher.count.calls == 0
    assert not (tmp_path / "pairs").exists()
    with pytest.raises(ValueError, match="size of a batch must be at least 1, got 0"):
        distill.Pairs(make(), size=0)


def test_a_training_that_was_stopped_goes_on_bit_for_bit_with_pairs(make, tmp_path, toy, weights):
    pytest.importorskip("accelerate")
    pairs = distill.Pairs(make(clip=0.5), size=4, noise=False)

    def run(out, steps):
        return distill.train(distill.Diffusion(toy()), pairs, steps=6, out=out, save_every=steps, keep=9)

    whole = run(tmp_path / "whole", 3)
    stopped = tmp_path / "stopped"
    stopped.mkdir()
    (tmp_path / "whole" / "step-000003").rename(stopped / "step-000003")
    torch.testing.assert_close(weights(run(stopped, 3)), weights(whole), rtol=0, atol=0)
