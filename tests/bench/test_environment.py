"""The environment says what the numbers hang on, and nothing of who owns the machine."""

import getpass
import os
import socket
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastsample.bench import environment
from fastsample.bench.environment import _setting


def test_it_names_versions_processor_threads_precision_and_load():
    found = environment()
    for name in ("date", "system", "cpu", "cpu instructions", "load average", "float32 matmul precision"):
        assert found[name]
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == torch.__version__
    for package in ("fastsample", "numpy", "scipy"):
        assert found[package] == version(package)
    assert int(found["cores"]) >= 1
    assert found["device"] == "cpu"
    assert "gpu" not in found


def test_the_threads_are_those_of_now():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert environment()["threads"] == "1"
    finally:
        torch.set_num_threads(before)


def test_a_package_that_is_not_installed_has_no_entry():
    found = environment()
    for package in ("diffusers", "triton", "tensorrt"):
        try:
            installed = version(package)
        except PackageNotFoundError:
            assert package not in found
        else:
            assert found[package] == installed


def test_it_holds_neither_hosts_nor_users_nor_paths(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent)
    words = " ".join(environment().values()).split()
    assert socket.gethostname() not in words
    assert getpass.getuser() not in words
    assert not any(word.startswith(("/", "~", str(Path.home()), os.getcwd())) for word in words)


def test_a_folder_that_is_no_repository_has_no_revision(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert not any("git" in name for name in environment())


def test_a_machine_without_git_or_driver_is_no_error(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert not any("git" in name for name in environment())


def test_on_a_gpu_the_driver_and_the_precision_flags_are_there(monkeypatch, tmp_path):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '570.86.15\\n570.86.15\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    properties = SimpleNamespace(total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    found = environment("cuda:0")
    assert found["gpu"] == "A GPU"
    assert found["gpu memory"] == "80.0 GiB"
    assert found["compute capability"] == "9.0"
    assert found["driver"] == "570.86.15"
    assert found["cudnn benchmark"] == "True"
    assert {"cuda", "cudnn", "cudnn deterministic", "tf32 in matmul", "tf32 in cudnn"} <= set(found)


def test_a_setting_that_torch_refuses_to_read_is_said_to_be_set_elsewhere():
    def refused():
        raise RuntimeError("mix of the legacy and new APIs")

    assert _setting(refused) == "set through torch's fp32_precision"
    assert _setting(lambda: True) == "True"


@pytest.mark.gpu
def test_a_real_gpu_is_named():
    found = environment("cuda")
    assert found["gpu"] == torch.cuda.get_device_name()
    assert found["driver"].split(".")[0].isdigit()
