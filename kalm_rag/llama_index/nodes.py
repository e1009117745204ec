"""Nodes of LlamaIndex: which of their text is scored, how Chroma's records become nodes, how scores are put on them."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from llama_index.core.bridge.pydantic import Field
from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, TextNode
from llama_index.core.vector_stores.utils import (
    legacy_metadata_dict_to_node,
    metadata_dict_to_node,
    node_to_metadata_dict,
)

from kalm_rag.checks import check_items, check_text
from kalm_rag.errors import InputError
from kalm_rag.index.collection import check_ids, check_metadata
from kalm_rag.index.passage_rule import PassageRule
from kalm_rag.index.writer import Records

logger = logging.getLogger(__name__)

SCORE_KEY = "retrieval_score"
"""Metadata key of the score a node came with; the name that LlamaIndex's own rerankers use."""


Kind = TypeVar("Kind")


def check_nodes(nodes: Iterable[Kind], kind: type) -> list[Kind]:
    """Read nodes of any iterable once.

    Raises:
        InputError: If it is none; the first item of another kind is named.
    """
    read = check_items(nodes, "nodes", f"a list of {kind.__name__}")
    for position, node in enumerate(read):
        if not isinstance(node, kind):
            raise InputError(f"node {position} is {type(node).__name__}; wanted a {kind.__name__}.")
    return read


def node_text(node: BaseNode, mode: MetadataMode) -> str | None:
    """Text of a node that the encoder reads; None for a node without any (an image, say), which can't be scored.

    Raises:
        InputError: If it holds a lone surrogate.
    """
    text = check_text(content_of(node, mode), f"text of node {node.node_id}")
    return text if text.strip() else None


def content_of(node: BaseNode, mode: MetadataMode) -> str:
    """Content of a node; without its metadata if its template can't be filled, which is told in the log."""
    try:
        return node.get_content(metadata_mode=mode)
    except Exception as err:  # a template with a slot that nothing fills
        logger.warning("node %r is read without its metadata: %r", node.node_id, err)
        return node.get_content(metadata_mode=MetadataMode.NONE)


def read_node(node: BaseNode, rule: PassageRule) -> str | None:
    """Text of a node that is read under a passage rule; None for a node without any, which can't be scored.

    Raises:
        InputError: If it holds a lone surrogate.
    """
    if rule.llama_mode is not None:
        return node_text(node, MetadataMode(rule.llama_mode))
    document = node.get_content(metadata_mode=MetadataMode.NONE)
    return check_text(rule.text(document, node.metadata) or "", f"text of node {node.node_id}") or None


def records_of(nodes: Sequence[BaseNode], *, flat_metadata: bool) -> Records:
    """What a collection keeps of nodes: their ids, texts, vectors, and all else in the metadata. Checks everything.

    Raises:
        InputError: If an id is empty, a node has no embedding or one that isn't finite or as wide as the others', or
            text or metadata that Chroma can't keep. The node is named.
    """
    ids = check_ids(node.node_id for node in nodes)
    documents, metadatas, vectors = [], [], []
    for i, node in zip(ids, nodes, strict=True):
        documents.append(check_text(node.get_content(metadata_mode=MetadataMode.NONE), f"text of node {i}"))
        try:
            metadata = node_to_metadata_dict(node, remove_text=True, flat_metadata=flat_metadata)
            vectors.append([float(x) for x in node.get_embedding()])
        except ValueError as err:
            raise InputError(f"node {i!r}: {err}") from err
        metadatas.append(check_metadata({k: "" if value is None else value for k, value in metadata.items()}, i))
        if len(vectors[-1]) != len(vectors[0]) or not all(map(math.isfinite, vectors[-1])):
            raise InputError(
                f"node {i!r} has an embedding of {len(vectors[-1])} numbers; wanted finite ones, as many as node "
                f"{ids[0]!r} has ({len(vectors[0])}). Embed all nodes with one model."
            )
    return Records(ids=ids, documents=documents, metadatas=metadatas, vectors=vectors)


def record_node(record_id: str, document: str | None, metadata: Mapping[str, Any] | None) -> BaseNode:
    """Node that LlamaIndex makes of a Chroma record, also of one that somebody else wrote."""
    fields = dict(metadata) if metadata is not None else {}
    if "_node_content" in fields:
        try:
            return metadata_dict_to_node(fields, text=document)
        except Exception as err:  # as LlamaIndex does: one bad record must not take the others along
            logger.debug("record %r holds no node that can be read: %r", record_id, err)
    fields, info, relationships = legacy_metadata_dict_to_node(fields)
    return TextNode(
        text=document if document is not None else "",
        id_=record_id,
        metadata=fields,
        start_char_idx=info.get("start"),
        end_char_idx=info.get("end"),
        relationships=relationships,
    )


def record_text(record_id: str, document: str | None, metadata: Mapping[str, Any] | None, mode: str) -> str | None:
    r"""Text that is read of a Chroma record: that of the node which LlamaIndex makes of it.

    Args:
        record_id: The record's id.
        document: Its text.
        metadata: Its metadata, as Chroma gives it; also of a record that another door wrote.
        mode: Which metadata the text holds: ``"embed"``, ``"llm"``, ``"all"`` or ``"none"``.

    Returns:
        The text, or None if the node has none.

    Raises:
        InputError: If it holds a lone surrogate.

    Example:
        >>> record_text("1", "Boil it.", {"title": "Tea"}, "embed")
        'title: Tea\n\nBoil it.'
    """
    return node_text(record_node(record_id, document, metadata), MetadataMode(mode))


class RankedNode(NodeWithScore):
    """A node with its score and how the ranking went; the node itself, its hash and its texts are the caller's."""

    details: dict[str, Any] = Field(default_factory=dict, description="Status, model, seconds, truncated, left out.")

    @classmethod
    def class_name(cls) -> str:
        """Name in serialised form."""
        return "RankedNode"


def with_score(item: NodeWithScore, score: float | None, *, keep: bool) -> NodeWithScore:
    """Put a score on a node in a new object; the caller's stays as it is.

    Args:
        item: What the retriever gave.
        score: P(yes), or None.
        keep: Note the old score in the metadata of a copy of the node, out of LLM and embedding text. The copy's hash
            is another, as with LlamaIndex's own rerankers: it is made of all metadata.
    """
    if not keep:
        return NodeWithScore(node=item.node, score=score)
    changes = {
        "metadata": {**item.node.metadata, SCORE_KEY: item.score},
        "excluded_embed_metadata_keys": _with_key(item.node.excluded_embed_metadata_keys),
        "excluded_llm_metadata_keys": _with_key(item.node.excluded_llm_metadata_keys),
    }
    return NodeWithScore(node=item.node.model_copy(update=changes), score=score)


def _with_key(keys: list[str]) -> list[str]:
    return keys if SCORE_KEY in keys else [*keys, SCORE_KEY]
