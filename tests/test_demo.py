"""The demo, in its quick size, from the command to the page."""

import csv

import pytest
from rich.console import Console

import fastsample as fs
from fastsample import bench, demo

pytest.importorskip("diffusers")
pytest.importorskip("matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    assert demo.run(out, quick=True) == out / "index.html"
    return out


def test_it_writes_the_pictures_and_one_page_that_needs_nothing_else(folder):
    for name in ("side_by_side.png", "pareto.png", "quality.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert "dpmpp_2m" in page
    assert 'src="http' not in page


def test_no_case_failed_and_quality_improves_with_evaluations(folder):
    rows = list(csv.DictReader((folder / "report.csv").open()))
    assert not [row["error"] for row in rows if row["error"]]
    ddim = [float(r["fd_digits"]) for r in rows if (r["model"], r["solver"]) == ("teacher", "ddim")]
    assert ddim == sorted(ddim, reverse=True)
    by_case = {(row["model"], row["solver"], row["steps"]): float(row["endpoint_rms"] or "nan") for row in rows}
    assert by_case["teacher", "dpmpp_2m", "8"] < by_case["teacher", "ddim", "8"] / 2


def test_the_student_loads_from_its_folder(folder):
    student = fs.from_pretrained(folder / "student-quick" / "model")
    assert student.prediction.name == "v"


def test_the_table_keeps_one_line_a_case_in_80_columns(folder, capsys):
    _, records = bench.read_run(folder)
    Console(width=80).print(demo._table(records))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert len(lines) == len(records) + 2  # and the head with its rule
    assert max(map(len, lines)) <= 80


def test_it_runs_again_in_the_same_folder(folder):
    before = (folder / "index.html").stat().st_mtime_ns
    demo.run(folder, quick=True)
    assert (folder / "index.html").stat().st_mtime_ns > before
