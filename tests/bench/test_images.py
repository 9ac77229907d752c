"""Real images read from folders and arrays: the same numbers whichever way, and clear words for what cannot be read."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastsample.bench import Features, Reference
from fastsample.bench.images import from_bytes, quantise, read_images, stats

PLAIN = Features("plain", lambda images: images.flatten(1))


def pictures(n=5, height=4, width=6, channels=3):
    return np.random.RandomState(0).randint(0, 256, (n, height, width, channels), dtype=np.uint8)


def folder_of(path, images, ending="png"):
    """Written in an order that is not the sorted one, and one of them in a subfolder."""
    path.mkdir(exist_ok=True)
    (path / "more").mkdir(exist_ok=True)
    for i in reversed(range(len(images))):
        place = path / "more" if i == len(images) - 1 else path
        Image.fromarray(images[i].squeeze()).save(place / f"{i:03}.{ending}")
    return path


def together(source, **options):
    return torch.cat(list(read_images(source, **options)))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_and_an_array_of_the_same_images_are_the_same(tmp_path, channels):
    images = pictures(channels=channels)
    folder_of(tmp_path / "folder", images)
    (tmp_path / "folder" / "notes.txt").write_text("not an image")
    np.savez(tmp_path / "nhwc.npz", images=images)
    np.savez(tmp_path / "nchw.npz", arr_0=images.transpose(0, 3, 1, 2))
    expected = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1
    for source in (tmp_path / "folder", tmp_path / "nhwc.npz", tmp_path / "nchw.npz"):
        found = together(source, batch=2)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    ids = {
        stats(source, PLAIN, tmp_path / "out.npz").dataset for source in (tmp_path / "folder", tmp_path / "nhwc.npz")
    }
    assert len(ids) == 1


def test_gray_arrays_need_no_axis_for_it(tmp_path):
    gray = pictures(channels=1)[..., 0]
    np.savez(tmp_path / "gray.npz", samples=gray)
    assert together(tmp_path / "gray.npz").shape == (5, 1, 4, 6)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "gif", "PNG"])
def test_every_common_ending_is_read(tmp_path, ending):
    flat = np.full((2, 8, 8, 3), 200, dtype=np.uint8)  # one colour survives every compression, to a level or two
    found = together(folder_of(tmp_path / "folder", flat, ending))
    assert found.shape == (2, 3, 8, 8)
    assert float((found - (200 / 127.5 - 1)).abs().max()) < 3 / 127.5


def test_batches_have_the_size_asked_for(tmp_path):
    np.savez(tmp_path / "a.npz", images=pictures(7))
    for source in (tmp_path / "a.npz", folder_of(tmp_path / "folder", pictures(7))):
        assert [len(batch) for batch in read_images(source, batch=3)] == [3, 3, 1]


def test_floats_in_range_are_taken_as_they_are(tmp_path):
    images = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 2 - 1
    np.savez(tmp_path / "a.npz", images=images.numpy())
    assert torch.equal(together(tmp_path / "a.npz"), images)
    for other in (">f4", np.longdouble):  # of another machine, or of another program
        np.savez(tmp_path / "b.npz", images=images.numpy().astype(other))
        assert torch.equal(together(tmp_path / "b.npz"), images)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x * 127.5 + 127.5, "another range: of bytes make uint8"),
        (lambda x: (x + 1) / 2, r"\[0, 1\]: make 2 x - 1"),
        (lambda x: x * 3, "reach from -3 to 3, another range"),
        (lambda x: x * np.nan, "NaN"),
        (lambda x: x.astype(np.int64), "uint8 or floats, got int64"),
    ],
)
def test_arrays_of_another_range_are_refused(tmp_path, change, said):
    images = np.linspace(-1, 1, 4 * 3 * 25).reshape(4, 3, 5, 5)
    np.savez(tmp_path / "a.npz", images=change(images))
    with pytest.raises(ValueError, match=said):
        read_images(tmp_path / "a.npz")


@pytest.mark.parametrize("shape", [(4, 3, 8, 3), (4, 1, 8, 1), (4, 3, 3, 3), (4, 1, 8, 3)])
def test_a_shape_that_could_be_either_layout_must_be_told(tmp_path, shape):
    images = np.random.RandomState(0).randint(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=images)
    with pytest.raises(ValueError, match="two axes that could be the channels; say layout='NCHW' or 'NHWC'"):
        read_images(tmp_path / "a.npz")
    assert together(tmp_path / "a.npz", layout="NCHW").shape == shape
    assert together(tmp_path / "a.npz", layout="NHWC").shape == (shape[0], shape[3], shape[1], shape[2])


@pytest.mark.parametrize("shape", [(4, 8, 8, 4), (4, 8, 8, 8), (8, 8), (4, 2, 2, 2, 3), (4, 3, 0, 8)])
def test_other_shapes_are_refused(tmp_path, shape):
    np.savez(tmp_path / "a.npz", images=np.zeros(shape, dtype=np.uint8))
    with pytest.raises(ValueError, match=r"no axis of 1 or 3 channels|must be \[n, H, W\]|some pixels"):
        read_images(tmp_path / "a.npz")


def test_images_of_two_sizes_are_refused_naming_both(tmp_path):
    folder_of(tmp_path / "folder", pictures())
    Image.fromarray(pictures(1, 9, 6)[0]).save(tmp_path / "folder" / "zzz.png")
    with pytest.raises(ValueError, match=r"000\.png is 6x4 with 3 channels and .*zzz\.png is 6x9 with 3 channels"):
        together(tmp_path / "folder", batch=2)


def test_gray_among_colour_is_refused_unless_the_channels_are_chosen(tmp_path):
    folder = folder_of(tmp_path / "folder", pictures())
    gray = pictures(1, channels=1)[0, ..., 0]
    Image.fromarray(gray).save(folder / "zzz.png")
    with pytest.raises(ValueError, match=r"zzz\.png is 6x4 with 1 channel: .*channels=3 makes gray images RGB"):
        together(folder)
    colour = together(folder, channels=3)
    assert colour.shape == (6, 3, 4, 6)
    for channel in colour[-1]:
        assert torch.equal(quantise(channel), torch.from_numpy(gray))
    assert together(folder, channels=1).shape == (6, 1, 4, 6)


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_mean_the_same_for_arrays_and_files(tmp_path, channels):
    given = 4 - channels
    images = pictures(channels=given)
    np.savez(tmp_path / "a.npz", images=images)
    of_array = together(tmp_path / "a.npz", channels=channels)
    of_files = together(folder_of(tmp_path / "folder", images), channels=channels)
    assert of_array.shape == of_files.shape == (5, channels, 4, 6)
    assert float((of_array - of_files).abs().max()) <= 1.01 / 127.5  # Pillow's weights have 16 bits: a level at most


def test_gray_images_into_an_extractor_of_colour_are_refused(tmp_path):
    colour = Features("colour", lambda images: images.mean((2, 3)), shape=(3, None, None))
    np.savez(tmp_path / "a.npz", images=pictures(channels=1))
    with pytest.raises(ValueError, match="takes images of 3 x any x any, not 1 x 4 x 6"):
        stats(tmp_path / "a.npz", colour, tmp_path / "out.npz")
    assert not (tmp_path / "out.npz").exists()


def test_what_has_no_colour_or_more_bits_than_eight_is_refused(tmp_path):
    def one(name, image):
        folder = tmp_path / name
        folder.mkdir()
        image.save(folder / "a.png")
        return folder

    see_through = np.concatenate([pictures(1)[0], np.full((4, 6, 1), 255, np.uint8)], axis=2)
    assert together(one("opaque", Image.fromarray(see_through))).shape == (1, 3, 4, 6)
    see_through[0, 0, 3] = 100
    with pytest.raises(ValueError, match=r"a\.png is transparent"):
        together(one("transparent", Image.fromarray(see_through)))
    with pytest.raises(ValueError, match="more than 8 bits"):
        together(one("deep", Image.fromarray(np.full((4, 6), 40000, np.uint16))))
    palette = Image.fromarray(np.full((4, 6, 3), 255, np.uint8)).convert("P")
    assert together(one("palette", palette)).shape == (1, 3, 4, 6)


def test_sources_that_hold_no_images_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        read_images(tmp_path / "none")
    with pytest.raises(ValueError, match="holds no images"):
        read_images(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"neither a folder of images nor an \.npz"):
        read_images(tmp_path / "a.txt")
    np.savez(tmp_path / "a.npz", mu=np.zeros(3))
    with pytest.raises(ValueError, match="keys mu, none of images, samples, arr_0"):
        read_images(tmp_path / "a.npz")
    (tmp_path / "b.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"b\.npz holds no images that can be read"):
        read_images(tmp_path / "b.npz")
    np.savez(tmp_path / "c.npz", images=np.array([None]))
    with pytest.raises(ValueError, match=r"c\.npz holds no images that can be read"):
        read_images(tmp_path / "c.npz")
    with (tmp_path / "d.npz").open("wb") as file:
        np.save(file, np.zeros((4, 8, 8)))  # an .npy of the wrong name
    with pytest.raises(ValueError, match=r"d\.npz holds no images that can be read"):
        read_images(tmp_path / "d.npz")
    folder = folder_of(tmp_path / "folder", pictures())
    (folder / "001.png").write_bytes((folder / "001.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"001\.png cannot be read as an image"):
        together(folder)


def test_wrong_options_are_refused(tmp_path):
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        read_images(tmp_path, batch=0)
    with pytest.raises(ValueError, match="channels must be 1, 3 or None, got 4"):
        read_images(tmp_path, channels=4)
    with pytest.raises(ValueError, match="layout must be"):
        read_images(tmp_path, layout="CHWN")
    with pytest.raises(ValueError, match=r"layout is of an \.npz"):
        read_images(tmp_path, layout="NCHW")


@given(st.floats(-3, 3, width=32))
def test_quantising_rounds_to_the_nearest_level_and_never_wraps(value):
    level = int(quantise(torch.tensor([value])))
    back = float(from_bytes(torch.tensor([level], dtype=torch.uint8)))
    inside = min(max(value, -1.0), 1.0)
    assert abs(back - inside) <= 0.5 / 127.5 + 1e-6


def test_bytes_come_back_from_floats():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(quantise(from_bytes(levels)), levels)


def test_statistics_of_a_folder_are_those_of_its_pixels(tmp_path):
    images = pictures(20, 2, 2)
    written = stats(folder_of(tmp_path / "folder", images), PLAIN, tmp_path / "out.npz", batch=7)
    flat = images.transpose(0, 3, 1, 2).reshape(20, -1) / 127.5 - 1
    found = Reference.load(tmp_path / "out.npz", PLAIN)
    np.testing.assert_allclose(found.mean.numpy(), flat.mean(0), atol=1e-6)
    np.testing.assert_allclose(found.cov.numpy(), np.cov(flat.T), atol=1e-6)
    assert found.id == written.id
    assert len(found.rows) == 20
    stats(tmp_path / "folder", PLAIN, tmp_path / "out.npz", rows=False)
    assert Reference.load(tmp_path / "out.npz", PLAIN).rows is None


def test_a_file_of_another_name_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"write to out\.npz"):
        stats(tmp_path / "none", PLAIN, tmp_path / "out.pt")
