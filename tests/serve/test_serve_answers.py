"""What the routes answer: the shapes of others to the byte, the engine's own scores, stored states for ids."""

from __future__ import annotations

import copy
from typing import Any

import httpx
import pytest
from serving import IDS, QUERY, TEXTS

from kalm_rag import Instructions, Reranker
from kalm_rag.engine import encoder_pass
from kalm_rag.index.clients import WRITER_FILE
from kalm_rag.serve.door import Door

BY_ID = [{"id": one} for one in IDS]


def post(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def wanted(pico: Reranker, texts: list[str] = TEXTS, **options: Any) -> list[tuple[int, float]]:
    return [(one.index, one.probability) for one in pico.rank(QUERY, texts, **options)]


def scores(results: list[dict[str, Any]], score: str = "relevance_score") -> list[tuple[int, float]]:
    return [(one["index"], one[score]) for one in results]


def test_cohere_v2(client: httpx.Client, pico: Reranker) -> None:
    answer = post(client, "/v2/rerank", model="rerank-v3.5", query=QUERY, documents=TEXTS, top_n=2)
    assert set(answer) == {"id", "results", "meta"}
    assert scores(answer["results"]) == wanted(pico)[:2], "to the last bit"
    assert set(answer["results"][0]) == {"index", "relevance_score"}
    assert answer["meta"]["api_version"] == {"version": "2"}
    assert answer["meta"]["tokens"]["input_tokens"] == sum(one.tokens for one in pico.encode(TEXTS))


def test_v1_as_jina_cohere_and_vllm_have_it(client: httpx.Client, pico: Reranker) -> None:
    documents = [TEXTS[0], {"text": TEXTS[1], "title": "ignored"}, *TEXTS[2:]]
    answer = post(client, "/v1/rerank", model="jina-reranker-v2", query=QUERY, documents=documents)
    assert set(answer) == {"id", "model", "object", "usage", "results", "meta"}
    assert answer["model"] == "pico"
    assert answer["usage"]["total_tokens"] == sum(one.tokens for one in pico.encode(TEXTS))
    assert scores(answer["results"]) == wanted(pico)
    assert [one["document"]["text"] for one in answer["results"]] == [TEXTS[i] for i, _ in wanted(pico)]
    bare = post(client, "/v1/rerank", query=QUERY, documents=TEXTS, return_documents=False)
    assert set(bare["results"][0]) == {"index", "relevance_score"}
    vllm = post(client, "/rerank", query=QUERY, documents=TEXTS)
    assert vllm["results"] == answer["results"], "vLLM and Infinity have it under this path, too"


def test_tei(client: httpx.Client, pico: Reranker) -> None:
    answer = post(client, "/rerank", query=QUERY, texts=TEXTS)
    assert scores(answer, "score") == wanted(pico)
    assert set(answer[0]) == {"index", "score"}
    raw = post(client, "/rerank", query=QUERY, texts=TEXTS, raw_scores=True, return_text=True, truncate=False)
    assert scores(raw, "score") == [(one.index, one.margin) for one in pico.rank(QUERY, TEXTS)]
    assert [one["text"] for one in raw] == [TEXTS[one["index"]] for one in raw]
    long = client.post("/rerank", json={"query": QUERY, "texts": ["short", "a " * 2400], "truncate": False})
    assert (long.status_code, long.json()["field"]) == (422, "texts[1]")


@pytest.mark.parametrize("field", ["instruction", "instruct"])
def test_instructions_steer(client: httpx.Client, pico: Reranker, field: str) -> None:
    steered = post(
        client, "/v1/rerank", query=QUERY, documents=TEXTS, system="You sell tea.", **{field: "Find drinks."}
    )
    told = Instructions(system="You sell tea.", task="Find drinks.")
    assert scores(steered["results"]) == wanted(pico, instructions=told)
    assert scores(steered["results"]) != wanted(pico)


def test_ids_are_scored_from_the_stored_states(
    client: httpx.Client, pico: Reranker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No text over the wire, no encoder pass: the scores are those of the texts."""
    passes: list[int] = []
    encode_rows = encoder_pass.encode_rows
    monkeypatch.setattr(encoder_pass, "encode_rows", lambda *a: passes.append(len(a[1])) or encode_rows(*a))
    for path, key in (("/v2/rerank", "documents"), ("/v1/rerank", "documents"), ("/rerank", "texts")):
        response = client.post(path, json={"query": QUERY, key: BY_ID})
        results = response.json() if path == "/rerank" else response.json()["results"]
        assert scores(results, "score" if path == "/rerank" else "relevance_score") == wanted(pico, TEXTS)
        assert (response.headers["x-states-stored"], response.headers["x-states-encoded"]) == ("4", "0")
        assert "fetch;dur=" in response.headers["server-timing"]
    assert passes == [4, 4, 4], "those of the engine, for comparison"
    shown = post(client, "/v2/rerank", query=QUERY, documents=BY_ID, return_documents=True)
    assert [one["document"]["text"] for one in shown["results"]] == [TEXTS[one["index"]] for one in shown["results"]]
    mixed = post(client, "/v2/rerank", query=QUERY, documents=[BY_ID[1], TEXTS[0], {"text": TEXTS[2]}, BY_ID[1]])
    assert sorted(one["index"] for one in mixed["results"]) == [0, 1, 2, 3]
    assert mixed["results"][0]["relevance_score"] == mixed["results"][1]["relevance_score"], "the same one twice"


def test_texts_are_encoded_once(client: httpx.Client) -> None:
    texts = ["A text that nobody sent before.", "Another one of that kind."]
    told = [
        client.post("/v2/rerank", json={"query": QUERY, "documents": texts}).headers["x-states-encoded"]
        for _ in range(2)
    ]
    assert told == ["2", "0"]


def test_a_text_may_be_cut(client: httpx.Client, pico: Reranker) -> None:
    """What is not in one batch with what differs by rounding."""
    text = "Tea is a drink made of leaves. Paris is the capital of France."
    for most, read in ((7, "Tea is a drink made of leaves"), (4096, text)):
        cut = post(client, "/v2/rerank", query=QUERY, documents=[text, "No tea."], max_tokens_per_doc=most)
        for (place, score), (same, want) in zip(scores(cut["results"]), wanted(pico, [read, "No tea."]), strict=True):
            assert (place, score) == (same, pytest.approx(want, rel=1e-5))
    refused = client.post("/v2/rerank", json={"query": QUERY, "documents": BY_ID, "max_tokens_per_doc": 7})
    assert (refused.status_code, refused.json()["field"]) == (422, "max_tokens_per_doc")


def test_search_is_that_of_the_index(client: httpx.Client, door: Door) -> None:
    options = {"top_n": 2, "fetch_k": 3, "where": {"kind": {"$ne": "land"}}}
    answer = post(client, "/v1/search", query=QUERY, instruction="Find the city.", **options)
    found = door.index.query(QUERY, instructions="Find the city.", **options)
    same = ("hits", "candidates", "from_store", "encoded", "status", "model", "fingerprint", "left_out")
    assert {key: answer[key] for key in same} == {key: found.to_dict()[key] for key in same}
    assert answer["hits"][0]["id"] == "paris"
    assert set(answer["seconds"]) == {"embed", "search", "fetch", "score"}
    few = post(client, "/v1/search", query=QUERY, top_n=None, threshold=0.5, drop_duplicates=True, max_tokens=500)
    assert all(hit["probability"] >= 0.5 for hit in few["hits"])


def test_passages_come_and_go(client: httpx.Client) -> None:
    honey = {"id": "honey", "text": "Bees make honey.", "metadata": {"kind": "food", "legs": 6}}
    sent = copy.deepcopy(honey)
    put = client.put(
        "/v1/passages", json={"passages": [honey, {"id": "wax", "text": "Bees make wax. The sea is wide and blue."}]}
    )
    assert (put.status_code, put.json()["records"], put.json()["encoded"]) == (200, 2, 2)
    again = client.put("/v1/passages", json={"passages": [honey]}).json()
    assert (again["records"], again["unchanged"]) == (0, 1)
    found = post(client, "/v1/search", query="What do bees make?", top_n=1)
    assert (found["hits"][0]["text"], found["encoded"]) == ("Bees make honey.", 0)
    assert {key: found["hits"][0][key] for key in sent} == sent
    short = post(client, "/v1/search", query="Who makes wax?", top_n=1, prune=1.5)["hits"][0]
    assert (short["id"], short["kept"]) == ("wax", [[0, 14]])
    listed = client.get("/v1/collections").json()["collections"]
    assert [(one["name"], one["records"], one["served"]) for one in listed] == [("passages", 6, True)]
    gone = client.request("DELETE", "/v1/passages", json={"ids": ["honey", "wax", "nobody"]})
    assert gone.json() == {"deleted": 2}
    refused = client.post("/v2/rerank", json={"query": QUERY, "documents": ["text", {"id": "honey"}]})
    assert (refused.status_code, refused.json()["field"]) == (422, "documents[1]")


def test_what_another_process_wrote_is_seen(door: Door, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers share a folder; each has its own view of it, which is opened again once the note of the writer is new."""
    database = door.index.home.database
    before = database.client
    monkeypatch.setattr("kalm_rag.serve.door.LOOK_SECONDS", -1.0)
    for note, anew in (("other begun", False), ("other done", True)):
        (database.folder / WRITER_FILE).write_text(note)
        assert database.outdated is anew
        assert post(client, "/v1/search", query=QUERY)["hits"][0]["id"] == "paris"
        assert (database.client is not before) is anew
    assert not database.outdated


def test_health_and_counts(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}
    post(client, "/v2/rerank", query=QUERY, documents=BY_ID)
    text = client.get("/metrics").text
    value = {
        name: float(number) for name, number in (line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    }
    assert value['kalm_rag_requests_total{route="/v2/rerank",status="200"}'] >= 1
    assert value['kalm_rag_states_total{source="stored"}'] >= 4
    assert value['kalm_rag_stage_seconds_count{stage="score"}'] >= 1
    assert value["kalm_rag_queue_length"] == 0


def test_openapi_tells_the_routes(client: httpx.Client) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    routes = {f"{method.upper()} {path}" for path, methods in paths.items() for method in methods}
    assert routes == {
        *("POST /v2/rerank", "POST /v1/rerank", "POST /rerank", "POST /v1/search", "POST /v1/explain"),
        *(
            "PUT /v1/passages",
            "DELETE /v1/passages",
            "GET /v1/collections",
            "GET /health",
            "GET /ready",
            "GET /metrics",
        ),
    }
    assert client.get("/docs").status_code == 404, "a page that fetches scripts from elsewhere"
    assert "access-control-allow-origin" not in client.get("/health", headers={"Origin": "http://evil"}).headers
