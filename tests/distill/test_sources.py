"""Sources of data: what they give lies in [-1, 1] with its labels, goes on exactly, and what is wrong is named."""

import math
import sys

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import distill, solvers
from fastsample.distill.data import Stream

Image = pytest.importorskip("PIL.Image")


def pixels(k, height=6, width=8):
    """Of image k: its columns rise from 10 k, its rows by one."""
    return (10 * k + np.arange(width)[None, :] + np.arange(height)[:, None]).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    """Eight images of two classes, "ants" and "bees", in shades that tell which it is."""
    for k in range(8):
        place = tmp_path / "images" / ("bees" if k % 2 else "ants") / "deep"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels(k)).save(place / f"{k}.png")
    (tmp_path / "images" / "notes.txt").write_text("no image")
    return tmp_path / "images"


def first(loader, seed=0, **options):
    return Stream(loader, seed, **options).next()


def number(x0):
    """Which image it is, mirrored or not."""
    return ((x0[:, 0, 0].amin(1) + 1) * 127.5 / 10).round().long()


def as_image(k):
    return torch.from_numpy(pixels(k)).float() / 127.5 - 1


def test_an_image_folder_gives_its_images_with_the_folders_as_classes(folder):
    loader = distill.image_folder(folder, classes=True, channels=1, size=8)
    batch = first(loader)
    assert batch["x0"].shape == (8, 1, 6, 8)
    assert batch["x0"].dtype == torch.float32
    for x0, k, label in zip(batch["x0"], number(batch["x0"]), batch["class_labels"]):
        torch.testing.assert_close(x0[0], as_image(int(k)))
        assert label == k % 2
    assert sorted(number(batch["x0"]).tolist()) == list(range(8))
    assert first(distill.image_folder(folder, size=3))["x0"].shape == (3, 3, 6, 8)
    assert len(distill.image_folder(folder, size=3)) == 2  # the last two are left out
    assert first(distill.image_folder(folder)).keys() == {"x0"}


def test_images_are_scaled_by_their_shorter_side_and_cut_in_the_middle(tmp_path):
    picture = np.full((8, 24, 3), 255, np.uint8)
    picture[:, 8:16] = [255, 0, 0]  # the middle is red
    Image.fromarray(picture).save(tmp_path / "wide.png")
    Image.fromarray(picture.transpose(1, 0, 2)).save(tmp_path / "high.png")
    for x0 in first(distill.image_folder(tmp_path, resolution=4))["x0"]:
        assert x0.shape == (3, 4, 4)
        assert x0[0].min() > 0.9
        assert x0[1:, 1:3, 1:3].max() < -0.8  # away from the edge, which the filter of the scaling blurs
    assert first(distill.image_folder(tmp_path, resolution=16))["x0"].shape == (2, 3, 16, 16)


@pytest.mark.parametrize("workers", [0, 2])
def test_half_of_the_images_are_mirrored_and_keep_their_labels(folder, workers):
    loader = distill.image_folder(folder, classes=True, channels=1, size=8, flip=True, workers=workers)
    stream, mirrored = Stream(loader, 0), []
    for _ in range(60):
        batch = stream.next()
        for x0, k, label in zip(batch["x0"], number(batch["x0"]).tolist(), batch["class_labels"]):
            mirrored.append(bool(x0[0, 0, 0] > x0[0, 0, -1]))
            torch.testing.assert_close(x0[0].flip(-1) if mirrored[-1] else x0[0], as_image(k))
            assert label == k % 2
    assert sum(mirrored) / 480 == pytest.approx(0.5, abs=0.115)  # five standard errors


def sources(folder, tmp_path, toy):
    datasets = pytest.importorskip("datasets")
    np.savez(tmp_path / "some.npz", images=np.stack([pixels(k)[..., None] for k in range(8)]), y=np.arange(8))
    rows = {"image": [Image.fromarray(pixels(k)) for k in range(8)], "label": list(range(8))}
    table = datasets.Dataset.from_dict(
        rows, features=datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    )
    model = toy()
    plan = fs.trace(solvers.ddim, fs.grid(model.schedule, 2, fs.uniform_t))
    return {
        "image_folder": lambda: distill.image_folder(folder, classes=True, size=3, flip=True),
        "npz": lambda: distill.npz_images(tmp_path / "some.npz", labels="y", size=3, flip=True),
        "hub_dataset": lambda: distill.hub_dataset(table, label="label", size=3, flip=True),
        "teacher_samples": lambda: distill.TeacherSamples(model, plan, (2,), classes=2, size=3, count=2),
    }


@pytest.mark.parametrize("name", ["image_folder", "npz", "hub_dataset", "teacher_samples"])
def test_a_source_goes_on_at_any_batch_and_is_shared_by_processes(name, folder, tmp_path, toy):
    make = sources(folder, tmp_path, toy)[name]
    stream, places, whole = Stream(make(), 7), [(0, 0)], []
    assert stream.first()["x0"].abs().max() <= 1
    for _ in range(5):
        whole.append(stream.next())
        places.append((stream.epoch, stream.used))
    assert len(make()) == 2
    assert places == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 1)]
    halves = [Stream(make(), 7, rank, 2) for rank in range(2)]
    for k, batch in enumerate(whole):
        again = Stream(make(), 7)
        again.go_to(*places[k])
        found = again.next()
        parts = [half.next() for half in halves]
        assert batch.keys() == found.keys() == {"x0", "class_labels"}
        for key, value in batch.items():
            assert torch.equal(found[key], value)
            torch.testing.assert_close(torch.cat([part[key] for part in parts]), value)  # networks sum by batch size
    assert not torch.equal(whole[0]["x0"], whole[2]["x0"])


@pytest.mark.parametrize(
    "shape", ["[N, H, W, C] bytes", "[N, H, W] bytes", "[N, C, H, W] floats", "named NCHW", "named NHWC"]
)
def test_an_npz_gives_its_images_and_labels(shape, tmp_path):
    stacked = np.stack([pixels(k) for k in range(8)])
    array = {
        "[N, H, W, C] bytes": stacked[..., None],
        "[N, H, W] bytes": stacked,
        "[N, C, H, W] floats": (stacked[:, None] / 127.5 - 1).astype(np.float64),
        "named NCHW": stacked[:, None],
        "named NHWC": (stacked[..., None] / 127.5 - 1).astype(np.float32),
    }[shape]
    np.savez(tmp_path / "some.npz", x0=array, digits=np.arange(8, dtype=np.uint8))
    layout = shape[-4:] if shape.startswith("named") else None
    loader = distill.npz_images(tmp_path / "some.npz", labels="digits", classes=8, layout=layout, size=8)
    batch = first(loader)
    for x0, label in zip(batch["x0"], batch["class_labels"]):
        torch.testing.assert_close(x0[0], as_image(int(label)))
    assert batch["class_labels"].dtype == torch.int64
    assert first(distill.npz_images(tmp_path / "some.npz", layout=layout)).keys() == {"x0"}


def test_an_npz_of_latents_says_so(tmp_path):
    np.savez(tmp_path / "latents.npz", latents=np.linspace(-4, 4, 64, dtype=np.float32).reshape(4, 4, 2, 2))
    with pytest.raises(ValueError, match=r"latents.npz: images must lie in \[-1, 1\], .* \[-4, 4\].*bounded=False"):
        distill.npz_images(tmp_path / "latents.npz", images="latents")
    loader = distill.npz_images(tmp_path / "latents.npz", images="latents", bounded=False)
    assert Stream(loader, 0).first()["x0"].shape == (4, 4, 2, 2)


NPZ = {
    "pickles": ({"images": np.array([{}], dtype=object)}, {}, ValueError, "bad.npz cannot be read as an .npz of plain"),
    "no key": ({"pictures": pixels(0)}, {}, KeyError, "none of the keys x0, images, samples, arr_0; it has pictures"),
    "another key": ({"x0": pixels(0)[None]}, {"images": "images"}, KeyError, "has no key 'images'; it has x0"),
    "no labels": ({"x0": pixels(0)[None]}, {"labels": "y"}, KeyError, "has no key 'y'; it has x0"),
    "whole numbers": ({"x0": pixels(0)[None].astype(np.int64)}, {}, ValueError, "uint8 or floats, got int64"),
    "a vector": ({"x0": np.zeros((4, 2), np.float32)}, {}, ValueError, r"\[N, C, H, W\] or \[N, H, W\], got \[4, 2\]"),
    "layout": ({"x0": np.zeros((4, 3, 8, 8), np.uint8)}, {}, ValueError, "are not .N, H, W, C.; say layout='NCHW'"),
    "floats": ({"x0": np.zeros((4, 8, 8, 3), np.float32)}, {}, ValueError, "floats look like .N, H, W, C.; say layout"),
    "NaN": ({"x0": np.full((1, 1, 2, 2), np.nan)}, {}, ValueError, "hold NaN or infinity"),
    "range": ({"x0": np.full((1, 1, 2, 2), 200.0)}, {}, ValueError, r"in \[-1, 1\], these lie in \[200, 200\]"),
    "one-hot": (
        {"x0": pixels(0)[None], "y": np.eye(1)}, {"labels": "y"}, ValueError, r"whole numbers \[N\], got .*argmax\(1\)"
    ),
    "real labels": ({"x0": pixels(0)[None], "y": np.ones(1)}, {"labels": "y"}, ValueError, r"whole numbers \[N\]"),
    "too few labels": ({"x0": pixels(0)[None], "y": np.arange(2)}, {"labels": "y"}, ValueError, "2 labels for 1 image"),
    "label below": ({"x0": pixels(0)[None], "y": -np.ones(1, int)}, {"labels": "y"}, ValueError, "from 0, got -1"),
    "label beyond": (
        {"x0": pixels(0)[None], "y": np.full(1, 10)}, {"labels": "y", "classes": 10}, ValueError, "from 0 to 9, got 10"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NPZ)
def test_an_npz_that_does_not_fit_is_refused(name, tmp_path):
    arrays, options, error, message = NPZ[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(error, match=message):
        distill.npz_images(tmp_path / "bad.npz", **options)


def test_what_is_no_npz_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent.npz"):
        distill.npz_images(tmp_path / "absent.npz")
    (tmp_path / "torn.npz").write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(ValueError, match=r"torn.npz cannot be read as an .npz"):
        distill.npz_images(tmp_path / "torn.npz")
    np.save(tmp_path / "one.npy", pixels(0))
    with pytest.raises(ValueError, match=r"one.npy cannot be read .*single array; save it by np.savez"):
        distill.npz_images(tmp_path / "one.npy")


def test_a_folder_that_does_not_fit_is_refused_with_the_file_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        distill.image_folder(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty holds no images \(.bmp"):
        distill.image_folder(tmp_path / "empty")
    Image.fromarray(pixels(0, 5, 5)).save(folder / "loose.png")
    with pytest.raises(ValueError, match=r"0.png is 8x6 and .*loose.png is 5x5; pass resolution=6"):
        distill.image_folder(folder)
    with pytest.raises(ValueError, match=r"loose.png lies in no folder of a class; move it"):
        distill.image_folder(folder, classes=True)
    (folder / "loose.png").write_bytes((folder / "ants" / "deep" / "0.png").read_bytes()[:45])
    with pytest.raises(ValueError, match=r"loose.png cannot be used as an image \(.*truncated.*\); mend or remove it"):
        first(distill.image_folder(folder, size=9))
    (folder / "loose.png").write_bytes(b"no image at all")
    with pytest.raises(ValueError, match=r"loose.png cannot be used as an image"):
        distill.image_folder(folder)
    with pytest.raises(ValueError, match=r"loose.png cannot be used as an image"):
        first(distill.image_folder(folder, resolution=4, size=9))
    for options, message in (
        ({"resolution": 0}, "resolution must be at least 1, got 0"),
        ({"size": 0}, "size of a batch must be at least 1, got 0"),
        ({"channels": 4}, "channels must be 1 or 3, got 4"),
    ):
        with pytest.raises(ValueError, match=message):
            distill.image_folder(folder, **{"resolution": 4, **options})


@pytest.mark.parametrize("workers", [0, 1])
def test_what_has_no_colour_or_too_many_bits_is_refused_with_the_file_named(tmp_path, workers):
    Image.new("RGBA", (4, 4), (1, 2, 3, 128)).save(tmp_path / "glass.png")
    with pytest.raises(ValueError, match=r"glass.png cannot be used as an image \(it is transparent in places"):
        first(distill.image_folder(tmp_path, workers=workers))
    Image.new("RGBA", (4, 4), (255, 0, 0, 255)).save(tmp_path / "glass.png")
    assert first(distill.image_folder(tmp_path))["x0"][0, :, 0, 0].tolist() == [1, -1, -1]
    Image.fromarray(np.full((4, 4), 60_000, np.uint16)).save(tmp_path / "glass.png")
    with pytest.raises(ValueError, match=r"glass.png .*more than 8 bits a channel"):
        first(distill.image_folder(tmp_path, workers=workers))


def exif_of(tag):
    """How the camera was held."""
    exif = Image.Exif()
    exif[0x0112] = tag
    return exif


def test_images_are_turned_upright_as_their_camera_says(tmp_path):
    """A quarter turn and a mirror image; by tag 0x0112, in a JPEG and in a PNG."""
    upright = np.kron(np.array([[250, 10], [90, 170], [10, 250]], np.uint8), np.ones((8, 8), np.uint8))  # 24 by 16
    for k, (tag, stored) in enumerate([(1, upright), (6, np.rot90(upright)), (2, upright[:, ::-1])]):
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"{k}.jpg", exif=exif_of(tag), quality=100)
    expected = torch.from_numpy(upright).float() / 127.5 - 1
    for x0 in first(distill.image_folder(tmp_path, channels=1))["x0"]:
        torch.testing.assert_close(x0[0], expected, rtol=0, atol=0.03)  # JPEG
    Image.fromarray(np.rot90(upright).copy()).save(tmp_path / "3.png", exif=exif_of(6))
    batch = first(distill.image_folder(tmp_path, channels=1, resolution=16))["x0"]
    torch.testing.assert_close(batch, expected[4:20].expand(4, 1, 16, 16), rtol=0, atol=0.03)


def test_images_of_several_sizes_are_refused_by_their_sizes_wherever_they_show(tmp_path, table):
    """In a data set, and in a PNG whose EXIF turns it, only as they are decoded."""
    import datasets

    rows = [Image.fromarray(pixels(0)), Image.fromarray(pixels(0, 5, 5))]
    several = datasets.Dataset.from_dict({"image": rows}, features=datasets.Features({"image": datasets.Image()}))
    with pytest.raises(ValueError, match=r"several sizes, 5x5 and 8x6; pass resolution=5 to scale and cut"):
        first(distill.hub_dataset(several))
    assert first(distill.hub_dataset(several, resolution=5))["x0"].shape == (2, 3, 5, 5)
    for k, tag in enumerate((1, 6)):
        Image.fromarray(pixels(0)).save(tmp_path / f"{k}.png", exif=exif_of(tag))
    with pytest.raises(ValueError, match=r"several sizes, 6x8 and 8x6; pass resolution=6"):
        first(distill.image_folder(tmp_path))


@pytest.mark.parametrize("damage", ["P5 2o 2 255 abcd", "a decompression bomb"])
def test_an_image_that_pillow_refuses_in_its_own_ways_is_named(damage, tmp_path, monkeypatch):
    (tmp_path / "a.pgm").write_bytes(damage.encode())
    if damage == "a decompression bomb":
        Image.new("L", (9, 9)).save(tmp_path / "a.pgm")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4)
    for options in ({}, {"resolution": 2}):
        with pytest.raises(ValueError, match=r"a.pgm cannot be used as an image \(.*\); mend or remove it"):
            first(distill.image_folder(tmp_path, **options))


@pytest.fixture
def table():
    datasets = pytest.importorskip("datasets")
    rows = {"image": [Image.fromarray(pixels(k)) for k in range(8)], "label": [k % 2 for k in range(8)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["even", "odd"])})
    return datasets.Dataset.from_dict(rows, features=features)


def test_a_data_set_gives_its_images_and_labels_from_memory_and_from_a_folder(table, tmp_path):
    import datasets

    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=table, test=table.select([0])).save_to_disk(tmp_path / "many")
    for source in (table, tmp_path / "one", str(tmp_path / "many"), table.with_format("torch")):
        batch = first(distill.hub_dataset(source, label="label", channels=1, size=8))
        assert sorted(number(batch["x0"]).tolist()) == list(range(8))
        assert torch.equal(batch["class_labels"], number(batch["x0"]) % 2)
        for x0, k in zip(batch["x0"], number(batch["x0"])):
            torch.testing.assert_close(x0[0], as_image(int(k)))
    assert first(distill.hub_dataset(tmp_path / "many", split="test"))["x0"].shape == (1, 3, 6, 8)


def test_a_data_set_of_arrays_works_too(table):
    import datasets

    arrays = datasets.Dataset.from_dict({"image": [pixels(k).tolist() for k in range(8)]})
    batch = first(distill.hub_dataset(arrays, channels=1, size=8))
    for x0, k in zip(batch["x0"], number(batch["x0"])):
        torch.testing.assert_close(x0[0], as_image(int(k)))
    wrong = datasets.Dataset.from_dict({"image": [[[0.5, 0.25]]]})
    with pytest.raises(ValueError, match=r"row 0 of column 'image' cannot be used as an image .*float64 numbers"):
        first(distill.hub_dataset(wrong))
    channels_first = datasets.Dataset.from_dict(
        {"image": np.zeros((2, 3, 8, 8), np.uint8)},
        features=datasets.Features({"image": datasets.Array3D((3, 8, 8), "uint8")}),
    )
    with pytest.raises(ValueError, match=r"row . of column 'image' .*\[H, W, C\], its shape is \[3, 8, 8\]"):
        first(distill.hub_dataset(channels_first))


def test_a_data_set_that_does_not_fit_is_refused(table, tmp_path, monkeypatch):
    import datasets

    with pytest.raises(KeyError, match="no column 'picture'; it has image, label"):
        distill.hub_dataset(table, image="picture")
    with pytest.raises(KeyError, match="no column 'class'; it has image, label"):
        distill.hub_dataset(table, label="class")
    with pytest.raises(KeyError, match="no split 'train'; it has test"):
        distill.hub_dataset(datasets.DatasetDict(test=table))
    with pytest.raises(FileNotFoundError, match=r"nothing is downloaded here; load it by datasets\.load_dataset"):
        distill.hub_dataset("uoft-cs/cifar10")
    with pytest.raises(TypeError, match=r"Dataset or a folder .*got IterableDataset; one that streams has no order"):
        distill.hub_dataset(table.to_iterable_dataset())
    with pytest.raises(ValueError, match="the data set is empty"):
        distill.hub_dataset(table.select([]))
    negative = datasets.Dataset.from_dict({"image": [pixels(0).tolist()] * 2, "label": [0, -1]})
    with pytest.raises(ValueError, match="column 'label': labels must be from 0, got -1"):
        distill.hub_dataset(negative, label="label")
    names = datasets.Dataset.from_dict({"image": [pixels(0).tolist()], "label": ["even"]})
    with pytest.raises(ValueError, match=r"column 'label': labels are whole numbers \[N\]"):
        distill.hub_dataset(names, label="label")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        distill.hub_dataset(table)


def test_without_pillow_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match="pip install pillow"):
        distill.image_folder(folder)


def test_teacher_samples_are_those_of_the_plan(toy):
    teacher = toy(dropout=0.5)
    teacher.network.train()
    plan = fs.trace(solvers.ddim, fs.grid(teacher.schedule, 3, fs.uniform_t))
    loader = distill.TeacherSamples(teacher, plan, (2,), classes=2, size=16, clip=0.5)
    chosen = next(loader.chosen())
    batch = loader.made(chosen)
    assert teacher.network.training  # as it was; the samples are without dropout
    teacher.network.eval()
    expected = fs.sample(
        teacher, plan, fs.noise((2,), chosen["seeds"].tolist()), condition={"class_labels": chosen["class_labels"]}
    )
    assert torch.equal(batch["x0"], expected.clamp(-0.5, 0.5))
    assert torch.equal(batch["class_labels"], chosen["class_labels"])
    assert set(chosen["class_labels"].tolist()) == {0, 1}
    assert expected.abs().max() > 0.5
    free = distill.TeacherSamples(teacher, plan, (2,), clip=math.inf)
    assert (loader.bounded, free.bounded) == (True, False)
    assert next(free.chosen()).keys() == {"seeds"}


def test_a_student_is_trained_from_its_teacher_alone(toy):
    pytest.importorskip("accelerate")
    teacher = toy(seed=1)
    plan = fs.trace(solvers.ddim, fs.grid(teacher.schedule, 2, fs.uniform_t))
    loader = distill.TeacherSamples(teacher, plan, (2,), classes=2, size=8, count=2)
    student = distill.train(distill.Conversion(toy(seed=2), teacher), loader, steps=3, progress=False)
    assert all(value.isfinite().all() for value in student.network.parameters())


def test_wrong_numbers_of_teacher_samples_are_refused(toy):
    plan = fs.trace(solvers.ddim, fs.grid(toy().schedule, 2, fs.uniform_t))
    for options, message in (
        ({"size": 0}, "size must be at least 1, got 0"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"classes": 0}, "classes must be at least 1, got 0"),
        ({"clip": 0.0}, "clip must be above 0, got 0"),
        ({"flip": True}, r"images \[C, H, W\], got samples of \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            distill.TeacherSamples(toy(), plan, (2,), **options)
