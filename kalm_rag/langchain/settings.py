"""Fields of engine and states for LangChain's components: pickled without the model, equal where they say the same."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, model_validator

from kalm_rag.index import settings
from kalm_rag.index.settings import lasting_place
from kalm_rag.langchain.inputs import check_names


class EngineSettings(settings.EngineSettings):
    """The shared fields, as LangChain's components are written down."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _hint_at_names(cls, values: object) -> object:
        check_names(values if isinstance(values, Mapping) else (), cls.model_fields, cls.__name__)
        return values

    def __getstate__(self) -> dict[Any, Any]:
        """Settings without the model or an open store.

        Raises:
            InputError: If the states are in memory or on a server, and so would be lost.
        """
        state = super().__getstate__()
        private = {**(state["__pydantic_private__"] or {}), "_lazy": None, "_lazy_for": ()}
        held = {**state["__dict__"], "reranker": None, "store": lasting_place(self.store, type(self).__name__)}
        return {**state, "__dict__": held, "__pydantic_private__": private}

    def __eq__(self, other: object) -> bool:
        """Whether the settings are the same, whatever was opened for them."""
        return type(self) is type(other) and self.__dict__ == other.__dict__
