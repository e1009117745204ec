"""What the server refuses, and how: by name, with the field, never with a traceback, and nothing of it in the log."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from selecting import held_decoder
from serving import IDS, PLAIN, QUERY, TEXTS, running, until

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import InputError
from kalm_rag.serve.door import Door
from kalm_rag.serve.settings import ServeSettings
from kalm_rag.serve.telemetry import JsonLines

GOOD = {"query": QUERY, "documents": TEXTS}


def opened(pico: Reranker) -> Door:
    index = ChromaIndex.open(model=pico)
    index.upsert(IDS, TEXTS)
    return Door(index)


@pytest.fixture(scope="module")
def own(pico: Reranker) -> Iterator[httpx.Client]:
    """A server whose collection may be written to."""
    with running(opened(pico), max_documents=20) as url, httpx.Client(base_url=url, timeout=30, verify=False) as client:
        yield client


@pytest.mark.parametrize(
    ("method", "path", "body", "field"),
    [
        ("POST", "/v2/rerank", {"documents": TEXTS}, "query"),
        ("POST", "/v2/rerank", {**GOOD, "query": "  "}, "query"),
        ("POST", "/v2/rerank", {**GOOD, "documents": []}, "documents"),
        ("POST", "/v2/rerank", {**GOOD, "documents": ["a", 3]}, "documents[1]"),
        ("POST", "/v2/rerank", {**GOOD, "documents": [{"title": "a"}]}, "documents[0]"),
        ("POST", "/v2/rerank", {**GOOD, "documents": [{"id": "nobody"}]}, "documents[0]"),
        ("POST", "/v2/rerank", {**GOOD, "documents": ["a"] * 21}, "documents"),
        ("POST", "/v2/rerank", {**GOOD, "documents": ["a", "b" * 3001]}, "documents[1]"),
        ("POST", "/v2/rerank", {**GOOD, "top_n": 0}, "top_n"),
        ("POST", "/v2/rerank", {**GOOD, "top_n": True}, "top_n"),
        ("POST", "/v1/rerank", {**GOOD, "rank_fields": ["title"]}, "rank_fields"),
        ("POST", "/v1/rerank", {**GOOD, "instruction": 3}, "instruction"),
        ("POST", "/rerank", {"query": QUERY}, "texts"),
        ("POST", "/rerank", {**GOOD, "top_n": 1.5}, "top_n"),
        ("POST", "/rerank", {"query": QUERY, "texts": ["a", None]}, "texts[1]"),
        ("POST", "/rerank", {"query": QUERY, "texts": ["a", {"id": "nobody"}]}, "texts[1]"),
        ("POST", "/v1/search", {"query": "q" * 3001}, "query"),
        ("POST", "/v1/search", {"query": QUERY, "fetch_k": 21}, "fetch_k"),
        ("POST", "/v1/search", {"query": QUERY, "top_k": 3}, "top_k"),
        ("POST", "/v1/search", {"query": QUERY, "threshold": 2}, "threshold"),
        ("POST", "/v1/search", {"query": QUERY, "where": {"$nonsense": 1}}, "where"),
        ("POST", "/v1/search", {"query": QUERY, "ratio": 5}, "ratio"),
        ("PUT", "/v1/passages", {"passages": [{"id": "a"}]}, "passages[0].text"),
        ("PUT", "/v1/passages", {"passages": [{"id": "", "text": "b"}]}, "passages[0].id"),
        ("PUT", "/v1/passages", {"passages": [{"id": "a", "text": "b"}] * 2}, "id"),
        ("PUT", "/v1/passages", {"passages": [{"id": str(n), "text": "b"} for n in range(6)]}, "passages"),
        ("PUT", "/v1/passages", {"passages": [{"id": "a", "text": "b", "metadata": {"a": {}}}]}, "metadata"),
        ("DELETE", "/v1/passages", {"ids": "a"}, "ids"),
    ],
)
def test_wrong_fields_are_named(client: httpx.Client, method: str, path: str, body: Any, field: str) -> None:
    response = client.request(method, path, json=body)
    told = response.json()
    assert (response.status_code, told["field"]) == (422, field), told
    assert set(told) == {"error", "message", "field"}
    assert "qqq" not in told["message"], "texts are not given back"


def test_what_is_no_json_or_too_long(client: httpx.Client) -> None:
    headers = {"content-type": "application/json"}
    for raw in (b"", b"{", b"[" * 50_000, b'{"query": "\xff"}', b'"\\ud800"', b"null", b"1" * 5000):
        response = client.post("/v2/rerank", content=raw, headers=headers)
        assert response.status_code in (400, 422), response.text
    surrogate = client.post("/v2/rerank", content=b'{"query": "q", "documents": ["\\ud800"]}', headers=headers)
    assert (surrogate.status_code, surrogate.json()["field"]) == (422, "documents[0]")
    assert client.post("/v2/rerank", content=json.dumps(GOOD)).status_code == 422, "a page of a stranger may send this"
    for content in (b"x" * 100_001, (b"x" * 1000 for _ in range(101))):
        assert client.post("/v2/rerank", content=content, headers=headers).status_code == 413
    assert client.get("/nowhere").status_code == 404
    assert client.get("/v2/rerank").status_code == 405


def test_a_key_is_asked_for(pico: Reranker) -> None:
    with running(opened(pico), key="s3cret é") as url, httpx.Client(base_url=url, verify=False) as client:
        for told in (None, "Bearer", "Bearer s3cret", "Basic s3cret é", "s3cret é", "Bearer s3cret éx"):
            headers = {} if told is None else {"authorization": told.encode()}
            refused = client.post("/v2/rerank", json=GOOD, headers=headers)  # type: ignore[arg-type]
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert client.get("/metrics", headers=headers).status_code == 401  # type: ignore[arg-type]
        right = {"authorization": "Bearer s3cret é".encode(), "host": "search.example"}
        assert client.post("/v2/rerank", json=GOOD, headers=right).status_code == 200  # type: ignore[arg-type]
        assert client.get("/health").status_code == client.get("/ready").status_code == 200


def test_without_a_key_it_is_for_this_machine(client: httpx.Client, pico: Reranker) -> None:
    """A page of a stranger, whose name leads to this machine, gets nothing."""
    for host, status in (("evil.example:80", 421), ("localhost:1", 200), ("[::1]:80", 200), ("127.0.0.1", 200)):
        assert client.get("/v1/collections", headers={"host": host}).status_code == status
    assert ServeSettings(host="::1").local
    for host in ("0.0.0.0", "::", "192.168.0.1", "my.host"):
        with pytest.raises(InputError, match=r"there is no API key\. Set KALM_RAG_API_KEY"):
            ServeSettings(host=host).check_exposure(None)
        ServeSettings(host=host, insecure=True).check_exposure(None)
        ServeSettings(host=host).check_exposure("key")
    with pytest.raises(InputError, match="db and chroma were both given"):
        ServeSettings(db="a", chroma="http://localhost")
    for wrong in ("localhost:8000", "ftp://a", "http://a:b"):
        with pytest.raises(InputError, match="chroma is"):
            ServeSettings(chroma=wrong)
    assert ServeSettings(chroma="https://c.example").chroma_address() == ("c.example", 443, True)


def test_too_much_at_once_is_refused_and_what_waits_is_dropped(pico: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request is in the decoder, one before it, one in the queue of the server: the next one is refused at once.

    Over the deadline all three are told so, and the two that waited never reach the decoder.
    """
    passes: list[int] = []
    real = pico.backbone.decode
    monkeypatch.setattr(pico.backbone, "decode", lambda *a: passes.append(len(a[0])) or real(*a))
    with running(opened(pico), threads=2, queue=3, timeout=1.5) as url, ThreadPoolExecutor(4) as pool:
        passes.clear()
        with held_decoder(pico, monkeypatch):
            jobs = []
            for number in (1, 2, 3):
                jobs.append(pool.submit(PLAIN.post, f"{url}/v2/rerank", json=GOOD | {"top_n": number}))
                until(lambda n=number: f"kalm_rag_queue_length {n}.0" in PLAIN.get(f"{url}/metrics").text)
            busy = PLAIN.post(f"{url}/v2/rerank", json=GOOD)
            assert (busy.status_code, busy.headers["retry-after"], busy.json()["error"]) == (429, "1", "busy")
            assert PLAIN.get(f"{url}/health").status_code == 200, "the loop is free"
            late = [job.result() for job in jobs]
            assert [(one.status_code, one.json()["error"]) for one in late] == [(504, "deadline")] * 3
        until(lambda: "kalm_rag_queue_length 0.0" in PLAIN.get(f"{url}/metrics").text)
        assert passes == [len(TEXTS)], "of the one that was in the decoder"
        assert PLAIN.post(f"{url}/v2/rerank", json=GOOD).status_code == 200


def test_who_goes_away_is_not_waited_for(pico: Reranker, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request is in the decoder; the one behind it is dropped when its client goes."""
    passes: list[int] = []
    with running(opened(pico)) as url, ThreadPoolExecutor(1) as pool:

        def length(number: int) -> bool:
            return f"kalm_rag_queue_length {number}.0" in PLAIN.get(f"{url}/metrics").text

        with held_decoder(pico, monkeypatch):
            held = pico.backbone.decode
            monkeypatch.setattr(pico.backbone, "decode", lambda *a: passes.append(len(a[0])) or held(*a))
            first = pool.submit(PLAIN.post, f"{url}/v2/rerank", json=GOOD)
            until(lambda: passes)
            with pytest.raises(httpx.ReadTimeout):
                PLAIN.post(f"{url}/v2/rerank", json=GOOD | {"documents": TEXTS[:2]}, timeout=0.5)
            until(lambda: 'route="/v2/rerank",status="499"' in PLAIN.get(f"{url}/metrics").text)
        assert first.result().status_code == 200
        until(lambda: length(0))
        assert passes == [len(TEXTS)]


def test_a_search_may_come_back_in_retrieval_order(own: httpx.Client, pico: Reranker, monkeypatch) -> None:
    with held_decoder(pico, monkeypatch):
        told = own.post("/v1/search", json={"query": QUERY, "timeout": 0.1, "on_error": "retrieval_order"})
        late = own.post("/v1/search", json={"query": QUERY, "timeout": 0.1})
    assert (told.status_code, told.json()["status"][:22]) == (200, "skipped: DeadlineError")
    assert [hit["retrieval_rank"] for hit in told.json()["hits"]] == [1, 2, 3, 4]
    assert late.status_code == 504


def test_no_collection_and_missing_states(own: httpx.Client, pico: Reranker) -> None:
    with running(Door(), max_documents=20) as url, httpx.Client(base_url=url, timeout=30, verify=False) as bare:
        assert bare.post("/v2/rerank", json=GOOD).status_code == 200
        for method, path, body in (
            ("POST", "/v1/search", {"query": QUERY}),
            ("POST", "/v2/rerank", GOOD | {"documents": [{"id": "a"}]}),
            ("PUT", "/v1/passages", {"passages": [{"id": "a", "text": "b"}]}),
        ):
            answer = bare.request(method, path, json=body)
            assert (answer.status_code, answer.json()["error"]) == (404, "no_collection")
        assert bare.get("/v1/collections").status_code == 404
    assert own.post("/v1/search", json={"query": QUERY, "missing": "raise"}).status_code == 200


def test_the_log_holds_no_text(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    secrets = {"query": "hush question", "documents": ["hush document"], "instruction": "hush task"}

    def told_lines() -> list[dict[str, Any]]:
        """Lines are written behind the answer; one of the fixtures' may still come."""
        told = [json.loads(JsonLines().format(record)) for record in caplog.records]
        return [line for line in told if line.get("route") != "/ready"]

    with caplog.at_level(logging.INFO, logger="kalm_rag"):
        answer = client.post("/v2/rerank?q=hush", json=secrets)
        client.post("/hush", json={"hush": 1})
        client.post("/v2/rerank", json=secrets | {"top_n": "hush"})
        until(lambda: sum(line["message"] == "request" for line in told_lines()) == 3)
    lines = told_lines()
    assert "hush" not in json.dumps(lines)
    told = next(line for line in lines if line.get("request") == answer.headers["x-request-id"])
    assert (told["route"], told["status"], told["encoded"], told["level"]) == ("/v2/rerank", 200, 1, "info")
    assert {"fetch", "encode", "score"} <= set(told["seconds"])
    assert {line["route"] for line in lines if "route" in line} == {"/v2/rerank", "other"}
    try:
        raise ValueError("hush")
    except ValueError:
        record = logging.LogRecord("kalm_rag", logging.ERROR, "", 1, "failed", None, sys.exc_info())
    line = json.loads(JsonLines().format(record))
    assert (line["error"], line["at"][-1].split(":")[0]) == ("ValueError", __file__)
    assert "hush" not in json.dumps(line)


def test_a_bug_is_told_without_its_words(pico: Reranker) -> None:
    class Broken(Door):
        def collections(self) -> Any:
            raise ZeroDivisionError("secret")

    with running(Broken(opened(pico).index)) as url:
        answer = PLAIN.get(f"{url}/v1/collections")
    assert (answer.status_code, answer.json()["error"]) == (500, "bug")
    assert "secret" not in answer.text


def test_a_model_that_is_not_there(tmp_path) -> None:
    """The server runs and says so, and tries again when it is asked whether it is ready."""
    with running(Door.open(ServeSettings(model=str(tmp_path / "model"))), ready=503) as url:
        answer = PLAIN.post(f"{url}/v2/rerank", json=GOOD)
        assert (answer.status_code, answer.json()["error"]) == (503, "unavailable")
        assert PLAIN.get(f"{url}/ready").status_code == 503


names = st.sampled_from(
    ["query", "documents", "texts", "top_n", "where", "instruction", "ids", "passages", "id", "text"]
)
words = st.one_of(st.text(max_size=20), st.sampled_from([QUERY, *IDS, "\ud800", "\x00", "$and"]))
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words, st.sampled_from([10**400, -1, 0]))
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names | words, inner, max_size=4), max_leaves=8
)
likely = st.one_of(words, st.lists(st.one_of(words, st.fixed_dictionaries({"id": words}), values), max_size=4))
bodies = st.one_of(
    values,
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("documents", "texts"), likely),
            **dict.fromkeys(
                ("top_n", "fetch_k", "max_tokens_per_doc", "ratio", "threshold", "return_documents"), leaves
            ),
            **dict.fromkeys(("query", "instruction", "system", "missing", "on_error"), words | values),
            **dict.fromkeys(("where", "where_document"), values),
            "passages": st.lists(
                st.dictionaries(st.sampled_from(["id", "text", "metadata"]), likely | values), max_size=3
            ),
            "ids": likely,
        },
    ),
    st.fixed_dictionaries({"query": words, "documents": likely}, optional={"top_n": leaves, "instruction": words}),
    st.fixed_dictionaries({"query": words, "where": values}, optional={"fetch_k": leaves}),
)


@settings(
    max_examples=300,
    database=None,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(
    st.sampled_from(["POST /v2/rerank", "POST /v1/rerank", "POST /rerank", "POST /v1/search", "PUT /v1/passages"]),
    bodies,
)
def test_no_body_breaks_it(own: httpx.Client, route: str, body: Any) -> None:
    method, path = route.split()
    answer = own.request(method, path, content=json.dumps(body).encode(), headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 422), (answer.status_code, answer.text)
    if answer.status_code != 200:
        assert set(answer.json()) == {"error", "message", "field"}
