"""The ways a checkpoint's decoder can run over the same tensors: ours, rounded, compiled, or transformers' own."""

from __future__ import annotations

import copy
import logging

import torch
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Decoder

from kalm_rag.errors import ModelError
from kalm_rag.models.t5gemma2.compiled import CompiledDecoder
from kalm_rag.models.t5gemma2.decoder import LeanDecoder, unknown_parts
from kalm_rag.models.t5gemma2.int8 import Int8Projection

logger = logging.getLogger(__name__)


def make_decoder(decoder: T5Gemma2Decoder, weights: str | None, compiled: bool) -> LeanDecoder | CompiledDecoder | None:
    """Our own forward over a decoder, or None where it is of a kind that only transformers knows (which is logged).

    Args:
        decoder: In evaluation mode; its tensors are shared.
        weights: ``"int8"`` for rounded weights; None for its own.
        compiled: Whether to run it through torch.compile.

    Raises:
        ModelError: If a way is asked for that only our own forward has.
    """
    unknown = unknown_parts(decoder)
    if unknown is None:
        lean = LeanDecoder(decoder) if weights is None else LeanDecoder(decoder, Int8Projection)
        return CompiledDecoder(lean) if compiled else lean
    if weights is not None or compiled:
        asked = "compiled=True" if compiled else f"decoder_weights={weights!r}"
        raise ModelError(f"{asked} can't be had for a decoder with {unknown}. Leave it out.")
    logger.warning("this checkpoint's decoder has %s; it runs in transformers' own code, more slowly.", unknown)
    return None


def eager_twin(decoder: T5Gemma2Decoder) -> T5Gemma2Decoder:
    """Transformers' decoder over the same tensors, whose attention gives its weights (SDPA's can't)."""
    with torch.device("meta"):
        twin = T5Gemma2Decoder._from_config(
            copy.deepcopy(decoder.config),
            attn_implementation="eager",
            eoi_token_index=decoder.embed_tokens.eoi_token_index,
        )
    for name, tensor in [*decoder.named_parameters(), *decoder.named_buffers()]:
        home, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(home), leaf, tensor)
    return twin.eval()


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors (at most 62 MB): fresh pages cost up to a tenth of a query.

    It gives blocks over a threshold back at once. The threshold grows to the largest such block freed so far, up to
    32 MB; with another C library this does nothing.
    """
    torch.empty(31 << 20, dtype=torch.uint8)
