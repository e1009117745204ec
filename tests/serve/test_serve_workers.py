"""Several workers over one folder: what one writes all find, and one that is killed takes nothing with it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from serving import IDS, QUERY, TEXTS, until

from kalm_rag import ChromaIndex, Reranker

ROUNDS = 40


@pytest.mark.slow
def test_workers_share_the_folder(tmp_path: Path, pico: Reranker) -> None:
    with ChromaIndex.open(tmp_path / "db", model=pico) as index:
        index.add(IDS, TEXTS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    arguments = ["--db", str(tmp_path / "db"), "--port", str(port), "--workers", "2", "--warmup"]
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "kalm_rag", "serve", *arguments]
        server = subprocess.Popen(command, stderr=log, env={k: v for k, v in os.environ.items() if "API_KEY" not in k})

    def ask(number: int) -> int:
        """Each over a connection of its own, so that either worker may get it."""
        try:
            answer = httpx.post(f"{url}/v1/search", json={"query": f"{QUERY} {number}"}, timeout=60)
        except httpx.TransportError:
            return 0  # it was with the worker that was killed
        assert answer.json()["hits"][0]["id"] == "paris"
        return answer.status_code

    def both_ready() -> bool:
        return (tmp_path / "log").read_text().count('"route": "/ready", "status": 200') >= 20

    def workers() -> list[psutil.Process]:
        return [child for child in psutil.Process(server.pid).children() if "spawn_main" in " ".join(child.cmdline())]

    try:
        until(lambda: serves(url), 180, pause=0.5)
        until(lambda: serves(url) and both_ready(), 180, pause=0.2)
        assert len(workers()) == 2
        put = httpx.put(
            f"{url}/v1/passages", json={"passages": [{"id": "new", "text": "Bees make honey."}]}, timeout=60
        )
        assert put.status_code == 200

        def found() -> bool:
            seen = [httpx.post(f"{url}/v1/search", json={"query": "What do bees make?"}).json() for _ in range(12)]
            return all(one["hits"][0]["id"] == "new" and one["encoded"] == 0 for one in seen)

        until(found, 60, pause=0.5)
        with ThreadPoolExecutor(4) as pool:
            jobs = [pool.submit(ask, number) for number in range(ROUNDS)]
            until(lambda: sum(job.done() for job in jobs) >= ROUNDS // 4)
            workers()[0].send_signal(signal.SIGKILL)
            ended = [job.result() for job in jobs]
        assert ended.count(200) >= ROUNDS - 4, "no more than were with the killed one"
        assert set(ended) <= {200, 0}
        until(lambda: len(workers()) == 2, 60)
        assert "kalm_rag_requests_total" in httpx.get(f"{url}/metrics", timeout=60).text
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) in (0, -signal.SIGTERM)
    finally:
        for child in psutil.Process(server.pid).children(recursive=True) if server.poll() is None else []:
            child.kill()
        server.kill()
        server.wait()
    with ChromaIndex.open(tmp_path / "db", model=pico) as index:
        assert len(index) == len(IDS) + 1
        assert index.verify().clean


def serves(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready").status_code == 200
    except httpx.TransportError:
        return False
