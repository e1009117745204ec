"""The clients that people have, pointed at the server: each gets the order and the scores of the engine.

`huggingface_hub` has no method for reranking, so nothing of it can be pointed here.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from serving import QUERY, TEXTS

from kalm_rag import Reranker

KEY = "any"  # the server of these tests has none; some clients must be given one


@pytest.fixture(scope="module")
def best(pico: Reranker) -> list[tuple[str, float]]:
    return [(TEXTS[one.index], one.probability) for one in pico.rank(QUERY, TEXTS, top_n=3)]


def named(results: Any) -> list[tuple[str, float]]:
    """Texts and scores, of objects or mappings with an index."""
    pairs = [
        (r["index"], r["relevance_score"]) if isinstance(r, dict) else (r.index, r.relevance_score) for r in results
    ]
    return [(TEXTS[index], score) for index, score in pairs]


def test_cohere(url: str, best: list[tuple[str, float]]) -> None:
    cohere = pytest.importorskip("cohere", reason="needs cohere (extra 'recipes')")
    for client in (cohere.ClientV2(KEY, base_url=url), cohere.Client(KEY, base_url=url)):
        answer = client.rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS, top_n=3)
        assert named(answer.results) == best
        assert answer.id
        with pytest.raises(cohere.UnprocessableEntityError, match="top_n"):
            client.rerank(model="rerank-v3.5", query=QUERY, documents=TEXTS, top_n=-1)
    answer = asyncio.run(_later(cohere.AsyncClientV2(KEY, base_url=url)))
    assert named(answer.results) == best
    shown = cohere.Client(KEY, base_url=url).rerank(query=QUERY, documents=[{"text": t} for t in TEXTS], top_n=3)
    assert [one.document.text for one in shown.results] == [text for text, _ in best]


async def _later(client: Any) -> Any:
    return await client.rerank(model="m", query=QUERY, documents=TEXTS, top_n=3, max_tokens_per_doc=4096)


def test_langchain_cohere(url: str, best: list[tuple[str, float]]) -> None:
    rerank = pytest.importorskip("langchain_cohere.rerank", reason="needs langchain-cohere (extra 'recipes')")
    documents = pytest.importorskip("langchain_core.documents")
    compressor = rerank.CohereRerank(model="any", base_url=url, cohere_api_key=KEY, top_n=3)
    found = compressor.compress_documents([documents.Document(text) for text in TEXTS], QUERY)
    assert [(one.page_content, one.metadata["relevance_score"]) for one in found] == best


def llama_nodes() -> list[Any]:
    schema = pytest.importorskip("llama_index.core.schema", reason="needs llama-index-core (extra 'llama-index')")
    return [schema.NodeWithScore(node=schema.TextNode(text=text), score=0.5) for text in TEXTS]


def of_nodes(postprocessor: Any) -> list[tuple[str, float]]:
    return [(one.node.text, one.score) for one in postprocessor.postprocess_nodes(llama_nodes(), query_str=QUERY)]


def test_llama_index_cohere(url: str, best: list[tuple[str, float]]) -> None:
    module = pytest.importorskip("llama_index.postprocessor.cohere_rerank", reason="in the extra 'recipes'")
    assert of_nodes(module.CohereRerank(api_key=KEY, base_url=url, top_n=3)) == best


def test_llama_index_tei(url: str, best: list[tuple[str, float]]) -> None:
    module = pytest.importorskip("llama_index.postprocessor.tei_rerank", reason="in the extra 'recipes'")
    assert of_nodes(module.TextEmbeddingInference(base_url=url, top_n=3)) == best


def test_llama_index_jina(url: str, best: list[tuple[str, float]]) -> None:
    module = pytest.importorskip("llama_index.postprocessor.jinaai_rerank", reason="in the extra 'recipes'")
    assert of_nodes(module.JinaRerank(api_key=KEY, base_url=f"{url}/v1", top_n=3)) == best


@pytest.mark.parametrize("provider", ["cohere", "jina_ai", "hosted_vllm", "infinity", "huggingface"])
def test_litellm(url: str, best: list[tuple[str, float]], provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LiteLLM knows Cohere's, Jina's, vLLM's, Infinity's and TEI's servers.

    Infinity gives documents back as bare strings, under the path that vLLM gives objects; so it is asked for none.
    """
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network at import
    litellm = pytest.importorskip("litellm", reason="needs litellm (extra 'recipes')")
    answer = litellm.rerank(
        model=f"{provider}/any",
        query=QUERY,
        documents=TEXTS,
        top_n=3,
        api_base=url,
        api_key=KEY,
        return_documents=provider != "infinity",
    )
    assert named(answer.results)[: len(best)] == best
