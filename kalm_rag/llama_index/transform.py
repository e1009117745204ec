"""A step of an IngestionPipeline that encodes states, for vector stores other than ours or for many workers."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from typing import Any

from llama_index.core.bridge.pydantic import model_validator
from llama_index.core.schema import BaseNode, TransformComponent
from typing_extensions import Self

from kalm_rag.errors import InputError
from kalm_rag.index.candidates import keep_states
from kalm_rag.index.results import Timings
from kalm_rag.index.writer import BATCH
from kalm_rag.llama_index.fields import PassageFields
from kalm_rag.llama_index.nodes import check_nodes, read_node


class KaLMStateTransform(PassageFields, TransformComponent):
    """Encodes the states of nodes that have none yet, and hands the nodes on unchanged.

    `KaLMChromaVectorStore` encodes by itself; this is for pipelines that end elsewhere, or that encode in several
    worker processes (``num_workers``). Put it last: a later step that rewrites text or metadata makes other states.
    The states have no references: ``gc`` takes those that no `KaLMChromaVectorStore` or ``backfill`` refers to.

    A cached pipeline skips steps whose ``to_dict`` and input it has seen, also when the states have been wiped or swept
    since. So this one's ``to_dict`` has a value of its own each time: the step always looks what is missing, which
    costs milliseconds when nothing is.

    Args:
        store: Where states go: a folder, a ``.sqlite3`` file, a `StateStore` or a `KaLMChromaVectorStore`. For
            worker processes it must be a file.
        metadata_mode: Which metadata the encoded text of a node holds: the mode of the postprocessor that will score.
            Left out with a `KaLMChromaVectorStore`: nodes are read as its collection says.
        passage: How a node is read, in place of `metadata_mode`: ``"document"`` or a template such as
            ``"{title}: {text}"``.
        model: Name, repository id or folder, see `kalm_rag.Reranker.from_pretrained`: the model that will score.
        revision: Commit, tag or branch of a repository; None takes the pinned one.
        device: ``cpu``, ``cuda``, ``cuda:1``, or several with commas to encode on all; None takes CUDA if there is one.
        dtype: ``bf16`` or ``fp32``; None takes what fits the device.
        ratio: Tokens a state stands for in a new store; None is 4. A store that is there keeps its own.
        batch_size: Most passages in one encoder pass.
        max_passage_tokens: Where passages are cut; None takes the model's limit.
        reranker: A ready engine instead of `model`, yours to close.

    Raises:
        InputError: (inside pydantic's ValidationError) if there is no store, or an argument is unknown.

    Example:
        >>> from llama_index.core import Document
        >>> from llama_index.core.ingestion import IngestionPipeline
        >>> transform = KaLMStateTransform(store=":memory:")  # a folder keeps them
        >>> pipeline = IngestionPipeline(transformations=[transform])
        >>> nodes = pipeline.run(documents=[Document(text="Paris is the capital of France.")])
        >>> transform.parts.get()[1].stats().states
        1
    """

    @model_validator(mode="after")
    def _check_place(self) -> Self:
        if self.store is None:
            raise InputError("store is None; wanted the store to fill: a folder, a .sqlite3 file or a vector store.")
        return self

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "KaLMStateTransform"

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: object) -> Sequence[BaseNode]:
        """Encode what is missing, in batches; safe to break off and run again.

        Raises:
            StoreError: If states can't be written.
        """
        texts = [text for node in check_nodes(nodes, BaseNode) if (text := read_node(node, self.rule)) is not None]
        engine, store = self.lazy.get()
        for start in range(0, len(texts), BATCH):
            kept = keep_states(engine, store, texts[start : start + BATCH], Timings())
            store.put_many(list(kept.fresh.values()))
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: object) -> Sequence[BaseNode]:
        """Encode in a thread, so that the loop goes on."""
        return await asyncio.to_thread(self.__call__, nodes, **kwargs)

    def to_dict(self, **kwargs: object) -> dict[str, Any]:
        """Write down the fields, the model's fingerprint, and ``run``, new each time; loads the model."""
        engine, _ = self.lazy.get()
        return {**super().to_dict(**kwargs), "fingerprint": engine.info.fingerprint, "run": uuid.uuid4().hex}

    @classmethod
    def from_dict(cls, data: dict[str, Any], **kwargs: object) -> Self:
        """Make it from what `to_dict` wrote."""
        return super().from_dict({k: v for k, v in data.items() if k not in ("fingerprint", "run")}, **kwargs)
