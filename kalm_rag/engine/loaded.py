"""A loaded model with its settings: shared within the process, given back on `close`. `Reranker` is one that scores.

Knows where models come from; runs none.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from kalm_rag.checks import check_count
from kalm_rag.engine.decoder_pass import DecodeLog, DecodeStats
from kalm_rag.errors import ClosedError, InputError
from kalm_rag.models.backbone import Backbone, BackboneInfo, CachingBackbone
from kalm_rag.models.devices import parse_devices, parse_dtype
from kalm_rag.models.prefix_cache import check_bytes
from kalm_rag.models.registry import acquire_all
from kalm_rag.states import Codec, Layout
from kalm_rag.states.pooling import check_ratio

if TYPE_CHECKING:
    from typing_extensions import Self

DEFAULT_RATIO = 4


class LoadedModel:
    """What every engine has: a backbone, its ratio and batch size, helpers on further devices, and an end."""

    def __init__(
        self,
        backbone: Backbone,
        *,
        ratio: int | None = DEFAULT_RATIO,
        batch_size: int = 64,
        helpers: Sequence[Backbone] = (),
    ) -> None:
        if not hasattr(backbone, "decode"):
            raise InputError(
                f"backbone is {backbone!r:.80}; wanted a loaded model. Load one with from_pretrained(...)."
            )
        self.ratio = check_ratio(ratio)
        self.batch_size = check_count(batch_size, "batch_size")
        for helper in helpers:
            if helper.info.fingerprint != backbone.info.fingerprint:
                raise InputError(f"helper is {helper.info}; wanted the same model as {backbone.info}.")
        self._backbone: Backbone | None = backbone
        self._helpers = tuple(helpers)
        self._decoded = DecodeLog()
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._parent: LoadedModel | None = None

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str] = "pico",
        *,
        revision: str | None = None,
        device: str | torch.device | Sequence[str | torch.device] | None = None,
        dtype: str | torch.dtype | None = None,
        ratio: int | None = DEFAULT_RATIO,
        batch_size: int = 64,
        decoder_weights: str | None = None,
        compiled: bool = False,
        prefix_cache_bytes: int | None = None,
        max_passage_tokens: int | None = None,
    ) -> Self:
        """Load a model by name, or share it if this process has it already.

        Args:
            name: ``pico`` (bundled, offline), ``nano``, ``small``, ``large`` (KaLM-Reranker-V1 R2, pinned), any
                repository id, the folder of a T5Gemma 2 checkpoint, or one of pico's weights (``kalm-rag train``).
            revision: Commit, tag or branch of a repository; None takes the pinned one. Folders and pico have none.
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
            max_passage_tokens: Where passages are cut; states made under another cut are others. None is 2,048 for
                pico, which reads a long passage in overlapping windows of 256, and the protocol's 1,024 for KaLM
                checkpoints, which read it in one pass.

        Raises:
            ModelError: If the name is unknown or the checkpoint can't be fetched or loaded.
            MissingDependencyError: If the model's package is not installed.
            InputError: If an argument is out of range, or a revision is given for pico or a folder.

        Example:
            >>> from kalm_rag import Reranker
            >>> with Reranker.from_pretrained("pico", device="cpu", ratio=8) as reranker:
            ...     reranker
            Reranker('pico', device='cpu', dtype='float32', ratio=8, batch_size=64)
        """
        devices = parse_devices(device)
        name = os.fspath(name) if isinstance(name, os.PathLike) else name
        if not isinstance(name, str) or not name:
            raise InputError(f"name is {name!r}; wanted a model name, repository id or folder.")
        check_ratio(ratio)
        check_count(batch_size, "batch_size")
        if prefix_cache_bytes is not None:
            check_bytes(prefix_cache_bytes)
        loaded, give_back = acquire_all(
            devices,
            name,
            revision=revision,
            dtype=parse_dtype(dtype, devices[0]),
            decoder_weights=decoder_weights,
            compiled=compiled,
            max_passage_tokens=max_passage_tokens,
        )
        try:
            engine = cls(loaded[0], ratio=ratio, batch_size=batch_size, helpers=loaded[1:])
        except BaseException:
            give_back()
            raise
        engine._finalizer = weakref.finalize(engine, give_back)
        if prefix_cache_bytes is not None and isinstance(loaded[0], CachingBackbone):
            loaded[0].prefix_cache.resize(prefix_cache_bytes)
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
    def backbones(self) -> tuple[Backbone, ...]:
        """The loaded model on each device; the decoder runs on the first."""
        return (self.backbone, *self._helpers)

    @property
    def devices(self) -> list[torch.device]:
        """Where `encode` runs; the decoder runs on the first."""
        return [backbone.device for backbone in self.backbones]

    @property
    def stats(self) -> DecodeStats:
        """What this engine's decoder was given since it was made: passes, passages, padding."""
        return self._decoded.total

    def at(self, ratio: int | None) -> Self:
        """Give an engine over the same loaded model that makes states at another ratio.

        Args:
            ratio: Tokens a state stands for, >= 1; None is 1 (no pooling).

        Raises:
            InputError: If `ratio` is not a whole number >= 1.
        """
        other = type(self)(self.backbone, ratio=ratio, batch_size=self.batch_size, helpers=self._helpers)
        other._parent = self  # the model stays loaded as long as either is in use
        return other

    def layout(self, codec: str | Codec = Codec.EXACT) -> Layout:
        """What a store needs to know to hold this engine's states.

        Args:
            codec: How they are kept: ``exact``, ``bf16`` or ``int8``.

        Raises:
            InputError: If there is no such codec.
            ClosedError: After `close`.
        """
        return self.info.layout(self.ratio, codec)

    def close(self) -> None:
        """Give the model back; the last engine that uses it frees its memory. Closing twice is fine."""
        self._backbone = self._parent = None
        self._helpers = ()
        if self._finalizer is not None:
            self._finalizer()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def __repr__(self) -> str:
        if self._backbone is None:
            return "Reranker(closed)"
        info, where = self.info, ",".join(map(str, self.devices))
        sizes = f"ratio={self.ratio}, batch_size={self.batch_size}"
        return f"Reranker({info.name!r}, device={where!r}, dtype={info.dtype!r}, {sizes})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
