"""KaLM checkpoints: any T5Gemma 2 encoder-decoder, text path only, by the protocol of KaLM-Reranker-V1.

Protocol: arXiv 2606.22807 and the model cards of ``KaLM-Embedding/KaLM-Reranker-V1-*``. Of the logits only two rows at
one position are computed.
Letters: B passages, T passage tokens, N pooled states, Q prompt tokens, H width.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Decoder

from kalm_rag.errors import InputError
from kalm_rag.instructions import Instructions
from kalm_rag.models.backbone import BackboneInfo, TokenizedPassage, check_passage_limit, index_tensor
from kalm_rag.models.prefix_cache import CPU_CACHE_BYTES, PrefixCache, entry_keys
from kalm_rag.models.t5gemma2.checkpoint import digest_checkpoint, load_model, read_config, read_tokenizer
from kalm_rag.models.t5gemma2.compiled import CompiledDecoder
from kalm_rag.models.t5gemma2.decoder import DecoderInput, LeanDecoder, PrefixKV
from kalm_rag.models.t5gemma2.int8 import check_weights
from kalm_rag.models.t5gemma2.protocol import (
    HEAD_TEMPLATE,
    MAX_INSTRUCTION_TOKENS,
    MAX_PASSAGE_TOKENS,
    MAX_QUERY_TOKENS,
    PASSAGE_TEMPLATE,
    PROMPT_TEMPLATE,
    USER_TEMPLATE,
    TextTokens,
)
from kalm_rag.models.t5gemma2.text_model import T5Gemma2TextReranker
from kalm_rag.models.t5gemma2.variants import eager_twin, keep_freed_memory, make_decoder
from kalm_rag.states import check_dtype, dtype_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Prompt:
    """Decoder input of one query.

    Attributes:
        ids: Token ids on the device, shape ``(Q,)``.
        prefix: The first ids, which hold system and task and are the same whatever the query; may be empty.
    """

    ids: Tensor
    prefix: tuple[int, ...] = ()


class T5Gemma2Backbone:
    """A loaded KaLM checkpoint. See `kalm_rag.models.backbone.Backbone` for the contract."""

    def __init__(
        self,
        model: T5Gemma2TextReranker,
        tokens: TextTokens,
        info: BackboneInfo,
        *,
        decoder_weights: str | None = None,
        compiled: bool = False,
    ) -> None:
        self.info = info
        self.state_dtype = model.dtype
        self.device = model.device
        self._model: T5Gemma2TextReranker = model.eval()
        self._eager: T5Gemma2Decoder | None = None
        self._lock = threading.Lock()
        self._tokens = tokens
        self.decoder_weights, self.compiled = decoder_weights, compiled
        self._lean = make_decoder(self._model.model.decoder, decoder_weights, compiled)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.prefix_cache = PrefixCache(CPU_CACHE_BYTES if self.device.type == "cpu" else 0)
        self._softcap = model.config.decoder.final_logit_softcapping
        self._answer_ids = torch.tensor([tokens.yes_id, tokens.no_id], device=model.device)

    @property
    def decode_budget(self) -> int:
        """See `Backbone.decode_budget`; on a CPU where it was fastest of 520 to 6144, by up to 20%."""
        if self.device.type == "cuda":
            return 65536
        if self.compiled:
            return 3072  # longer passes meet more graphs
        return 4160

    def decode_width(self, prompt: Prompt, states: int) -> int:
        """Tokens and states of one row; see `Backbone.decode_width`."""
        return len(prompt.ids) + states

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        name: str,
        revision: str,
        device: torch.device,
        dtype: torch.dtype,
        weights: str | None = None,
        decoder_weights: str | None = None,
        compiled: bool = False,
        max_passage_tokens: int | None = None,
    ) -> T5Gemma2Backbone:
        """Load a checkpoint folder in the Hugging Face format (one safetensors shard or several).

        Args:
            folder: Holds config.json, the tokenizer and ``*.safetensors``.
            name: How the checkpoint was asked for.
            revision: Its commit, or ``"local"``.
            device: Where to compute.
            dtype: float32 or bfloat16.
            weights: What pins all files (repository and commit); None hashes those that change a state.
            decoder_weights: ``"int8"`` scores with rounded decoder weights (CPU only); None with the checkpoint's.
                States are the same either way. The checkpoint's own stay loaded: explanations read them.
            compiled: Run the decoder through torch.compile, at the first query; not together with `decoder_weights`.
            max_passage_tokens: Where passages are cut, template included; None is the protocol's 1,024. They are read
                in one pass, so memory grows with the square of it.

        Raises:
            InputError: For float16, whose range this model overflows, or `decoder_weights` that can't be had, or not
                together with `compiled`.
            ModelError: If the folder is no T5Gemma 2 checkpoint, or one of its files is missing or can't be used.
        """
        check_dtype(dtype)
        if decoder_weights is not None:
            check_weights(decoder_weights, device)
            if compiled:
                raise InputError(f"decoder_weights={decoder_weights!r} can't be compiled. Leave one of the two out.")
        config = read_config(folder)
        tokens = read_tokenizer(folder, config)
        model = load_model(folder, config, dtype)
        info = BackboneInfo(
            family="t5gemma2",
            name=name,
            revision=revision,
            weights=weights if weights is not None else digest_checkpoint(folder),
            template=PASSAGE_TEMPLATE,
            hidden_size=config.decoder.hidden_size,
            max_passage_tokens=check_passage_limit(
                max_passage_tokens,
                MAX_PASSAGE_TOKENS,
                max(MAX_PASSAGE_TOKENS, config.encoder.text_config.max_position_embeddings),
            ),
            dtype=dtype_name(dtype),
            state_dtype=dtype_name(dtype),
        )
        return cls(model.to(device), tokens, info, decoder_weights=decoder_weights, compiled=compiled)

    @property
    def model(self) -> T5Gemma2TextReranker:
        """Encoder, decoder and head; training changes them in place."""
        return self._model

    def tokenize(self, passages: Sequence[str]) -> list[TokenizedPassage]:
        """Turn passages into encoder input; see `Backbone.tokenize`."""
        encoded = self._tokens.ids_many([PASSAGE_TEMPLATE.format(passage=text) for text in passages])
        limit = self.info.max_passage_tokens
        return [TokenizedPassage(ids=ids[:limit], total_tokens=len(ids)) for ids in encoded]

    @torch.inference_mode()
    def encode(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Read passages once; see `Backbone.encode`."""
        return self.read(ids)

    def read(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Do what `encode` does, under autograd: for training."""
        tokens, mask = self._pad(ids)
        states = self._model.model.encoder.text_model(input_ids=tokens, attention_mask=mask.long()).last_hidden_state
        return states, mask

    def prompt(self, query: str, instructions: Instructions) -> Prompt:
        """Tokenise the decoder's input; see `Backbone.prompt`."""
        system, task = self._instruction_texts(instructions)
        ids = self._tokens.prompt_ids(self._user_part(query, system, task))
        head = HEAD_TEMPLATE.format(system=system, task=task)
        # tokens may merge across the seam to the query, so only what the whole prompt begins with counts
        same = takewhile(lambda pair: pair[0] == pair[1], zip(self._tokens.head_ids(head), ids, strict=False))
        return Prompt(index_tensor(ids, self.device), tuple(token for token, _ in same))

    @torch.inference_mode()
    def decode(
        self, prompts: Sequence[Prompt], states: Tensor, counts: Tensor, token_ids: Tensor | None = None
    ) -> Tensor:
        """Score each passage under its prompt; see `Backbone.decode`."""
        states = states.to(self._model.dtype)
        if self._lean is None:
            return self._judge(self._decode_plainly(prompts, states, counts > 0))
        if self.prefix_cache.enabled:
            return self._judge(self._decode_cached(self._lean, prompts, states, counts > 0))
        return self._judge(self._lean(self._batch(prompts, states, counts > 0)))

    def judge(self, prompts: Sequence[Prompt], states: Tensor, counts: Tensor) -> Tensor:
        """Do what `decode` does, under autograd and by transformers' own forward: for training."""
        return self._judge(self._decode_plainly(prompts, states.to(self._model.dtype), counts > 0))

    def _judge(self, at_last: Tensor) -> Tensor:
        """Margins of the decoder's last positions ``(B, H)``."""
        answers = self._model.lm_head.out_proj.weight[self._answer_ids]  # (2, H), afresh: training changes them
        with torch.autocast(self.device.type, enabled=False):  # bf16 logits would round a margin of 10 to 1/16
            logits = nn.functional.linear(at_last.to(answers.dtype), answers)  # (B, 2)
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        yes_no = logits.float()
        return yes_no[:, 0] - yes_no[:, 1]

    def _decode_plainly(self, prompts: Sequence[Prompt], states: Tensor, real: Tensor) -> Tensor:
        """Transformers' own decoder, at the last prompt positions: ``(B, H)``."""
        batch = self._batch(prompts, states, real)
        ids = batch.ids[batch.rows]  # (B, Q)
        hidden = self._model.model.decoder(
            input_ids=ids,
            attention_mask=(torch.arange(ids.shape[1], device=self.device) <= batch.last[:, None]).long(),
            encoder_hidden_states=states,
            encoder_attention_mask=real.long(),
            use_cache=False,
        ).last_hidden_state  # (B, Q, H)
        at_last: Tensor = hidden[torch.arange(len(prompts), device=self.device), batch.last]
        return at_last

    def _decode_cached(
        self, lean: LeanDecoder | CompiledDecoder, prompts: Sequence[Prompt], states: Tensor, real: Tensor
    ) -> Tensor:
        """Start behind each prompt's prefix, whose keys and values are kept per passage: ``(B, H)``.

        What was kept and what is computed now go through the same steps, so a score doesn't depend on which it was.
        """
        at_last = torch.empty(len(prompts), states.shape[2], dtype=states.dtype, device=states.device)
        for prefix in dict.fromkeys(p.prefix for p in prompts):
            rows = [row for row, prompt in enumerate(prompts) if prompt.prefix == prefix]
            past = self._prefix_kv(lean, prefix, states[rows], real[rows]) if prefix else None
            at_last[rows] = lean(self._batch([prompts[row] for row in rows], states[rows], real[rows], past))
        return at_last

    def _prefix_kv(
        self, lean: LeanDecoder | CompiledDecoder, prefix: tuple[int, ...], states: Tensor, real: Tensor
    ) -> PrefixKV:
        """Keys and values of one prefix and of passages' states, from the cache or made now."""
        lengths = real.sum(1).tolist()
        keys = entry_keys(prefix, states, lengths)
        found = {key: self.prefix_cache.get(key) for key in dict.fromkeys(keys)}
        rows = [keys.index(key) for key, entry in found.items() if entry is None]
        if rows:
            made = lean.compute_prefix_kv(self._batch([self._beginning(prefix)] * len(rows), states[rows], real[rows]))
            for place, row in enumerate(rows):
                entry = made[:, :, place, : len(prefix) + lengths[row]].clone()
                found[keys[row]] = entry
                self.prefix_cache.put(keys[row], entry)
        return PrefixKV(entries=[cast("Tensor", found[key]) for key in keys], width=len(prefix) + states.shape[1])

    def _beginning(self, prefix: tuple[int, ...]) -> Prompt:
        return Prompt(index_tensor(prefix, self.device))

    def _batch(
        self, prompts: Sequence[Prompt], states: Tensor, real: Tensor, past: PrefixKV | None = None
    ) -> DecoderInput:
        """Lay out prompts for the decoder, each distinct one once; behind their prefix where `past` holds it."""
        distinct = {id(prompt): prompt for prompt in prompts}
        place = {name: row for row, name in enumerate(distinct)}
        ids = [p.ids[len(p.prefix) if past is not None else 0 :] for p in distinct.values()]
        rows = [place[id(prompt)] for prompt in prompts]
        return DecoderInput(
            ids=nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=self._tokens.pad_id),
            rows=index_tensor(rows, self.device),
            last=index_tensor([len(ids[row]) - 1 for row in rows], self.device),
            states=states,
            real=real,
            past=past,
        )

    @torch.inference_mode()
    def attend(self, prompt: Prompt, states: Tensor, counts: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Attention of the scoring position over the states, meaned over layers and heads; see `Backbone.attend`."""
        batch = states.shape[0]
        attention = self._eager_decoder()(
            input_ids=prompt.ids.expand(batch, -1),
            encoder_hidden_states=states.to(self._model.dtype),
            encoder_attention_mask=(counts > 0).long(),
            use_cache=False,
            output_attentions=True,
        ).cross_attentions  # per layer (B, K, Q, N): the passage's part of the merged softmax
        weights = torch.stack([layer[:, :, -1].float().mean(1) for layer in attention]).mean(0)  # (B, N)
        return weights / weights.sum(-1, keepdim=True)

    def offsets(self, passage: str) -> list[tuple[int, int]]:
        """Characters behind each token of a passage; see `Backbone.offsets`."""
        prefix = len(PASSAGE_TEMPLATE.format(passage=""))
        found = self._tokens.offsets(PASSAGE_TEMPLATE.format(passage=passage))[: self.info.max_passage_tokens]
        return [(max(start - prefix, 0), max(end - prefix, 0)) for start, end in found]

    def _eager_decoder(self) -> T5Gemma2Decoder:
        with self._lock:
            if self._eager is None:
                self._eager = eager_twin(self._model.model.decoder)
            return self._eager

    def preview(self, query: str, instructions: Instructions) -> str:
        """Show the exact decoder text, and behind it what was cut; see `Backbone.preview`."""
        texts = (
            ("system text", instructions.system_text, MAX_INSTRUCTION_TOKENS),
            ("task", instructions.task_text, MAX_INSTRUCTION_TOKENS),
            ("query", query, MAX_QUERY_TOKENS),
        )
        counted = [(name, limit, self._tokens.total_tokens(text)) for name, text, limit in texts]
        cuts = [f"({name} cut: {limit} of {total} tokens)" for name, limit, total in counted if total > limit]
        read = PROMPT_TEMPLATE.format(user=self._user_part(query, *self._instruction_texts(instructions)))
        return "\n".join([read, *cuts])

    def _instruction_texts(self, instructions: Instructions) -> tuple[str, str]:
        """System text and task as they are read."""
        cut = self._tokens.cut_instruction
        return cut(instructions.system_text, "system text"), cut(instructions.task_text, "task")

    def _user_part(self, query: str, system: str, task: str) -> str:
        # str.format never reads braces inside the values, so a query with "{x}" is safe here
        return USER_TEMPLATE.format(system=system, task=task, query=self._tokens.cut_query(query))

    def _pad(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        width = max(len(row) for row in ids)
        padded = [[*row, *[self._tokens.pad_id] * (width - len(row))] for row in ids]
        lengths = torch.tensor([len(row) for row in ids], device=self.device)
        mask = torch.arange(width, device=self.device) < lengths[:, None]  # (B, T)
        return torch.tensor(padded, device=self.device), mask
