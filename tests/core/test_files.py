"""Files that are whole or absent."""

import os
import signal
import stat
import subprocess
import sys
import time

import pytest

from fastsample.files import folder, write, write_text


def test_a_file_is_written_with_its_folders(tmp_path):
    write_text(tmp_path / "a" / "b" / "file.txt", "zwölf")
    assert (tmp_path / "a" / "b" / "file.txt").read_text(encoding="utf-8") == "zwölf"
    assert os.listdir(tmp_path / "a" / "b") == ["file.txt"]


def test_others_may_read_it_as_the_umask_says(tmp_path):
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "text")
        assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(before)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OSError])
def test_a_writer_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, error):
    write_text(tmp_path / "file", "old")

    def fill(path):
        path.write_text("ne")
        raise error("no space left")

    with pytest.raises(error, match="no space left"):
        write(tmp_path / "file", fill)
    assert (tmp_path / "file").read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path):
    write_text(tmp_path / "file", "old")
    code = (
        "import sys, time; from pathlib import Path; from fastsample.files import write\n"
        "def fill(path):\n"
        "    path.write_text('ne'); Path(sys.argv[1] + '.begun').touch(); time.sleep(60)\n"
        "write(sys.argv[1], fill)"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "file")], cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "file.begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert (tmp_path / "file").read_text() == "old"


def test_a_folder_that_cannot_be_written_is_named_with_the_remedy(tmp_path):
    (tmp_path / "file").write_text("a file is no folder, not even for root")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OSError, match=r"cannot write into .*file.*; choose another or mend its rights"):
            write_text(path / "plan.json", "text")
        with pytest.raises(OSError, match="cannot write into"):
            folder(path)


def test_a_folder_in_the_place_of_the_file_stays(tmp_path):
    (tmp_path / "plan.json").mkdir()
    with pytest.raises(OSError, match=r"plan\.json"):
        write_text(tmp_path / "plan.json", "text")
    assert os.listdir(tmp_path) == ["plan.json"]
