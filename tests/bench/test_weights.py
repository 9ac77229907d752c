"""Weights that are not shipped: where they are looked for, and that nothing else is ever taken for them."""

import hashlib
import socket
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from fastsample.bench.weights import Weights, cache_folder

DATA = bytes(range(256)) * 9000  # more than two blocks of the download
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TOY_WEIGHTS", raising=False)
    return Weights("the toy", "toy.pth", "http://127.0.0.1:9/toy.pth", SHA256, len(DATA), "TOY_WEIGHTS")


@pytest.fixture
def offline(monkeypatch):
    def refuse(*_):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture
def serve(monkeypatch):
    """serve(body, length=...) -> a URL that answers with it."""
    monkeypatch.setenv("no_proxy", "*")
    servers = []

    def start(body, *, length=None, status=200):
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body) if length is None else length))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.01,), daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}/toy.pth"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def put(path, data=DATA):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def test_the_option_goes_before_the_variable_and_that_before_the_cache(weights, tmp_path, monkeypatch, offline):
    option, variable, cache = (put(tmp_path / name / "toy.pth") for name in ("option", "variable", "cache/fastsample"))
    assert weights.find() == cache
    monkeypatch.setenv("TOY_WEIGHTS", str(variable))
    assert weights.find() == variable
    assert weights.find(option) == option
    assert weights.find(str(option)) == option


def test_what_is_said_is_not_looked_for_elsewhere(weights, tmp_path, monkeypatch, offline):
    put(cache_folder() / "toy.pth")
    with pytest.raises(FileNotFoundError, match="by path="):
        weights.find(tmp_path / "absent.pth")
    monkeypatch.setenv("TOY_WEIGHTS", str(tmp_path / "absent.pth"))
    with pytest.raises(FileNotFoundError, match=r"by \$TOY_WEIGHTS"):
        weights.find()


def test_an_absent_file_is_named_with_its_place_url_hash_and_options_and_no_socket_is_opened(weights, offline):
    with pytest.raises(FileNotFoundError) as caught:
        weights.find()
    for part in (
        str(cache_folder() / "toy.pth"),
        weights.url,
        SHA256,
        "path=",
        "$TOY_WEIGHTS",
        "allow_download=True",
        "--allow-download",
    ):
        assert part in str(caught.value)


def test_the_cache_is_in_the_home_where_xdg_says_nothing(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "fastsample"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fastsample"


@pytest.mark.parametrize("allow_download", [False, True])
def test_a_damaged_file_is_refused_with_both_hashes_and_left_alone(weights, offline, allow_download):
    damaged = DATA[:-1]
    place = put(cache_folder() / "toy.pth", damaged)
    with pytest.raises(ValueError, match=r"damaged or not toy\.pth") as caught:
        weights.find(allow_download=allow_download)
    for part in (str(place), SHA256, hashlib.sha256(damaged).hexdigest(), weights.url):
        assert part in str(caught.value)
    assert place.read_bytes() == damaged


def test_a_folder_is_not_taken_for_the_file(weights, tmp_path, offline):
    with pytest.raises(ValueError, match=r"is no file; give the path of toy\.pth itself"):
        weights.find(tmp_path)


@pytest.mark.parametrize("given", [False, True])
def test_a_download_that_was_asked_for_lies_where_it_was_looked_for(weights, tmp_path, serve, given):
    path = tmp_path / "mine" / "toy.pth" if given else None
    place = replace(weights, url=serve(DATA)).find(path, allow_download=True)
    assert place == (path or cache_folder() / "toy.pth")
    assert place.read_bytes() == DATA
    assert list(place.parent.iterdir()) == [place]
    assert weights.find(path) == place  # the second time without a server


def test_a_download_of_something_else_is_refused_with_both_hashes_and_nothing_stays(weights, serve):
    other = DATA[:-1] + b"!"
    with pytest.raises(ValueError, match="was changed on its way") as caught:
        replace(weights, url=serve(other)).find(allow_download=True)
    assert SHA256 in str(caught.value)
    assert hashlib.sha256(other).hexdigest() in str(caught.value)
    assert list(cache_folder().iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(weights, serve):
    url = serve(DATA[:100_000], length=len(DATA))
    with pytest.raises((OSError, ValueError), match=r"cannot download|broke off"):
        replace(weights, url=url).find(allow_download=True)
    assert list(cache_folder().iterdir()) == []


def test_a_server_that_has_no_such_file_is_named(weights, serve):
    url = serve(b"", status=404)
    with pytest.raises(OSError, match="fetch it on another machine") as caught:
        replace(weights, url=url).find(allow_download=True)
    assert url in str(caught.value)
    assert "404" in str(caught.value)
