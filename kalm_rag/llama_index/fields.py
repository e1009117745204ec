"""What the LlamaIndex components share: fields that name engine and store, and the two themselves, made on first use.

Fields survive ``to_dict``/``from_dict`` and pickling; the engine and an open store never travel.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr, field_serializer, field_validator, model_validator
from llama_index.core.schema import BaseComponent, MetadataMode
from typing_extensions import Self

from kalm_rag.checks import unknown_argument_hint
from kalm_rag.engine.reranker import Reranker
from kalm_rag.errors import InputError, StateMismatchError
from kalm_rag.index.lazy_engine import EngineSpec, LazyEngine, spec_of
from kalm_rag.index.passage_rule import LLAMA_INDEX, PassageRule
from kalm_rag.store.opening import MEMORY


class EngineFields(BaseComponent):
    """Fields of every component of ours. Those of the engine can't be changed after construction."""

    model: str = Field(default="pico", frozen=True, description="Model name, repository id or folder.")
    revision: str | None = Field(default=None, frozen=True, description="Commit, tag or branch; None: the pinned one.")
    device: str | None = Field(default=None, frozen=True, description="cpu, cuda, cuda:1; None: CUDA if there is one.")
    dtype: str | None = Field(default=None, frozen=True, description="bf16 or fp32; None: what fits the device.")
    ratio: int | None = Field(
        default=None, frozen=True, description="Tokens a state stands for; None: as stored, or 4."
    )
    state_ratio: int | None = Field(
        default=None, frozen=True, description="Tokens a state stands for where states are made; None: ratio, or 4."
    )
    batch_size: int = Field(default=64, frozen=True, description="Most passages in one pass.")
    decoder_weights: str | None = Field(default=None, frozen=True, description="int8: faster scoring on the CPU.")
    compiled: bool = Field(default=False, frozen=True, description="Compile the decoder, at the first query.")
    prefix_cache_bytes: int | None = Field(
        default=None, frozen=True, description="Most bytes of decoder work kept between queries; None: the model's."
    )
    store: Any = Field(
        default=None,
        frozen=True,
        description="Where states are: a StateStore, a folder or .sqlite3 file, a KaLMChromaVectorStore, or None for "
        "the process's bounded cache.",
    )
    reranker: Any = Field(
        default=None, frozen=True, exclude=True, repr=False, description="A ready engine instead of model."
    )
    _parts: LazyEngine = PrivateAttr()

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:  # noqa: ANN401 - what pydantic was given
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                hint = unknown_argument_hint(name, cls.model_fields)
                raise InputError(f"{cls.class_name()} has no argument {name!r}. Extra inputs are not permitted.{hint}")
        return values

    @field_validator("device", "dtype", mode="before")
    @classmethod
    def _name(cls, value: object) -> object:
        return value if value is None or isinstance(value, str) else str(value).removeprefix("torch.")

    @field_validator("store", mode="before")
    @classmethod
    def _check_store(cls, value: object) -> object:
        return read_store(value)

    @model_validator(mode="after")
    def _make_parts(self) -> Self:
        if not hasattr(self, "_parts"):
            self.__dict__.update(name_engine(self.reranker, self.model_fields_set & {"model", "revision"}))
            if self.reranker is not None and (self.ratio is None or self.store is not None):
                self.__dict__["state_ratio"] = self.reranker.ratio
            given = getattr(self.store, "parts", None)
            if isinstance(given, LazyEngine):
                self._parts = self._share(given)
            else:
                self._parts = LazyEngine(self._spec(), reranker=self.reranker, store=self.store)
        return self

    def _share(self, given: LazyEngine) -> LazyEngine:
        """Use the store of a `KaLMChromaVectorStore`, opened once for both, and its engine unless one was named.

        Where only the way it runs is another, it is another engine of the same model.
        """
        spec, reranker = self._spec(), self.reranker
        if reranker is None and not self.model_fields_set & set(SPEC_FIELDS):
            other = {field: getattr(self, field) for field in self.model_fields_set & set(RUN_FIELDS)}
            spec, reranker = replace(given.spec, **other), None if other else given.reranker
            self.__dict__.update({field: getattr(spec, field) for field in (*SPEC_FIELDS, *RUN_FIELDS)})
            self.__dict__["state_ratio"] = spec.ratio
        return LazyEngine(spec, reranker=reranker, store=given)

    @field_serializer("store")
    def _write_store(self, value: object) -> str | dict[str, str] | None:
        return self._written_store()

    @property
    def parts(self) -> LazyEngine:
        """Engine and store, made on first use."""
        return self._parts

    def _spec(self) -> EngineSpec:
        ratio = self.state_ratio if self.state_ratio is not None else self.ratio
        return EngineSpec(ratio=ratio, **{field: getattr(self, field) for field in (*SPEC_FIELDS, *RUN_FIELDS)})

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by what ``to_dict`` says; neither model nor open store travels.

        Raises:
            InputError: If the store is in memory or remote, and so would be lost.
        """
        written = {"live": "MemoryStore"} if self._written_store() == MEMORY else self._written_store()
        if isinstance(written, dict):
            raise InputError(
                f"{self.class_name()} uses a live {written['live']}, which can't be pickled. Give store= a "
                f"folder or a .sqlite3 file, which every process can open."
            )
        return _restore, (type(self), BaseComponent.to_dict(self))

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        return self.model_copy()  # a deep copy would copy the model

    def place(self) -> str | dict[str, str] | None:
        """Where the states are, for other components to write down: a file, or what kind of live store."""
        return self._written_store()

    def _written_store(self) -> str | dict[str, str] | None:
        """What ``to_dict`` says of the store."""
        return describe_store(self.store)


class PassageFields(EngineFields):
    """Fields of components that read nodes: how a node becomes the text that is encoded or scored."""

    metadata_mode: MetadataMode = Field(
        default=MetadataMode.EMBED, frozen=True, description="Which metadata the text of a node holds when it is read."
    )
    passage: str | None = Field(
        default=None,
        frozen=True,
        description="How a node is read, in place of metadata_mode: 'document' (its text alone) or a template such as "
        "'{title}: {text}'; None: as the collection of a KaLMChromaVectorStore says, or metadata_mode.",
    )

    @model_validator(mode="after")
    def _check_rule(self) -> Self:
        if self.passage is not None:
            self._set_rule(PassageRule(self.passage))
        if isinstance(self.store, PassageFields):
            self._follow_rule(self.store.rule, "the vector store")
        return self

    @property
    def rule(self) -> PassageRule:
        """How nodes are read."""
        return PassageRule(self.passage if self.passage is not None else f"{LLAMA_INDEX}{self.metadata_mode.value}")

    def _follow_rule(self, rule: PassageRule, whose: str) -> None:
        """Take over how a collection's records are read.

        Raises:
            StateMismatchError: If another way was asked for by name.
        """
        named = "passage" if self.passage is not None else "metadata_mode"
        if (self.passage is not None or "metadata_mode" in self.model_fields_set) and self.rule != rule:
            raise StateMismatchError(
                f"{named} is {getattr(self, named)!r}, so nodes would be read as {str(self.rule)!r}; {whose} reads "
                f"them as {str(rule)!r}. Leave {named} out to go on with that, or make another collection."
            )
        self._set_rule(rule)

    def _set_rule(self, rule: PassageRule) -> None:
        mode = rule.llama_mode
        self.__dict__["passage"] = str(rule) if mode is None else None
        if mode is not None:
            self.__dict__["metadata_mode"] = MetadataMode(mode)


SPEC_FIELDS = ("model", "revision", "device", "dtype")
"""Fields that say which model, where."""
RUN_FIELDS = ("batch_size", "decoder_weights", "compiled", "prefix_cache_bytes")
"""Fields that say how it runs."""


def read_store(value: object) -> Any:  # noqa: ANN401 - a store, a component that has one, its place, or None
    """Check what components take as ``store=``.

    Raises:
        InputError: If it is nothing that holds states, or the written trace of a store that was live.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if value is None or isinstance(value, str) or isinstance(getattr(value, "parts", None), LazyEngine):
        return value
    if isinstance(value, dict) and "live" in value:
        raise InputError(
            f"store was a live {value['live']} when this was written down, which can't be reopened from a description. "
            f"Pass store= again: from_dict(data, store=...)."
        )
    if callable(getattr(value, "get_many", None)) and hasattr(value, "layout"):
        return value
    raise InputError(
        f"store is {type(value).__name__}; wanted a StateStore, a folder, a .sqlite3 file, a KaLMChromaVectorStore "
        f"or None."
    )


def describe_store(store: object) -> str | dict[str, str] | None:
    """Write a store down: its file where it has one, else what kind it was."""
    if store is None or isinstance(store, str):
        return store
    if isinstance(store, EngineFields):
        return store.place()
    path = getattr(store, "path", None)
    return str(path) if path is not None else {"live": type(store).__name__}


def name_engine(reranker: object, also: set[str]) -> dict[str, Any]:
    """Fields that lead back to a ready engine, so that serialisation doesn't lose it; nothing for None.

    Raises:
        InputError: If it is no engine, or `also` says that a model was named too.
        ClosedError: If it was closed.
    """
    if reranker is None:
        return {}
    if not isinstance(reranker, Reranker):
        raise InputError(f"reranker is {type(reranker).__name__}; wanted a kalm_rag.Reranker, or give model=.")
    if also:
        raise InputError(f"both reranker and {' and '.join(sorted(also))} were given; wanted one of them.")
    return spec_of(reranker)


def _restore(kind: type[EngineFields], data: dict[str, Any]) -> EngineFields:
    return kind.from_dict(data)
