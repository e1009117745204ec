"""Which engine a framework's component uses and where its states are: fields that are written down, and the two made.

Every component of the LangChain and LlamaIndex rooms has these fields. They survive each framework's own way of writing
a component down; model and open store never travel. Knows pydantic, which both frameworks bring, and neither of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from typing import TYPE_CHECKING, Any

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationInfo,
    field_serializer,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index.candidates import Owners
from kalm_rag.index.lazy_engine import EngineSpec, LazyEngine, spec_of
from kalm_rag.index.outcome import FailurePolicy, OnError
from kalm_rag.index.select import Selection
from kalm_rag.store import StateStore
from kalm_rag.store.opening import MEMORY

SPEC_FIELDS = {"model", "revision", "device", "dtype", "max_passage_tokens"}
"""Fields that say which model, where, and what it reads."""
RUN_FIELDS = {"batch_size", "decoder_weights", "compiled", "prefix_cache_bytes"}
"""Fields that say how it runs: its states are the same either way."""
ENGINE_FIELDS = SPEC_FIELDS | RUN_FIELDS

Place = str | dict[str, str] | None
"""Where states are, written down: a folder or file, the kind of a store that only lives in this process, or nowhere."""


class HasStates(ABC):
    """A component with an engine and states of its own, which others may use."""

    @property
    @abstractmethod
    def lazy(self) -> LazyEngine:
        """The two, made on first use."""

    @abstractmethod
    def states_place(self) -> Place:
        """Where its states are."""

    def owners(self, ids: Sequence[str | None], texts: Sequence[str | None]) -> Owners | None:
        """Records of its collection that texts of a query are of; None for a component without a collection."""
        return None


class ByName(BaseModel):
    """A component whose arguments all have names."""

    if not TYPE_CHECKING:  # type checkers read the fields

        def __init__(self, *unnamed: object, **fields: object) -> None:
            if unnamed:
                names = ", ".join([*type(self).model_fields][:3])
                raise InputError(
                    f"{type(self).__name__} got {type(unnamed[0]).__name__} without a name; wanted its arguments by "
                    f"name: {names}, ..."
                )
            super().__init__(**fields)


class EngineSettings(ByName, HasStates):
    """Fields of engine and states. `EngineSpec` says what those of the engine mean."""

    model: str = Field(default="pico", description="Model name, repository id or folder.")
    revision: str | None = Field(default=None, description="Commit, tag or branch; None: the pinned one.")
    device: str | None = Field(default=None, description="cpu, cuda, cuda:1; None: CUDA if there is one.")
    dtype: str | None = Field(default=None, description="bf16 or fp32; None: what fits the device.")
    ratio: StrictInt | None = Field(default=None, description="Tokens a state stands for; None: as stored, or 4.")
    state_ratio: StrictInt | None = Field(
        default=None, description="Tokens a state stands for where states are made; None: ratio, or 4."
    )
    batch_size: StrictInt = Field(default=64, description="Most passages in one pass.")
    decoder_weights: str | None = Field(default=None, description="int8: faster scoring on the CPU.")
    compiled: bool = Field(default=False, description="Compile the decoder, at the first query.")
    prefix_cache_bytes: StrictInt | None = Field(
        default=None, description="Most bytes of decoder work kept between queries; None: the model's."
    )
    max_passage_tokens: StrictInt | None = Field(
        default=None, description="Where passages are cut; None: as stored, or the model's own limit."
    )
    store: Any = Field(
        default=None,
        description="Where states are: a StateStore, a folder or .sqlite3 file, a KaLMChroma or KaLMChromaVectorStore, "
        "or None for the process's bounded cache.",
    )
    reranker: Any = Field(default=None, exclude=True, repr=False, description="A ready engine instead of model.")
    _lazy: LazyEngine | None = PrivateAttr(default=None)
    _lazy_for: tuple[Any, ...] = PrivateAttr(default=())

    @field_validator("device", "dtype", mode="before")
    @classmethod
    def _name_torch_type(cls, value: object) -> object:
        return value if value is None or isinstance(value, str) else str(value).removeprefix("torch.")

    @field_validator("store", mode="before")
    @classmethod
    def _check_store(cls, value: object) -> object:
        return read_store(value)

    @field_validator("reranker")
    @classmethod
    def _check_reranker(cls, value: object) -> object:
        return check_reranker(value)

    @model_validator(mode="after")
    def _name_engine(self) -> Self:
        """Note what leads back to an engine that was given, so that what is written down makes the same one."""
        named = ENGINE_FIELDS & self.model_fields_set
        if self.reranker is not None:
            refuse_both(self.reranker, named)
            self.__dict__.update(spec_of(self.reranker))
            if self.ratio is None or self.store is not None:
                self.__dict__["state_ratio"] = self.reranker.ratio
        elif isinstance(self.store, HasStates) and not named & SPEC_FIELDS:
            shared = self.store.lazy
            ready = shared.reranker
            found = replace(shared.spec, **spec_of(ready), ratio=ready.ratio) if ready is not None else shared.spec
            self.__dict__.update({field: getattr(found, field) for field in ENGINE_FIELDS - named})
            self.__dict__["state_ratio"] = found.ratio
        self._make_lazy()
        return self

    @field_serializer("store")
    def _write_store(self, value: StateStore | HasStates | str | None) -> Place:
        return place_of(value)

    @property
    def lazy(self) -> LazyEngine:
        """Engine and states, made on first use; others in a copy whose settings were changed."""
        return self._make_lazy()

    def states_place(self) -> Place:
        """Where the states are, for other components to write down."""
        return place_of(self.store)

    def _owners(self, ids: Sequence[str | None], texts: Sequence[str | None]) -> Owners | None:
        """Records of the vector store whose states this uses; None without one: then all that is encoded is kept."""
        return self.store.owners(ids, texts) if isinstance(self.store, HasStates) else None

    def _make_lazy(self) -> LazyEngine:
        shared = self.store.lazy if isinstance(self.store, HasStates) else None
        if shared is not None and self.reranker is None and not ENGINE_FIELDS & self.model_fields_set:
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
        return EngineSpec(ratio=ratio, **{field: getattr(self, field) for field in ENGINE_FIELDS})

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        """Copy the settings; model and open store are shared, as locks and files can't be copied."""
        return self.model_copy()


class SelectionFields(BaseModel):
    """Fields that say which passages are handed on, and what happens when there is no ranking."""

    max_tokens: StrictInt | None = Field(default=None, description="Most tokens of all passages together.")
    count_tokens: Any = Field(default=None, description="Counts the tokens of a text; None: the model's tokenizer.")
    drop_duplicates: StrictBool | StrictFloat = Field(
        default=False, description="Leave out passages that repeat a better one: True, or from which cosine on."
    )
    diversity: float = Field(
        default=0.0, description="How much being like what is handed on counts against, in [0, 1)."
    )
    prune: StrictBool | StrictFloat = Field(
        default=False, description="Leave out sentences that don't answer: True, or how far below the best one."
    )
    on_error: OnError = Field(default="raise", description="raise, or retrieval_order: if the ranking fails.")
    timeout: float | None = Field(default=None, description="Most seconds for loading and ranking.")
    details: StrictBool = Field(default=False, description="Put on each result how the ranking went.")

    @field_validator("count_tokens", mode="before")
    @classmethod
    def _check_counter(cls, value: object) -> object:
        if isinstance(value, Mapping) and "live" in value:
            raise InputError(
                f"count_tokens was the function {value['live']} when this was written down, which can't be made from "
                f"a description. Pass count_tokens= again."
            )
        return value

    @field_validator("timeout", "diversity", mode="before")
    @classmethod
    def _check_number(cls, value: Any, info: ValidationInfo) -> Any:  # noqa: ANN401 - before pydantic makes True 1.0
        if info.field_name == "timeout":
            FailurePolicy(timeout=value)
        else:
            Selection(diversity=value)
        return value

    @model_validator(mode="after")
    def _check_selection(self) -> Self:
        self.selection()
        self.policy()
        return self

    @field_serializer("count_tokens")
    def _write_counter(self, value: object) -> dict[str, str] | None:
        return None if value is None else {"live": getattr(value, "__name__", type(value).__name__)}

    def selection(self) -> Selection:
        """What is handed on."""
        return Selection(
            max_tokens=self.max_tokens,
            count_tokens=self.count_tokens,
            drop_duplicates=self.drop_duplicates,
            diversity=self.diversity,
            prune=self.prune,
        )

    def policy(self) -> FailurePolicy:
        """What happens on failure."""
        return FailurePolicy(on_error=self.on_error, timeout=self.timeout)

    def refuse_counter(self) -> None:
        """Refuse to be pickled with a function of the app's.

        Raises:
            InputError: If ``count_tokens`` is one.
        """
        if self.count_tokens is not None:
            raise InputError(
                f"{type(self).__name__} has count_tokens, a function, which can't be written down. Leave it out, and "
                f"pass it again where this is read."
            )

    def __getstate__(self) -> dict[Any, Any]:
        self.refuse_counter()
        return super().__getstate__()


def read_store(value: object) -> Any:  # noqa: ANN401 - a store, what has one, its place, or None
    """Check what components take as ``store=``.

    Raises:
        InputError: If it is nothing that holds states, or the written trace of a store that was live.
    """
    if value is None or isinstance(value, str | HasStates):
        return value
    if isinstance(value, PathLike):
        return str(value)
    if isinstance(value, Mapping) and "live" in value:
        raise InputError(
            f"store was a live {value['live']} when this was written down, which can't be opened from a description. "
            f"Pass store= again."
        )
    if callable(getattr(value, "get_many", None)) and hasattr(value, "layout"):
        return value
    raise InputError(
        f"store is {type(value).__name__}; wanted a StateStore, a folder, a .sqlite3 file, a KaLMChroma or "
        f"KaLMChromaVectorStore, or None."
    )


def place_of(store: StateStore | HasStates | str | None) -> Place:
    """Write a store down: its file where it has one, else what kind it was."""
    if store is None or isinstance(store, str):
        return store
    if isinstance(store, HasStates):
        return store.states_place()
    path = getattr(store, "path", None)
    return str(path) if path is not None else {"live": type(store).__name__}


def lasting_place(store: StateStore | HasStates | str | None, whose: str) -> str | None:
    """Where a store is, for a pickle, which another process may open.

    Raises:
        InputError: If the states are in memory or on a server, and so would be lost.
    """
    place = place_of(store)
    if place == MEMORY:
        place = {"live": "MemoryStore"}
    if isinstance(place, dict):
        raise InputError(
            f"{whose} uses a live {place['live']}, which can't be pickled. Give store= a folder or a .sqlite3 file, "
            f"which every process can open."
        )
    return place


def check_reranker(value: object) -> Any:  # noqa: ANN401 - a Reranker, or None
    """Check what doors take as ``reranker=``.

    Raises:
        InputError: If it is no engine.
        ClosedError: If it was closed.
    """
    if value is not None and not isinstance(value, Reranker):
        raise InputError(f"reranker is {type(value).__name__}; wanted a kalm_rag.Reranker, or give model=.")
    if value is not None:
        value.info  # noqa: B018 - says so if it was closed
    return value


def refuse_both(reranker: Reranker | None, named: set[str]) -> None:
    """Refuse a ready engine together with settings of one to be loaded.

    Raises:
        InputError: If both were given.
    """
    if reranker is not None and named:
        raise InputError(f"reranker and {', '.join(sorted(named))} were both given; wanted one of them.")
