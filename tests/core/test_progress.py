"""Progress bars."""

import io
import subprocess
import sys

import pytest

from fastsample.progress import track


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("show", [None, True, False])
def test_every_item_comes_once_and_in_order(show, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(track(range(5), "count", show, after_s=0)) == [0, 1, 2, 3, 4]
    assert list(track([], "nothing", show, after_s=0)) == []


def test_a_short_run_and_a_run_nobody_looks_at_show_nothing(monkeypatch):
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(track(range(5), "count")) == [0, 1, 2, 3, 4]
        assert stream.getvalue() == ""


def test_a_long_run_shows_a_bar_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    list(track(range(3), "walking", after_s=0))
    assert "walking" in stream.getvalue()


def test_a_bar_may_be_asked_for_where_nobody_looks(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(track(range(3), "walking", True)) == [0, 1, 2]


def test_the_bar_ends_when_the_loop_is_left(monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    items = track(range(3), "walking", after_s=0)
    next(items)
    items.close()
    assert stream.getvalue().endswith("\x1b[?25h") or "\x1b[?25h" in stream.getvalue()  # the cursor is back


def test_a_short_run_does_not_load_the_library_of_bars():
    code = (
        "import sys, io; from fastsample.progress import track\n"
        "before = 'rich.progress' in sys.modules\n"
        "sys.stderr.isatty = lambda: True\n"
        "list(track(range(3), 'x')); assert before or 'rich.progress' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
