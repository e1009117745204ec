"""The vector store against a Chroma server."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("langchain_chroma", reason="langchain-chroma is not installed (extra 'langchain')")

from langchain_documents import QUERY, VECTORS, documents
from stores import running_chroma

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.langchain import KaLMChroma


def test_a_collection_on_a_server(tiny: Reranker, tmp_path: Path) -> None:
    """Deleting it left the companion with all its states there; headers stood in the pickle, in clear."""
    with running_chroma(tmp_path) as client:
        place: dict[str, Any] = {"host": "127.0.0.1", "port": client.get_settings().chroma_server_http_port}
        headers = {"X-Token": "s3cret"}
        store = KaLMChroma("docs", VECTORS, **place, reranker=tiny.at(16), headers=headers)
        assert headers == {"X-Token": "s3cret"}, "Chroma adds its own, to a copy"
        store.add_documents(documents())
        wanted = [d.metadata["relevance_score"] for d in store.rerank(QUERY)]
        with pytest.raises(InputError, match="headers may hold secrets, which are not written down"):
            pickle.dumps(store)
        open_to_all = KaLMChroma("docs", VECTORS, **place, reranker=tiny.at(16))
        copied = pickle.loads(pickle.dumps(open_to_all))
        compressor = copied.as_compressor()
        for opened in (store, copied):
            opened.close()
            assert [d.metadata["relevance_score"] for d in opened.rerank(QUERY)] == wanted
            assert opened.verify().clean
        assert compressor.compress_documents(documents(), QUERY)
        with pytest.raises(InputError, match="uses a live KaLMChroma in memory or on a server"):
            pickle.dumps(compressor)
        assert len(client.list_collections()) == 2, "the records and the states"
        store.delete_collection()
        assert client.list_collections() == []
        for opened in (store, copied, open_to_all):
            opened.close()
