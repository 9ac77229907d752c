"""The report: tables that parse, pictures of the right size, and a page that loads nothing from anywhere."""

import base64
import csv
import hashlib
import json
import random
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

from fastsample import bench
from fastsample.bench.front import turned, undominated
from fastsample.bench.measure import Score
from fastsample.bench.page import page
from fastsample.bench.pictures import _axis, latency_picture, nfe_picture
from fastsample.bench.record import read_run
from fastsample.bench.report import _front, _spread
from fastsample.bench.sprites import Sprites, economical, sprites
from fastsample.bench.table import columns, markdown_text

from .sweeps import ENVIRONMENT, blank, case, failed, floor, timing, two_models, write

LOADS = {"src", "href", "srcset", "action", "data", "poster", "xlink:href"}
HOSTILE = "</script><script>alert(1)</script><!-- & \"co' $title"


class Page(HTMLParser):
    """What a browser makes of the page: raw text in scripts and styles, the cells of the table, what is loaded."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.tags, self.cells, self.rows, self.raw, self.policy = [], [], [], [], {}, ""
        self._inside, self._table = "", True
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.tags.append(tag)
        self.loads += [value for name, value in attributes if name in LOADS]
        self._inside = given.get("type", tag) if tag == "script" else tag
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if tag == "tr":
            self.rows.append((given.get("class"), []))
        if tag in ("td", "th"):
            self.rows[-1][1].append("")

    def handle_data(self, text):
        if self._inside in ("style", "script", "application/json"):
            self.raw[self._inside] = text
        elif self._inside in ("td", "th", "span", "a") and self.rows and self._table:
            self.rows[-1][1][-1] += text.rstrip("\n")

    def handle_endtag(self, tag):
        if tag in ("table", "script", "style"):
            self._inside = ""
        self._table = self._table and tag != "table"


def read(path):
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep with hostile names, a failure, a floor and every kind of column, reported."""
    out = tmp_path_factory.mktemp("sweep")
    records = [*two_models(), case(HOSTILE, "</td>", 4, ms=3.0, fd=0.9, options={"</table>": "<b>"})]
    records.append(failed(case("$broken", "ddim", 4, ms=1, fd=1), "<img src='https://example.org'>", "<script>in it"))
    write(out, records)
    bench.sample_grid({"given": torch.zeros(3, 1, 4, 4)}, out / "my_grid.png")
    assert bench.report(out, title="A <title>") == out / "index.html"
    return out


def without_pictures(records, **changes):
    body = {"cases": [], "configuration": {}, "hash": "", "environments": [ENVIRONMENT], "finished": True} | changes
    return page(body, records, columns(records), measure=None, front=[], pictures=[], strips=Sprites({}), title="t")


def test_the_page_is_whole_and_loads_nothing_from_anywhere(folder):
    found = read(folder / "index.html")
    loaded = [value for value in found.loads if not value.startswith("#")]
    assert loaded
    assert all(value.startswith("data:") for value in loaded)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", "".join(found.raw.values()).replace(
        "https://example.org", ""))  # fmt: skip
    assert found.tags.count("table") == 1
    assert found.tags.count("img") == 5  # latency, NFE, endpoint, samples, the caller's
    assert len(found.rows) == 1 + 15
    assert "my grid" in (folder / "index.html").read_text(encoding="utf-8")


def test_the_policy_lets_in_this_script_and_this_style_and_no_other(folder):
    found = read(folder / "index.html")
    assert found.policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in found.policy
    for kind, place in (("script", "script-src"), ("style", "style-src")):
        digest = base64.b64encode(hashlib.sha256(found.raw[kind].encode()).digest()).decode()
        assert f"{place} 'sha256-{digest}'" in found.policy
    assert found.tags.count("script") == 2  # the data and the script: none of a name
    assert found.tags.count("style") == 1


def test_names_are_escaped_also_in_the_data_of_the_script(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "<script>alert" not in text
    assert "<script>in it" not in text
    assert "<img src='https" not in text
    assert "A &lt;title&gt;" in text
    assert not re.search("[<>&]", Page(text).raw["application/json"])
    data = json.loads(Page(text).raw["application/json"])
    hostile = [one for one in data["cases"] if one["model"] == HOSTILE]
    assert [one["solver"] for one in hostile] == ["</td>, </table>=<b>"]
    cells = [cells for _, cells in Page(text).rows if cells[0] == HOSTILE]
    assert [row[1] for row in cells] == ["</td>, </table>=<b>"]


def test_the_rows_of_the_front_are_shaded_and_the_floor_comes_first(folder):
    rows = read(folder / "index.html").rows
    assert rows[1][1][0] == "floor: real images against real ones"
    # Of the student with heun (ms, distance) = (0.8, 1.5), (1.6, 0.75), (3.2, 0.5625), of the teacher (4, 0.55) and
    # (8, 0.3625), each better than all that are faster; what else there is lies beyond the intervals, -+0.1, but one.
    shaded = {(cells[0], cells[1], cells[2]) for mark, cells in rows if mark == "front"}
    assert shaded == {("student", "heun", n) for n in "248"} | {("teacher", "heun", n) for n in "48"} | {
        ("student", "ddim", "8")
    }


def test_a_case_that_failed_says_why_and_its_traceback_unfolds(folder):
    found = read(folder / "index.html")
    assert [cells[-1] for _, cells in found.rows if cells[0] == "$broken"] == ["<img src='https://example.org'>"]
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert re.search(r"<details><summary>.*\$broken/ddim/4.*</summary><pre>&lt;script&gt;in it</pre></details>", text)
    assert "2 cases failed" in text


def test_the_head_says_what_was_measured_and_whether_it_is_whole(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    assert "14 cases, 500 samples of each from the same noises; latency: medians of 6 interleaved batches of 4;" in text
    assert "not finished" not in text
    records = two_models()
    text = without_pictures(records[:5], cases=[record.key for record in records], finished=False)
    assert "the run was not finished" in text
    assert "8 cases are not measured yet" in text


def test_every_environment_of_a_resumed_run_stands_at_the_foot():
    text = without_pictures(two_models()[:3], environments=[ENVIRONMENT, ENVIRONMENT | {"cpu": "Another <CPU>"}])
    assert "<dt>cpu</dt><dd>1: Some CPU\n2: Another &lt;CPU&gt;</dd>" in text
    assert "<dt>torch</dt><dd>2.13.0</dd>" in text
    assert "resumed on another machine" in text
    assert "resumed on another machine" not in without_pictures(two_models()[:3], environments=[ENVIRONMENT] * 2)


def test_the_csv_holds_every_number_unrounded(folder):
    records = read_run(folder)[1]
    with (folder / "report.csv").open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["kind"] for line in lines] == ["floor"] + ["case"] * 14
    for line, record in zip(lines, records):
        assert (line["model"], line["solver"], int(line["steps"])) == (record.model, record.solver, record.steps)
        assert (line["error"] or None) == record.error
        for name, score in record.scores.items():
            assert float(line[name]) == score.value
            if score.se is not None:
                assert float(line[f"{name}_se"]) == score.se
        if record.timing:
            times = record.timing.steady.samples_s
            assert float(line["median_ms_per_batch"]) == float(np.median(times)) * 1e3
            assert float(line["p90_ms_per_batch"]) == pytest.approx(np.quantile(times, 0.9) * 1e3)
            assert float(line["images_per_s"]) == pytest.approx(4 / np.median(times))
            assert float(line["memory_rss_bytes"]) == 100 * 2**20
    assert {line["recall_better"] for line in lines} == {"more", ""}
    assert "endpoint_rms_debiased" not in lines[0]  # a column that is empty everywhere
    assert "p99_ms_per_batch" not in lines[0]  # of six times


def test_a_measure_named_like_a_column_does_not_take_its_place(tmp_path):
    write(tmp_path, [blank(scores={"steps": Score(7.5)})])
    bench.report(tmp_path)
    with (tmp_path / "report.csv").open(newline="", encoding="utf-8") as file:
        (line,) = csv.DictReader(file)
    assert (line["steps"], line["score steps"]) == ("4", "7.5")


def test_the_markdown_is_one_table_whatever_the_names(folder):
    lines = (folder / "report.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 2 + 15
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {len(re.findall(r"\|", lines[1]))}
    assert not re.search(r"(?<!\\)[<`]", "\n".join(lines))
    assert "0.300 \u00b1 0.050" in markdown_text([case("a|b\nc", "s", 4, ms=1, fd=0.3)])


@pytest.mark.parametrize(
    ("value", "se", "text"),
    [
        (1.87912, 0.0213, "1.879 \u00b1 0.021"),
        (187.912, 2.13, "187.9 \u00b1 2.1"),
        (0.05, 13.0, "0 \u00b1 13"),
        (1.87912, None, "1.879"),
        (0.5, None, "0.5000"),
        (64.0, None, "64"),
        (7919.21, None, "7919"),
        (1.234e-7, None, "1.234e-07"),
    ],
)
def test_a_number_has_the_digits_that_its_error_leaves_it(value, se, text):
    (column,) = [c for c in columns([blank(scores={"q": Score(value, se)})]) if c.title == "q"]
    assert column.text(blank(scores={"q": Score(value, se)})) == text


def test_the_table_has_the_columns_that_differ_and_the_rest_is_said_once():
    settings = [{"dtype": dtype, "device": "cpu"} for dtype in ("float32", "bfloat16")]
    records = [case("m", f"s{k}", 4, ms=1, fd=1, settings=given, rows=8.0) for k, given in enumerate(settings)]
    text = without_pictures(records)
    found = Page(text)
    assert found.rows[0][1][:6] == ["model", "solver", "settings", "steps", "NFE", "rows"]
    assert [cells[2:6] for _, cells in found.rows[1:]] == [
        ["dtype=float32", "4", "4", "8"], ["dtype=bfloat16", "4", "4", "8"],
    ]  # fmt: skip
    assert "The same for all cases: device=cpu." in text


def test_a_ratio_names_its_baseline(folder):
    heads = read(folder / "index.html").rows[0][1]
    assert heads[-1] == "time / teacher/ddim/2"
    with (folder / "report.csv").open(newline="", encoding="utf-8") as file:
        known = [line for line in csv.DictReader(file) if line["ratio"]]
    assert [(one["ratio"], one["ratio_low"], one["baseline"]) for one in known] == [("0.4", "0.39", "teacher/ddim/2")]


def test_a_sweep_without_latency_or_without_quality_has_a_report_too(tmp_path):
    untimed = [replace(record, timing=None, samples=0) for record in two_models()]
    found = read(bench.report(write(tmp_path / "a", untimed)))
    assert sorted(path.name for path in (tmp_path / "a").glob("*.png")) == ["endpoint.png", "quality.png"]
    assert found.tags.count("img") == 2
    timed = [replace(record, scores={}, samples=0) for record in two_models()[2:]]
    assert read(bench.report(write(tmp_path / "b", timed))).tags.count("img") == 0
    broken = [failed(record, "no") for record in two_models()[2:4]]
    assert read(bench.report(write(tmp_path / "c", broken))).rows[1][1][-1] == "no"
    assert len(read(bench.report(write(tmp_path / "d", []))).rows) == 1


def test_what_run_wrote_can_be_reported(sweep, toys, model, tmp_path):
    cases = bench.Case.product(model={"toy": model}, solver=[toys["ddim"]], steps=[4, 8])
    records = sweep(cases=cases, latency=bench.latency(rounds=1))
    found = read(bench.report(tmp_path / "out"))
    assert [cells[:4] for _, cells in found.rows[-2:]] == [["toy", "ddim", "4", "4"], ["toy", "ddim", "8", "8"]]
    assert [record.name for record in records if record.kind == "case"] == ["toy/ddim/4", "toy/ddim/8"]
    assert found.tags.count("img") == 3  # latency, NFE, samples


def test_pictures_of_an_earlier_report_or_a_killed_one_are_not_shown(folder, tmp_path):
    for name in ("pareto.png", "samples.png", ".pareto.png.abc.png"):
        (tmp_path / name).write_bytes(b"old")
    text = bench.report(
        write(tmp_path, [blank(scores={"q": Score(1.0)})])
    ).read_text(encoding="utf-8")  # fmt: skip
    assert Page(text).tags.count("img") == 1
    assert [path.name for path in sorted(tmp_path.glob("[!.]*.png"))] == ["quality.png"]


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no run\.json"):
        bench.report(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()


def test_an_unknown_measure_is_named_beside_those_there_are(tmp_path):
    write(tmp_path, two_models())
    with pytest.raises(ValueError, match="no measure 'fid'; it has fd_digits, recall, endpoint_rms"):
        bench.report(tmp_path, measure="fid")


def test_the_pareto_front_is_what_nothing_beats():
    points = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)).tolist()
    front = set(bench.pareto_front([tuple(point) for point in points]))
    for i, (x, y) in enumerate(points):
        beaten = any(a <= x and b <= y and (a < x or b < y) for a, b in points)
        assert (i not in front) == beaten
    assert bench.pareto_front([(1.0, 2.0), (1.0, 1.0), (1.0, 1.0)]) == [1]  # of equal points the first
    assert bench.pareto_front([(2.0, 1.0), (1.0, 1.0), (0.5, 3.0), (0.5, 2.0)]) == [3, 1]
    assert bench.pareto_front([]) == []


def span(centre, reach=0.0):
    return centre, centre - reach, centre + reach


def test_a_point_leaves_the_front_only_where_another_is_better_beyond_both_intervals():
    best = (span(1.0, 0.1), span(1.0, 0.1))
    assert undominated([best, (span(1.15, 0.1), span(1.15, 0.1))]) == [0, 1]  # both intervals overlap
    assert undominated([best, (span(1.15, 0.1), span(1.3, 0.1))]) == [0]
    assert undominated([best, (span(1.3, 0.1), span(1.0, 0.1))]) == [0]  # clearly slower, no better
    assert undominated([best, (span(1.3, 0.1), span(0.99, 0.1))]) == [0, 1]  # slower, and better for all one knows
    assert undominated([(span(1.3), span(1.0)), (span(1.0), span(1.3))]) == [1, 0]  # by the first number
    assert undominated([best, (span(1.0, 0.1), span(1.2, 0.1))]) == [0, 1]  # intervals that touch
    assert undominated([]) == []


def test_with_intervals_the_front_holds_that_of_the_centres_and_without_them_is_it():
    draw = random.Random(0)
    for _ in range(200):
        centres = [(draw.random(), draw.random()) for _ in range(draw.randint(1, 12))]
        plain = bench.pareto_front(centres)
        assert undominated([(span(x), span(y)) for x, y in centres]) == plain
        wide = [(span(x, 0.3 * draw.random()), span(y, 0.3 * draw.random())) for x, y in centres]
        assert set(undominated(wide)) >= set(plain)


def test_intervals_of_unlike_width_leave_somebody_on_the_front():
    """Four points that go round in a circle under the rule "clearly better in one, not clearly worse in the other"."""
    ring = [(span(1), span(3)), (span(2), span(2, 1.2)), (span(3), span(1)), (span(2.1, 1.2), span(1.9))]

    def loosely(a, b):
        return any(p[2] < q[1] for p, q in zip(a, b)) and not any(p[1] > q[2] for p, q in zip(a, b))

    assert all(any(loosely(other, point) for other in ring) for point in ring)
    assert undominated(ring) == [0, 1, 3, 2]


def test_where_more_is_better_the_front_is_the_other_way_round():
    assert turned((2.0, 1.5, 3.0)) == (-2.0, -3.0, -1.5)
    records = [case("m", "s", n, ms=n, fd=1, recall=recall) for n, recall in ((1, 0.5), (2, 0.9), (3, 0.6))]
    assert [record.steps for record in _front(records, "recall")] == [1, 2]
    assert [record.steps for record in _front(records, "fd_digits")] == [1]


def test_the_front_is_by_time_where_times_are_known_else_by_evaluations():
    timed = [
        blank(nfe=nfe, scores={"q": Score(value)}, timing=timing(ms, spread=0))
        for nfe, ms, value in ((1, 0.4, 9.0), (2, 0.1, 8.0), (3, 0.2, 7.0), (4, 0.3, 7.5))
    ]
    assert [record.nfe for record in _front(timed, "q")] == [2, 3]
    untimed = blank(nfe=1, scores={"q": Score(1.0)})
    assert [record.nfe for record in _front([untimed, *timed, floor()], "q")] == [2, 3]
    assert [record.nfe for record in _front([replace(r, timing=None) for r in timed], "q")] == [1, 2, 3]
    assert [record.nfe for record in _front([replace(timed[0], scores={}), *timed[1:]], "q")] == [2, 3]


@pytest.mark.parametrize("values", [[1e-4, 1.0, 1e4], [1.0, 1.0, 1.0], [-1.0, 0.0, 2.0], [-0.1, 0.3, 2.0], [5.0]])
def test_pictures_can_be_drawn_of_any_range(values, tmp_path):
    records = [
        blank(model="a $model_$", solver="s^_", scores={"q": Score(value, 0.5 * abs(value))}, nfe=3 + i, steps=i + 1,
              timing=timing(25.0 * (i + 1)))
        for i, value in enumerate(values)
    ]  # fmt: skip
    records.append(replace(floor(), scores={"q": Score(0.1, 0.2)}))
    for draw in (latency_picture, nfe_picture):
        draw(records, "q", tmp_path / "picture.png")
        assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_a_log_axis_keeps_numbers_of_zero_or_less_on_its_edge():
    figure = pytest.importorskip("matplotlib.figure").Figure()
    axes = figure.subplots()
    place = _axis(axes.set_xscale, axes.set_xlim, axes.xaxis, [(-0.1, -0.2, 0.1), (1.0, -1.0, 3.0), (8.0, 7.0, 9.0)])
    assert axes.get_xscale() == "log"
    assert axes.get_xlim()[0] == pytest.approx(place(-0.1))
    assert 0 < place(-0.1) < 0.1  # an interval that reaches 0 is cut at a tenth of its middle
    assert place(8.0) == 8.0
    axes = bench_axes(figure)
    assert _axis(axes.set_xscale, axes.set_xlim, axes.xaxis, [(-1.0, -1.0, -1.0), (0.0, 0, 0), (2.0, 2, 2)])(-1.0) == -1
    assert axes.get_xscale() == "linear"


def bench_axes(figure):
    figure.clear()
    return figure.subplots()


def test_spread_keeps_the_first_and_the_last():
    assert _spread("abcdefghij", 4) == ["a", "d", "g", "j"]
    assert _spread("ab", 8) == ["a", "b"]
    assert _spread("abc", 1) == ["a"]


def strip(data, mode=None):
    from io import BytesIO

    from PIL import Image

    picture = Image.open(BytesIO(base64.b64decode(data.removeprefix("data:image/png;base64,"))))
    return np.array(picture.convert(mode) if mode else picture)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_strip_shows_the_first_samples_pixel_by_pixel_each_with_a_gap_behind_it(channels):
    levels = torch.randint(256, (20, channels, 6, 8), generator=torch.Generator().manual_seed(0))
    found = sprites({"a": levels / 127.5 - 1})
    assert (found.count, found.size, found.reduced) == (16, 8, False)
    pixels = strip(found.data["a"]).reshape(6, 16, 9, channels + 1)
    np.testing.assert_array_equal(pixels[:, :, :8, :channels], levels[:16].permute(2, 0, 3, 1).numpy())
    assert (pixels[:, :, :8, channels] == 255).all()
    assert (pixels[:, :, 8, channels] == 0).all()


def test_strips_shrink_until_all_cases_fit_and_halving_is_averaging():
    noise = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    large, small = (sprites(dict.fromkeys("ab", noise), budget=budget) for budget in (20_000, 4_000))
    assert (large.size, large.reduced) == (16, False)
    assert sum(map(len, small.data.values())) <= 4_000
    assert (small.size, small.reduced) == (8, True)
    mean = ((noise[0, 0].reshape(8, 2, 8, 2).mean((1, 3)) + 1) * 127.5).round()
    np.testing.assert_allclose(strip(small.data["a"])[:, :8, 0], mean.numpy(), atol=1)  # a tie rounds either way
    assert sprites(dict.fromkeys("ab", noise), budget=10).data == {}


def test_a_picture_in_the_page_has_fewer_colours_and_looks_the_same(folder):
    picture = (folder / "pareto.png").read_bytes()
    small = economical(picture)
    assert len(small) < 0.6 * len(picture)
    a, b = (strip(base64.b64encode(data).decode(), "RGB").astype(int) for data in (picture, small))
    assert a.shape == b.shape
    assert abs(a - b).mean() < 1.0  # of 255 levels: flat areas keep their colour, blended edges move a little
    found = read(folder / "index.html").loads
    assert f"data:image/png;base64,{base64.b64encode(small).decode()}" in found


def test_a_page_of_a_hundred_cases_stays_below_five_megabytes():
    """Of noise in colour, which no PNG can shorten. The pictures, less than 1.5 MB, are left out here."""
    noise = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    records = [floor(), *(case("m", f"s{k}", 4, ms=k + 1, fd=1.0, rms=0.1) for k in range(100))]
    body = {"cases": [], "configuration": {}, "hash": "", "environments": [ENVIRONMENT], "finished": True}
    strips = sprites({record.quality: noise for record in records[1:]})
    text = page(body, records, columns(records), measure="fd_digits", front=[], pictures=[], strips=strips, title="t")
    assert len(strips.data) == 100
    assert len(text) < 3_500_000


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
