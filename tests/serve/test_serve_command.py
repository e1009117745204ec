"""``kalm-rag serve`` as a stranger runs it: it starts, answers, and on SIGTERM lets what runs end."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from serving import IDS, PLAIN, QUERY, TEXTS, until
from stores import running_chroma
from typer.testing import CliRunner

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.cli import app
from kalm_rag.serve.door import Door, RecordId
from kalm_rag.serve.settings import ServeSettings


def answers(url: str) -> bool:
    try:
        return PLAIN.get(f"{url}/ready", headers={"connection": "close"}).status_code == 200
    except httpx.TransportError:
        return False


def test_it_serves_and_drains(tmp_path: Path, pico: Reranker) -> None:
    with ChromaIndex.open(tmp_path / "db", model=pico) as index:
        index.add(IDS, TEXTS)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
    command = [sys.executable, "-m", "kalm_rag", "serve", "--db", str(tmp_path / "db"), "--warmup"]
    with (tmp_path / "log").open("wb") as log, ThreadPoolExecutor(1) as pool:
        server = subprocess.Popen(
            [*command, "--port", url.rpartition(":")[2]],
            stderr=log,
            env=os.environ | {"KALM_RAG_API_KEY": "key"},
        )
        try:
            until(lambda: answers(url) or server.poll() is not None, 120, pause=0.2)
            client = httpx.Client(base_url=url, headers={"authorization": "Bearer key"}, timeout=60)
            assert client.post("/v1/search", json={"query": QUERY}).json()["hits"][0]["id"] == "paris"
            many = {"query": QUERY, "documents": [f"Fact {number} is long. " * 8 for number in range(100)]}
            job = pool.submit(client.post, "/v2/rerank", json=many)
            until(lambda: "kalm_rag_queue_length 1.0" in client.get("/metrics").text)
            server.send_signal(signal.SIGTERM)
            until(lambda: not answers(url))
            assert not job.done(), "it still runs, and new ones are not let in"
            assert len(job.result().json()["results"]) == 100
            assert server.wait(30) in (0, -signal.SIGTERM)
        finally:
            server.kill()
            server.wait()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [line["status"] for line in lines if line.get("route") == "/v2/rerank"] == [200]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--host", "0.0.0.0"], "there is no API key. Set KALM_RAG_API_KEY, listen on 127.0.0.1, or say --insecure."),
        (["--db", "nowhere"], "no Chroma database in"),
        (["--db", "a", "--chroma", "http://b"], "db and chroma were both given"),
        (["--chroma", "b"], "chroma is 'b'; wanted a URL such as http://localhost:8000."),
        (["--workers", "0"], "workers is 0"),
        (["--timeout", "0"], "timeout is 0.0; wanted seconds above 0."),
    ],
)
def test_what_it_refuses_to_start_with(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KALM_RAG_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["serve", *arguments])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split())
    assert not any(tmp_path.iterdir())


def test_a_chroma_server_behind_it(tmp_path: Path) -> None:
    """Records and states are on the server, so that any number of these may stand before it."""
    with running_chroma(tmp_path) as chroma:
        place = ServeSettings(chroma=f"http://127.0.0.1:{chroma.get_settings().chroma_server_http_port}", create=True)
        writes, reads = Door.open(place), Door.open(place)
        assert writes.upsert(IDS, TEXTS, [None] * len(IDS)).encoded == len(TEXTS)
        ranked = reads.rank(QUERY, [RecordId(one) for one in IDS])
        assert (ranked.results[0].index, ranked.from_store, ranked.encoded) == (1, len(IDS), 0)
        assert reads.search(QUERY, top_n=1).hits[0].id == "paris"
        assert [(one["name"], one["records"], one["served"]) for one in reads.collections()] == [("passages", 4, True)]
        for door in (writes, reads):
            door.close()


def test_the_containers_commands_are_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    """No container runs here; what its file and the compose file call is asked for what it lacks: a key."""
    yaml = pytest.importorskip("yaml", reason="Chroma brings it")
    folder = Path(__file__).resolve().parents[2] / "examples" / "serve"
    lines = dict(
        line.split(" ", 1) for line in (folder / "Dockerfile").read_text().splitlines() if line[:3] in ("ENT", "CMD")
    )
    entry, default = json.loads(lines["ENTRYPOINT"]), json.loads(lines["CMD"])
    service = yaml.safe_load((folder / "compose.yaml").read_text())["services"]["kalm-rag"]
    monkeypatch.delenv("KALM_RAG_API_KEY", raising=False)
    for command in (default, service["command"]):
        result = CliRunner().invoke(app, [*entry[1:], *command])
        assert (result.exit_code, "there is no API key" in " ".join(result.output.split())) == (1, True), result.output
    assert (folder / service["build"]["context"] / service["build"]["dockerfile"]).resolve() == folder / "Dockerfile"
