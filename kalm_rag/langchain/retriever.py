"""A retriever in two phases over any LangChain vector store: candidates by vector, the best of them by the decoder."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from inspect import signature
from typing import Any, Literal, Protocol, runtime_checkable

from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import ConfigurableFieldSpec, RunnableConfig
from langchain_core.runnables.config import ensure_config, run_in_executor
from langchain_core.vectorstores import VectorStore
from pydantic import ConfigDict, Field, StrictInt, field_serializer, field_validator, model_validator
from typing_extensions import Self

from kalm_rag.checks import check_count, check_cut, check_text
from kalm_rag.engine.prepared import PreparedQuery
from kalm_rag.errors import InputError
from kalm_rag.index.settings import ByName, SelectionFields
from kalm_rag.instructions import AnyInstructions, Instructions, as_instructions
from kalm_rag.langchain.compressor import RETRIEVAL_RANK, RETRIEVAL_SCORE, KaLMDocumentCompressor
from kalm_rag.langchain.inputs import CONFIG_SPECS, DEFAULT_TOP_N, FILTER_KEY, check_names, configured

logger = logging.getLogger(__name__)

_MMR_POOL = 5
"""Of how many times as many documents ``"mmr"`` chooses its candidates, as LangChain's own 20 for 4."""

_OWN: Any = object()
"""Stands for the retriever's own k, filter and threshold in a call that doesn't say: None lifts them."""

_TAKEN_OVER = (*SelectionFields.model_fields, "threshold", "keep_score")
"""What is the compressor's where the retriever was not told."""


@runtime_checkable
class KeepsStates(Protocol):
    """A vector store with states beside its vectors."""

    def as_compressor(self) -> KaLMDocumentCompressor:
        """What scores its documents."""
        ...

    def check_embedder(self) -> None:
        """Refuse to search by other vectors than the collection's."""
        ...

    def search_prepared(
        self,
        instructions: Instructions | None,
        *,
        query: str,
        **search: Any,  # noqa: ANN401
    ) -> tuple[PreparedQuery, Sequence[tuple[Document, float]]] | None:
        """Documents with their scores, and the query as the decoder takes it; None where that saves nothing."""
        ...


class KaLMRetriever(ByName, SelectionFields, BaseRetriever):
    """Takes `fetch_k` candidates from a vector store and gives the `k` that the decoder finds most relevant.

    Over a `KaLMChroma` the candidates' stored states are used. Over any other vector store (or with a `compressor` of
    yours) states come from the compressor's store, or from memory. ``invoke`` (and ``bind``) takes `k`, `fetch_k`,
    `filter`, `instructions` and `threshold` for one call, too; None there lifts `k`, a filter or a threshold. So does
    ``config["configurable"]``, under ``kalm_top_n``, ``kalm_threshold``, ``kalm_filter`` and ``kalm_instructions``:
    what it says holds for every step of ours in a chain; for one of them use ``configurable_fields``.
    What a call says goes before what its config says, that before what the retriever was told by name (False and None,
    too), and that before what the compressor says.

    Behind a retriever that asks several times and compares whole documents (``MultiQueryRetriever``), each question's
    own ``relevance_score`` makes one document look like several. Put the reranking outside, so that it is done once,
    for the user's question: ``ContextualCompressionRetriever(base_compressor=store.as_compressor(),
    base_retriever=MultiQueryRetriever.from_llm(store.as_retriever(), llm))``. Or take ``keep_score=False``.

    Args:
        vectorstore: Where candidates come from.
        k: Documents wanted, >= 1; None for all candidates. Not given, it is the `top_n` that the compressor was given,
            or else the same default.
        fetch_k: Candidates, >= 1; at least `k` are taken.
        instructions: `Instructions`, a task as a string, or the app's prompt or chain.
        threshold: Keep only P(yes) >= this.
        ratio: A multiple of the stored ratio to score at; None takes the stored one.
        filter: The vector store's own filter.
        search_type: ``"similarity"``, or ``"mmr"``: the vector store's ``max_marginal_relevance_search``, which gives
            candidates that are unlike each other. The decoder then orders them by relevance alone.
        search_kwargs: Further arguments of the search. A vector store with a ``fetch_k`` of its own (FAISS looks at so
            many, then filters) is told at least the number of candidates, for ``"mmr"`` 5 times as many; more by
            ``search_kwargs={"fetch_k": 1000}``.
        compressor: What scores; None takes the vector store's own, or else pico.
        keep_score: Give ``relevance_score`` = P(yes) in the metadata. False leaves it out.
        keep_retrieval_score: Keep the vector store's score (Chroma: a distance, lower is nearer; none with ``"mmr"``)
            and rank.
        max_tokens: Most tokens of all documents together; see `KaLMDocumentCompressor`, as for the next seven. What is
            not named is the compressor's; so are `threshold` and `keep_score`.
        count_tokens: Counts the tokens of a text.
        drop_duplicates: Leave out documents that repeat a better one.
        diversity: How much a document loses for being like others, in [0, 1).
        prune: Leave out sentences that don't answer.
        on_error: ``"raise"`` or ``"retrieval_order"``, if the ranking fails; errors of the search are raised.
        timeout: Most seconds for loading and ranking.
        details: Give ``rerank_details`` in the metadata.

    Raises:
        pydantic.ValidationError: If an argument is unknown or out of range, or `k` and the compressor's `top_n` were
            both given and differ.

    Example:
        >>> from langchain_core.vectorstores import InMemoryVectorStore
        >>> from kalm_rag.langchain import KaLMEmbeddings
        >>> vectors = InMemoryVectorStore(KaLMEmbeddings())
        >>> ids = vectors.add_texts(["I like tea.", "Paris is the capital of France.", "France borders Spain."])
        >>> retriever = KaLMRetriever(vectorstore=vectors, k=1, instructions="Find the city.")
        >>> retriever.invoke("What is the capital of France?")[0].page_content
        'Paris is the capital of France.'
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    vectorstore: VectorStore
    k: StrictInt | None = DEFAULT_TOP_N
    fetch_k: StrictInt = 50
    instructions: AnyInstructions = None
    threshold: float | None = None
    ratio: StrictInt | None = None
    filter: Any = None
    search_type: Literal["similarity", "mmr"] = "similarity"
    search_kwargs: dict[str, Any] = Field(default_factory=dict)
    compressor: KaLMDocumentCompressor | None = None
    keep_score: bool = True
    keep_retrieval_score: bool = False

    @model_validator(mode="before")
    @classmethod
    def _hint_at_names(cls, values: object) -> object:
        check_names(values if isinstance(values, Mapping) else (), cls.model_fields, cls.__name__)
        return values

    @field_validator("vectorstore", mode="before")
    @classmethod
    def _hint_at_vectorstore(cls, value: object) -> object:
        if isinstance(value, BaseRetriever):
            raise InputError(
                f"vectorstore is the retriever {type(value).__name__}; wanted a vector store. Behind a retriever, use "
                f"ContextualCompressionRetriever(base_compressor=KaLMDocumentCompressor(...), base_retriever=...)."
            )
        return value

    @field_validator("threshold", mode="before")
    @classmethod
    def _check_threshold(cls, value: Any) -> Any:  # noqa: ANN401 - before pydantic makes True 1.0
        check_cut(None, value)
        return value

    @field_validator("instructions", mode="before")
    @classmethod
    def _read_instructions(cls, value: object) -> Instructions | None:
        return as_instructions(value)

    @model_validator(mode="after")
    def _check_settings(self) -> Self:
        if self.compressor is not None and "top_n" in self.compressor.model_fields_set:
            wanted = self.compressor.top_n
            if "k" in self.model_fields_set and self.k != wanted:
                raise InputError(
                    f"k is {self.k} and the compressor's top_n {wanted}; wanted one of them, or the same twice."
                )
            self.k = wanted
            self.compressor = self.compressor.model_copy()
            self.compressor.model_fields_set.discard("top_n")  # it is `k` now, which a call's config may change
        if self.compressor is not None:  # now: a copy that LangChain makes for a call was told all by name
            for name in set(_TAKEN_OVER) - self.model_fields_set:
                self.__dict__[name] = getattr(self.compressor, name)
        check_cut(self.k, None, count="k")
        check_count(self.fetch_k, "fetch_k")
        check_cut(None, self.threshold)
        if taken := sorted({"k", "query"} & self.search_kwargs.keys()):
            raise InputError(f"search_kwargs has {', '.join(taken)}; give k to the retriever itself.")
        if "fetch_k" in self.search_kwargs and self.search_type != "mmr" and _own(self.vectorstore) is not None:
            raise InputError("search_kwargs has fetch_k, which Chroma's search hasn't; give it to the retriever.")
        return self

    @field_serializer("compressor")
    def _write_compressor(self, value: KaLMDocumentCompressor | None) -> dict[str, Any] | None:
        """Settings, with the `top_n` that holds, so that what is read back agrees with `k`."""
        return None if value is None else {**value.model_dump(), "top_n": self.k}

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """What a call's config may carry: ``kalm_instructions``, ``kalm_top_n``, ``kalm_threshold``."""
        return CONFIG_SPECS

    def invoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:  # noqa: ANN401
        """Retrieve and rerank; see the class for what `kwargs` may hold."""
        return super().invoke(input, config, **self._arguments(config, kwargs))

    async def ainvoke(self, input: str, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:  # noqa: ANN401
        """Retrieve and rerank without holding up the event loop."""
        return await super().ainvoke(input, config, **self._arguments(config, kwargs))

    def add_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:  # noqa: ANN401
        """Add documents to the vector store, as LangChain's own retriever does.

        Args:
            documents: Passages.
            **kwargs: Of the vector store's ``add_documents``, ``ids`` for instance.

        Returns:
            Their ids.
        """
        return self.vectorstore.add_documents(documents, **kwargs)

    async def aadd_documents(self, documents: list[Document], **kwargs: Any) -> list[str]:  # noqa: ANN401
        """Add documents without holding up the event loop; see `add_documents`."""
        return await self.vectorstore.aadd_documents(documents, **kwargs)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        k: int | None = _OWN,
        fetch_k: int | None = None,
        filter: Any = _OWN,  # noqa: ANN401 - each vector store has its own kind
        instructions: object = None,
        threshold: float | None = _OWN,
    ) -> list[Document]:
        compressor, search = self._plan(query, k, fetch_k, filter, instructions, threshold)
        found = self._search_own(compressor, search)
        if found is None:
            found = query, getattr(self.vectorstore, self._search_name())(**search)
        candidates = _as_candidates(found[1], search, scored=self.keep_retrieval_score)
        return compressor.run(candidates, found[0], _config(run_manager))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        k: int | None = _OWN,
        fetch_k: int | None = None,
        filter: Any = _OWN,  # noqa: ANN401 - each vector store has its own kind
        instructions: object = None,
        threshold: float | None = _OWN,
    ) -> list[Document]:
        compressor, search = await run_in_executor(None, self._plan, query, k, fetch_k, filter, instructions, threshold)
        found = await run_in_executor(None, self._search_own, compressor, search)
        if found is None:  # its own async methods: a store opened in async mode has no others
            found = query, await getattr(self.vectorstore, f"a{self._search_name()}")(**search)
        candidates = _as_candidates(found[1], search, scored=self.keep_retrieval_score)
        return await compressor.arun(candidates, found[0], _config(run_manager))

    def _arguments(self, config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Arguments of a call, and before them what its config, or that of the running chain, says.

        Raises:
            TypeError: If a call can't say that.
        """
        known = [*signature(self._get_relevant_documents).parameters][1:]
        known.remove("run_manager")
        check_names(kwargs, known, "KaLMRetriever.invoke")
        if unknown := [name for name in kwargs if name not in known]:
            own = " It is an argument of the retriever itself." if unknown[0] in type(self).model_fields else ""
            wanted = ", ".join(known)
            raise TypeError(
                f"KaLMRetriever.invoke got an unexpected keyword argument {unknown[0]!r}; wanted {wanted}.{own}"
            )
        said = configured(config)
        if "top_n" in said:
            said["k"] = said.pop("top_n")
        held = ensure_config(config).get("configurable") or {}
        if FILTER_KEY in held:
            said["filter"] = held[FILTER_KEY]
        return {**said, **kwargs}

    def _plan(
        self,
        query: str,
        k: int | None,
        fetch_k: int | None,
        filter: Any,  # noqa: ANN401
        instructions: object,
        threshold: float | None,
    ) -> tuple[KaLMDocumentCompressor, dict[str, Any]]:
        """The compressor of one call, and the arguments of the vector store's search."""
        changes = self._changes(k, instructions, threshold)
        own = _own(self.vectorstore)
        if own is not None:
            own.check_embedder()
        return self._compressor().model_copy(update=changes), self._search(query, changes["top_n"], fetch_k, filter)

    def _changes(self, k: int | None, instructions: object, threshold: float | None) -> dict[str, Any]:
        """Settings of the compressor that this call, or else the retriever, says otherwise."""
        top_n, least = self.k if k is _OWN else k, self.threshold if threshold is _OWN else threshold
        check_cut(top_n, least, count="k")
        told = as_instructions(instructions)
        said = {"instructions": told if told is not None else self.instructions, "ratio": self.ratio}
        return {
            **{name: getattr(self, name) for name in _TAKEN_OVER},
            "top_n": top_n,
            "threshold": least,
            **{name: value for name, value in said.items() if value is not None},
        }

    def _search(self, query: str, k: int | None, fetch_k: int | None, filter: Any) -> dict[str, Any]:  # noqa: ANN401
        """Arguments of the vector store's search."""
        check_text(query, "query")
        count = check_count(fetch_k if fetch_k is not None else self.fetch_k, "fetch_k")
        count = count if k is None else max(k, count)
        search = {"query": query, "k": count, **self.search_kwargs}
        if filter is not _OWN:
            search.pop("filter", None)
        chosen = self.filter if filter is _OWN else filter
        if chosen is not None:
            search["filter"] = chosen
        own = signature(getattr(self.vectorstore, self._search_name())).parameters.get("fetch_k")
        if own is not None and "fetch_k" not in search:
            pool = count * _MMR_POOL if self.search_type == "mmr" else count
            search["fetch_k"] = max(pool, own.default) if isinstance(own.default, int) else pool
        return search

    def _search_name(self) -> str:
        """The vector store's method that gives candidates."""
        if self.search_type == "mmr":
            return "max_marginal_relevance_search"
        return "similarity_search_with_score" if self.keep_retrieval_score else "similarity_search"

    def _search_own(
        self, compressor: KaLMDocumentCompressor, search: dict[str, Any]
    ) -> tuple[str | PreparedQuery, Sequence[Any]] | None:
        """Search a store with states with a query that is then read for search and decoder alike; None for others."""
        own = _own(self.vectorstore) if self.search_type == "similarity" else None
        return None if own is None else own.search_prepared(compressor.instructions, **search)

    def _compressor(self) -> KaLMDocumentCompressor:
        if self.compressor is not None:
            return self.compressor
        own = _own(self.vectorstore)
        return own.as_compressor() if own is not None else KaLMDocumentCompressor()


def _own(vectorstore: VectorStore) -> KeepsStates | None:
    """The vector store if it keeps states of its own, as `KaLMChroma` does."""
    return vectorstore if isinstance(vectorstore, KeepsStates) else None


def _config(run_manager: CallbackManagerForRetrieverRun | AsyncCallbackManagerForRetrieverRun) -> RunnableConfig:
    """Traces of the call; its instructions are settled, whatever the running chain's config says."""
    return {"callbacks": run_manager.get_child(), "configurable": {}}


def _as_candidates(found: Sequence[Any], search: Mapping[str, Any], *, scored: bool) -> list[Document]:
    """Documents of a search, which may come with scores; if asked for, score and rank in a copy of the metadata."""
    if not found and "fetch_k" in search and search.get("filter") is not None:
        logger.warning(
            "the vector store looked at %d records and gave none that its filter lets through. If there should be "
            "some, let it look at more: search_kwargs={'fetch_k': ...}.",
            search["fetch_k"],
        )
    if not scored:
        return [one if isinstance(one, Document) else one[0] for one in found]
    return [_with_retrieval(one, place) for place, one in enumerate(found, start=1)]


def _with_retrieval(found: Document | tuple[Document, float], place: int) -> Document:
    document, kept = (found, {}) if isinstance(found, Document) else (found[0], {RETRIEVAL_SCORE: float(found[1])})
    return document.model_copy(update={"metadata": {**document.metadata, **kept, RETRIEVAL_RANK: place}})
