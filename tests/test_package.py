"""The package as it is installed and published: version, entry points, bounds, what a source archive holds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import kalm_rag

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def project() -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def pins(name: str) -> dict[str, str]:
    """Versions by distribution in a constraints file."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def test_version_and_module() -> None:
    """``python -m kalm_rag`` and ``kalm-rag --version`` failed, and the package had no ``__version__``."""
    assert re.fullmatch(r"\d+\.\d+\.\d+", kalm_rag.__version__)
    code = [sys.executable, "-m", "kalm_rag", "--version"]
    run = subprocess.run(code, capture_output=True, text=True, check=True)
    assert run.stdout == f"kalm-rag {kalm_rag.__version__}\n"


def test_lowest_versions_are_those_declared(project: dict[str, Any]) -> None:
    """Lower bounds were declared that nothing had been tested with, some of which can't be had together."""
    extras = project["project"]["optional-dependencies"]
    names = ("pico", "files", "langchain", "llama-index", "serve", "mcp", "eval", "plot", "otel")
    assert extras["all"] == [f"kalm-rag[{','.join(names)}]"]
    declared = [*project["project"]["dependencies"], *(line for name in names for line in extras[name])]
    bounds = dict(line.split(">=") for line in declared)
    lowest = pins("constraints-lowest.txt")
    assert lowest.keys() == bounds.keys() - {"torch"}
    for name, bound in bounds.items():
        if name != "torch":
            assert re.fullmatch(re.escape(bound) + r"(\.0)*", lowest[name]), f"{name}: {bound} and {lowest[name]}"


def test_source_archive_holds_what_its_tests_read(project: dict[str, Any]) -> None:
    """Tests read examples, notebooks and the README, of which an archive had only the last."""
    included = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / name).exists() for name in included)
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    read = set(re.findall(r"""(?:ROOT|parents\[1\]) / "([^".][^"]*)""", sources)) - {"pyproject.toml"}
    assert {"examples", "notebooks", "README.md"} <= read <= set(included), read
