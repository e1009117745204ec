"""A retriever in two phases over any LangChain vector store: candidates by vector, the best of them by the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import ensure_config, run_in_executor
from langchain_core.vectorstores import VectorStore
from pydantic import ConfigDict, Field, StrictInt, field_validator, model_validator
from typing_extensions import Self

from kalm_rag.checks import check_cut, check_query
from kalm_rag.errors import InputError
from kalm_rag.instructions import Instructions, as_instructions
from kalm_rag.langchain.compressor import CONFIG_KEY, RETRIEVAL_SCORE, KaLMDocumentCompressor
from kalm_rag.store import Reference


@runtime_checkable
class KeepsStates(Protocol):
    """A vector store with states beside its vectors."""

    def as_compressor(self) -> KaLMDocumentCompressor:
        """What scores its documents."""
        ...

    def references(self, documents: Sequence[Document]) -> list[Reference]:
        """Records behind documents that a search gave."""
        ...


class KaLMRetriever(BaseRetriever):
    """Takes `fetch_k` candidates from a vector store and gives the `k` that the decoder finds most relevant.

    Over a `KaLMChroma` the candidates' stored states are used. Over any other vector store (or with a `compressor` of
    yours) states come from the compressor's store, or from memory. ``invoke`` takes `k`, `fetch_k`, `filter`,
    `instructions` and `threshold` for one call, too, and so does ``config["configurable"]["kalm_instructions"]``.

    Args:
        vectorstore: Where candidates come from.
        k: Documents wanted, >= 1.
        fetch_k: Candidates, >= 1; at least `k` are taken.
        instructions: `Instructions`, a task as a string, or the app's prompt or chain.
        threshold: Keep only P(yes) >= this.
        ratio: A multiple of the stored ratio to score at; None takes the stored one.
        filter: The vector store's own filter.
        search_kwargs: Further arguments of its ``similarity_search``.
        compressor: What scores; None takes the vector store's own, or else pico.
        keep_retrieval_score: Keep the vector store's score (Chroma: a distance, lower is nearer) and rank.

    Raises:
        pydantic.ValidationError: If an argument is unknown or out of range.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    vectorstore: VectorStore
    k: StrictInt = 4
    fetch_k: StrictInt = 50
    instructions: Instructions | None = None
    threshold: float | None = None
    ratio: StrictInt | None = None
    filter: Any = None
    search_kwargs: dict[str, Any] = Field(default_factory=dict)
    compressor: KaLMDocumentCompressor | None = None
    keep_retrieval_score: bool = False

    @field_validator("instructions", mode="before")
    @classmethod
    def _read_instructions(cls, value: object) -> Instructions | None:
        return as_instructions(value)

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        _check_counts(self.k, self.fetch_k)
        check_cut(None, self.threshold)
        if taken := sorted({"k", "fetch_k", "query"} & self.search_kwargs.keys()):
            raise InputError(
                f"search_kwargs has {', '.join(taken)}; give k (documents wanted) and fetch_k (candidates) to "
                f"KaLMRetriever itself."
            )
        return self

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:  # noqa: ANN401
        """Retrieve and rerank; see the class for what `kwargs` may hold."""
        return super().invoke(input, config, **_with_configured(config, kwargs))

    async def ainvoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:  # noqa: ANN401
        """Retrieve and rerank without holding up the event loop."""
        return await super().ainvoke(input, config, **_with_configured(config, kwargs))

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = None,
        fetch_k: int | None = None,
        filter: Any = None,  # noqa: ANN401 - each vector store has its own kind
        instructions: object = None,
        threshold: float | None = None,
    ) -> list[Document]:
        candidates, references, compressor = self._candidates(query, k, fetch_k, filter, instructions, threshold)
        return compressor.run(candidates, query, {"callbacks": run_manager.get_child()}, references)

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = None,
        fetch_k: int | None = None,
        filter: Any = None,  # noqa: ANN401 - each vector store has its own kind
        instructions: object = None,
        threshold: float | None = None,
    ) -> list[Document]:
        search = partial(self._candidates, query, k, fetch_k, filter, instructions, threshold)
        candidates, references, compressor = await run_in_executor(None, search)
        return await compressor.arun(candidates, query, {"callbacks": run_manager.get_child()}, references)

    def _candidates(
        self,
        query: str,
        k: int | None,
        fetch_k: int | None,
        filter: Any,  # noqa: ANN401
        instructions: object,
        threshold: float | None,
    ) -> tuple[list[Document], Sequence[Reference], KaLMDocumentCompressor]:
        """Candidates of one call, references for their states, and the compressor set up for it."""
        check_query(query)
        k, fetch_k = k if k is not None else self.k, fetch_k if fetch_k is not None else self.fetch_k
        _check_counts(k, fetch_k)
        threshold = threshold if threshold is not None else self.threshold
        check_cut(k, threshold)
        search = dict(self.search_kwargs)
        chosen = filter if filter is not None else self.filter
        if chosen is not None:
            search["filter"] = chosen
        candidates = self._search(query, max(k, fetch_k), search)
        own = _own(self.vectorstore)
        references = own.references(candidates) if own is not None else []
        told = as_instructions(instructions)
        given = {
            "instructions": told if told is not None else self.instructions,
            "threshold": threshold,
            "ratio": self.ratio,
        }
        changes: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return candidates, references, self._compressor().model_copy(update={**changes, "top_n": k})

    def _search(self, query: str, count: int, search: dict[str, Any]) -> list[Document]:
        if not self.keep_retrieval_score:
            return self.vectorstore.similarity_search(query, k=count, **search)
        return [
            document.model_copy(
                update={"metadata": {**document.metadata, RETRIEVAL_SCORE: float(score), "retrieval_rank": place}}
            )
            for place, (document, score) in enumerate(
                self.vectorstore.similarity_search_with_score(query, k=count, **search), start=1
            )
        ]

    def _compressor(self) -> KaLMDocumentCompressor:
        if self.compressor is not None:
            return self.compressor
        own = _own(self.vectorstore)
        return own.as_compressor() if own is not None else KaLMDocumentCompressor()


def _own(vectorstore: VectorStore) -> KeepsStates | None:
    """The vector store if it keeps states of its own, as `KaLMChroma` does."""
    return vectorstore if isinstance(vectorstore, KeepsStates) else None


def _with_configured(config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call, with the instructions that its config, or that of the running chain, carries."""
    configured = (ensure_config(config).get("configurable") or {}).get(CONFIG_KEY)
    return kwargs if configured is None else {"instructions": configured, **kwargs}


def _check_counts(k: int, fetch_k: int) -> None:
    for name, value in (("k", k), ("fetch_k", fetch_k)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name} is {value!r}; wanted a whole number >= 1.")
