"""The stream of batches: the same after a stop, on any number of processes and workers; wrong loaders are refused."""

import random
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, RandomSampler, Subset, get_worker_info
from torch.utils.data.distributed import DistributedSampler

from fastsample import distill
from fastsample.distill.data import Stream, part_of, shard


class Points(Dataset):
    """Its transforms draw from all three generators. item: what was got, for those who count."""

    def __init__(self, count=26):
        self.count, self.got = count, []

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        self.got.append(i)
        drawn = [torch.rand(()), random.random(), np.random.rand()]  # noqa: NPY002
        return {"x0": torch.tensor([i / self.count, *drawn, -1.0]), "class_labels": i}


class Together(Points):
    def __getitems__(self, indices):
        return [{"x0": torch.full((4,), -i / self.count), "class_labels": i} for i in indices]


class Streamed(IterableDataset):
    def __iter__(self):
        for i in range(26):
            yield {"x0": 2 * torch.rand(4) - 1, "class_labels": i}


class Global:
    """A batch sampler that draws each batch from the generators of numpy and of torch, and so has no order to keep."""

    def __iter__(self):
        for _ in range(4):
            yield [int(np.random.randint(26)), *torch.randint(26, (5,)).tolist()]  # noqa: NPY002


def images(**options):
    pictures = torch.linspace(-1, 1, 26 * 12).view(26, 1, 3, 4)
    return distill.Batches(pictures, {"class_labels": torch.arange(26)}, size=8, **options)


LOADERS = {
    "a DataLoader": lambda: DataLoader(Points(), batch_size=8, shuffle=True),
    "a DataLoader with workers": lambda: DataLoader(
        Points(), batch_size=8, shuffle=True, num_workers=2, persistent_workers=True
    ),
    "a DataLoader of a subset": lambda: DataLoader(Subset(Points(40), range(26)), batch_size=8, shuffle=True),
    "a DataLoader of whole batches": lambda: DataLoader(Together(), batch_size=8, shuffle=True),
    "a DataLoader with a batch sampler": lambda: DataLoader(Points(), batch_sampler=Global()),
    "a DataLoader that streams": lambda: DataLoader(Streamed(), batch_size=8),
    "a DataLoader that streams with workers": lambda: DataLoader(Streamed(), batch_size=8, num_workers=2),
    "Batches": images,
    "Batches with flips": partial(images, flip=True),
    "a list": lambda: [{"x0": torch.full((6, 2), k / 8), "n": torch.arange(6)} for k in range(4)],
}


def drawn(loader, count, rank=0, world=1, seed=3):
    stream = Stream(loader, seed, rank, world)
    return [stream.next_part() for _ in range(count)]


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("name", LOADERS)
def test_the_parts_of_all_processes_make_the_whole_batch(name):
    count = 9  # more than two epochs, with short last batches
    whole = drawn(LOADERS[name](), count)
    parts = [drawn(LOADERS[name](), count, rank, 2) for rank in range(2)]
    for k, (batch, first, total) in enumerate(whole):
        assert first == 0
        assert total == len(batch["x0"])
        together = {key: torch.cat([part[k][0][key] for part in parts]) for key in batch}
        assert equal(together, batch)
        starts = [part[k][1] for part in parts]
        assert starts == [part_of(total, rank, 2)[0] for rank in range(2)]
        assert {part[k][2] for part in parts} == {total}


@pytest.mark.parametrize("name", LOADERS)
def test_a_stream_goes_on_at_any_batch_as_if_it_had_not_stopped(name):
    stream, places, whole = Stream(LOADERS[name](), 3), [], []
    for _ in range(9):
        whole.append(stream.next())
        places.append((stream.epoch, stream.used))
    assert places[-1][0] >= 1
    assert not equal(whole[0], whole[places.index((1, 1))]) or name == "a list"  # each epoch is another
    resumed = LOADERS[name]()
    for at in range(0, 8, 3 if "workers" in name else 1):
        again = Stream(resumed, 3)
        again.first()
        again.go_to(*places[at])
        assert equal(again.next(), whole[at + 1])
        assert (again.epoch, again.used) == places[at + 1]


def test_workers_change_nothing():
    for one, other in zip(drawn(LOADERS["a DataLoader"](), 9), drawn(LOADERS["a DataLoader with workers"](), 9)):
        assert equal(one[0], other[0])


def test_another_seed_gives_another_order():
    assert not equal(drawn(images(), 1)[0][0], drawn(images(), 1, seed=4)[0][0])


def test_a_process_loads_its_own_rows_alone_and_none_that_are_used():
    data = Points()
    loader = DataLoader(data, batch_size=8, drop_last=True)
    part, first, total = next(shard(loader, 1, 4)(0, 0, 2))
    assert data.got == [18, 19]
    assert part["class_labels"].tolist() == [18, 19]
    assert (first, total) == (2, 8)


def test_batches_make_their_own_rows_alone():
    class Watched(distill.Batches):
        def made(self, chosen):
            made.append(chosen["rows"].tolist())
            return super().made(chosen)

    made = []
    next(shard(Watched(torch.zeros(26, 2), size=8), 1, 4)(0, 0, 2))
    whole = list(distill.Batches(torch.zeros(26, 2), size=8).chosen())
    assert len(made) == 1
    assert len(made[0]) == 2
    assert len(whole) == 3


def test_what_numpy_and_python_draw_next_does_not_depend_on_the_stream():
    before = random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    drawn(LOADERS["a DataLoader"](), 3)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # noqa: NPY002


def test_a_worker_sees_the_data_set_of_the_user():
    loader = DataLoader(Points(8), batch_size=4, num_workers=1, worker_init_fn=count_five)
    assert max(part["x0"][:, 0].max() for part, _, _ in drawn(loader, 2)) == pytest.approx(7 / 5)


def count_five(worker):
    get_worker_info().dataset.count = 5


def test_about_half_of_the_images_are_mirrored_each_with_its_label():
    pictures = torch.rand(4000, 1, 2, 3) * 2 - 1
    loader = distill.Batches(pictures, {"class_labels": torch.arange(4000)}, size=4000, flip=True)
    batch = Stream(loader, 0).next()
    x0, original = batch["x0"], pictures[batch["class_labels"]]
    mirrored = (x0 == original.flip(-1)).flatten(1).all(1)
    assert torch.equal(x0[~mirrored], original[~mirrored])
    assert mirrored.float().mean() == pytest.approx(0.5, abs=0.04)  # five standard errors
    assert torch.equal(batch["x0"], Stream(loader, 0).next()["x0"])
    assert not torch.equal(mirrored, (Stream(loader, 1).next()["x0"] == pictures.flip(-1)).flatten(1).all(1))


def test_bytes_become_images_from_minus_one_to_one():
    pictures = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1)
    batch = Stream(distill.Batches(pictures, {"n": torch.arange(3)}), 0).next()
    torch.testing.assert_close(batch["x0"].flatten()[batch["n"].argsort()], torch.tensor([-1.0, -0.6, 1.0]))


def test_images_that_were_made_for_zero_to_one_are_pointed_out():
    """As by torchvision's ToTensor, which is within [-1, 1] too."""
    pictures = torch.linspace(0, 1, 32).view(8, 1, 2, 2)
    with pytest.warns(UserWarning, match=r"expected in \[-1, 1\] and .* lies in \[0, 1\].*give 2 \* x - 1"):
        Stream(distill.Batches(pictures), 0).first()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Stream(distill.Batches(2 * pictures - 1), 0).first()
        Stream(distill.Batches(torch.zeros(8, 1, 2, 2)), 0).first()
        Stream(distill.Batches(pictures, bounded=False), 0).first()


@pytest.mark.parametrize("total", [1, 7, 64, 129])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_parts_cover_a_batch_once_and_are_as_even_as_can_be(total, world):
    if total < world:
        with pytest.raises(ValueError, match=rf"batch of {total} cannot be shared by {world} parts .*drop_last=True"):
            part_of(total, 0, world)
        return
    edges = [part_of(total, rank, world) for rank in range(world)]
    assert [row for first, last in edges for row in range(first, last)] == list(range(total))
    sizes = [last - first for first, last in edges]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("name", ["a DataLoader", "Batches", "a list"])
def test_a_batch_smaller_than_the_processes_is_refused_at_once(name):
    with pytest.raises(ValueError, match="cannot be shared by 9 parts"):
        Stream(LOADERS[name](), 0, 3, 9).first()


def test_a_short_last_batch_that_cannot_be_shared_is_refused_before_work_starts():
    loader = DataLoader(Points(26), batch_size=8)
    with pytest.raises(ValueError, match=r"batch of 2 cannot be shared by 4 parts .*drop_last=True"):
        Stream(loader, 0, 1, 4).first()
    Stream(DataLoader(Points(26), batch_size=8, drop_last=True), 0, 1, 4).first()


def test_latents_may_lie_anywhere_where_the_loader_says_so():
    latents = torch.linspace(-4, 4, 32).view(16, 2)
    with pytest.raises(ValueError, match=r"of latents.*bounded=False.*lies in \[-4, 4\]; scale it: x / 4"):
        Stream(distill.Batches(latents, size=16), 0).first()
    Stream(distill.Batches(latents, size=16, bounded=False), 0).first()
    loader = DataLoader([{"x0": row} for row in latents], batch_size=16)
    with pytest.raises(ValueError, match="bounded=False"):
        Stream(loader, 0).first()
    loader.bounded = False
    Stream(loader, 0).first()
    latents[3, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        Stream(distill.Batches(latents, size=16, bounded=False), 0).first()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": DistributedSampler(Points(), 2, 0)}, "DistributedSampler.*give the size of the whole batch"),
        ({"shuffle": True, "generator": torch.Generator()}, "generator of its own, whose state no checkpoint holds"),
        ({"sampler": RandomSampler(Points(), generator=torch.Generator())}, "generator of its own"),
        (
            {"batch_sampler": BatchSampler(RandomSampler(Points(), generator=torch.Generator()), 4, True)},
            "generator of its own",
        ),
        ({"dataset": Streamed(), "num_workers": 1, "persistent_workers": True}, "streams with persistent_workers=True"),
        ({"num_workers": 1, "in_order": False}, "in_order=False, so no two runs see the same order"),
    ],
)
def test_loaders_that_no_seed_can_bring_back_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Stream(DataLoader(**{"dataset": Points(), **options}), 0)


def test_a_loader_that_accelerate_cut_is_refused():
    accelerate = pytest.importorskip("accelerate")
    loader = accelerate.data_loader.prepare_data_loader(DataLoader(Points(), batch_size=4), num_processes=1)
    with pytest.raises(ValueError, match="prepared by accelerate; pass it as it was"):
        Stream(loader, 0)


def test_empty_and_uneven_batches_are_refused():
    with pytest.raises(ValueError, match="gives no batch: the data set is empty"):
        Stream(distill.Batches(torch.zeros(0, 2)), 0).first()
    with pytest.raises(ValueError, match="gives no batch"):
        Stream(DataLoader(Points(4), batch_size=8, drop_last=True), 0).first()
    with pytest.raises(ValueError, match="a row for each image, got 'x0' with 4, 'n' with 3"):
        Stream([{"x0": torch.zeros(4, 2), "n": torch.zeros(3)}], 0).first()
    with pytest.raises(ValueError, match="a row for each image, got 'x0' with 4, 'scale' with None"):
        Stream([{"x0": torch.zeros(4, 2), "scale": torch.tensor(3.0)}], 0).first()
    with pytest.raises(ValueError, match=r"images \[N, C, H, W\], got x0 of shape \[4, 2\]"):
        distill.Batches(torch.zeros(4, 2), flip=True)
    for label, message in ((3.0, "float"), (torch.tensor(3.0), "one number"), ([0, 1, 2, 3], "list")):
        with pytest.raises(TypeError, match=rf"'n' must be a tensor with a row for each image, got {message}"):
            distill.Batches(torch.zeros(4, 2), {"n": label})
    with pytest.raises(TypeError, match="'x0' must be a tensor with a row for each image, got ndarray"):
        distill.Batches(np.zeros((4, 2), np.float32))
    with pytest.raises(ValueError, match="rank must be from 0 to world - 1, got rank 2 of 2"):
        Stream([], 0, 2, 2)
