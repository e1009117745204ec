"""Our models as models of mteb: its reranking tasks (and retrieval tasks turned into them) run on any of them.

Extra ``mteb``. A passage is read once, whatever number of queries, splits and tasks have it among their candidates.
Knows the engine and stores; nothing else of this package knows mteb.
"""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from kalm_rag.checks import check_passages, check_query
from kalm_rag.engine.reranker import DEFAULT_RATIO, Reranker
from kalm_rag.errors import InputError, require
from kalm_rag.index.ranking import rank_candidates
from kalm_rag.instructions import Instructions
from kalm_rag.models.backbone import Backbone
from kalm_rag.models.registry import CHECKPOINTS
from kalm_rag.states import to_bytes
from kalm_rag.store import open_store


class MtebReranker:
    """A reranker in the shape that mteb wants: ``mteb.models.CrossEncoderProtocol``.

    A query's own instruction, where a task has them, is the task text; else the task's prompt for queries is, if there
    is one. Scores are margins, which order as P(yes) does but don't saturate.

    Args:
        engine: The engine. The caller closes it.
        store: Folder that keeps states for another run; None keeps them in a temporary folder, as long as this lives.
        system: System text for all queries.
        task_prompts: Take mteb's prompt of a task as task text.

    Raises:
        MissingDependencyError: If mteb is not installed.
        StoreError: If the store can't be opened.

    Example:
        .. code-block:: python

            model = MtebReranker.from_pretrained("pico")
            results = mteb.evaluate(model, mteb.get_tasks(tasks=["AskUbuntuDupQuestions"]))
    """

    def __init__(
        self, engine: Reranker, *, store: Path | str | None = None, system: str | None = None, task_prompts: bool = True
    ) -> None:
        self.engine, self.system, self.task_prompts = engine, system, task_prompts
        self.mteb_model_meta = _meta(engine)
        self._folder = tempfile.TemporaryDirectory() if store is None else None
        self.store = open_store(Path(self._folder.name if self._folder is not None else str(store)), engine.layout())

    @classmethod
    def from_pretrained(
        cls,
        name: str = "pico",
        revision: str | None = None,
        device: str | None = None,
        *,
        ratio: int | None = DEFAULT_RATIO,
        dtype: str | None = None,
        **options: Any,  # noqa: ANN401 - those of the class
    ) -> MtebReranker:
        """Load a model as `Reranker.from_pretrained` does; `options` are those of the class."""
        engine = Reranker.from_pretrained(name, revision=revision, device=device, dtype=dtype, ratio=ratio)
        return cls(engine, **options)

    def predict(
        self,
        inputs1: Iterable[Mapping[str, Any]],
        inputs2: Iterable[Mapping[str, Any]],
        *,
        task_metadata: Any = None,  # noqa: ANN401 - mteb's types are not ours
        show_progress_bar: bool | None = None,
        **_: Any,  # noqa: ANN401 - mteb's other settings: the engine cuts its batches by tokens
    ) -> np.ndarray:
        """Score pairs; mteb calls this.

        Args:
            inputs1: Batches of queries: ``query`` (or ``text``), and ``instruction`` where there are any.
            inputs2: Batches of passages, ``text``, as many as queries.
            task_metadata: The task's; its prompt may be the task text.
            show_progress_bar: None shows one on a terminal.

        Returns:
            float32 margins in input order, ``(pairs,)``.

        Raises:
            InputError: If there are not as many passages as queries, or a query is blank.
        """
        prompt = getattr(task_metadata, "prompt", None) if self.task_prompts else None
        prompt = prompt.get("query") if isinstance(prompt, dict) else prompt
        asked = self._asked(inputs1, prompt if isinstance(prompt, str) else None)
        passages = [text for batch in inputs2 for text in batch["text"]]
        if len(asked) != len(passages):
            raise InputError(f"{len(asked)} queries and {len(passages)} passages; wanted as many of each.")
        groups: dict[tuple[str, Instructions], list[int]] = {}
        for place, question in enumerate(asked):
            groups.setdefault(question, []).append(place)
        scores = np.empty(len(asked), dtype=np.float32)
        shown = sys.stderr.isatty() if show_progress_bar is None else show_progress_bar
        for (query, steer), places in tqdm(groups.items(), desc="reranking", unit="query", disable=not shown):
            check_query(query)
            texts = check_passages([passages[place] for place in places])
            for placed in rank_candidates(self.engine, self.store, query, texts, instructions=steer):
                scores[places[placed.index]] = placed.margin
        return scores

    def _asked(self, batches: Iterable[Mapping[str, Any]], prompt: str | None) -> list[tuple[str, Instructions]]:
        """Query and instructions of each pair. mteb puts the instruction behind the query in ``text``."""
        out = []
        for batch in batches:
            queries = batch["query"] if "query" in batch else batch["text"]
            told = batch["instruction"] if "instruction" in batch else [None] * len(queries)
            for query, own in zip(queries, told, strict=True):
                out.append((query, Instructions(system=self.system, task=own if own else prompt)))
        return out


def _meta(engine: Reranker) -> Any:  # noqa: ANN401
    """What mteb files results under. Name, revision and ratio tell apart whatever scores differently."""
    meta = require("mteb.models.model_meta", "mteb", "running our models in mteb").ModelMeta
    info = engine.info
    changes = {
        "name": CHECKPOINTS[info.name].repository if info.name in CHECKPOINTS else _mteb_name(info.name),
        "revision": _revision(engine.backbone),
        "languages": ["eng-Latn"],
        "max_tokens": info.max_passage_tokens,
        "license": "apache-2.0",
        "open_weights": True,
        "framework": ["PyTorch"],
        "use_instructions": True,
        "model_type": ["cross-encoder"],
        "experiment_kwargs": {"ratio": engine.ratio},
    }
    return meta.create_empty(changes)


def _mteb_name(name: str) -> str:
    """``owner/name``, as mteb wants it, of pico and of folders."""
    if Path(name).is_dir():
        return f"local/{Path(name).resolve().name}"
    return name if "/" in name else f"kalm-rag/{name}"


def _revision(backbone: Backbone) -> str:
    """The commit, or a digest of the weights: mteb gives old results back for a revision it has seen."""
    info = backbone.info
    if info.family != "pico":
        return info.revision if info.revision != "local" else info.weights[:12]
    digest = hashlib.sha256()
    for tensor in backbone.decoder.state_dict().values():  # type: ignore[attr-defined]  # pico's info is its encoder's
        digest.update(to_bytes(tensor.cpu().flatten()))
    return digest.hexdigest()[:12]
