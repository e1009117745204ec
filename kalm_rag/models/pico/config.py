"""Sizes of pico's decoder, as they stand in a weights folder's config.json."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from kalm_rag.errors import InputError

MAX_PASSAGE_TOKENS = 2048
"""Where passages are cut by default, ``[CLS]`` and ``[SEP]`` included: eight times what the encoder reads at once."""

FORMER_PASSAGE_TOKENS = 256
"""Where they were cut before long passages were read in windows: by the states of collections that note no cut."""

_FORMER_KEYS = {"views": "probes", "lexical": "code_size"}
"""What config files of earlier releases call a size."""

_LARGEST = 100_000
"""No size is larger; one that is would only fill the memory."""


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Sizes of the decoder.

    Attributes:
        hidden: H, width of a state: the encoder's last layer.
        code_size: X, width of a word code.
        vocab: Size of the encoder's vocabulary.
        probes: K, learned projections of a prompt token that are compared with the states, each of width H.
        pairs: M, features of one (prompt token, state) pair.
        width: D, width of the mixing layers.
        layers: Mixing layers.
        heads: Attention heads of a mixing layer.
    """

    hidden: int = 384
    code_size: int = 128
    vocab: int = 30522
    probes: int = 2
    pairs: int = 16
    width: int = 256
    layers: int = 2
    heads: int = 4

    def to_dict(self) -> dict[str, int]:
        """Plain values, for the config file."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DecoderConfig:
        """Read what `to_dict` wrote.

        Raises:
            InputError: If a key is unknown, or a size is no whole number that could be one.
        """
        values = {_FORMER_KEYS.get(key, key): value for key, value in values.items()}
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise InputError(f"decoder config has unknown keys {', '.join(unknown)}; wanted a config of this release.")
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _LARGEST:
                raise InputError(f"decoder config says {key} {value!r}; wanted a whole number from 1 to {_LARGEST}.")
        config = cls(**values)
        if config.layers > config.width or config.width % config.heads:
            raise InputError(f"decoder config says {config}; wanted heads that divide the width, and fewer layers.")
        return config
