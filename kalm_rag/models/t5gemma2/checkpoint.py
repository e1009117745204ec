"""A T5Gemma 2 checkpoint's files: which folder is one, and the model without its vision tower.

Parameter names are those of the full model, so that its checkpoints load and ours load elsewhere.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig
from transformers.models.t5gemma2.configuration_t5gemma2 import T5Gemma2Config
from transformers.models.t5gemma2.modeling_t5gemma2 import (
    T5Gemma2Decoder,
    T5Gemma2LMHead,
    T5Gemma2PreTrainedModel,
    T5Gemma2TextEncoder,
)

from kalm_rag.errors import ModelError

# Checkpoints come with both spellings of the encoder's names, depending on the transformers release that saved them.
KEY_MAPPING = {r"^model\.encoder\.(layers|norm|embed_tokens)\.": r"model.encoder.text_model.\1."}


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


def read_config(folder: Path) -> T5Gemma2Config:
    """Read a checkpoint folder's config.

    Raises:
        ModelError: If the folder is no T5Gemma 2 checkpoint, or has no safetensors.
    """
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no .safetensors file. Save the checkpoint with save_pretrained(); pickles are refused."
        )
    try:
        config = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as err:
        raise ModelError(f"{folder} has no readable config.json: {err}") from err
    if not isinstance(config, T5Gemma2Config):
        raise ModelError(f"{folder} is a {config.model_type!r} checkpoint; wanted 't5gemma2' (KaLM-Reranker-V1).")
    return config


def load_model(folder: Path, config: T5Gemma2Config, dtype: torch.dtype) -> T5Gemma2TextReranker:
    """Load a checkpoint's text weights, on the CPU.

    Raises:
        ModelError: If they can't be read, or some are missing.
    """
    try:
        model, report = T5Gemma2TextReranker.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            key_mapping=KEY_MAPPING,
            output_loading_info=True,
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as err:
        raise ModelError(f"{folder} could not be loaded as a T5Gemma 2 checkpoint: {err}") from err
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(
            f"{folder} misses {len(missing)} weights (first: {missing[0]}); scores would be random. "
            f"Fetch or save the checkpoint again."
        )
    return model


def digest_files(files: Sequence[Path]) -> str:
    """Sha256 over the contents of files, in the order given, hex."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(1 << 22):
                digest.update(block)
    return digest.hexdigest()
