"""pyproject.toml says what lies in the folders, and the wheel made from it works away from the repository."""

import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
WINGS = ["solvers", "distill", "kernels", "bench"]
DATA = {".safetensors", ".json", ".npz", ".toml", ".html", ".js", ".css"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Runs the console script of the wheel unpacked at argv[1]. An editable install would answer for modules that
# the wheel lacks, so its finder is taken out.
RUN_SCRIPT = f"""
import importlib, sys
target, name, function = sys.argv[1:4]
sys.meta_path = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
sys.path.insert(0, target)
for wing in {WINGS}:
    importlib.import_module("fastsample." + wing)
main = getattr(importlib.import_module(name), function)
ours = [module for key, module in sys.modules.items() if key.split(".")[0] == "fastsample"]
strays = [module for module in ours if not (module.__file__ or "").startswith(target)]
assert not strays, strays
sys.argv = ["fastsample", *sys.argv[4:]]
sys.exit(main())
"""


def inside(path):
    """Where a file of the repository lies in the wheel: solvers/ddim.py -> fastsample/solvers/ddim.py"""
    return path.as_posix() if path.parts[0] == "fastsample" else f"fastsample/{path.as_posix()}"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the repository without what git ignores, as a fresh clone would be."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    ignored = [line.rstrip("/") for line in lines if line and not line.startswith("#")]
    target = tmp_path_factory.mktemp("source") / "fastsample"
    return shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns(".git", *ignored))


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    # Without isolation, which would fetch setuptools from the network.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source]
    done = subprocess.run(command, cwd=out, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    target = tmp_path_factory.mktemp("site")
    ZipFile(wheel).extractall(target)
    return target


def test_packages_are_the_folders_with_an_init_file():
    inits = [path for folder in ["fastsample", *WINGS] for path in (ROOT / folder).rglob("__init__.py")]
    folders = {inside(path.parent.relative_to(ROOT)).replace("/", ".") for path in inits}
    assert sorted(PYPROJECT["tool"]["setuptools"]["packages"]) == sorted(folders)


def test_every_folder_with_modules_has_an_init_file():
    modules = [path for folder in ["fastsample", *WINGS] for path in (ROOT / folder).rglob("*.py")]
    bare = {path.parent for path in modules if not (path.parent / "__init__.py").exists()}
    assert bare == {ROOT / "bench" / "studies"}  # scripts that join wings: for the repository, not for the package


def test_the_promised_extras_exist():
    promised = "diffusers train lora kernels export tensorrt tensorrt-rtx bench demo test all"
    assert set(promised.split()) <= PYPROJECT["project"]["optional-dependencies"].keys()


def test_the_wheel_holds_every_module_and_data_file_and_nothing_else(source, wheel):
    paths = [path for folder in ["fastsample", *WINGS] for path in (source / folder).rglob("*")]
    wanted = [path for path in paths if path.suffix in DATA | {".py"} or path.name == "py.typed"]
    left = {source / "bench/results", source / "bench/studies"}
    kept = [path for path in wanted if not left & set(path.parents)]
    names = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert "fastsample/py.typed" in names
    assert names == {inside(path.relative_to(source)) for path in kept}


def test_the_wheel_carries_its_license(wheel):
    names = ZipFile(wheel).namelist()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_command_runs_from_the_wheel_alone(unpacked, tmp_path):
    scripts = ConfigParser()
    scripts.read(next(unpacked.glob("*.dist-info/entry_points.txt")))
    name, function = scripts["console_scripts"]["fastsample"].split(":")
    command = [sys.executable, "-I", "-c", RUN_SCRIPT, unpacked, name, function, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower()
