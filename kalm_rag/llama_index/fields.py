"""What the LlamaIndex components share: fields that name engine and store, and how nodes are read.

Fields survive ``to_dict``/``from_dict`` and pickling; the engine and an open store never travel.
"""

from __future__ import annotations

from typing import Any

from llama_index.core.bridge.pydantic import ConfigDict, Field, ValidationError, model_validator
from llama_index.core.schema import BaseComponent, MetadataMode
from typing_extensions import Self

from kalm_rag.checks import unknown_argument_hint
from kalm_rag.errors import InputError, StateMismatchError
from kalm_rag.index.lazy_engine import LazyEngine
from kalm_rag.index.passage_rule import LLAMA_INDEX, PassageRule
from kalm_rag.index.settings import EngineSettings, lasting_place


class EngineFields(EngineSettings, BaseComponent):
    """Fields of every component of ours. Those of the engine can't be changed after construction."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid", protected_namespaces=("pydantic_model_",))

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, values: Any) -> Any:  # noqa: ANN401 - what pydantic was given
        if isinstance(values, dict) and "class_name" in values:  # LlamaIndex's ``model_dump`` writes it
            if values["class_name"] != cls.class_name():
                raise InputError(f"class_name is {values['class_name']!r}; wanted {cls.class_name()!r}.")
            values = {name: value for name, value in values.items() if name != "class_name"}
        for name in values if isinstance(values, dict) else ():
            if name not in cls.model_fields:
                hint = unknown_argument_hint(name, cls.model_fields)
                raise InputError(f"{cls.class_name()} has no argument {name!r}. Extra inputs are not permitted.{hint}")
        return values

    @property
    def parts(self) -> LazyEngine:
        """Engine and store, made on first use."""
        return self.lazy

    def __setattr__(self, name: str, value: object) -> None:
        if name in EngineSettings.model_fields:
            raise ValidationError.from_exception_data(
                type(self).__name__, [{"type": "frozen_field", "loc": (name,), "input": value}]
            )
        super().__setattr__(name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by what ``to_dict`` says; neither model nor open store travels.

        Raises:
            InputError: If the store is in memory or remote, and so would be lost.
        """
        lasting_place(self.store, self.class_name())
        return _restore, (type(self), BaseComponent.to_dict(self))


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


def _restore(kind: type[EngineFields], data: dict[str, Any]) -> EngineFields:
    return kind.from_dict(data)
