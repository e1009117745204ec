"""What both framework adapters share: an engine loaded on first use, states in memory, one way to rank candidates.

Knows no framework and no Chroma. Adapters keep an `EngineSpec` (small, picklable) instead of a model.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kalm_rag.checks import check_cut, check_text
from kalm_rag.engine.reranker import DEFAULT_RATIO, Reranker
from kalm_rag.errors import ClosedError, InputError
from kalm_rag.index.candidates import Missing, RankedCandidate, check_missing, rank_texts
from kalm_rag.index.results import Timings
from kalm_rag.instructions import Instructions
from kalm_rag.models.backbone import CachingBackbone
from kalm_rag.models.t5gemma2.prefix_cache import check_bytes
from kalm_rag.states import Layout, PassageStates
from kalm_rag.states.pooling import check_ratio
from kalm_rag.store import Reference, StateStore, open_store, stored_layout
from kalm_rag.store.base import Fetched
from kalm_rag.store.memory import MemoryStore
from kalm_rag.store.opening import store_file

logger = logging.getLogger(__name__)

CACHE_BYTES = 256 * 1024 * 1024
"""Most bytes of states kept in memory per model and ratio, for adapters without a store (2,700 full-length passages
of pico at ratio 4). The least recently used go first."""

_engines: dict[EngineSpec, Reranker] = {}
_caches: dict[Layout, CacheStore] = {}
_stores: dict[tuple[str, Layout], StateStore] = {}
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Which engine an adapter wants. Nothing is loaded until `engine` is called; equal specs share one engine.

    Attributes:
        model: Name, repository id or folder: see `Reranker.from_pretrained`.
        revision: Commit, tag or branch; None takes the pinned one.
        device: ``cpu``, ``cuda``, ``cuda:1``, ``cuda:0,cuda:1``; None takes CUDA where there is one. A torch device
            becomes its name.
        dtype: ``bf16`` or ``fp32``; None takes what fits the device. A torch dtype becomes its name.
        ratio: Tokens a state stands for where the engine makes states; None is 4.
        batch_size: Most passages in one pass.
        decoder_weights: ``int8`` or None; see `Reranker.from_pretrained`, as for the next two.
        compiled: Whether the decoder is compiled.
        prefix_cache_bytes: Most bytes of decoder work kept; None leaves the model's bound.

    Raises:
        InputError: If the model is no name, or a number is out of range. Devices are looked at when loading.
    """

    model: str = "pico"
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    ratio: int | None = None
    batch_size: int = 64
    decoder_weights: str | None = None
    compiled: bool = False
    prefix_cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise InputError(f"model is {self.model!r}; wanted a model name, repository id or folder.")
        if self.ratio is not None:
            check_ratio(self.ratio)
        if isinstance(self.batch_size, bool) or not isinstance(self.batch_size, int) or self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size!r}; wanted a whole number >= 1.")
        if self.decoder_weights not in (None, "int8") or not isinstance(self.compiled, bool):
            raise InputError(
                f"decoder_weights is {self.decoder_weights!r} and compiled {self.compiled!r}; wanted 'int8' or None, "
                f"and True or False."
            )
        if self.prefix_cache_bytes is not None:
            check_bytes(self.prefix_cache_bytes)
        device: object = self.device
        dtype: object = self.dtype
        if isinstance(device, torch.device):
            object.__setattr__(self, "device", str(device))
        if isinstance(dtype, torch.dtype):
            object.__setattr__(self, "dtype", str(dtype).removeprefix("torch."))

    def engine(self) -> Reranker:
        """Give this process's engine for the spec, loading it on the first call (or after it was closed).

        Safe from many threads: they wait for one load. The engine stays loaded until `release_engines`.

        Raises:
            ModelError: If the model can't be found or loaded.
            MissingDependencyError: If the model's package is not installed.
            InputError: If the device or dtype can't be used here.
        """
        with _lock:
            kept = _engines.get(self)
        if kept is not None and is_open(kept):
            return kept
        fresh = Reranker.from_pretrained(  # the registry makes concurrent askers wait for one load
            self.model,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            ratio=self.ratio if self.ratio is not None else DEFAULT_RATIO,
            batch_size=self.batch_size,
            decoder_weights=self.decoder_weights,
            compiled=self.compiled,
            prefix_cache_bytes=self.prefix_cache_bytes,
        )
        with _lock:
            kept = _engines.get(self)
            if kept is None or not is_open(kept):
                _engines[self] = fresh
                return fresh
        fresh.close()  # another thread was first; the model itself is shared either way
        return kept


def spec_of(engine: Reranker) -> dict[str, Any]:
    """What an `EngineSpec` needs to load a ready engine again elsewhere, ratio aside."""
    info = engine.info
    ways: dict[str, Any] = {}
    if isinstance(engine.backbone, CachingBackbone):
        ways = {
            "decoder_weights": engine.backbone.decoder_weights,
            "compiled": engine.backbone.compiled,
            "prefix_cache_bytes": engine.backbone.prefix_cache.stats.max_bytes,
        }
    return ways | {
        "model": info.name,
        "revision": None if info.family == "pico" or info.revision == "local" else info.revision,
        "device": ",".join(map(str, engine.devices)),
        "dtype": info.dtype,
        "batch_size": engine.batch_size,
    }


def release_engines() -> None:
    """Close every engine and store opened here and forget the states kept in memory. Later calls load again."""
    with _lock:
        engines, caches = list(_engines.values()), list(_caches.values())
        _engines.clear()
        _caches.clear()
        stores = list(_stores.values())
        _stores.clear()
    for store in (*stores, *caches):
        store.close()
    for engine in engines:
        engine.close()


class CacheStore(MemoryStore):
    """A memory store with an upper bound: the least recently used states make room. Keeps no references.

    Args:
        layout: Model, width, ratio, codec and dtype.
        max_bytes: Most bytes of payload held.
    """

    def __init__(self, layout: Layout, max_bytes: int = CACHE_BYTES) -> None:
        super().__init__(layout)
        self.max_bytes = max_bytes
        self._held = 0

    def get_many(self, keys: Sequence[str]) -> Fetched:
        """Fetch states and count them as used just now; see `StateStore.get_many`."""
        fetched = super().get_many(keys)
        with self._lock:
            for position in fetched.found:
                row = self._rows.pop(keys[position], None)  # a dict keeps the order of insertion: oldest use first
                if row is not None:
                    self._rows[keys[position]] = row
        return fetched

    def put_many(
        self,
        states: Sequence[PassageStates],
        references: Sequence[Reference] = (),
        *,
        scope: str = "",
        wait: float | None = None,
    ) -> None:
        """Keep states, then drop the least recently used until the bound holds; references are not kept."""
        super().put_many(states)
        with self._lock:
            self._held = sum(len(row.payload) for row in self._rows.values())
            while self._held > self.max_bytes:
                self._held -= len(self._rows.pop(next(iter(self._rows))).payload)


def shared_store(path: str, engine: Reranker) -> StateStore:
    """Open the store in a folder or ``.sqlite3`` file, once per process, with the ratio and codec that are stored.

    Raises:
        StoreError: If it can't be opened; StoreFormatError if it is damaged.
    """
    there = stored_layout(path, engine.info.fingerprint)
    layout = there if there is not None else engine.layout()
    key = (str(store_file(path).resolve()), layout)
    with _lock:
        if key not in _stores:
            _stores[key] = open_store(path, layout)
        return _stores[key]


def match_ratio(engine: Reranker, store: StateStore | None) -> tuple[Reranker, StateStore]:
    """Bring an engine and a store together: an engine at the store's ratio; without a store, the process's cache.

    Raises:
        ClosedError: If the engine was closed.
    """
    if store is not None:
        return (engine if engine.ratio == store.layout.ratio else engine.at(store.layout.ratio)), store
    layout = engine.layout()
    with _lock:
        if layout not in _caches:
            _caches[layout] = CacheStore(layout)
        return engine, _caches[layout]


def rank_candidates(
    engine: Reranker,
    store: StateStore | None,
    query: str,
    texts: Sequence[str | None],
    *,
    instructions: Instructions | None = None,
    ratio: int | None = None,
    top_n: int | None = None,
    threshold: float | None = None,
    missing: Missing = "encode",
    references: Iterable[Reference] = (),
) -> list[RankedCandidate]:
    """Order candidates by relevance: states by content, decoder, cut. What both adapters do between their hooks.

    A blank query (an agent's, or an empty rewriting) and a candidate that is no valid Unicode (text out of a PDF) don't
    end the app's run: what can't be scored comes back unscored, in retrieval order, and the log says so.

    Args:
        engine: The engine; used at the store's ratio.
        store: Where states are; None takes the process's bounded cache.
        query: The question. A blank one scores nothing.
        texts: Exact candidate texts in retrieval order; None marks one without text, which is not scored. Neither is
            one with a lone surrogate.
        instructions: System and task text; None takes the model's defaults.
        ratio: A multiple of the store's ratio to score at; None takes the stored one.
        top_n: Most candidates given back, >= 1; None gives all.
        threshold: Keep only P(yes) >= this; unscored ones are dropped then.
        missing: What to do with texts that have no stored states.
        references: Records that use them, kept with states that are encoded now.

    Returns:
        Best first, ties in input order; unscored candidates behind the scored ones, in input order.

    Raises:
        InputError: If the query is no valid string, a number is out of range, or a text is no string.
        MissingStateError: Under ``missing="raise"``.
        StateMismatchError: If the store is another model's, or `ratio` no multiple of its.
        StoreFormatError: If a stored state is damaged.
    """
    check_cut(top_n, threshold)
    check_missing(missing)
    readable = [_readable(text, position) for position, text in enumerate(texts)]
    if is_blank(query):
        return unscored_candidates(len(texts), top_n=top_n, threshold=threshold)
    engine, store = match_ratio(engine, store)
    timings = Timings()
    ranking = rank_texts(
        engine,
        store,
        query,
        readable,
        missing=missing,
        timings=timings,
        instructions=instructions,
        ratio=ratio,
        threshold=threshold,
        references=list(references),
    )
    logger.info(
        "ranked %d candidates: %d from the store, %d encoded, %d not scored; seconds %s",
        len(texts),
        ranking.from_store,
        ranking.encoded,
        ranking.unscored,
        {stage: round(seconds, 4) for stage, seconds in timings.seconds.items()},
    )
    return ranking.placed[:top_n]


def is_blank(query: str) -> bool:
    """Whether a query asks for nothing; such a one needs no engine: see `unscored_candidates`.

    Raises:
        InputError: If it is no valid string.
    """
    return not check_text(query, "query").strip()


def unscored_candidates(count: int, *, top_n: int | None, threshold: float | None) -> list[RankedCandidate]:
    """What comes back for a blank query: the retrieval order, unscored; nothing under a threshold."""
    logger.warning(
        "query is blank, so %d candidates are not scored: %s",
        count,
        "they come back in retrieval order" if threshold is None else "the threshold drops them",
    )
    return [] if threshold is not None else [RankedCandidate(index=i) for i in range(count)][:top_n]


def _readable(text: str | None, position: int) -> str | None:
    """A text that can be scored, or None; why not is logged."""
    try:
        return None if text is None else check_text(text, f"document {position}")
    except InputError as err:
        if not isinstance(text, str):
            raise
        logger.warning("%s It comes back unscored.", err)
        return None


def is_open(engine: Reranker) -> bool:
    """Whether an engine was not closed."""
    try:
        return engine.info is not None
    except ClosedError:
        return False
