"""Nodes of LlamaIndex: which of their text is scored, how Chroma's records become nodes, how scores are put on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_index.core.schema import BaseNode, MetadataMode, NodeWithScore, TextNode
from llama_index.core.vector_stores.utils import legacy_metadata_dict_to_node, metadata_dict_to_node

from kalm_rag.checks import check_text
from kalm_rag.index.passage_rule import PassageRule

SCORE_KEY = "retrieval_score"
"""Metadata key of the score a node came with; the name that LlamaIndex's own rerankers use."""


def node_text(node: BaseNode, mode: MetadataMode) -> str | None:
    """Text of a node that the encoder reads; None for a node without any (an image, say), which can't be scored.

    Raises:
        InputError: If it holds a lone surrogate.
    """
    text = check_text(node.get_content(metadata_mode=mode), f"text of node {node.node_id}")
    return text if text.strip() else None


def read_node(node: BaseNode, rule: PassageRule) -> str | None:
    """Text of a node that is read under a collection's passage rule; None for a node without any.

    Raises:
        InputError: If it holds a lone surrogate.
    """
    mode = rule.llama_mode
    if mode is not None:
        return node_text(node, MetadataMode[mode.upper()])
    return rule.text(check_text(node.get_content(MetadataMode.NONE), f"text of node {node.node_id}"), node.metadata)


def record_node(record_id: str, document: str | None, metadata: Mapping[str, Any] | None) -> BaseNode:
    """Node that LlamaIndex makes of a Chroma record, also of one that somebody else wrote."""
    fields = dict(metadata) if metadata is not None else {}
    if "_node_content" in fields:
        return metadata_dict_to_node(fields, text=document)
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
