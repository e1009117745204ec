"""Imports point one way, frameworks stay in their adapters, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kalm_rag

PACKAGE = Path(kalm_rag.__file__).parent
# Lower may not import higher. Adapters -> index -> engine and stores -> models and states -> pooling and errors.
RANKS = {
    "errors": 0,
    "instructions": 1,
    "prompts": 2,
    "pooling": 1,
    "ranking": 2,
    "states": 2,
    "models": 3,
    "scheduler": 3,
    "encoding": 4,
    "batching": 4,
    "store": 4,
    "results": 4,
    "reranker": 4,
    "beir": 4,
    "engines": 5,
    "embedders": 5,
    "upkeep": 5,
    "lookup": 5,
    "explanation": 5,
    "database": 6,
    "index": 7,
    "langchain": 8,
    "llama_index": 8,
    "documents": 8,
    "evaluation": 8,
    "training": 8,
    "bench": 8,
    "demo": 9,
    "cli": 10,
}
CHROMA = {"database", "index", "store", "langchain", "llama_index"}
LAZY_UP = {("instructions", "prompts"), ("reranker", "explanation")}  # convenience methods that delegate upwards


def modules() -> list[tuple[str, Path]]:
    return [
        (path.relative_to(PACKAGE).parts[0].removesuffix(".py"), path)
        for path in sorted(PACKAGE.rglob("*.py"))
        if path != PACKAGE / "__init__.py"
    ]


def imported(path: Path) -> set[str]:
    """Dotted names a file imports, wherever in it, type checking blocks included."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(str(node.module))
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(("room", "path"), modules(), ids=lambda v: str(v.name) if isinstance(v, Path) else v)
def test_imports_point_one_way(room: str, path: Path) -> None:
    names = imported(path)
    rooms = {n.split(".")[1] for n in names if n.startswith("kalm_rag.") and n.split(".")[1] in RANKS}
    wrong = {r for r in rooms - {room} if RANKS[r] > RANKS[room] and (room, r) not in LAZY_UP}
    assert not wrong, f"{path} imports {wrong}, which stand above it"
    tops = {n.split(".")[0] for n in names}
    assert room in CHROMA or "chromadb" not in tops
    if room != "langchain":
        assert not tops & {"langchain", "langchain_core", "langchain_chroma", "langchain_classic"}
    if room != "llama_index":
        assert not any(n.startswith("llama_index") for n in names)


def test_public_names() -> None:
    assert kalm_rag.__all__ == ["ChromaIndex", "Instructions", "PassageStates", "Reranker", "open_store"]
    assert all(getattr(kalm_rag, name) for name in kalm_rag.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kalm_rag.nothing


def test_importing_the_package_imports_no_framework() -> None:
    """No work at import: ``import kalm_rag`` must not pull in torch, transformers or Chroma."""
    code = "import sys, kalm_rag; print(sorted({'torch', 'transformers', 'chromadb'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_no_pickle_and_no_remote_code() -> None:
    for _, path in modules():
        names = imported(path)
        assert not {n.split(".")[0] for n in names} & {"pickle", "dill", "cloudpickle", "joblib"}, path
        assert "trust_remote_code=True" not in path.read_text(encoding="utf-8")


def test_modules_are_short() -> None:
    long = {str(p.name): n for _, p in modules() if (n := len(p.read_text(encoding="utf-8").splitlines())) > 500}
    assert not long, f"over the hard limit of 500 lines: {long}"
