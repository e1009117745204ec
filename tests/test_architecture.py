"""Imports point one way, frameworks stay in their adapters, and importing the package costs nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import kalm_rag

PACKAGE = Path(kalm_rag.__file__).parent
# From the bottom up; a room imports only rooms below it.
ROOMS = [
    *("errors", "checks", "instructions", "states", "store", "models", "engine", "index"),
    *("evaluation", "training", "bench", "mteb"),  # the workshop uses the product path
    *("langchain", "llama_index", "serve", "cli", "__main__"),
]
RANKS = {room: rank for rank, room in enumerate(ROOMS)}
CHROMA = {"index", "store", "langchain", "llama_index"}
MOST_ROOT_FILES = 8


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
    wrong = {r for r in rooms - {room} if RANKS[r] > RANKS[room]}
    assert not wrong, f"{path} imports {wrong}, which stand above it"
    tops = {n.split(".")[0] for n in names}
    assert room in CHROMA or "chromadb" not in tops
    if room != "langchain":
        assert not tops & {"langchain", "langchain_core", "langchain_chroma", "langchain_classic"}
    if room != "llama_index":
        assert not any(n.startswith("llama_index") for n in names)


def test_every_room_has_a_place_and_the_root_is_small() -> None:
    assert {room for room, _ in modules()} <= set(RANKS)
    files = [path.name for path in PACKAGE.iterdir() if path.is_file()]
    assert len(files) <= MOST_ROOT_FILES, files


def test_no_circles_among_files() -> None:
    """Two files that need each other can't be read, tested or replaced alone; imports inside functions count, too."""
    files = {".".join(("kalm_rag", *path.relative_to(PACKAGE).with_suffix("").parts)): path for _, path in modules()}
    names = {name.removesuffix(".__init__"): path for name, path in files.items()}
    graph = {path: {names[name] for name in needed(path, set(names)) if names[name] != path} for path in names.values()}
    circles = [c for c in strongly_connected(graph) if len(c) > 1]
    assert not circles, circles


def needed(path: Path, files: set[str]) -> set[str]:
    """Files that a file imports: of ``from room import file`` the file, not the room's ``__init__``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {n if (n := f"{node.module}.{alias.name}") in files else str(node.module) for alias in node.names}
    return names & files


def strongly_connected(graph: dict[Path, set[Path]]) -> list[set[Path]]:
    """Files that reach each other (by the sets each one reaches; the graph is small)."""
    reach: dict[Path, set[Path]] = {}
    for start in graph:
        reach[start], todo = set(), [start]
        while todo:
            for path in graph[todo.pop()] - reach[start]:
                reach[start].add(path)
                todo.append(path)
    return [{b for b in reach[a] if a in reach[b]} | {a} for a in graph]


def test_public_names() -> None:
    assert kalm_rag.__all__ == ["ChromaIndex", "Instructions", "PassageStates", "Reranker", "open_store"]
    assert all(getattr(kalm_rag, name) for name in kalm_rag.__all__)
    assert [name for name in dir(kalm_rag) if not name.startswith("__")] == kalm_rag.__all__, "for tab completion"
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
