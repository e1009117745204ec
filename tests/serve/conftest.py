"""One server for all tests of the HTTP door, over pico and a small collection in a folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

pytest.importorskip("fastapi", reason="serving over HTTP is in the extra 'serve'")
pytest.importorskip("prometheus_client", reason="serving over HTTP is in the extra 'serve'")

import httpx
from serving import IDS, TEXTS, running

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.serve.door import Door


@pytest.fixture(scope="session")
def door(tmp_path_factory: pytest.TempPathFactory, pico: Reranker) -> Door:
    index = ChromaIndex.open(tmp_path_factory.mktemp("served") / "db", model=pico)
    index.add(IDS, TEXTS, [{"kind": "drink"}, {"kind": "city"}, {"kind": "city"}, {"kind": "land"}])
    return Door(index)


@pytest.fixture(scope="session")
def url(door: Door) -> Iterator[str]:
    with running(door, max_documents=20, max_passages=5, max_characters=3000, max_body_bytes=100_000) as address:
        yield address


@pytest.fixture(scope="session")
def client(url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=url, timeout=30, verify=False) as opened:
        yield opened
