"""Which engine a LangChain component uses and where its states are: what is written down, and the two themselves."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    StrictInt,
    field_serializer,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.lazy_engine import EngineSpec, LazyEngine, spec_of
from kalm_rag.langchain.inputs import check_names
from kalm_rag.store import StateStore

_ENGINE_FIELDS = {field.name for field in fields(EngineSpec)} - {"ratio"}
"""Fields that say which engine; `ratio` is the store's too."""

Place = str | dict[str, str] | None
"""Where states are, written down: a folder or file, the kind of a store that only lives in this process, or nowhere."""


class HasStates(ABC):
    """A component with an engine and states of its own, which others may use: `KaLMChroma`."""

    @property
    @abstractmethod
    def lazy(self) -> LazyEngine:
        """The two, made on first use."""

    @abstractmethod
    def states_place(self) -> Place:
        """Where its states are."""


class EngineSettings(BaseModel):
    """Settings of engine and states, which survive pickling and ``model_dump``; neither model nor open store does."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    model: str = "pico"
    revision: str | None = None
    device: str | None = None
    dtype: str | None = None
    ratio: StrictInt | None = None
    state_ratio: StrictInt | None = None
    batch_size: StrictInt = 64
    decoder_weights: str | None = None
    compiled: bool = False
    prefix_cache_bytes: StrictInt | None = None
    store: Any = None
    reranker: Reranker | None = Field(default=None, exclude=True, repr=False)
    _lazy: LazyEngine | None = PrivateAttr(default=None)
    _lazy_for: tuple[Any, ...] = PrivateAttr(default=())

    @model_validator(mode="before")
    @classmethod
    def _hint_at_names(cls, values: object) -> object:
        check_names(values if isinstance(values, Mapping) else (), cls.model_fields, cls.__name__)
        return values

    @field_validator("device", "dtype", mode="before")
    @classmethod
    def _name_torch_type(cls, value: object) -> object:
        return value if value is None or isinstance(value, str) else str(value).removeprefix("torch.")

    @field_validator("store", mode="before")
    @classmethod
    def _check_store(cls, value: object) -> object:
        return read_store(value)

    @model_validator(mode="after")
    def _find_engine(self) -> Self:
        """Note what leads back to an engine that was given, so that what is written down makes the same one."""
        named = _ENGINE_FIELDS & self.model_fields_set
        if self.reranker is not None:
            if named:
                raise InputError(f"reranker and {', '.join(sorted(named))} were both given; wanted one of them.")
            self.__dict__.update(spec_of(self.reranker))
            if self.ratio is None or self.store is not None:
                self.__dict__["state_ratio"] = self.reranker.ratio
        elif isinstance(self.store, HasStates) and not named:
            self.__dict__.update(_fields_of(self.store.lazy))
        self._spec()
        return self

    @field_serializer("store")
    def _write_store(self, value: StateStore | HasStates | str | None) -> Place:
        return place_of(value)

    @property
    def lazy(self) -> LazyEngine:
        """Engine and states, made on first use, and again after `release_engines` or when settings were changed."""
        shared = self.store.lazy if isinstance(self.store, HasStates) else None
        if shared is not None and self.reranker is None and not _ENGINE_FIELDS & self.model_fields_set:
            return shared
        wanted = self._spec(), self.reranker, shared if shared is not None else self.store
        if (
            self._lazy is None
            or wanted[0] != self._lazy_for[0]
            or any(new is not old for new, old in zip(wanted[1:], self._lazy_for[1:], strict=True))
        ):
            self._lazy, self._lazy_for = LazyEngine(wanted[0], reranker=wanted[1], store=wanted[2]), wanted
        return self._lazy

    def _spec(self) -> EngineSpec:
        ratio = self.state_ratio if self.state_ratio is not None else self.ratio
        return EngineSpec(ratio=ratio, **{field: getattr(self, field) for field in _ENGINE_FIELDS})

    def __getstate__(self) -> dict[Any, Any]:
        """Settings without the model or an open store.

        Raises:
            InputError: If the states are in memory or on a server, and so would be lost.
        """
        state = super().__getstate__()
        place = place_of(self.store)
        if isinstance(place, dict):
            raise InputError(
                f"{type(self).__name__} uses a live {place['live']}, which can't be pickled. Give store= a folder or a "
                f".sqlite3 file, which every process can open."
            )
        private = {**(state["__pydantic_private__"] or {}), "_lazy": None, "_lazy_for": ()}
        held = {**state["__dict__"], "reranker": None, "store": place}
        return {**state, "__dict__": held, "__pydantic_private__": private}

    def __eq__(self, other: object) -> bool:
        """Whether the settings are the same, whatever was opened for them."""
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the settings; model and open store are shared, as locks and files can't be copied."""
        return self.model_copy()


def read_store(value: object) -> Any:  # noqa: ANN401 - a store, what has one, its place, or None
    """Check what components take as ``store=``.

    Raises:
        InputError: If it is nothing that holds states, or the written trace of a store that was live.
    """
    if value is None or isinstance(value, str | HasStates):
        return value
    if hasattr(value, "__fspath__"):
        return str(value)
    if isinstance(value, Mapping) and "live" in value:
        raise InputError(
            f"store was a live {value['live']} when this was written down, which can't be opened from a description. "
            f"Pass store= again."
        )
    if callable(getattr(value, "get_many", None)) and hasattr(value, "layout"):
        return value
    raise InputError(
        f"store is {type(value).__name__}; wanted a StateStore, a folder, a .sqlite3 file, a KaLMChroma, or None."
    )


def place_of(store: StateStore | HasStates | str | None) -> Place:
    """Write a store down: its file where it has one, else what kind it was."""
    if store is None or isinstance(store, str):
        return store
    if isinstance(store, HasStates):
        return store.states_place()
    path = getattr(store, "path", None)
    return str(path) if path is not None else {"live": type(store).__name__}


def _fields_of(lazy: LazyEngine) -> dict[str, Any]:
    """Fields that lead back to a shared engine."""
    found = vars(lazy.spec) if lazy.reranker is None else {**spec_of(lazy.reranker), "ratio": lazy.reranker.ratio}
    return {**{name: found[name] for name in _ENGINE_FIELDS if name in found}, "state_ratio": found["ratio"]}
