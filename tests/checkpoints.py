"""Tiny seeded T5Gemma 2 checkpoints and their tokenizer, in the Hugging Face format."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, T5Gemma2Config, T5Gemma2ForConditionalGeneration

from kalm_rag.bench.checkpoint import NANO, VISION

TINY_NANO = {
    **NANO,
    "vocab_size": 512,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
TINY_TOWER = {
    **VISION,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
"""Nano's shape and its vision tower, made tiny."""

SPECIALS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with Gemma's turn markers, and merges across newlines so that boundaries matter."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("ĊĊ", "ĊĊ"), ("t", "h"), ("th", "e"), ("i", "n"), ("y", "e"), ("ye", "s"), ("n", "o")]
    tokens = SPECIALS + alphabet + ["".join(pair) for pair in merges]
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=SPECIALS[3:],
    )


def tiny_config(**changes: object) -> T5Gemma2Config:
    """Two encoder and three decoder layers, sliding and full attention, width 16, window shorter than the prompts."""
    text = {
        "vocab_size": 272,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "initializer_range": 0.3,  # large, so that margins differ by more than rounding
        **changes,
    }
    vision = {
        "model_type": "siglip_vision_model",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    encoder = {
        "text_config": dict(text),
        "vision_config": vision,
        "mm_tokens_per_image": 4,
        "eoi_token_index": 270,
        "boi_token_index": 269,
    }
    return T5Gemma2Config(encoder=encoder, decoder=dict(text), image_token_index=271)


def save_tiny(folder: Path, *, seed: int = 0, max_shard_size: str = "5GB", **changes: object) -> Path:
    """Save a seeded tiny checkpoint with its tokenizer, as ``save_pretrained`` writes them."""
    torch.manual_seed(seed)
    model = T5Gemma2ForConditionalGeneration(tiny_config(**changes)).eval()
    with torch.no_grad():
        model.model.decoder.embed_tokens.eoi_embedding.normal_()
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tiny_tokenizer().save_pretrained(folder)
    return folder
