"""A checkpoint of KaLM-Reranker-V1-Nano's shape with random weights, in the published format, and what reads it whole.

The real weights are not needed for time and memory. Its tokenizer knows the words of `measuring.random_text`, one token
each, so that passages and prompts of a wanted length can be made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Gemma2Config, T5Gemma2ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutput

from kalm_rag.bench.measuring import random_text, words_used
from kalm_rag.instructions import Instructions
from kalm_rag.models.t5gemma2.protocol import PASSAGE_TEMPLATE, PROMPT_TEMPLATE, USER_TEMPLATE
from kalm_rag.states.pooling import mean_groups

NANO: Mapping[str, Any] = MappingProxyType(
    {
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
    }
)
"""Text encoder and decoder of KaLM-Reranker-V1-Nano."""
VISION: Mapping[str, Any] = MappingProxyType(
    {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
    }
)
"""Its vision tower (SigLIP), more than half of the parameters; reranking text never uses it."""
_BEFORE, _AFTER = 5, 3
"""Tokens of the prompt template before and behind the query: ``<bos> <start_of_turn> user <Instruct>: <Query>:`` and
``<end_of_turn> <start_of_turn> model``."""
_SPECIALS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<unk>")


def save_checkpoint(folder: Path, text: Mapping[str, Any] = NANO, vision: Mapping[str, Any] = VISION) -> Path:
    """Save a checkpoint in bfloat16 as ``save_pretrained`` writes them, with its tokenizer.

    `text` is the shape of encoder and decoder, `vision` that of the vision tower, whose weights are zeros.
    """
    encoder = {"text_config": dict(text), "vision_config": {"model_type": "siglip_vision_model", **vision}}
    config = T5Gemma2Config(encoder=encoder, decoder=dict(text))
    with torch.device("meta"):  # transformers' own initialisation takes a minute for this size
        model = T5Gemma2ForConditionalGeneration(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim < 2 or "vision" in name:
                weight.zero_()
            else:
                weight.normal_(0.0, 0.02, generator=draw)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, for the words of `random_text` and of the protocol's templates; Gemma's turn markers."""
    templates = " ".join((PASSAGE_TEMPLATE, PROMPT_TEMPLATE, USER_TEMPLATE, Instructions().system_text)).split()
    words = dict.fromkeys([*_SPECIALS, "yes", "no", *words_used(), *templates])
    tokenizer = Tokenizer(models.WordLevel({word: row for row, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def passage_of(tokens: int, seed: int) -> str:
    """A passage that this tokenizer turns into so many tokens, the template's included."""
    return random_text(max(1, tokens - len(PASSAGE_TEMPLATE.format(passage="").split())), seed)


def prompt_of(tokens: int, *, prefix: int = 58, seed: int = 1) -> tuple[str, Instructions]:
    """Give a query and instructions whose prompt has so many tokens, at least 40.

    The protocol's own words take most of these. `prefix` of them (fewer where there are few) are in front of the query:
    turn markers, system text and task. The seed is the query's; instructions are the same for all.
    """
    system = len(Instructions().system_text.split())
    task = max(1, min(prefix - system - _BEFORE, tokens - system - _BEFORE - _AFTER - 1))
    query = max(1, tokens - system - task - _BEFORE - _AFTER)
    return random_text(query, seed), Instructions(task=random_text(task, seed=2))


class Reference:
    """The published one-phase protocol by transformers' own model: encode, pool, decode, logits at all positions."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        model = T5Gemma2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
        del model.model.encoder.vision_tower  # reading text doesn't need it either
        self._model, self._device = model.to(device), device

    @torch.inference_mode()
    def margins(
        self, query: str, passages: Sequence[str], instructions: Instructions, *, ratio: int, batch: int = 32
    ) -> Tensor:
        """Score passages from scratch, batch by batch; margins, float32 ``(passages,)`` on the CPU."""
        user = USER_TEMPLATE.format(system=instructions.system_text, task=instructions.task_text, query=query)
        prompt = torch.tensor(self._ids(PROMPT_TEMPLATE.format(user=user)), device=self._device)  # (Q,)
        parts = [self._batch(passages[at : at + batch], prompt, ratio) for at in range(0, len(passages), batch)]
        return torch.cat(parts).cpu()

    def _batch(self, passages: Sequence[str], prompt: Tensor, ratio: int) -> Tensor:
        rows = [torch.tensor(self._ids(PASSAGE_TEMPLATE.format(passage=text))) for text in passages]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self._tokenizer.pad_token_id)  # (B, T)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).to(self._device)  # (B, T)
        encoder = self._model.get_encoder()
        hidden = encoder(input_ids=ids.to(self._device), attention_mask=mask.long()).last_hidden_state  # (B, T, H)
        pooled, counts = mean_groups(hidden, mask, ratio)  # (B, N, H), (B, N)
        logits = self._model(
            encoder_outputs=BaseModelOutput(last_hidden_state=pooled.to(self._model.dtype)),
            attention_mask=(counts > 0).long(),
            decoder_input_ids=prompt.expand(len(rows), -1),
            use_cache=False,
        ).logits  # (B, Q, V)
        yes, no = (self._ids(word)[-1] for word in ("yes", "no"))
        last: Tensor = logits[:, -1].float()
        return last[:, yes] - last[:, no]

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
