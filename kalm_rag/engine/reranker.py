"""The engine: passages in once, states out; queries in, relevances out. Batches, devices and threads live here.

Knows models and states; knows no store, no Chroma and no framework.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from kalm_rag.checks import check_count, check_cut, check_passages, check_query, check_text
from kalm_rag.engine.decoder_pass import decode_all, find_attention
from kalm_rag.engine.encoder_pass import encode_passages
from kalm_rag.engine.explanation import Explanation, attended_spans
from kalm_rag.engine.inputs import Pairs, check_pairs, check_question, check_states, check_texts_or_states
from kalm_rag.engine.loaded import DEFAULT_RATIO, LoadedModel
from kalm_rag.engine.prepared import PreparedQuery
from kalm_rag.engine.queue import Request, cancel_on_error, queue_of
from kalm_rag.engine.relevance import Ranked, Relevance, probability_of, rank_relevances
from kalm_rag.errors import InputError, KalmRagError, StateMismatchError
from kalm_rag.instructions import Instructions, as_instructions
from kalm_rag.states import PassageStates, StateBatch, batch_states, passage_key
from kalm_rag.states.pooling import repool_factor

__all__ = ["DEFAULT_RATIO", "Reranker"]


class Reranker(LoadedModel):
    """Scores passages for queries in two phases: `encode` once per passage, `score` per query.

    Safe to use from many threads. Engines made by `from_pretrained` share one loaded model per
    (checkpoint, revision, device, dtype) in a process; `close` gives it back.

    Args:
        backbone: A loaded model.
        ratio: Tokens one stored state stands for, >= 1 (None: 1). Larger is smaller and faster, a little less exact.
        batch_size: Most passages in one pass; also bounded by tokens, so long passages make smaller batches.
        helpers: The same model on further devices, to encode on all of them at once.

    Raises:
        InputError: If `ratio` or `batch_size` is not a whole number >= 1, or a helper is another model.

    Example:
        >>> from kalm_rag import Reranker
        >>> with Reranker.from_pretrained("pico") as reranker:
        ...     ranking = reranker.rank("What is the capital of France?", ["I like tea.", "Paris is France's capital."])
        >>> ranking[0].index
        1
    """

    def encode(
        self, passages: Iterable[str], *, show_progress: bool | None = None, keys: Sequence[str] | None = None
    ) -> list[PassageStates]:
        """Read passages once; what comes back can be scored under any query and instruction.

        A passage that occurs twice is encoded once. Blank passages are passages like any other. Passages over the
        model's limit are cut there: see `PassageStates.truncated`, `tokens` and `total_tokens`.

        Args:
            passages: Texts, in the order the states are wanted; any iterable, read once.
            show_progress: None shows a bar on a terminal when there is much to do.
            keys: Content addresses of the passages (`passage_key`), for callers that have them at hand.

        Returns:
            One `PassageStates` per passage, in input order, on the CPU; an empty list for no passages.

        Raises:
            InputError: If `passages` is a single string or no iterable, or one of them is no valid string (which one is
                named).
            ClosedError: After `close`.
        """
        backbones, texts = self.backbones, check_passages(passages)
        if keys is None:
            keys = [passage_key(text) for text in texts]
        return encode_passages(
            backbones, texts, keys, ratio=self.ratio, batch_size=self.batch_size, show_progress=show_progress
        )

    def prepare(self, query: str | PreparedQuery, instructions: Instructions | str | None = None) -> PreparedQuery:
        """Read a query once, for a search and the decoder behind it, or for several calls of `score` and `rank`.

        The bundled embedder takes its vector from it, so that a search costs one encoder pass per query.

        Args:
            query: The question, not blank. One that another model prepared is read again by this one.
            instructions: System and task text, or a task alone; None takes the model's defaults.

        Raises:
            InputError: If the query is blank or no valid string, or a prepared one comes with other instructions.
            ClosedError: After `close`.
        """
        backbone = self.backbone
        if isinstance(query, PreparedQuery):
            if instructions is not None:
                raise InputError("instructions were given for a prepared query, which has its own. Leave them out.")
            if query.is_of(backbone):
                return query
            text, asked = query.query, query.instructions
        else:
            check_query(query)
            text, asked = query, as_instructions(instructions) or Instructions()
        return PreparedQuery(text, asked, backbone.prompt(text, asked), weakref.ref(backbone))

    def score(
        self,
        query: str | PreparedQuery,
        states: Iterable[PassageStates] | StateBatch,
        *,
        instructions: Instructions | str | None = None,
        ratio: int | None = None,
    ) -> list[Relevance]:
        """Run the decoder over passages that were encoded before.

        Args:
            query: The question, not blank, or what `prepare` made of it.
            states: What `encode` or a store gave, of this model; any iterable, read once.
            instructions: System and task text, or a task alone; None takes the model's defaults.
            ratio: Pool the states further, to this multiple of their ratio; None takes them as they are.

        Returns:
            One `Relevance` per passage, in input order. A passage's relevance does not depend on the others.

        Raises:
            InputError: If the query is blank or no valid string, `states` holds something else, or `ratio` is not a
                whole number >= 1.
            StateMismatchError: If the states are another model's, or `ratio` is no multiple of theirs.
            ClosedError: After `close`.
        """
        check_question(query)
        if not isinstance(states, StateBatch):
            states = check_states(states)
        if len(states) == 0:
            return []
        batch = states if isinstance(states, StateBatch) else batch_states(states)
        self._check_states(batch, ratio)
        prompts = [self.prepare(query, instructions).prompt] * len(batch)
        margins = self._queued(prompts, batch, ratio)
        return [Relevance(margin, probability_of(margin)) for margin in margins]

    def rank(
        self,
        query: str | PreparedQuery,
        passages_or_states: Iterable[str] | Iterable[PassageStates] | StateBatch,
        *,
        top_n: int | None = None,
        threshold: float | None = None,
        instructions: Instructions | str | None = None,
        ratio: int | None = None,
    ) -> list[Ranked]:
        """Order passages by relevance, best first.

        Args:
            query: The question, not blank, or what `prepare` made of it.
            passages_or_states: Texts (encoded now) or what `encode` or a store gave; any iterable, read once.
            top_n: Keep at most this many, >= 1; None keeps all.
            threshold: Keep only P(yes) >= this, in [0, 1]; None keeps all.
            instructions: System and task text, or a task alone; None takes the model's defaults.
            ratio: See `score`.

        Returns:
            `Ranked` entries by falling margin; ties keep the input's order.

        Raises:
            InputError: As `score` and `encode`, and if `top_n` or `threshold` is out of range, or texts and states are
                mixed.
            StateMismatchError: As `score`.
            ClosedError: After `close`.
        """
        check_question(query)
        check_cut(top_n, threshold)
        if isinstance(passages_or_states, StateBatch):
            states: list[PassageStates] | StateBatch = passages_or_states
        else:
            texts, states = check_texts_or_states(passages_or_states)
            states = self.encode(texts) if texts else states
        relevances = self.score(query, states, instructions=instructions, ratio=ratio)
        return rank_relevances(relevances, top_n=top_n, threshold=threshold)

    async def arank(
        self,
        query: str | PreparedQuery,
        passages_or_states: Iterable[str] | Iterable[PassageStates] | StateBatch,
        *,
        top_n: int | None = None,
        threshold: float | None = None,
        instructions: Instructions | str | None = None,
        ratio: int | None = None,
    ) -> list[Ranked]:
        """Do what `rank` does in a thread, so that the event loop goes on; results and errors are its.

        If the await is cancelled, no further batch is encoded, and passages that wait for the decoder are dropped.

        Args:
            query: As `rank`.
            passages_or_states: As `rank`; an iterator is read in the thread.
            top_n: As `rank`.
            threshold: As `rank`.
            instructions: As `rank`.
            ratio: As `rank`.

        Example:
            >>> import asyncio
            >>> with Reranker.from_pretrained("pico") as reranker:
            ...     ranking = asyncio.run(reranker.arank("What do bees make?", ["Rust is iron.", "Bees make honey."]))
            >>> ranking[0].index
            1
        """
        with cancel_on_error():
            return await asyncio.to_thread(
                self.rank,
                query,
                passages_or_states,
                top_n=top_n,
                threshold=threshold,
                instructions=instructions,
                ratio=ratio,
            )

    def predict(
        self,
        sentences: Pairs,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        activation_fn: Callable[[Tensor], Tensor] | None = None,
        *,
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        instructions: Instructions | str | None = None,
    ) -> np.ndarray | Tensor | list[Tensor]:
        """Score (query, passage) pairs; stands in for ``CrossEncoder.predict`` of sentence-transformers.

        Each distinct passage is encoded once, each distinct query prepared once.

        Args:
            sentences: Pairs, or a single pair; any iterable, read once.
            batch_size: Most pairs in one pass, >= 1; None takes the engine's.
            show_progress_bar: As `encode`.
            activation_fn: Applied to the margins; None is the sigmoid, so results are P(yes).
            convert_to_numpy: Give a numpy array (the default), else a list of 0-d tensors.
            convert_to_tensor: Give one tensor; wins over `convert_to_numpy`.
            instructions: System and task text, or a task alone, for all pairs.

        Returns:
            float32 scores in input order, shape ``(pairs,)``; a 0-d result for a single pair.

        Raises:
            InputError: If an item is not a pair of valid strings, a query is blank, or `batch_size` is not a whole
                number >= 1.
            ClosedError: After `close`.

        Example:
            >>> with Reranker.from_pretrained("pico") as reranker:
            ...     scores = reranker.predict([("What is rust?", "Rust is iron."), ("What is tea?", "Rust is iron.")])
            >>> bool(scores[0] > scores[1])
            True
        """
        pairs, single = check_pairs(sentences)
        share = check_count(batch_size, "batch_size") if batch_size is not None else self.batch_size
        asked = as_instructions(instructions)
        prompts = {query: self.prepare(query, asked).prompt for query in dict.fromkeys(query for query, _ in pairs)}
        margins: list[float] = []
        if pairs:
            states = batch_states(self.encode([text for _, text in pairs], show_progress=show_progress_bar))
            margins = self._queued([prompts[query] for query, _ in pairs], states, None, share=share)
        scores = torch.tensor(margins, dtype=torch.float32)
        scores = torch.sigmoid(scores) if activation_fn is None else activation_fn(scores)
        if single:
            scores = scores[0]
        if convert_to_tensor:
            return scores
        return scores.numpy() if convert_to_numpy else list(scores)

    def explain(
        self,
        query: str | PreparedQuery,
        passage: str,
        *,
        instructions: Instructions | str | None = None,
        ratio: int | None = None,
    ) -> Explanation:
        """Score one passage and tell which part of it the decoder looked at.

        Args:
            query: The question, not blank, or what `prepare` made of it.
            passage: One text.
            instructions: System and task text, or a task alone; None takes the model's defaults.
            ratio: A multiple of the engine's ratio; spans get longer with it. None takes the engine's.

        Raises:
            InputError: If the query is blank, or a text is no valid string.
            StateMismatchError: If `ratio` is no multiple of the engine's.
            ClosedError: After `close`.
        """
        check_question(query)
        check_text(passage, "passage")
        factor, backbone = repool_factor(self.ratio, ratio), self.backbone
        asked, states = self.prepare(query, instructions), batch_states(self.encode([passage]))
        weights: list[float] = []

        def decode(prompts: Sequence[Any], batch: StateBatch, ratio: int | None) -> list[float]:
            weights.extend(find_attention(backbone, prompts[0], batch, ratio))
            return self._margins(prompts, batch, ratio)

        request = Request(decode, [asked.prompt], states, ratio, share=1, alone=True)
        (margin,) = queue_of(backbone).run(request)
        return Explanation(
            query=asked.query,
            passage=passage,
            spans=attended_spans(weights, backbone.offsets(passage), self.ratio * factor),
            margin=margin,
            probability=probability_of(margin),
        )

    def preview(self, query: str, instructions: Instructions | str | None = None) -> str:
        """Show the exact text that the decoder reads for a query.

        Raises:
            InputError: If the query is blank or no valid string.
        """
        check_query(query)
        return self.backbone.preview(query, as_instructions(instructions) or Instructions())

    def _check_states(self, states: StateBatch, ratio: int | None) -> None:
        info = self.info
        if states.fingerprint != info.fingerprint or states.vectors.shape[-1] != info.hidden_size:
            raise StateMismatchError(
                f"states were made by model {states.fingerprint} (width {states.vectors.shape[-1]}); this engine is "
                f"{info.name} {info.fingerprint} (width {info.hidden_size}). Encode the passages with this model."
            )
        repool_factor(states.ratio, ratio)

    def _queued(
        self, prompts: Sequence[Any], states: StateBatch, ratio: int | None, *, share: int | None = None
    ) -> list[float]:
        """Margins in input order, when the decoder is free for them."""
        request = Request(self._margins, prompts, states, ratio, share=share if share is not None else self.batch_size)
        return queue_of(self.backbone).run(request)

    def _margins(self, prompts: Sequence[Any], states: StateBatch, ratio: int | None) -> list[float]:
        """Margins in input order, at once; see `decode_all`."""
        backbone = self.backbone
        margins, stats = decode_all(backbone, prompts, states, ratio)
        self._decoded.add(stats)
        if not bool(torch.isfinite(margins).all()):
            raise KalmRagError(
                f"{backbone.info.name} gave non-finite margins in {backbone.info.dtype}. Use dtype='fp32', and check "
                f"that the checkpoint is a reranker."
            )
        return cast("list[float]", margins.tolist())
