"""Documents, traces and stores that the tests of the LangChain adapter share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding

from kalm_rag.states import Layout
from kalm_rag.store import Fetched
from kalm_rag.store.memory import MemoryStore

TEXTS = ["Cats sleep a lot.", "Rain falls in May.", "Steel rusts.", "Bees make honey.", "Lisbon lies on the Tagus."]
QUERY = "what do bees make?"
VECTORS = DeterministicFakeEmbedding(size=6)


def documents(texts: Sequence[str] = TEXTS) -> list[Document]:
    return [Document(t, id=f"id-{i}", metadata={"place": i, "tags": ["a"]}) for i, t in enumerate(texts)]


class Trace(BaseCallbackHandler):
    """Counts what starts and what ends."""

    def __init__(self) -> None:
        self.started: dict[Any, tuple[str, Any, Any]] = {}
        self.ended: dict[Any, Any] = {}
        self.failed: dict[Any, BaseException] = {}

    def _start(self, serialized: Any, inputs: Any, *, run_id: Any, parent_run_id: Any = None, **kwargs: Any) -> None:
        self.started[run_id] = (kwargs.get("name") or "", inputs, parent_run_id)

    def _end(self, outputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.ended[run_id] = outputs

    def _error(self, error: BaseException, *, run_id: Any, **kwargs: Any) -> None:
        self.failed[run_id] = error

    on_chain_start = on_retriever_start = _start
    on_chain_end = on_retriever_end = _end
    on_chain_error = on_retriever_error = _error

    def of(self, name: str) -> list[Any]:
        return [run for run, (found, _, _) in self.started.items() if found == name]

    def paired(self) -> bool:
        return self.started.keys() == self.ended.keys() ^ self.failed.keys()


class Waiting(MemoryStore):
    """A store that answers when it is told to: `asked` is set while somebody waits for it."""

    def __init__(self, layout: Layout) -> None:
        super().__init__(layout)
        self.asked, self.answer = threading.Event(), threading.Event()

    def get_many(self, keys: Sequence[str]) -> Fetched:
        self.asked.set()
        assert self.answer.wait(60), "nobody let the store go on"
        return super().get_many(keys)
