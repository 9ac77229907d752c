"""Times of pytest-benchmark become a run folder; a file that lacks the raw times says how to have them."""

import json

import pytest

from fastsample.bench import compare, import_benchmarks, read_run

pytest_plugins = ["pytester"]

FAST = {"fullname": "tests/benchmarks/test_a.py::test_speed[8]", "name": "test_speed[8]", "group": "loops"}
SLOW = {"fullname": "tests/benchmarks/test_b.py::test_speed[8]", "name": "test_speed[8]", "group": None}
STATS = {"median": 99.0, "min": 99.0, "iterations": 1, "data": [0.5, 0.25, 4.0]}


@pytest.fixture
def write(tmp_path):
    def file(*benchmarks, **more):
        path = tmp_path / "times.json"
        machine = {"node": "bobs-laptop", "python_version": "3.12.1", "system": "Linux", "machine": "x86_64"}
        cpu = {"brand_raw": "A CPU", "count": 4}
        body = {"machine_info": {**machine, "cpu": cpu}, "datetime": "2026-01-02T03:04:05"}
        path.write_text(json.dumps({**body, "benchmarks": list(benchmarks), **more}))
        return path

    return file


def test_each_benchmark_becomes_a_record_with_its_raw_times(write, tmp_path):
    made = import_benchmarks(
        write({**FAST, "stats": STATS, "params": {"n": 8}}, {**SLOW, "stats": STATS}), tmp_path / "r"
    )
    body, records = read_run(tmp_path / "r")
    assert records == made
    assert body["finished"]
    fast, slow = records
    assert (fast.name, slow.name) == (FAST["fullname"], SLOW["fullname"])
    assert (fast.model, fast.solver, fast.steps, fast.spacing) == ("pytest-benchmark", "test_speed[8]", 0, "")
    assert fast.timing.steady.samples_s == (0.5, 0.25, 4.0)
    assert fast.timing.steady.median_s == 0.5  # of the raw times, not the 99 of the file's own median
    assert fast.settings == {"group": "loops", "n": "8"}
    assert fast.scores == {}
    assert fast.error is None


def test_the_machine_is_known_and_its_name_is_not(write, tmp_path):
    commit = {"id": "abc", "dirty": True, "branch": "main"}
    import_benchmarks(write({**FAST, "stats": STATS}, commit_info=commit), tmp_path / "r")
    (found,) = read_run(tmp_path / "r")[0]["environments"]
    assert (found["cpu"], found["cores"], found["python"]) == ("A CPU", "4", "3.12.1")
    assert found["git revision of the working folder"] == "abc with changes"
    text = "".join(path.read_text() for path in (tmp_path / "r").rglob("*.json"))
    assert "bobs-laptop" not in text


def test_the_same_benchmarks_have_the_same_hash_whatever_their_times(write, tmp_path):
    hashes = []
    for k, data in enumerate(([1.0], [2.0, 3.0])):
        import_benchmarks(write({**FAST, "stats": {"data": data}}), tmp_path / str(k))
        hashes.append(read_run(tmp_path / str(k))[0]["hash"])
    import_benchmarks(write({**SLOW, "stats": STATS}), tmp_path / "other")
    assert hashes[0] == hashes[1] != read_run(tmp_path / "other")[0]["hash"]


@pytest.mark.parametrize("stats", [{}, {"stats": None}, {"stats": {}}])
def test_a_benchmark_without_stats_keeps_that_as_its_error_beside_the_others(write, tmp_path, stats):
    bad, good = import_benchmarks(write({**SLOW, **stats}, {**FAST, "stats": STATS}), tmp_path / "r")
    assert "has no times" in bad.error
    assert bad.timing is None
    assert good.timing is not None


def test_stripped_raw_times_name_the_option_that_keeps_them(write, tmp_path):
    stats = {name: value for name, value in STATS.items() if name != "data"}
    with pytest.raises(ValueError, match=r"raw times .* are not there.*--benchmark-json=FILE.*--benchmark-save-data"):
        import_benchmarks(write({**FAST, "stats": stats}), tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"benchmarks": [', "no JSON, or half of one"),
        ("[1, 2]", "not a file of pytest-benchmark"),
        ('{"benchmarks": [{"stats": {}}]}', "not a file of pytest-benchmark"),
        ('{"format": "fastsample.bench.run"}', "not a file of pytest-benchmark"),
        ('{"benchmarks": []}', "holds no benchmarks: were they disabled"),
    ],
)
def test_another_file_is_refused_with_the_command_that_makes_the_right_one(tmp_path, text, said):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{said}.*--benchmark-enable"):
        import_benchmarks(path, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.json is no file.*--benchmark-json"):
        import_benchmarks(tmp_path / "gone.json", tmp_path / "r")


@pytest.mark.parametrize("data", [["fast"], [-1.0], [float("nan")], [[1.0]], 3.0])
def test_times_that_are_no_seconds_are_refused(write, tmp_path, data):
    with pytest.raises(ValueError, match=r"stats\.data of .*test_a.* holds something else than seconds"):
        import_benchmarks(write({**FAST, "stats": {"data": data}}), tmp_path / "r")


def test_a_benchmark_that_occurs_twice_is_refused(write, tmp_path):
    with pytest.raises(ValueError, match=r"holds the benchmark .*test_a.* twice"):
        import_benchmarks(write({**FAST, "stats": STATS}, {**FAST, "stats": STATS}), tmp_path / "r")


def test_a_folder_that_holds_a_run_is_left_as_it_is(write, tmp_path):
    path = write({**FAST, "stats": STATS})
    import_benchmarks(path, tmp_path / "r")
    before = (tmp_path / "r" / "run.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run already; import into another folder"):
        import_benchmarks(path, tmp_path / "r")
    assert (tmp_path / "r" / "run.json").read_bytes() == before


def test_two_imported_files_are_compared_like_runs(write, tmp_path):
    """One benchmark takes twice as long afterwards, the other the same: no drift between two processes explains it."""
    times = [1.0 + 0.01 * (k % 7) for k in range(30)]
    for side, factor in (("before", 1), ("after", 2)):
        slow = {**SLOW, "stats": {"data": [factor * time for time in times]}}
        import_benchmarks(write({**FAST, "stats": {"data": times}}, slow), tmp_path / side)
    found = compare(tmp_path / "before", tmp_path / "after")
    verdicts = {row.cell: row.verdict for row in found.rows}
    assert verdicts[SLOW["fullname"]] == "regressed"
    assert verdicts[FAST["fullname"]] in ("unchanged", "inconclusive")


def test_what_pytest_benchmark_writes_can_be_read(pytester):
    """A real file, of the installed version: iterations are divided out, and saved files are refused without data."""
    pytest.importorskip("pytest_benchmark")
    pytester.makepyfile(
        standing="""
        now = [0.0]

        def clock():  # moves a little by itself, since pytest-benchmark waits until it does
            now[0] += 1e-6
            return now[0]

        def work():
            now[0] += 0.002
        """,
        test_speed="""
        import standing

        def test_work(benchmark):
            benchmark.pedantic(standing.work, rounds=4, iterations=2, warmup_rounds=1)
        """,
    )
    pytester.syspathinsert()
    options = ["--benchmark-timer=standing.clock", "--benchmark-json=times.json", "--benchmark-autosave"]
    pytester.runpytest("-p", "no:cacheprovider", *options)
    (record,) = import_benchmarks(pytester.path / "times.json", pytester.path / "r")
    assert record.timing.steady.samples_s == pytest.approx([0.002] * 4, rel=0.01)  # readings of the clock move it
    (saved,) = (pytester.path / ".benchmarks").rglob("*.json")
    with pytest.raises(ValueError, match="--benchmark-save-data"):
        import_benchmarks(saved, pytester.path / "again")
