"""T5Gemma 2 without its vision tower: encoder, decoder and head, as far as text needs them.

Parameter names are those of the full model, so that its checkpoints load and ours load elsewhere. Reads no file.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2Config
from transformers.models.t5gemma2.modeling_t5gemma2 import (
    T5Gemma2Decoder,
    T5Gemma2LMHead,
    T5Gemma2PreTrainedModel,
    T5Gemma2TextEncoder,
)

KEY_MAPPING = {r"^model\.encoder\.(layers|norm|embed_tokens)\.": r"model.encoder.text_model.\1."}
"""Checkpoints spell the encoder's names in two ways, depending on the transformers release that saved them."""


class _TextEncoder(T5Gemma2PreTrainedModel):
    """The encoder without its vision tower; parameter names as in the full model."""

    def __init__(self, config: Any) -> None:  # noqa: ANN401 - the config classes are untyped
        super().__init__(config)
        self.text_model = T5Gemma2TextEncoder._from_config(config.text_config, eoi_token_index=config.eoi_token_index)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()


class _TextModel(T5Gemma2PreTrainedModel):
    """Encoder and decoder; parameter names as in the full model."""

    _tied_weights_keys = {  # noqa: RUF012 - transformers reads a plain class attribute
        "decoder.embed_tokens.weight": "encoder.text_model.embed_tokens.weight",
        "decoder.embed_tokens.eoi_embedding": "encoder.text_model.embed_tokens.eoi_embedding",
    }

    def __init__(self, config: T5Gemma2Config) -> None:
        super().__init__(config)
        self.encoder = _TextEncoder(config.encoder)
        self.decoder = T5Gemma2Decoder(config.decoder, config.eoi_token_index)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.get_input_embeddings()


class T5Gemma2TextReranker(T5Gemma2PreTrainedModel):
    """`T5Gemma2ForConditionalGeneration` as far as text needs it: loads its checkpoints, skips the vision weights."""

    _tied_weights_keys = {  # noqa: RUF012
        "lm_head.out_proj.weight": "model.encoder.text_model.embed_tokens.weight"
    }
    _keys_to_ignore_on_load_unexpected = [r"vision_tower", r"multi_modal_projector"]  # noqa: RUF012

    def __init__(self, config: T5Gemma2Config) -> None:
        super().__init__(config)
        self.model = _TextModel(config)
        self.lm_head = T5Gemma2LMHead(config.decoder.hidden_size, config.decoder.vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Token embeddings, which encoder, decoder and head share."""
        return self.model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The head over the vocabulary."""
        return self.lm_head.out_proj
