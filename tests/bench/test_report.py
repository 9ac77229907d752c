"""The report: tables that parse, pictures of the right size, and a page that loads nothing from anywhere."""

import csv
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import fastsample as fs
from fastsample import bench
from fastsample.bench.pictures import _span, latency_picture, nfe_picture
from fastsample.bench.record import Record
from fastsample.bench.report import _front, _spread

LOADS = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.cells, self.heads, self.rows, self._inside = [], [], [], [], 0, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in LOADS]
        self.rows += tag == "tr"
        self._inside = {"td": self.cells, "th": self.heads}.get(tag)

    def handle_data(self, text):
        if self._inside is not None:
            self._inside.append(text)


def fails(x, t):
    raise RuntimeError("<img src='https://example.org'>")


@pytest.fixture(scope="module")
def folder(toys, tmp_path_factory):
    """A sweep with hostile names, failures and every kind of column, reported."""
    out, good = tmp_path_factory.mktemp("sweep"), toys["toy"]()
    models = {
        "teacher": good,
        "<script>alert(1)</script> & co": good,
        "$broken": toys["toy"](fails),
    }
    with pytest.warns(UserWarning, match="4 of 12 cases failed"):
        toys["sweep_into"](
            out,
            cases=bench.Case.product(model=models, solver=[toys["ddim"], toys["heun"]], steps=[2, 4]),
            latency=bench.latency(rounds=3, batch=4),
            converged={"teacher": bench.Case("teacher", good, "heun", toys["heun"], 50)},
        )
    bench.sample_grid({"given": torch.zeros(3, 1, 4, 4)}, out / "my_grid.png")
    assert bench.report(out, title="A <title>") == out / "index.html"
    return out


def test_the_page_is_whole_and_loads_nothing_from_anywhere(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.loads
    assert all(value.startswith("data:image/png;base64,") for value in page.loads)
    rest = re.sub(r"base64,[\w+/=]+", "", text).replace("$broken", "").replace("https://example.org", "")
    assert not re.search(r"https?://|url\(|@import", rest)
    assert page.tags.count("table") == 1
    assert page.rows == 1 + 12
    assert page.tags.count("img") == 4  # latency, NFE, samples, the caller's
    assert "my grid" in text
    assert "prefers-color-scheme: dark" in text
    assert "$" not in rest  # no place of the template is left


def test_the_rows_of_the_front_of_the_first_picture_are_shaded(folder):
    records = [record for record in bench.read_run(folder)[1] if not record.error]
    front = bench.pareto_front([(record.ms_per_image[0], record.scores["fd_pixels"].value) for record in records])
    text = (folder / "index.html").read_text(encoding="utf-8")
    shaded = [Page(row).cells[:3] for row in re.findall(r"<tr class=front>.*?</tr>", text)]
    assert shaded == [[records[i].model, records[i].solver, str(records[i].steps)] for i in sorted(front)]


def test_the_front_is_by_time_where_times_are_known_else_by_evaluations():
    blank = Record("k", "n", "m", "s", 4, "default", {}, 10, latency_batch=2)
    timed = [
        replace(blank, nfe=nfe, scores={"q": bench.Score(value)}, latency=bench.Times((seconds,)))
        for nfe, seconds, value in ((1, 0.4, 9.0), (2, 0.1, 8.0), (3, 0.2, 7.0), (4, 0.3, 7.5))
    ]
    assert [record.nfe for record in _front(timed, "q")] == [2, 3]
    untimed = replace(blank, nfe=0, scores={"q": bench.Score(1.0)})
    assert [record.nfe for record in _front([untimed, *timed], "q")] == [2, 3]
    assert [record.nfe for record in _front([replace(r, latency=None) for r in timed], "q")] == [1, 2, 3]
    assert [record.nfe for record in _front([replace(timed[0], scores={}), *timed[1:]], "q")] == [2, 3]


def test_a_bar_is_the_95_percent_interval_and_never_reaches_zero():
    blank = Record("k", "n", "m", "s", 4, "default", {}, 10)
    assert _span(replace(blank, scores={"q": bench.Score(10.0, 1.0)}), "q") == pytest.approx((10, 8.04, 11.96))
    assert _span(replace(blank, scores={"q": bench.Score(1.0, 1.0)}), "q") == pytest.approx((1, 0.1, 2.96))
    assert _span(replace(blank, scores={"q": bench.Score(1.0)}), "q") == (1, 1, 1)


def test_an_unfinished_run_says_so_and_the_number_of_its_timings_is_told(folder, sweep, tmp_path):
    assert "medians of 6 interleaved batches of 4;" in (folder / "index.html").read_text(encoding="utf-8")
    assert "not finished" not in (folder / "index.html").read_text(encoding="utf-8")
    sweep()
    run = tmp_path / "out" / "run.json"
    run.write_text(run.read_text().replace('"finished": true', '"finished": false'))
    assert "the run was not finished" in bench.report(tmp_path / "out").read_text(encoding="utf-8")


def test_names_are_escaped(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in text
    assert "A &lt;title&gt;" in text


def test_the_table_of_the_page_says_why_a_case_failed(folder):
    cells = " ".join(Page((folder / "index.html").read_text(encoding="utf-8")).cells)
    assert "$broken/ddim/2: RuntimeError: <img src='https://example.org'>" in cells


def test_the_csv_says_the_same_as_the_records(folder):
    _, records = bench.read_run(folder)
    with (folder / "report.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(records) == 12
    for line, record in zip(lines, records):
        assert (line["model"], line["solver"], int(line["steps"])) == (record.model, record.solver, record.steps)
        assert (line["error"] or None) == record.error
        if not record.error:
            assert float(line["fd_pixels"]) == record.scores["fd_pixels"].value
            assert float(line["fd_pixels_se"]) == record.scores["fd_pixels"].se
            assert float(line["median_ms_per_image"]) == record.ms_per_image[0]
    assert "endpoint_rms" in lines[0]
    assert "endpoint_rms_debiased" not in lines[0]  # a column that is empty everywhere


def test_a_sweep_without_latency_or_without_quality_has_a_report_too(sweep, tmp_path):
    sweep()
    text = bench.report(tmp_path / "out").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "pareto.png").exists()
    assert (tmp_path / "out" / "quality.png").exists()
    assert Page(text).tags.count("img") == 2
    sweep(quality=(), latency=bench.latency(rounds=1), out=tmp_path / "fast", keep=0)
    assert Page(bench.report(tmp_path / "fast").read_text(encoding="utf-8")).tags.count("img") == 0


def test_pictures_of_an_earlier_report_or_a_killed_one_are_not_shown(sweep, tmp_path):
    sweep(latency=bench.latency(rounds=1))
    bench.report(tmp_path / "out")
    (tmp_path / "out" / ".pareto.png.abc.png").write_bytes(b"half a pic")
    sweep(keep=0)
    text = bench.report(tmp_path / "out").read_text(encoding="utf-8")
    assert Page(text).tags.count("img") == 1
    assert ".pareto" not in text
    assert [path.name for path in sorted((tmp_path / "out").glob("[!.]*.png"))] == ["quality.png"]


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run\.json"):
        bench.report(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_rows_stand_beside_evaluations_where_guidance_makes_them_two(sweep, toys, model, tmp_path):
    def network(x, t, shift):
        return 0.5 * x + shift

    guided = fs.Guided(toys["toy"](network), {"shift": 0.0}, {"shift": 0.0}, scale=2.0)
    sweep(cases=bench.Case.product(model={"plain": model, "guided": guided}, solver=toys["ddim"], steps=4))
    page = Page(bench.report(tmp_path / "out").read_text(encoding="utf-8"))
    assert page.heads[2:5] == ["steps", "NFE", "rows"]
    assert [page.cells[k : k + 5] for k, cell in enumerate(page.cells) if cell in ("plain", "guided")] == [
        ["plain", "ddim", "4", "4", "4"], ["guided", "ddim", "4", "4", "8"],
    ]  # fmt: skip


def test_an_unknown_measure_is_named_beside_those_there_are(sweep, tmp_path):
    sweep()
    with pytest.raises(ValueError, match="no measure 'fid'; it has fd_pixels"):
        bench.report(tmp_path / "out", measure="fid")


def test_the_pareto_front_is_what_nothing_beats():
    points = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)).tolist()
    front = set(bench.pareto_front([tuple(point) for point in points]))
    for i, (x, y) in enumerate(points):
        beaten = any(a <= x and b <= y for j, (a, b) in enumerate(points) if j != i)
        assert (i in front) == (not beaten)
    assert bench.pareto_front([(1.0, 2.0), (1.0, 1.0), (1.0, 1.0)]) == [1]  # of equal points the first
    assert bench.pareto_front([(2.0, 1.0), (1.0, 1.0), (0.5, 3.0), (0.5, 2.0)]) == [3, 1]
    assert bench.pareto_front([]) == []


@pytest.mark.parametrize("values", [[1e-4, 1.0, 1e4], [1.0, 1.0, 1.0], [-1.0, 0.0, 2.0], [5.0]])
def test_pictures_can_be_drawn_of_any_range(values, tmp_path):
    blank = Record("k", "n", "a $model_$", "s^_", 4, "default", {}, 10, nfe=3)
    records = [
        replace(blank, scores={"q": bench.Score(value, 0.5 * abs(value))}, nfe=3 + i, steps=i + 1,
                latency=bench.Times((0.1 * (i + 1),) * 3), latency_batch=2)
        for i, value in enumerate(values)
    ]  # fmt: skip
    for draw in (latency_picture, nfe_picture):
        draw(records, "q", tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_spread_keeps_the_first_and_the_last():
    assert _spread("abcdefghij", 4) == ["a", "d", "g", "j"]
    assert _spread("ab", 8) == ["a", "b"]
    assert _spread("abc", 1) == ["a"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_shows_every_pixel_enlarged_and_unsmoothed(channels, tmp_path):
    from matplotlib.image import imread

    images = torch.rand(4, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    bench.sample_grid({"first": images, "second row": images.flip(0)}, tmp_path / "grid.png", pixels=32)
    picture = imread(tmp_path / "grid.png")[..., :3]
    assert picture.shape[0] == 6 + 2 * (32 + 6)
    shown = ((images + 1) / 2).expand(4, 3, 8, 8).permute(0, 2, 3, 1).repeat_interleave(4, 1).repeat_interleave(4, 2)
    left = picture.shape[1] - 6 - 4 * 34
    for k in range(4):
        place = picture[6:38, left + 34 * k : left + 34 * k + 32]
        np.testing.assert_allclose(place, shown[k].numpy(), atol=1 / 255)
    assert picture[:, :left].min() < 0.5  # the labels


def test_a_grid_of_what_is_no_image_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'odd' must be \[n, 1 or 3, H, W\], got \[2, 5\]"):
        bench.sample_grid({"odd": torch.zeros(2, 5)}, tmp_path / "grid.png")


def test_without_matplotlib_the_error_gives_the_pip_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'fastsample\[bench\]'"):
        bench.sample_grid({"a": torch.zeros(1, 1, 4, 4)}, tmp_path / "grid.png")
