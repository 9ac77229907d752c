"""The imports are a star: the core imports no wing, a wing imports no other, heavy packages wait for use."""

import ast
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINGS = ["solvers", "distill", "kernels", "bench"]
# they alone put wings together
JOINS = {"fastsample", "fastsample.cli", "fastsample.cli_bench", "fastsample.cli_train", "fastsample.demo"}
HEAVY = {"accelerate", "diffusers", "matplotlib", "onnx", "onnxruntime", "sklearn", "tensorrt", "triton"}
STUDIES = ROOT / "bench" / "studies"  # scripts, no part of the package: they join wings as examples do
FILES = sorted(
    path for folder in ["fastsample", *WINGS] for path in (ROOT / folder).rglob("*.py") if STUDIES not in path.parents
)


@dataclass(frozen=True)
class Import:
    name: str  # absolute: `from . import grid` in fastsample.plan is fastsample.grid
    line: int
    on_load: bool  # runs when the module is loaded, thus not inside a function


def module_name(path):
    """solvers/ddim.py -> fastsample.solvers.ddim, solvers/__init__.py -> fastsample.solvers"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "fastsample" else ("fastsample", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source, package):
    """Every import in `source`, a module whose relative imports start at `package`, also inside functions."""
    return list(_imports(ast.parse(source), package, on_load=True))


def _imports(node, package, on_load):
    for name in _names(node, package):
        yield Import(name, node.lineno, on_load)
    for field, value in ast.iter_fields(node):
        # A function runs later, and what stands under `if TYPE_CHECKING` never.
        waits = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and field == "body" and "TYPE_CHECKING" in ast.unparse(node.test)
        )
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _imports(child, package, on_load and not waits)


def _names(node, package):
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            base = resolve_name("." * node.level + (node.module or ""), package)
            return [f"{base}.{alias.name}" for alias in node.names]  # the alias may be a module
        case ast.Call(args=[ast.Constant(value=str(name)), *_]):
            if ast.unparse(node.func).endswith(("import_module", "__import__")):
                return [resolve_name(name, package)]
    return []


def within(name, package):
    return name == package or name.startswith(package + ".")


def wing(name):
    return next((w for w in WINGS if within(name, f"fastsample.{w}")), None)


def violations(source, module, is_package=False):
    """What in the source of `module` breaks the star, one line each."""
    package = module if is_package else module.rpartition(".")[0]
    light = is_package or wing(module) is None
    found = []
    for i in imports(source, package):
        if module not in JOINS and wing(i.name) not in (None, wing(module)):
            found.append(f"line {i.line} imports the wing {wing(i.name)}; move what is shared to the core")
        if module not in JOINS and any(within(i.name, joiner) for joiner in JOINS - {"fastsample"}):
            found.append(f"line {i.line} imports {i.name}, which imports the wings")
        if light and i.on_load and i.name.partition(".")[0] in HEAVY:
            found.append(f"line {i.line} loads {i.name} with the module; import it in the function that uses it")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_form_a_star(path):
    assert violations(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastsample.grid", "import fastsample.solvers.ddim"),
        ("fastsample.grid", "from fastsample import schedule, solvers"),
        ("fastsample.grid", "from . import bench"),
        ("fastsample.grid", "from .solvers.ddim import ddim"),
        ("fastsample.adapters.onnx", "from ..kernels import attention"),
        ("fastsample.grid", "def late():\n    from fastsample import distill"),
        ("fastsample.grid", "import importlib\nimportlib.import_module('fastsample.distill')"),
        ("fastsample.grid", "from importlib import import_module\nimport_module('.bench', __package__)"),
        ("fastsample.grid", "if TYPE_CHECKING:\n    from fastsample.bench import Case"),
        ("fastsample.solvers.ddim", "from fastsample.kernels import attention"),
        ("fastsample.solvers.ddim", "from ..distill.trainer import train"),
        ("fastsample.distill.trainer", "from fastsample.cli import main"),
        ("fastsample.bench.sweep", "from fastsample.cli_bench import app"),
        ("fastsample.grid", "import torch, triton.language as tl"),
        ("fastsample.cli", "from matplotlib import pyplot"),
        ("fastsample.grid", "try:\n    import onnx\nexcept ImportError:\n    onnx = None"),
        ("fastsample.grid", "class Net:\n    import diffusers"),
    ],
)
def test_the_checker_finds_what_breaks_the_star(module, source):
    assert len(violations(source, module)) == 1


def test_the_checker_finds_a_heavy_package_in_the_face_of_a_wing():
    assert violations("from diffusers import UNet2DModel", "fastsample.solvers", is_package=True)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("fastsample.plan", "from .grid import Node\nimport fastsample.schedule, torch"),
        ("fastsample.cli", "from fastsample import solvers, bench"),
        ("fastsample.adapters.diffusers", "def load():\n    import diffusers"),
        ("fastsample.adapters.diffusers", "if TYPE_CHECKING:\n    from diffusers import UNet2DModel"),
        ("fastsample.solvers.scheduler", "from diffusers import SchedulerMixin\nfrom .ddim import ddim"),
        ("fastsample.bench.run", "from fastsample.bench.cases import Case\nfrom fastsample.plan import Plan"),
    ],
)
def test_the_checker_lets_the_rest_pass(module, source):
    assert violations(source, module) == []


def test_importing_everything_loads_no_heavy_package():
    everything = ", ".join(["fastsample"] + [f"fastsample.{w}" for w in WINGS])
    # What torch itself loads is not ours to answer for.
    assert heavy_after(f"import {everything}") <= heavy_after("import torch")


def test_the_repository_root_is_not_on_the_search_path():
    paths = {Path(entry or ".").resolve() for entry in sys.path}
    assert ROOT not in paths, "kernels/ hides the PyPI package `kernels`: run `pytest`, not `python -m pytest`"


def heavy_after(statement):
    code = f"{statement}; import sys; print(*{HEAVY!r} & set(sys.modules))"
    # -I: neither the current folder nor PYTHONPATH decide what is found
    done = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())
