"""Synthetic states and a real Chroma server, for the store tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import chromadb
import pytest
import torch
from chromadb.config import Settings

from kalm_rag.states import DTYPES, Codec, Layout, PassageStates, passage_key
from kalm_rag.store import Reference


def make_layout(**changes: object) -> Layout:
    fields = {"fingerprint": "feed" * 16, "hidden_size": 12, "ratio": 4, "codec": Codec.EXACT, "state_dtype": "float32"}
    return Layout(**{**fields, **changes})


def make_states(text: str, layout: Layout, tokens: int | None = None) -> PassageStates:
    """States that depend on the text only: whoever makes them, they are the same."""
    seed = int(passage_key(text)[:12], 16)
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens if tokens is not None else 1 + seed % 40
    vectors = torch.randn(-(-tokens // layout.ratio), layout.hidden_size, generator=generator)
    return PassageStates(
        vectors=vectors.to(DTYPES[layout.state_dtype]),
        tokens=tokens,
        total_tokens=tokens + seed % 3,
        ratio=layout.ratio,
        fingerprint=layout.fingerprint,
        key=passage_key(text),
        token_ids=torch.randint(1, 1 << 16, (tokens,), generator=generator) if layout.keeps_token_ids else None,
    )


def make_many(count: int, layout: Layout, start: int = 0) -> list[PassageStates]:
    return [make_states(f"passage {i}", layout) for i in range(start, start + count)]


def refer(states: list[PassageStates], collection: str = "c") -> list[Reference]:
    return [Reference(collection_id=collection, record_id=f"r{i}", key=s.key) for i, s in enumerate(states)]


@contextlib.contextmanager
def running_chroma(folder: Path) -> Iterator[chromadb.ClientAPI]:
    """A Chroma server of our own on a free port of the loopback, gone afterwards."""
    beside = Path(sys.executable).with_name("chroma")
    command = str(beside) if beside.exists() else shutil.which("chroma")
    if command is None:
        pytest.skip("no chroma command on this machine")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (folder / "server.log").open("wb")
    server = subprocess.Popen(
        [command, "run", "--path", str(folder / "db"), "--host", "127.0.0.1", "--port", str(port)],
        stdout=log,
        stderr=subprocess.STDOUT,
        env={**os.environ, "ANONYMIZED_TELEMETRY": "False"},
    )
    try:
        yield _connected(port, server)
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(10)
        log.close()


def _connected(port: int, server: subprocess.Popen[bytes]) -> chromadb.ClientAPI:
    end = time.monotonic() + 30
    while True:
        try:
            client = chromadb.HttpClient(host="127.0.0.1", port=port, settings=Settings(anonymized_telemetry=False))
            client.heartbeat()
        except Exception:
            if time.monotonic() > end or server.poll() is not None:
                raise
            time.sleep(0.1)
        else:
            return client


@pytest.fixture(scope="module")
def chroma_client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromadb.ClientAPI]:
    with running_chroma(tmp_path_factory.mktemp("chroma")) as client:
        yield client
