"""The reranker as a document compressor, and as a step of an LCEL chain.

New documents come back: ids kept, `relevance_score` (P(yes), a plain float) in a copy of the metadata. The step is
traced as a chain run with the candidates as its input, and its start always has an end or an error.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from langchain_core.callbacks import AsyncCallbackManagerForChainRun, CallbackManagerForChainRun, Callbacks
from langchain_core.documents import BaseDocumentCompressor, Document
from langchain_core.load.serializable import SerializedConstructor, SerializedNotImplemented
from langchain_core.runnables import ConfigurableFieldSpec, RunnableConfig, RunnableSerializable
from langchain_core.runnables.config import (
    ensure_config,
    get_async_callback_manager_for_config,
    get_callback_manager_for_config,
    run_in_executor,
)
from pydantic import BaseModel, ConfigDict, Field, StrictInt, field_validator, model_validator
from typing_extensions import Self

from kalm_rag.checks import check_cut
from kalm_rag.engine.prepared import PreparedQuery
from kalm_rag.engine.queue import cancel_on_error
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.candidates import Missing, RankedCandidate
from kalm_rag.index.outcome import Outcome, rank_for_app
from kalm_rag.index.passage_rule import DOCUMENT, PassageRule
from kalm_rag.index.pruning import pruned_text
from kalm_rag.index.ranking import is_blank
from kalm_rag.index.select import Candidates
from kalm_rag.index.settings import SelectionFields, place_of
from kalm_rag.index.traces import inside_langchain
from kalm_rag.instructions import AnyInstructions, Instructions, as_instructions
from kalm_rag.langchain.inputs import (
    CALL_NAMES,
    CONFIG_SPECS,
    DEFAULT_TOP_N,
    RerankInput,
    check_documents,
    check_names,
    configured,
    read_call,
    read_input,
)
from kalm_rag.langchain.settings import EngineSettings

SCORE = "relevance_score"
"""Metadata key of P(yes) in [0, 1]: the key that LangChain's rerankers use."""
MARGIN = "relevance_margin"
"""Metadata key of the margin, with ``keep_margin``."""
RETRIEVAL_SCORE = "retrieval_score"
"""Metadata key of the score a document came with, with ``keep_retrieval_score``."""
RETRIEVAL_RANK = "retrieval_rank"
"""Metadata key of the place a document came at, from 1, with ``keep_retrieval_score``."""

DETAILS = "rerank_details"
"""Metadata key of how the ranking went, with ``details``."""


class KaLMDocumentCompressor(EngineSettings, SelectionFields, BaseDocumentCompressor):
    """Reranks documents: states are looked up, or encoded once where missing; only the decoder runs per query.

    Nothing is loaded before the first call; equal settings share one engine in a process (`release_engines` frees
    it). Pickles and ``model_dump`` carry settings, never a model. Safe to use from many threads and event loops.

    One call's ``config["configurable"]`` may say ``kalm_instructions``, ``kalm_top_n`` and ``kalm_threshold``. A
    retriever around this (``ContextualCompressionRetriever``, ``MergerRetriever``) hands no config on when it is asked
    by itself; as a step of a chain, ``retriever | RunnableLambda(list)``, it is heard.

    Args:
        model: ``pico`` (bundled), ``nano``, ``small``, ``large``, a repository id or a folder.
        revision: Commit, tag or branch of a repository; None takes the pinned one.
        device: ``cpu``, ``cuda``, ``cuda:1``, or several as ``"cuda:0,cuda:1"``; None takes CUDA where there is one.
        dtype: ``bf16`` or ``fp32``; None takes bf16 on CUDA, fp32 on the CPU.
        ratio: Tokens a state stands for. With a store: a multiple of what is stored; None takes the stored one.
            Without a store: None is `state_ratio`.
        state_ratio: Tokens a state stands for where states are made; None is `ratio`, or else 4.
        batch_size: Most passages in one pass.
        decoder_weights: ``int8`` scores KaLM checkpoints faster on the CPU, a little less exactly; None as they are.
        compiled: Whether a KaLM checkpoint's decoder is compiled, which takes a minute at the first query.
        prefix_cache_bytes: Most bytes of decoder work that a KaLM checkpoint keeps between queries; None leaves it.
        max_passage_tokens: Where passages are cut; None takes the model's limit (2,048 for pico, 1,024 for KaLM
            checkpoints).
        top_n: Most documents given back, >= 1; None gives all. Not given, it is 4, as everywhere in LangChain.
        threshold: Keep only P(yes) >= this, in [0, 1].
        missing: Documents without stored states are encoded and kept (``"encode"``), an error (``"raise"``), or put
            unscored behind the others (``"skip"``).
        passage: How a document becomes the text that is read: ``"document"``, or a template over its text and metadata
            such as ``"{title}: {text}"``; see `kalm_rag.index.passage_rule.PassageRule`.
        instructions: `Instructions`, a task as a string, or the app's prompt or chain (`Instructions.from_prompt`).
        store: Where states are: a `StateStore`, a folder or a ``.sqlite3`` file, or a `KaLMChroma`, whose engine is
            then used, too. None keeps the latest 256 MiB of states in memory, shared by the process.
        reranker: A ready engine, in place of `model` and its settings. Stays yours to close.
        keep_score: Give ``relevance_score`` = P(yes) in the metadata. False leaves it out, for what compares whole
            documents afterwards (see `KaLMRetriever`).
        keep_retrieval_score: Keep ``retrieval_rank``, and a former ``relevance_score`` as ``retrieval_score``.
        keep_margin: Give ``relevance_margin`` = logit(yes) - logit(no), which doesn't saturate.
        max_tokens: Most tokens of all documents together, filled in rank order: one that doesn't fit is left out, and a
            shorter one behind it may still fit. ``page_content`` counts, without what a template adds.
        count_tokens: Counts the tokens of a text; None takes the model's tokenizer. A function isn't written down.
        drop_duplicates: Leave out documents that repeat a better one: True, or from which cosine of their states on;
            see `kalm_rag.index.select.Selection`.
        diversity: How much a document loses for being like others, in [0, 1), when `top_n` or the budget decides which
            are handed on; they come best first all the same.
        prune: Leave sentences out of ``page_content`` that don't answer, ``…`` in their place: True, or how far the
            margin of one that stays may lie below its passage's best; see `kalm_rag.index.pruning`.
        on_error: ``"raise"``, so that a wrong setting is seen; or ``"retrieval_order"``: if the model can't be loaded,
            fails or takes too long, documents come back as they came, unscored, and the log and `details` say why.
        timeout: Most seconds for loading and ranking; None for no limit.
        details: Give ``rerank_details`` in the metadata: status (``reranked`` or ``skipped: ...``), model,
            fingerprint, seconds, whether this document was read only to the model's limit (``truncated``), which
            characters of it are left if it was pruned (``kept``), and how many were left out for what. Traces always
            have them when there is something to tell.

    Raises:
        pydantic.ValidationError: If an argument is unknown or out of range.

    Example:
        >>> compressor = KaLMDocumentCompressor(top_n=1)
        >>> texts = ["I like tea.", "Paris is the capital of France."]
        >>> compressor.compress_documents([Document(t) for t in texts], "capital of France?")[0].page_content
        'Paris is the capital of France.'
    """

    top_n: StrictInt | None = DEFAULT_TOP_N
    threshold: float | None = None
    missing: Missing = "encode"
    passage: str = DOCUMENT
    instructions: AnyInstructions = None
    keep_score: bool = True
    keep_retrieval_score: bool = False
    keep_margin: bool = False

    @field_validator("passage")
    @classmethod
    def _check_passage(cls, value: str) -> str:
        return str(PassageRule(value))

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
        check_cut(self.top_n, self.threshold)
        if self.keep_margin and not self.keep_score:
            raise InputError("keep_margin=True needs keep_score=True: a margin is a score.")
        return self

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rerank documents for a query.

        Args:
            documents: Candidates in retrieval order, left as they are. None of them: an empty list comes back.
            query: The question. A blank one (an agent's, an empty rewriting) gives the retrieval order, unscored.
            callbacks: Where the step is traced; None takes those of the chain that is running.

        Returns:
            Copies, best first, at most `top_n`; ties in input order; unscored ones last.

        Raises:
            InputError: If the query is no valid string, or an item is no `Document`.
            MissingStateError: Under ``missing="raise"``.
            StateMismatchError: If the store is another model's, or at a ratio that can't give `ratio`.
            ModelError: If the model can't be loaded.
        """
        return self.run(documents, query, _config(callbacks))

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        """Rerank without holding up the event loop; see `compress_documents`."""
        return await self.arun(documents, query, _config(callbacks))

    def with_instructions(self, instructions: object) -> Self:
        """Give a copy that follows other instructions, e.g. those of another prompt.

        For one call in a chain, use ``config={"configurable": {"kalm_instructions": ...}}``; ``kalm_top_n`` and
        ``kalm_threshold`` go the same way.

        Args:
            instructions: `Instructions`, a task as a string, or the app's prompt or chain.
        """
        return self.model_copy(update={"instructions": as_instructions(instructions)})

    def as_runnable(self) -> KaLMRerank:
        """Give the step for LCEL chains: question and documents in, documents out. See `KaLMRerank`."""
        return KaLMRerank(compressor=self)

    def engine(self) -> Reranker:
        """Give the engine, loading it if need be."""
        return self.lazy.engine()

    def preview(self, query: str) -> str:
        """Show the exact text that the decoder reads for a query, instructions included."""
        return self.engine().preview(query, self.instructions)

    def run(
        self,
        documents: Sequence[Document],
        query: str | PreparedQuery,
        config: RunnableConfig,
    ) -> list[Document]:
        """Rerank within a chain's config (callbacks, tags, instructions); see `compress_documents`."""
        manager = get_callback_manager_for_config(config)
        traced = manager.on_chain_start(None, _shown(documents, query), name=self._run_name(config))
        try:
            with inside_langchain(traced.run_id):
                ranked, told = self._ranked(documents, query, config)
        except BaseException as err:
            traced.on_chain_error(err)
            raise
        traced.on_chain_end({"documents": ranked, **told})
        return ranked

    async def arun(
        self,
        documents: Sequence[Document],
        query: str | PreparedQuery,
        config: RunnableConfig,
    ) -> list[Document]:
        """Rerank in a thread; see `run`."""
        manager = get_async_callback_manager_for_config(config)
        traced = await manager.on_chain_start(None, _shown(documents, query), name=self._run_name(config))
        try:
            with cancel_on_error(), inside_langchain(traced.run_id):
                ranked, told = await run_in_executor(None, self._ranked, documents, query, config)
        except BaseException as err:  # cancelled too: a start without an end stays open in a trace for ever
            await traced.on_chain_error(err)
            raise
        await traced.on_chain_end({"documents": ranked, **told})
        return ranked

    def rank(
        self,
        documents: Sequence[Document],
        query: str | PreparedQuery,
        config: RunnableConfig,
        said: Mapping[str, Any] | None = None,
    ) -> list[Document]:
        """Rerank without a trace of its own, for a step that has one; see `compress_documents`.

        Args:
            documents: Candidates.
            query: The question.
            config: The chain's.
            said: What the call says otherwise, read by `read_call`; goes before what its config says.
        """
        with inside_langchain(get_callback_manager_for_config(config).parent_run_id):
            return self._ranked(documents, query, config, said)[0]

    def _ranked(
        self,
        documents: Sequence[Document],
        query: str | PreparedQuery,
        config: RunnableConfig,
        said: Mapping[str, Any] | None = None,
    ) -> tuple[list[Document], dict[str, Any]]:
        """Rerank; give the documents, and what a trace tells besides."""
        said = {**configured(config), **(said if said is not None else {})}
        return (self.model_copy(update=said) if said else self)._rank(documents, query)

    def _rank(self, documents: Sequence[Document], query: str | PreparedQuery) -> tuple[list[Document], dict[str, Any]]:
        is_blank(query)  # refuses what is no text
        documents = check_documents(documents)
        if not documents:
            return [], {}
        rule = PassageRule(self.passage)
        texts = [rule.text(one.page_content, one.metadata, one.id or "") for one in documents]
        outcome = rank_for_app(
            self.lazy,
            query,
            Candidates(
                read=texts,
                shown=lambda place: documents[place].page_content,
                names=[one.id or f"document {place}" for place, one in enumerate(documents)],
                body=lambda place: documents[place].page_content,
            ),
            instructions=None if isinstance(query, PreparedQuery) else self.instructions,  # it has its own
            ratio=self.ratio,
            top_n=self.top_n,
            threshold=self.threshold,
            missing=self.missing,
            selection=self.selection(),
            policy=self.policy(),
            owners=lambda: self._owners([one.id for one in documents], texts),
        )
        ranked = [self._scored(documents[one.index], one, outcome) for one in outcome.candidates]
        return ranked, {} if outcome.plain and not self.details else {DETAILS: outcome.report()}

    def _scored(self, document: Document, placed: RankedCandidate, outcome: Outcome) -> Document:
        metadata = {key: value for key, value in document.metadata.items() if key not in (SCORE, MARGIN, DETAILS)}
        if self.keep_retrieval_score:
            if SCORE in document.metadata:
                metadata[RETRIEVAL_SCORE] = document.metadata[SCORE]
            metadata[RETRIEVAL_RANK] = placed.index + 1
        if self.keep_score and placed.probability is not None:
            metadata[SCORE] = placed.probability
        if self.keep_margin and placed.margin is not None:
            metadata[MARGIN] = placed.margin
        if self.details:
            metadata[DETAILS] = outcome.details(placed)
        text = pruned_text(document.page_content, placed.kept)
        return document.model_copy(update={"page_content": text, "metadata": metadata})

    def _run_name(self, config: RunnableConfig) -> str:
        return config.get("run_name") or type(self).__name__


class KaLMRerank(RunnableSerializable[Any, list[Document]]):
    """A chain step: takes a dict with the question and the documents, gives the documents reranked.

    Reads the question under ``query``, ``question`` or ``input``, the documents under ``documents``, ``context`` or
    ``docs`` (the first there is), out of a dict or a pydantic or dataclass state; documents may be dicts with
    ``page_content``. For one call, ``bind`` and ``invoke`` take `instructions`, `top_n` and `threshold`, and so does
    ``config["configurable"]``, as ``kalm_instructions``, ``kalm_top_n`` and ``kalm_threshold``; what a call says goes
    before what its config says. ``configurable_fields`` knows the three, too.

    Args:
        compressor: What reranks. None makes a `KaLMDocumentCompressor`.
        name: Name of the step in traces and events; None is the class's.
        **settings: Arguments of `KaLMDocumentCompressor` (``top_n``, ``model``, ...), in place of `compressor`. Beside
            a compressor, `instructions`, `top_n` and `threshold` of this step, in place of the compressor's.

    Raises:
        InputError: If both a compressor and other settings are given.
        pydantic.ValidationError: If a setting is unknown or out of range.

    Example:
        >>> step = KaLMRerank(top_n=1)
        >>> texts = ["I like tea.", "Paris is the capital of France."]
        >>> step.invoke({"question": "capital of France?", "documents": [Document(t) for t in texts]})[0].page_content
        'Paris is the capital of France.'
    """

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    compressor: KaLMDocumentCompressor
    # the compressor's own, where `configurable_fields` looks for them
    instructions: AnyInstructions = Field(default=None, exclude=True, repr=False)
    top_n: int | None = Field(default=DEFAULT_TOP_N, exclude=True, repr=False)
    threshold: float | None = Field(default=None, exclude=True, repr=False)

    def __init__(
        self,
        compressor: KaLMDocumentCompressor | None = None,
        *,
        name: str | None = None,
        **settings: Any,  # noqa: ANN401
    ) -> None:
        said = {} if compressor is None else {key: settings.pop(key) for key in CALL_NAMES if key in settings}
        if compressor is not None and settings:
            raise InputError(f"compressor and {', '.join(sorted(settings))} were both given; wanted one of them.")
        if compressor is None:
            check_names(settings, KaLMDocumentCompressor.model_fields, type(self).__name__)
            compressor = KaLMDocumentCompressor(**settings)
        if not isinstance(compressor, KaLMDocumentCompressor | Mapping):  # a mapping is one that was written down
            raise InputError(
                f"compressor is {type(compressor).__name__}; wanted a KaLMDocumentCompressor, or its settings by name."
            )
        if isinstance(compressor, Mapping):
            compressor = KaLMDocumentCompressor(**compressor)
        if said:
            compressor = compressor.model_copy(update=read_call(said))
        own = {key: getattr(compressor, key) for key in CALL_NAMES}
        super().__init__(compressor=compressor, name=name, **own)  # type: ignore[call-arg]

    @classmethod
    def is_lc_serializable(cls) -> bool:
        """Let LangChain's ``dumpd`` write the step down; see `to_json`."""
        return True

    def to_json(self) -> SerializedConstructor | SerializedNotImplemented:
        """Write down the settings, for ``load(..., allowed_objects=[KaLMRerank], valid_namespaces=["kalm_rag"])``.

        States that are in memory or on a server can't be written down; neither can a compressor of another class, nor a
        function that counts tokens.
        """
        if (
            self.compressor.count_tokens is not None
            or type(self.compressor) is not KaLMDocumentCompressor
            or isinstance(place_of(self.compressor.store), dict)
        ):
            return self.to_json_not_implemented()
        settings = self.compressor.model_dump(exclude_defaults=True)
        return {"lc": 1, "type": "constructor", "id": self.lc_id(), "kwargs": {**settings, "name": self.name}}

    @property
    def config_specs(self) -> list[ConfigurableFieldSpec]:
        """What a call's config may carry: ``kalm_instructions``, ``kalm_top_n``, ``kalm_threshold``."""
        return CONFIG_SPECS

    def get_input_schema(self, config: RunnableConfig | None = None) -> type[BaseModel]:
        """Say what `invoke` reads, for LangServe and other callers by HTTP."""
        return RerankInput

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:  # noqa: ANN401
        """Rerank; see `KaLMDocumentCompressor.compress_documents`.

        Args:
            input: Question and documents; see the class.
            config: Callbacks, tags, ``run_id``, ``run_name``, and what this call says; see the class.
            **kwargs: `instructions`, `top_n` and `threshold` of this call.

        Raises:
            InputError: If a key is missing, or an argument is unknown or out of range.
        """
        return self._call_with_config(partial(self._rerank, _read_call(kwargs)), input, config)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> list[Document]:  # noqa: ANN401
        """Rerank without holding up the event loop; see `invoke`."""
        return await self._acall_with_config(partial(self._arerank, _read_call(kwargs)), input, config)

    def _rerank(
        self, said: dict[str, Any], given: object, run_manager: CallbackManagerForChainRun, config: RunnableConfig
    ) -> list[Document]:
        query, documents = read_input(given)
        return self.compressor.rank(documents, query, config, said=said)

    async def _arerank(
        self, said: dict[str, Any], given: object, run_manager: AsyncCallbackManagerForChainRun, config: RunnableConfig
    ) -> list[Document]:
        query, documents = read_input(given)
        with cancel_on_error():
            return await run_in_executor(None, partial(self.compressor.rank, said=said), documents, query, config)


def _read_call(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What one call of the step says otherwise than its compressor.

    Raises:
        InputError: If an argument is unknown or out of range.
    """
    if unknown := sorted(kwargs.keys() - set(CALL_NAMES)):
        check_names(unknown, CALL_NAMES, "KaLMRerank.invoke")
        raise InputError(
            f"unknown arguments {', '.join(unknown)}; the step takes its input, a config and {', '.join(CALL_NAMES)}."
        )
    return read_call(kwargs)


def _config(callbacks: Callbacks | None) -> RunnableConfig:
    """Config of the chain that is running, if any, with the callbacks of the call."""
    config = ensure_config()
    config.pop("run_name", None)
    return config if callbacks is None else {**config, "callbacks": callbacks}


def _shown(documents: object, query: object) -> dict[str, Any]:
    text = query.query if isinstance(query, PreparedQuery) else query
    return {"query": text, "documents": list(documents) if isinstance(documents, Sequence) else documents}
