"""The engine: passages in once, states out; queries in, relevances out. Batches, devices and threads live here.

Knows models and states; knows no store, no Chroma and no framework.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from kalm_rag.checks import check_count, check_cut, check_passages, check_query, check_text
from kalm_rag.engine.decoder_pass import DecodeLog, DecodeStats, cut_batches, decode_all
from kalm_rag.engine.encoder_pass import encode_texts
from kalm_rag.engine.explanation import Explanation, attended_spans
from kalm_rag.engine.queue import Request, queue_of
from kalm_rag.engine.relevance import Ranked, Relevance, probability_of, rank_relevances
from kalm_rag.errors import ClosedError, InputError, KalmRagError, StateMismatchError
from kalm_rag.instructions import Instructions, as_instructions
from kalm_rag.models.backbone import Backbone, BackboneInfo, CachingBackbone, TokenizedPassage
from kalm_rag.models.registry import acquire, parse_devices, parse_dtype
from kalm_rag.models.t5gemma2.prefix_cache import check_bytes
from kalm_rag.states import Codec, Layout, PassageStates, StateBatch, batch_states, passage_key
from kalm_rag.states.pooling import check_ratio, repool_factor

logger = logging.getLogger(__name__)

DEFAULT_RATIO = 4
_LONG = 512
"""Passages from which `encode` shows a progress bar by itself (on a terminal)."""
_ENCODE_TOKENS = {"cpu": 4096, "cuda": 65536}


class Reranker:
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

    def __init__(
        self,
        backbone: Backbone,
        *,
        ratio: int | None = DEFAULT_RATIO,
        batch_size: int = 64,
        helpers: Sequence[Backbone] = (),
    ) -> None:
        self.ratio = check_ratio(ratio)
        self.batch_size = check_count(batch_size, "batch_size")
        for helper in helpers:
            if helper.info.fingerprint != backbone.info.fingerprint:
                raise InputError(f"helper is {helper.info}; wanted the same model as {backbone.info}.")
        self._backbone: Backbone | None = backbone
        self._helpers = tuple(helpers)
        self._decoded = DecodeLog()
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._parent: Reranker | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str = "pico",
        *,
        revision: str | None = None,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        dtype: str | torch.dtype | None = None,
        ratio: int | None = DEFAULT_RATIO,
        batch_size: int = 64,
        decoder_weights: str | None = None,
        compiled: bool = False,
        prefix_cache_bytes: int | None = None,
    ) -> Reranker:
        """Load a model by name, or share it if this process has it already.

        Args:
            name: ``pico`` (bundled, offline), ``nano``, ``small``, ``large`` (KaLM-Reranker-V1 R2, pinned), any
                repository id, the folder of a T5Gemma 2 checkpoint, or one of pico's weights (``kalm-rag train``).
            revision: Commit, tag or branch for a repository; None takes the pinned one.
            device: ``cpu``, ``cuda``, ``cuda:1``; None takes CUDA where there is one. Several, as a list or as
                ``"cuda:0,cuda:1"``: `encode` uses them all, the decoder runs on the first.
            dtype: ``bf16`` or ``fp32``; None takes bf16 on CUDA, fp32 on the CPU. float16 is refused.
            ratio: Tokens a state stands for, >= 1; None is 1 (no pooling).
            batch_size: Most passages in one pass.
            decoder_weights: ``"int8"`` scores KaLM checkpoints with rounded decoder weights, on the CPU: faster, a
                little less exact; states and stores are not touched. None takes them as they are.
            compiled: Run a KaLM checkpoint's decoder through ``torch.compile``: the first query then takes a minute or
                more. For GPUs; needs what torch's compiler needs (Triton there, a C++ compiler on a CPU).
            prefix_cache_bytes: Most bytes of decoder work that a KaLM checkpoint keeps in memory, so that passages
                seen before under the same instructions are scored faster; 0 keeps nothing. All engines of one loaded
                model share it, and the last number given holds. None leaves it: 512 MiB on the CPU, 0 on a GPU.

        Raises:
            ModelError: If the name is unknown or the checkpoint can't be fetched or loaded.
            MissingDependencyError: If the model's package is not installed.
            InputError: If an argument is out of range.
        """
        devices = parse_devices(device)
        if not isinstance(name, str) or not name:
            raise InputError(f"name is {name!r}; wanted a model name, repository id or folder.")
        check_ratio(ratio)
        if prefix_cache_bytes is not None:
            check_bytes(prefix_cache_bytes)
        computing = parse_dtype(dtype, devices[0])
        with ExitStack() as leases:
            loaded = []
            for where in devices:
                decodes = where == devices[0]
                lease = acquire(
                    name,
                    revision=revision,
                    device=where,
                    dtype=computing,
                    decoder_weights=decoder_weights if decodes else None,
                    compiled=compiled and decodes,
                )
                leases.callback(lease.release)
                loaded.append(lease.backbone)
            if prefix_cache_bytes is not None and isinstance(loaded[0], CachingBackbone):
                loaded[0].prefix_cache.resize(prefix_cache_bytes)
            engine = cls(loaded[0], ratio=ratio, batch_size=batch_size, helpers=loaded[1:])
            engine._finalizer = weakref.finalize(engine, leases.pop_all().close)
        return engine

    @property
    def backbone(self) -> Backbone:
        """The loaded model.

        Raises:
            ClosedError: After `close`.
        """
        if self._backbone is None:
            raise ClosedError("this Reranker was closed. Make another with Reranker.from_pretrained(...).")
        return self._backbone

    @property
    def info(self) -> BackboneInfo:
        """What the model is; ``info.fingerprint`` names its states."""
        return self.backbone.info

    @property
    def devices(self) -> list[torch.device]:
        """Where `encode` runs; the decoder runs on the first."""
        return [backbone.device for backbone in (self.backbone, *self._helpers)]

    @property
    def stats(self) -> DecodeStats:
        """What this engine's decoder was given since it was made: passes, passages, padding."""
        return self._decoded.total

    def at(self, ratio: int | None) -> Reranker:
        """Give an engine over the same loaded model that makes states at another ratio.

        Raises:
            InputError: If `ratio` is not a whole number >= 1.
        """
        other = Reranker(self.backbone, ratio=ratio, batch_size=self.batch_size, helpers=self._helpers)
        other._parent = self  # the model stays loaded as long as either is in use
        return other

    def layout(self, codec: str | Codec = Codec.EXACT) -> Layout:
        """What a store needs to know to hold this engine's states."""
        return self.info.layout(self.ratio, codec)

    def encode(self, passages: Sequence[str], *, show_progress: bool | None = None) -> list[PassageStates]:
        """Read passages once; what comes back can be scored under any query and instruction.

        A passage that occurs twice is encoded once. Blank passages are passages like any other. Passages over the
        model's limit are cut there: see `PassageStates.truncated`, `tokens` and `total_tokens`.

        Args:
            passages: Texts, in the order the states are wanted.
            show_progress: None shows a bar on a terminal when there is much to do.

        Returns:
            One `PassageStates` per passage, in input order, on the CPU; an empty list for no passages.

        Raises:
            InputError: If `passages` is a single string, or one of them is no valid string (which one is named).
            ClosedError: After `close`.
        """
        texts = check_passages(passages)
        keys = [passage_key(text) for text in texts]
        first = dict(zip(reversed(keys), reversed(texts), strict=True))  # each distinct text once
        distinct = list(dict.fromkeys(keys))
        bar = tqdm(
            total=len(distinct),
            desc="encoding",
            unit="passage",
            disable=not (len(distinct) >= _LONG and sys.stderr.isatty() if show_progress is None else show_progress),
        )
        made: dict[str, PassageStates] = {}
        with bar:
            backbones, texts = (self.backbone, *self._helpers), [first[key] for key in distinct]
            for batch in encode_texts(backbones, texts, distinct, ratio=self.ratio, cut=self._encode_batches):
                made |= {states.key: states for states in batch}
                bar.update(len(batch))
        return [made[key] for key in keys]

    def score(
        self,
        query: str,
        states: Sequence[PassageStates] | StateBatch,
        *,
        instructions: Instructions | str | None = None,
        ratio: int | None = None,
    ) -> list[Relevance]:
        """Run the decoder over passages that were encoded before.

        Args:
            query: The question, not blank.
            states: What `encode` or a store gave, of this model.
            instructions: System and task text, or a task alone; None takes the model's defaults.
            ratio: Pool the states further, to this multiple of their ratio; None takes them as they are.

        Returns:
            One `Relevance` per passage, in input order. A passage's relevance does not depend on the others.

        Raises:
            InputError: If the query is blank or no valid string, or `ratio` is not a whole number >= 1.
            StateMismatchError: If the states are another model's, or `ratio` is no multiple of theirs.
            ClosedError: After `close`.
        """
        check_query(query)
        backbone = self.backbone
        if not isinstance(states, StateBatch):
            if len(states) == 0:
                return []
            states = batch_states(states)
        self._check_states(states, ratio)
        prompt = backbone.prompt(query, as_instructions(instructions) or Instructions())
        request = Request(self._margins, prompt, states, ratio, share=self.batch_size)
        margins = queue_of(backbone).run(request)
        return [Relevance(margin, probability_of(margin)) for margin in margins]

    def rank(
        self,
        query: str,
        passages_or_states: Sequence[str] | Sequence[PassageStates] | StateBatch,
        *,
        top_n: int | None = None,
        threshold: float | None = None,
        instructions: Instructions | str | None = None,
        ratio: int | None = None,
    ) -> list[Ranked]:
        """Order passages by relevance, best first.

        Args:
            query: The question.
            passages_or_states: Texts (encoded now) or what `encode` or a store gave.
            top_n: Keep at most this many, >= 1; None keeps all.
            threshold: Keep only P(yes) >= this, in [0, 1]; None keeps all.
            instructions: System and task text.
            ratio: See `score`.

        Returns:
            `Ranked` entries by falling margin; ties keep the input's order.

        Raises:
            InputError: As `score` and `encode`, and if `top_n` or `threshold` is out of range.
            StateMismatchError: As `score`.
        """
        check_query(query)
        check_cut(top_n, threshold)
        states = passages_or_states
        if not isinstance(states, StateBatch) and not any(isinstance(s, PassageStates) for s in states):
            states = self.encode(cast("Sequence[str]", states))
        relevances = self.score(query, cast("Sequence[PassageStates]", states), instructions=instructions, ratio=ratio)
        return rank_relevances(relevances, top_n=top_n, threshold=threshold)

    def predict(
        self,
        sentences: Sequence[tuple[str, str]] | Sequence[list[str]] | tuple[str, str] | list[str],
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
            sentences: Pairs, or a single pair.
            batch_size: Most pairs in one pass; None takes the engine's.
            show_progress_bar: As `encode`.
            activation_fn: Applied to the margins; None is the sigmoid, so results are P(yes).
            convert_to_numpy: Give a numpy array (the default), else a list of 0-d tensors.
            convert_to_tensor: Give one tensor; wins over `convert_to_numpy`.
            instructions: System and task text for all pairs.

        Returns:
            float32 scores in input order, shape ``(pairs,)``; a 0-d result for a single pair.

        Raises:
            InputError: If an item is not a pair of valid strings, or a query is blank.
        """
        single = len(sentences) == 2 and all(isinstance(part, str) for part in sentences)
        pairs = cast("Sequence[Sequence[str]]", [sentences] if single else sentences)
        for position, pair in enumerate(pairs):
            if isinstance(pair, str) or len(pair) != 2:
                raise InputError(f"pair {position} is {pair!r:.80}; wanted (query, passage).")
            check_query(pair[0], f"query of pair {position}")
        backbone = self.backbone
        chosen = as_instructions(instructions) or Instructions()
        prompts = {query: backbone.prompt(query, chosen) for query in dict.fromkeys(pair[0] for pair in pairs)}
        margins: list[float] = []
        if pairs:
            states = batch_states(self.encode([pair[1] for pair in pairs], show_progress=show_progress_bar))
            margins = self._margins([prompts[pair[0]] for pair in pairs], states, None, batch_size)
        scores = torch.tensor(margins, dtype=torch.float32)
        scores = torch.sigmoid(scores) if activation_fn is None else activation_fn(scores)
        if single:
            scores = scores[0]
        if convert_to_tensor:
            return scores
        return scores.numpy() if convert_to_numpy else list(scores)

    def explain(
        self, query: str, passage: str, *, instructions: Instructions | str | None = None, ratio: int | None = None
    ) -> Explanation:
        """Score one passage and tell which part of it the decoder looked at.

        Args:
            query: The question.
            passage: One text.
            instructions: System and task text, or a task alone.
            ratio: A multiple of the engine's ratio; spans get longer with it. None takes the engine's.

        Raises:
            InputError: If the query is blank, or a text is no valid string.
            StateMismatchError: If `ratio` is no multiple of the engine's.
        """
        check_query(query)
        check_text(passage, "passage")
        backbone = self.backbone
        states = batch_states(self.encode([passage]))
        (relevance,) = self.score(query, states, instructions=instructions, ratio=ratio)
        prompt = backbone.prompt(query, as_instructions(instructions) or Instructions())
        vectors, counts = states.on(backbone.device, backbone.state_dtype, ratio)
        token_ids = states.token_ids_on(backbone.device, ratio)
        weights = backbone.attend(prompt, vectors, counts, token_ids)[0].float().cpu().tolist()
        step = ratio if ratio is not None else states.ratio
        return Explanation(
            query=query,
            passage=passage,
            spans=attended_spans(weights, backbone.offsets(passage), step),
            margin=relevance.margin,
            probability=relevance.probability,
        )

    def preview(self, query: str, instructions: Instructions | str | None = None) -> str:
        """Show the exact text that the decoder reads for a query.

        Raises:
            InputError: If the query is blank or no valid string.
        """
        check_query(query)
        return self.backbone.preview(query, as_instructions(instructions) or Instructions())

    def close(self) -> None:
        """Give the model back; the last engine that uses it frees its memory. Closing twice is fine."""
        self._backbone = self._parent = None
        self._helpers = ()
        if self._finalizer is not None:
            self._finalizer()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __enter__(self) -> Reranker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode_batches(self, tokenized: Sequence[TokenizedPassage]) -> Iterator[list[int]]:
        """Rows by falling length, in batches bounded by count and by padded tokens."""
        order = sorted(range(len(tokenized)), key=lambda i: -len(tokenized[i].ids))
        budget = _ENCODE_TOKENS.get(self.backbone.device.type, _ENCODE_TOKENS["cpu"])
        return cut_batches(order, [len(t.ids) for t in tokenized], self.batch_size, budget)

    def _check_states(self, states: StateBatch, ratio: int | None) -> None:
        info = self.info
        if states.fingerprint != info.fingerprint or states.vectors.shape[-1] != info.hidden_size:
            raise StateMismatchError(
                f"states were made by model {states.fingerprint} (width {states.vectors.shape[-1]}); this engine is "
                f"{info.name} {info.fingerprint} (width {info.hidden_size}). Encode the passages with this model."
            )
        repool_factor(states.ratio, ratio)

    def _margins(
        self, prompts: Sequence[Any], states: StateBatch, ratio: int | None, batch_size: int | None = None
    ) -> list[float]:
        """Margins in input order; see `decode_all`."""
        backbone = self.backbone
        size = batch_size if batch_size is not None else self.batch_size
        margins, stats = decode_all(backbone, prompts, states, ratio, size)
        self._decoded.add(stats)
        if not bool(torch.isfinite(margins).all()):
            raise KalmRagError(
                f"{backbone.info.name} gave non-finite margins in {backbone.info.dtype}. Use dtype='fp32', and check "
                f"that the checkpoint is a reranker."
            )
        return cast("list[float]", margins.tolist())
