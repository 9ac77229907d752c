"""The documentation says what the code says."""

import importlib.util
import re
from pathlib import Path

import pytest

from fastsample import solvers

ROOT = Path(__file__).parents[1]


def generator():
    spec = importlib.util.spec_from_file_location("solver_page", ROOT / "docs" / "solver_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_solvers_is_what_its_script_writes():
    """If this fails: python docs/solver_page.py"""
    module = generator()
    assert module.PAGE.read_text(encoding="utf-8") == module.page()


@pytest.mark.parametrize("name", [*solvers.SOLVERS, "exact", "rk45"])
def test_every_solver_says_its_source(name):
    function = getattr(solvers, name)
    text = " ".join(function.__doc__.split())
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|k-diffusion|See `|Sources: see the module|`\w+`", text), text


@pytest.mark.parametrize("page", [*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md"], ids=lambda path: path.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target
