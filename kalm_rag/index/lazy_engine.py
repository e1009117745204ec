"""An engine and its store, made on first use, released together, made again when needed. One for every door.

Doors keep an `EngineSpec` (small, picklable) instead of a model. Knows no framework and no Chroma.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from kalm_rag.checks import check_count
from kalm_rag.engine.reranker import DEFAULT_RATIO, Reranker
from kalm_rag.errors import ClosedError, InputError, StateMismatchError
from kalm_rag.index.state_cache import release_caches, shared_cache
from kalm_rag.models.backbone import CachingBackbone
from kalm_rag.models.prefix_cache import check_bytes
from kalm_rag.states import Codec, Layout, dtype_name
from kalm_rag.states.pooling import check_ratio
from kalm_rag.store import StateStore, open_store, stored_layout
from kalm_rag.store.arguments import check_same_layout
from kalm_rag.store.opening import store_file

logger = logging.getLogger(__name__)

_engines: dict[EngineSpec, Reranker] = {}
_stores: dict[tuple[str, Layout], StateStore] = {}
_lock = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Which engine a door wants. Nothing is loaded until `engine` is called; equal specs share one engine.

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
        max_passage_tokens: Where passages are cut; None takes the model's default.

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
    max_passage_tokens: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, str) or not self.model:
            raise InputError(f"model is {self.model!r}; wanted a model name, repository id or folder.")
        check_count(self.batch_size, "batch_size")
        for number, check in (
            (self.ratio, check_ratio),
            (self.prefix_cache_bytes, check_bytes),
            (self.max_passage_tokens, partial(check_count, name="max_passage_tokens")),
        ):
            if number is not None:
                check(number)
        if self.decoder_weights not in (None, "int8") or not isinstance(self.compiled, bool):
            raise InputError(
                f"decoder_weights is {self.decoder_weights!r} and compiled {self.compiled!r}; wanted 'int8' or None, "
                f"and True or False."
            )
        device: object = self.device
        dtype: object = self.dtype
        if isinstance(device, Sequence) and not isinstance(device, str):
            object.__setattr__(self, "device", ",".join(map(str, device)))
        elif isinstance(device, torch.device):
            object.__setattr__(self, "device", str(device))
        if isinstance(dtype, torch.dtype):
            object.__setattr__(self, "dtype", dtype_name(dtype))
        for name, wanted in (("device", "'cpu' or 'cuda:1'"), ("dtype", "'bf16' or 'fp32'")):
            if not isinstance(getattr(self, name), str | None):
                raise InputError(f"{name} is {getattr(self, name)!r}; wanted a name such as {wanted}, or None.")

    def engine(self) -> Reranker:
        """Give this process's engine for the spec, loading it on the first call (or after it was closed).

        Safe from many threads: they wait for one load. The engine stays loaded until `release_engines`.

        Raises:
            ModelError: If the model can't be found or loaded.
            MissingDependencyError: If the model's package is not installed.
            InputError: If the device or dtype can't be used here.
        """
        with _lock:
            shared = _engines.get(self)
        if shared is not None and is_open(shared):
            return shared
        fresh = self.load()  # the registry makes concurrent askers wait for one load
        with _lock:
            shared = _engines.get(self)
            if shared is None or not is_open(shared):
                _engines[self] = fresh
                return fresh
        fresh.close()  # another thread was first; the model itself is shared either way
        return shared

    def load(self) -> Reranker:
        """Give an engine of the caller's own, who closes it; the model itself is shared. Errors as `engine`."""
        return Reranker.from_pretrained(
            self.model,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            ratio=self.ratio if self.ratio is not None else DEFAULT_RATIO,
            batch_size=self.batch_size,
            decoder_weights=self.decoder_weights,
            compiled=self.compiled,
            prefix_cache_bytes=self.prefix_cache_bytes,
            max_passage_tokens=self.max_passage_tokens,
        )


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
        "max_passage_tokens": info.max_passage_tokens,
    }


class LazyEngine:
    """An engine and a store at one ratio, made on first use and shared by the components that were given it.

    Args:
        spec: Which engine; equal specs share one in a process.
        reranker: A ready engine instead, yours to close.
        store: A store; its place (folder, file or ``":memory:"``), opened once in a process; another `LazyEngine`, to
            use its store; or None for the process's bounded cache.
        opener: Opens a store of its own for an engine, in place of `store`; `close` closes it.
        own_engine: Load an engine of its own, which `close` closes, instead of the one that the process shares.
        codec: Codec of a `store` at a place; None takes what is stored, or else exact.
        ratio: Tokens a state stands for in a `store` at a place; None takes what is stored, or else the engine's.
    """

    def __init__(
        self,
        spec: EngineSpec,
        *,
        reranker: Reranker | None = None,
        store: StateStore | LazyEngine | str | None = None,
        opener: Callable[[Reranker], StateStore] | None = None,
        own_engine: bool = False,
        codec: str | Codec | None = None,
        ratio: int | None = None,
    ) -> None:
        self.spec, self.reranker = spec, reranker
        self._codec, self._ratio = codec, ratio
        self._owns_engine = own_engine
        self._engine: Reranker | None = None
        self._given, self._opener = store, opener
        self._opened: StateStore | None = None
        self._opened_for: Reranker | None = None
        self._at_ratio: Reranker | None = None
        self._lock = threading.RLock()

    def engine(self) -> Reranker:
        """Give the engine alone, at its own ratio.

        Raises:
            ModelError: If the model can't be loaded.
            ClosedError: If a ready engine was closed.
        """
        if self.reranker is not None or not self._owns_engine:
            return self.reranker if self.reranker is not None else self.spec.engine()
        with self._lock:
            if self._engine is None or not is_open(self._engine):
                self._engine = self.spec.load()
            return self._engine

    def get(self) -> tuple[Reranker, StateStore]:
        """Give engine and store at one ratio, loading and opening what isn't there yet. Safe from many threads.

        Raises:
            ModelError: If the model can't be loaded.
            StoreError: If the store can't be opened; StoreFormatError if it is damaged.
            StateMismatchError: If the store holds another model's states.
            ClosedError: If a ready engine was closed.
        """
        engine = self.engine()
        store = self._find_store(engine)
        ratio = store.layout.ratio if store is not None else self.spec.ratio
        if ratio is not None and engine.ratio != ratio:
            engine = self._at(engine, ratio)
        return engine, store if store is not None else shared_cache(engine.layout())

    def loaded(self) -> Reranker | None:
        """The engine, if it is loaded and open already; loads nothing and waits for nobody."""
        own = self._engine if self._owns_engine else _engines.get(self.spec)
        engine = self.reranker if self.reranker is not None else own
        return engine if engine is not None and is_open(engine) else None

    def opened(self) -> StateStore | None:
        """The store, if it is open already; loads nothing."""
        if isinstance(self._given, LazyEngine):
            return self._given.opened()
        return self._opened if self._opened is not None else None if isinstance(self._given, str) else self._given

    def close(self) -> None:
        """Close the store, and the engine, that this opened for itself; they are opened again when needed."""
        with self._lock:
            if self._opener is not None and self._opened is not None:
                self._opened.close()
            if self._at_ratio is not None:
                self._at_ratio.close()
            if self._engine is not None:
                self._engine.close()
            self._opened = self._opened_for = self._at_ratio = self._engine = None

    def _at(self, engine: Reranker, ratio: int) -> Reranker:
        with self._lock:  # one engine per ratio, so that its counts add up
            kept = self._at_ratio
            if kept is None or not is_open(kept) or kept.ratio != ratio or kept.backbone is not engine.backbone:
                kept = self._at_ratio = engine.at(ratio)
            return kept

    def _find_store(self, engine: Reranker) -> StateStore | None:
        if isinstance(self._given, LazyEngine):
            theirs, store = self._given.get()
            check_same_limit(engine, theirs)
            return store
        if self._opener is None and not isinstance(self._given, str):
            return self._given
        with self._lock:
            if self._opened is not None and self._opened_for is engine:
                return self._opened
            if self._opener is not None:
                if self._opened is not None:  # `release_engines` closed the engine; the store is the same
                    self._opened.close()
                self._opened = self._opener(engine)
            elif isinstance(self._given, str):
                self._opened = shared_store(
                    self._given, engine, codec=self._codec, ratio=self._ratio
                )  # `release_engines` closes it, with the engine
            self._opened_for = engine
            return self._opened

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyEngine:
        return self  # a copy of a component shares model and store


def release_engines() -> None:
    """Close every engine and store opened here and forget the states kept in memory. Later calls load again."""
    with _lock:
        engines, stores = list(_engines.values()), list(_stores.values())
        _engines.clear()
        _stores.clear()
    release_caches()
    for store in stores:
        store.close()
    for engine in engines:
        engine.close()


def shared_store(
    path: str, engine: Reranker, *, codec: str | Codec | None = None, ratio: int | None = None
) -> StateStore:
    """Open the store in a folder or ``.sqlite3`` file, once per process.

    Args:
        path: Where it is.
        engine: Whose states.
        codec: None takes what is stored, or else exact.
        ratio: None takes what is stored, or else the engine's.

    Raises:
        StateMismatchError: If states are stored at another ratio or codec than asked for.
        StoreError: If it can't be opened; StoreFormatError if it is damaged.
    """
    there = stored_layout(path, engine.info.fingerprint)
    layout = (engine.at(ratio) if ratio is not None else engine).layout(codec if codec is not None else Codec.EXACT)
    if there is not None:
        wanted = replace(
            there,
            ratio=there.ratio if ratio is None else ratio,
            codec=there.codec if codec is None else layout.codec,
        )
        check_same_layout(there, wanted, path)
        layout = there
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
    return engine, shared_cache(engine.layout())


def check_same_limit(engine: Reranker, theirs: Reranker) -> None:
    """Refuse an engine that differs from that of a store only in where it cuts passages; others name their models.

    Raises:
        StateMismatchError: If it does.
    """
    asked, made = engine.info.max_passage_tokens, theirs.info.max_passage_tokens
    if asked != made and replace(engine.info, max_passage_tokens=made) == theirs.info:
        raise StateMismatchError(
            f"max_passage_tokens is {asked}, and the store's states were made with {made}. Leave max_passage_tokens "
            f"out to read as the store does, or give it to the store."
        )


def is_open(engine: Reranker) -> bool:
    """Whether an engine was not closed."""
    try:
        return engine.info is not None
    except ClosedError:
        return False
