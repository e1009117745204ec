"""Load on a `kalm-rag serve` of one's own: requests/s and waits by number of clients, and what HTTP costs.

    python notebooks/serving_load.py [--passages 20000] [--seconds 10] [--steady 0]

Fills an index of made-up passages, starts the command on a free port, asks it from 1, 8 and 32 clients (threads of
this process, which shares its cores with the server), and stops it. Three ways to rerank 50 passages of 100 words:
texts that it never saw, texts that it has read before, ids; and a search of 50 candidates. Of one client also the
time beside the stages that the server tells: HTTP, JSON, checks and threads, at both ends. `--steady` seconds of load
from 8 clients then show whether memory, descriptors or threads grow.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
import torch

from kalm_rag.bench.measuring import random_text
from kalm_rag.bench.serving import Filled

KINDS, CLIENTS, CANDIDATES = ("new texts", "known texts", "ids", "search"), (1, 8, 32), 50
KNOWN = [random_text(100, seed) for seed in range(200)]


class Asker:
    """One client: requests of one kind over one connection, no two the same."""

    def __init__(self, kind: str, port: int, passages: int, seed: int) -> None:
        self.kind, self.passages, self.number = kind, passages, seed * 10**6
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)

    def next_request(self) -> tuple[str, dict]:
        self.number += 1
        query = random_text(8, 10**7 + self.number)
        if self.kind == "search":
            return "/v1/search", {"query": query, "fetch_k": CANDIDATES, "top_n": 10}
        rows = [self.number * 7919 + n * 3 for n in range(CANDIDATES)]
        texts = [KNOWN[row % len(KNOWN)] for row in rows]
        if self.kind == "new texts":
            texts = [f"{self.number} {text}" for text in texts]
        ids = [{"id": f"p{row % self.passages}"} for row in rows]
        return "/v2/rerank", {"query": query, "documents": ids if self.kind == "ids" else texts}

    def ask(self, path: str, body: dict) -> tuple[float, float]:
        """Seconds until the whole answer is here, and those of them that the server spent in its stages."""
        started = time.perf_counter()
        self.connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
        response = self.connection.getresponse()
        told = response.read()
        seconds = time.perf_counter() - started
        assert response.status == 200, told
        return seconds, sum(map(float, re.findall("dur=([0-9.]+)", response.headers["server-timing"]))) / 1000


def load(kind: str, clients: int, seconds: float, port: int, passages: int) -> dict:
    """So many clients, each asking again as soon as it has its answer."""
    waits: list[tuple[float, float]] = []
    started = time.perf_counter()

    def run(seed: int) -> None:
        asker = Asker(kind, port, passages, seed + int(started * 1000) % 10**6)
        while time.perf_counter() < started + seconds:
            waits.append(asker.ask(*asker.next_request()))

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    rate = len(waits) / (time.perf_counter() - started)
    cuts = statistics.quantiles([seconds for seconds, _ in waits * 2], n=100, method="inclusive")
    told = {"kind": kind, "clients": clients, "requests": len(waits), "per_second": round(rate, 1)}
    told |= {f"p{p}_ms": round(1000 * cuts[p - 1], 1) for p in (50, 95, 99)}
    if clients == 1:  # of more, waiting for a turn is in it
        told["beside_the_stages_p50_ms"] = round(1000 * statistics.median(wait - staged for wait, staged in waits), 1)
    return told


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, number in (("passages", 20_000), ("seconds", 10.0), ("steady", 0.0)):
        parser.add_argument(f"--{name}", type=type(number), default=number)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        db, log = Path(folder) / "db", Path(folder) / "log"
        filled = Filled(db, torch.device("cpu"))
        filled.grow(asked.passages, lambda line: None)
        filled.close()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "kalm_rag", "serve", "--db", str(db), "--port", str(port), "--timeout", "300"]
        environment = {key: value for key, value in os.environ.items() if key != "KALM_RAG_API_KEY"}
        server = subprocess.Popen(command, env=environment, stderr=log.open("wb"))
        process = psutil.Process(server.pid)
        try:
            while b"Uvicorn running" not in log.read_bytes():
                assert server.poll() is None, log.read_text()
                time.sleep(0.5)
            Asker("", port, 1, 0).ask("/v2/rerank", {"query": "known", "documents": KNOWN})
            print(f"{os.cpu_count()} cores, load of the machine {os.getloadavg()}, {asked.passages:,} passages")
            for kind in KINDS:
                for clients in CLIENTS[: 2 if kind == "new texts" else 3]:
                    print(json.dumps(load(kind, clients, asked.seconds, port, asked.passages)), flush=True)
            for part in range(10 if asked.steady else 0):
                told = load(KINDS[1 + part % 3], 8, asked.steady / 10, port, asked.passages)
                sizes = process.memory_info().rss // 10**6, process.num_fds(), process.num_threads()
                print("MB, descriptors, threads:", *sizes, "after", told["requests"], told["kind"], flush=True)
        finally:
            server.terminate()
            server.wait(60)
        print(f"load of the machine at the end {os.getloadavg()}")


if __name__ == "__main__":
    main()
