"""A node postprocessor that orders retrieved nodes by P(yes) of the decoder over their stored states."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from typing import Any, Literal

from llama_index.core.bridge.pydantic import Field, PrivateAttr, field_serializer, field_validator
from llama_index.core.callbacks import CBEventType, EventPayload
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher
from typing_extensions import Self

from kalm_rag.checks import check_cut, check_text
from kalm_rag.engine.queue import cancel_on_error
from kalm_rag.errors import InputError
from kalm_rag.index.candidates import Missing, RankedCandidate, check_missing
from kalm_rag.index.outcome import Outcome, rank_for_app
from kalm_rag.index.pruning import pruned_text
from kalm_rag.index.select import Candidates
from kalm_rag.index.settings import SelectionFields
from kalm_rag.index.traces import inside_llama_index
from kalm_rag.instructions import AnyInstructions, Instructions, as_instructions
from kalm_rag.llama_index.fields import PassageFields
from kalm_rag.llama_index.nodes import RankedNode, check_nodes, content_of, read_node, with_score
from kalm_rag.llama_index.steering import override, overriding, surrounding_instructions, watch_engines

logger = logging.getLogger(__name__)
dispatcher = get_dispatcher(__name__)


class KaLMNodePostprocessor(PassageFields, SelectionFields, BaseNodePostprocessor):
    """Reranks retrieved nodes: states by content from the store, one decoder pass, best first.

    Scores are P(yes) in [0, 1], plain floats. Nodes without text can't be scored: they come behind the scored ones in
    retrieval order with score None, and are dropped under a threshold. So do all nodes under a blank query, and one
    whose text is no valid Unicode; the log tells. New `NodeWithScore` objects come back, the caller's stay as they are.
    Nothing is loaded before the first query. Safe from many threads and event loops.

    Args:
        model: ``pico`` (bundled), ``nano``, ``small``, ``large``, a repository id or a folder: see
            `kalm_rag.Reranker.from_pretrained`. Left out with a `KaLMChromaVectorStore` as `store`: the store's.
        revision: Commit, tag or branch of a repository; None takes the pinned one.
        device: ``cpu``, ``cuda``, ``cuda:1``; None takes CUDA where there is one.
        dtype: ``bf16`` or ``fp32``; None takes what fits the device.
        ratio: Tokens a state stands for when scoring; with a store, a multiple of its ratio. None takes what is
            stored, or 4.
        state_ratio: Tokens a state stands for where states are made, in a new store; None takes `ratio`, or 4.
        batch_size: Most passages in one pass.
        decoder_weights: ``int8`` scores KaLM checkpoints faster on the CPU.
        compiled: Compile a KaLM checkpoint's decoder at the first query (for GPUs).
        prefix_cache_bytes: Most bytes of decoder work kept between queries; None leaves the model's bound.
        max_passage_tokens: Where passages are cut; None takes the model's limit (2,048 for pico, 1,024 for KaLM
            checkpoints).
        store: Where states are: a `StateStore`, a folder (of a Chroma database, say), a ``.sqlite3`` file, a
            `KaLMChromaVectorStore`; None takes a bounded cache of this process.
        reranker: A ready engine instead of `model`, yours to close.
        top_n: Most nodes given back, >= 1; None gives all.
        threshold: Keep only nodes with P(yes) >= this, in [0, 1].
        missing: Nodes without stored states: ``"encode"`` (and keep; with a `KaLMChromaVectorStore` only what its
            collection holds, the rest is cached), ``"raise"``, or ``"skip"`` (treated as nodes without text).
        instructions: `Instructions`, a task, any prompt or engine (read now), or ``"auto"``: those of the prompt of
            the query or chat engine, agent or workflow that runs this (the innermost), read anew at each query; also
            through ``asyncio.gather``, ``create_task`` and ``to_thread``. Threads of an executor of the app's
            (``ThreadPoolExecutor.submit``, ``run_in_executor``) don't see what started them: hand them
            ``contextvars.copy_context().run``, or `follow` the engine. LlamaIndex 0.14.0 runs plain function tools so.
        metadata_mode: Which metadata the scored text of a node holds: the mode they were indexed with. Left out with a
            `KaLMChromaVectorStore`: nodes are read as its collection says.
        passage: How a node is read, in place of `metadata_mode`: ``"document"``, or a template over text and metadata
            such as ``"{title}: {text}"``. None as above.
        keep_retrieval_score: Keep the retriever's score as ``metadata["retrieval_score"]``.
        max_tokens: Most tokens of all nodes together, as the LLM gets them (``MetadataMode.LLM``), filled in rank
            order: one that doesn't fit is left out, and a shorter one behind it may still fit.
        count_tokens: Counts the tokens of a text; None takes the model's tokenizer. A function isn't written down.
        drop_duplicates: Leave out nodes that repeat a better one: True, or from which cosine of their states on; see
            `kalm_rag.index.select.Selection`.
        diversity: How much a node loses for being like others, in [0, 1), when `top_n` or the budget decides which are
            handed on; they come best first all the same.
        prune: Leave sentences out of a node's text that don't answer, ``…`` in their place: True, or how far the margin
            of one that stays may lie below its passage's best; see `kalm_rag.index.pruning`. The node keeps its id.
        on_error: ``"raise"``, so that a wrong setting is seen; or ``"retrieval_order"``: if the model can't be loaded,
            fails or takes too long, nodes come back as they came, with score None; log, event and `details` say why.
        timeout: Most seconds for loading and ranking; None for no limit.
        details: Give `RankedNode` objects, whose ``details`` hold status (``reranked`` or ``skipped: ...``), model,
            fingerprint, seconds, whether this node was read only to the model's limit (``truncated``), which characters
            of it are left if it was pruned (``kept``), and how many were left out for what. The nodes in them, their
            hashes and texts stay as they are. The end event of every rerank has the same in its ``tags``.

    Raises:
        InputError: (inside pydantic's ValidationError) if an argument is unknown, of the wrong kind or out of range.

    Example:
        >>> from llama_index.core.schema import NodeWithScore, TextNode
        >>> nodes = [NodeWithScore(node=TextNode(text=t)) for t in ("I like tea.", "Paris is France's capital.")]
        >>> best = KaLMNodePostprocessor(top_n=1).postprocess_nodes(nodes, query_str="What is the capital of France?")
        >>> best[0].text
        "Paris is France's capital."
    """

    top_n: int | None = Field(default=3, description="Most nodes given back; None gives all.")
    threshold: float | None = Field(default=None, description="Keep only P(yes) >= this.")
    missing: Missing = Field(default="encode", description="Policy for nodes without stored states.")
    instructions: AnyInstructions | Literal["auto"] = Field(default=None, description="What steers the decoder.")
    keep_retrieval_score: bool = Field(default=False, description="Keep the retriever's score in metadata.")
    _followed: Any = PrivateAttr(default=None)
    _warned: bool = PrivateAttr(default=False)

    @field_validator("top_n", mode="before")
    @classmethod
    def _check_top_n(cls, value: int | None) -> int | None:
        check_cut(value, None)
        return value

    @field_validator("threshold", mode="before")
    @classmethod
    def _check_threshold(cls, value: float | None) -> float | None:
        check_cut(None, value)
        return value

    @field_validator("missing", mode="before")
    @classmethod
    def _check_missing(cls, value: str) -> str:
        return check_missing(value)

    @field_validator("instructions", mode="before")
    @classmethod
    def _read_instructions(cls, value: object) -> object:
        if isinstance(value, str) and value == "auto":
            watch_engines()
            return value
        return as_instructions(value)

    @field_serializer("instructions")
    def _write_instructions(self, value: object) -> dict[str, Any] | str | None:
        """A followed engine can't be written down: its instructions of now are."""
        if value == "auto" and self._followed is None:
            return "auto"
        written = as_instructions(value if self._followed is None else self._followed)
        return None if written is None else asdict(written)

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "KaLMNodePostprocessor"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as all components do; InputError if ``count_tokens`` is a function."""
        self.refuse_counter()
        return super().__reduce__()

    def follow(self, engine: object) -> Self:
        """Read the instructions of one engine or agent from its prompts at every query, wherever this runs.

        Args:
            engine: What ``index.as_query_engine()`` or ``as_chat_engine()`` gave, or anything that holds prompts.

        Returns:
            This postprocessor.

        Raises:
            InputError: If it holds no prompt.
        """
        Instructions.from_prompt(engine)
        self.instructions, self._followed = "auto", engine
        return self

    def use(self, instructions: object) -> AbstractContextManager[None]:
        """Let other instructions hold inside a ``with`` block, in this thread or task only (per-request steering).

        Args:
            instructions: `Instructions`, a task, or any prompt.

        Raises:
            InputError: If it is none of these.
        """
        wanted = as_instructions(instructions)
        return override(self, wanted if wanted is not None else Instructions())

    def preview(self, query: str) -> str:
        """Show the exact text that the decoder reads for a query, under the instructions that hold here and now.

        Raises:
            InputError: If the query is blank.
        """
        return self.lazy.get()[0].preview(query, self._current())

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Rerank, on this thread."""
        return self._rerank(nodes, query_bundle, self._current())

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        """Rerank in a thread, so that the loop goes on; through `_postprocess_nodes` where a subclass has its own."""
        current = self._current()  # here: a thread doesn't see which engine is running this
        with cancel_on_error():
            hook = next(kind for kind in type(self).__mro__ if "_postprocess_nodes" in vars(kind))
            if hook is KaLMNodePostprocessor:
                return await asyncio.to_thread(self._rerank, nodes, query_bundle, current)
            with self.use(current):
                return await asyncio.to_thread(self._postprocess_nodes, nodes, query_bundle)

    def _current(self) -> Instructions | None:
        """Instructions that hold for the query being answered on this call stack."""
        chosen = overriding(self)
        if chosen is not None:
            return chosen
        if self.instructions != "auto":
            return as_instructions(self.instructions)  # may have been assigned, in any form
        if self._followed is not None:
            return Instructions.from_prompt(self._followed)
        watch_engines()  # "auto" may have been assigned, and an app's tracing may have put its own handlers there
        found = surrounding_instructions()
        if found is None:
            logger.log(
                logging.INFO if self._warned else logging.WARNING,
                "instructions='auto' found no query or chat engine, agent or workflow with a prompt around this "
                "postprocessor, so the default instructions hold. Threads of an executor see none, unless they run in "
                "contextvars.copy_context(). Use follow(engine), or pass the prompt as instructions=.",
            )
            self._warned = True
        return found

    def _rerank(
        self, nodes: list[NodeWithScore], query: QueryBundle | None, instructions: Instructions | None
    ) -> list[NodeWithScore]:
        if query is None:
            raise InputError("no query was given; wanted query_str= or query_bundle=, which nodes are ranked for.")
        check_text(query.query_str, "query")
        check_nodes(nodes, NodeWithScore)
        check_cut(self.top_n, self.threshold)
        check_missing(self.missing)
        if not nodes:
            return []
        with self._announced(nodes, query) as (ranked, tags), inside_llama_index():
            outcome = self._rank(nodes, query.query_str.strip(), instructions)  # a RetrieverTool adds line ends
            ranked += [self._scored(nodes[c.index], c, outcome) for c in outcome.candidates]
            tags.update(outcome.report())
        return ranked

    def _rank(self, nodes: list[NodeWithScore], query: str, instructions: Instructions | None) -> Outcome:
        texts = [self._read(item) for item in nodes]
        return rank_for_app(
            self.lazy,
            query,
            Candidates(
                read=texts,
                shown=lambda place: content_of(nodes[place].node, MetadataMode.LLM),
                names=[item.node_id for item in nodes],
                body=lambda place: content_of(nodes[place].node, MetadataMode.NONE),
            ),
            instructions=instructions,
            ratio=self.ratio,
            top_n=self.top_n,
            threshold=self.threshold,
            missing=self.missing,
            selection=self.selection(),
            policy=self.policy(),
            owners=lambda: self._owners([item.node_id for item in nodes], texts),
        )

    def _scored(self, item: NodeWithScore, placed: RankedCandidate, outcome: Outcome) -> NodeWithScore:
        ranked = with_score(item, placed.probability, keep=self.keep_retrieval_score)
        if placed.kept is not None:
            node = ranked.node.model_copy()
            node.set_content(pruned_text(content_of(item.node, MetadataMode.NONE), placed.kept))
            ranked = NodeWithScore(node=node, score=ranked.score)
        if not self.details:
            return ranked
        return RankedNode(node=ranked.node, score=ranked.score, details=outcome.details(placed))

    def _read(self, item: NodeWithScore) -> str | None:
        """Text of a node that can be scored, or None; one that is no valid Unicode is named in the log."""
        try:
            return read_node(item.node, self.rule)
        except InputError as err:
            logger.warning("%s It comes back unscored.", err)
            return None

    @contextmanager
    def _announced(
        self, nodes: list[NodeWithScore], query: QueryBundle
    ) -> Iterator[tuple[list[NodeWithScore], dict[str, Any]]]:
        """Tell instrumentation and callbacks of a rerank: each start has its end, also when scoring fails."""
        ranked: list[NodeWithScore] = []
        tags: dict[str, Any] = {}
        top_n = self.top_n if self.top_n is not None else len(nodes)
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: self.model,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: top_n,
        }
        dispatcher.event(ReRankStartEvent(query=query, nodes=list(nodes), top_n=top_n, model_name=self.model))
        try:
            with self.callback_manager.event(CBEventType.RERANKING, payload=payload) as event:
                yield ranked, tags
                event.on_end(payload={EventPayload.NODES: ranked})
        finally:
            dispatcher.event(ReRankEndEvent(nodes=ranked, tags=tags))
