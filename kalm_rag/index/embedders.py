"""Retrieval vectors for a Chroma collection: from pico's own states, or from whatever embedder the app has.

Knows no collection. An embedder of the app's is used as it is, told apart by the methods it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch

from kalm_rag.checks import call_app
from kalm_rag.engine.prepared import PreparedQuery
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, ModelError, require
from kalm_rag.models.backbone import EmbeddingBackbone
from kalm_rag.states import StateBatch, batch_states

BUNDLED = "all-MiniLM-L6-v2"
"""Name of the vectors that pico's encoder gives; the same model as Chroma's default embedding function."""


class Embedder(Protocol):
    """Texts to retrieval vectors, float32."""

    name: str

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of passages, shape ``(passages, width)``."""

    def query(self, text: str | PreparedQuery) -> list[float]:
        """Vector of a query; one that an engine has prepared may give it for nothing."""


class BundledEmbedder:
    """Vectors of pico's frozen encoder: unit length, width 384.

    A passage's vector is the mean of its pooled states, so whoever has the states has the vector without another
    encoder pass. `engine` must be over pico.
    """

    name = BUNDLED

    def __init__(self, engine: Reranker) -> None:
        self._engine = engine

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """Encode passages and give their vectors. No state is kept, so only what a vector stands for is read."""
        backbones = [cast("EmbeddingBackbone", one) for one in self._engine.backbones]
        first, *others = [one.cut_at(one.embedded_tokens) for one in backbones]
        reader = Reranker(first, ratio=self._engine.ratio, batch_size=self._engine.batch_size, helpers=others)
        return self.from_states(batch_states(reader.encode(texts, show_progress=False)))

    def from_states(self, states: StateBatch) -> np.ndarray:
        """Vectors of passages whose states are at hand."""
        backbone = cast("EmbeddingBackbone", self._engine.backbone)
        vectors, counts = states.on(backbone.device, torch.float32)
        return backbone.embed_states(vectors, counts).float().cpu().numpy()

    def query(self, text: str | PreparedQuery) -> list[float]:
        """Vector of a query; of one that this model has prepared, without reading it again."""
        backbone = cast("EmbeddingBackbone", self._engine.backbone)
        vector = None
        if isinstance(text, PreparedQuery):
            vector = backbone.embed_prompt(text.prompt) if text.is_of(backbone) else None
            text = text.query
        return cast("list[float]", (vector if vector is not None else backbone.embed_query(text)).tolist())


class AppEmbedder:
    """An embedder of the app's: two functions and a name."""

    def __init__(
        self, name: str, passages: Callable[[list[str]], Any], query: Callable[[str], Any] | None = None
    ) -> None:
        self.name = name
        self._passages = passages
        self._query = query if query is not None else lambda text: passages([text])[0]

    def passages(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of passages; InputError if the app's embedder gives anything but one finite vector per text."""
        vectors = np.asarray(call_app(f"embedder {self.name}", self._passages, list(texts)), dtype=np.float32)
        if vectors.ndim != 2 or vectors.shape[0] != len(texts) or not np.isfinite(vectors).all():
            raise InputError(
                f"embedder {self.name} gave shape {vectors.shape} for {len(texts)} texts; wanted ({len(texts)}, width) "
                f"of finite numbers."
            )
        return vectors

    def query(self, text: str | PreparedQuery) -> list[float]:
        """Vector of a query; the app's embedder gets its text."""
        question = text.query if isinstance(text, PreparedQuery) else text
        vector = call_app(f"embedder {self.name}", self._query, question)
        return cast("list[float]", np.asarray(vector, dtype=np.float32).tolist())


def wrap_embedder(embedder: object) -> Embedder:
    """Make an `Embedder` of what apps have.

    Args:
        embedder: The name or folder of a sentence-transformers model, such a model (``encode``), a LangChain
            ``Embeddings`` (``embed_documents``), a LlamaIndex embedding (``get_text_embedding_batch``), a Chroma
            embedding function or any function from a list of texts to vectors.

    Raises:
        InputError: If it is none of these.
        ModelError: If no sentence-transformers model can be loaded by that name.
        MissingDependencyError: If it is a name and sentence-transformers is not installed.
    """
    if isinstance(embedder, BundledEmbedder | AppEmbedder):
        return embedder
    if isinstance(embedder, str):
        return _named_embedder(embedder)
    name = type(embedder).__name__
    some = cast("Any", embedder)
    if hasattr(some, "embed_documents"):
        return AppEmbedder(name, some.embed_documents, some.embed_query)
    if hasattr(some, "get_text_embedding_batch"):
        return AppEmbedder(name, some.get_text_embedding_batch, some.get_query_embedding)
    if hasattr(some, "encode"):
        encode = getattr(some, "encode_document", some.encode)  # asymmetric models have a prompt for each side
        query = getattr(some, "encode_query", some.encode)
        return AppEmbedder(name, lambda texts: encode(texts, show_progress_bar=False), query)
    if hasattr(some, "embed_query") and callable(some):  # Chroma's protocol
        return AppEmbedder(name, some, lambda text: some.embed_query([text])[0])
    if callable(some):
        return AppEmbedder(getattr(some, "__name__", name), some)
    raise InputError(
        f"embedder is {name}; wanted a sentence-transformers model, a LangChain or LlamaIndex embedding, a Chroma "
        f"embedding function, or a function from texts to vectors."
    )


def _named_embedder(name: str) -> Embedder:
    """A sentence-transformers model by name or folder. Its own code is never run; offline settings are respected."""
    package = require("sentence_transformers", "pico", f"embedder {name!r}")
    try:
        model = package.SentenceTransformer(name, trust_remote_code=False, model_kwargs={"use_safetensors": True})
    except (OSError, ValueError, RuntimeError) as err:
        raise ModelError(
            f"embedder {name!r} can't be loaded as a sentence-transformers model ({str(err)[:200]}). Wanted a name on "
            f"the hub, a folder, or an object that embeds; None takes the bundled one."
        ) from err
    wrapped = wrap_embedder(model)
    wrapped.name = name
    return wrapped
