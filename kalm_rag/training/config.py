"""What a T5Gemma 2 is adapted with: the paper's stages (arXiv 2606.22807) and every setting."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from kalm_rag.checks import check_count
from kalm_rag.engine.reranker import DEFAULT_RATIO
from kalm_rag.errors import InputError
from kalm_rag.instructions import Instructions
from kalm_rag.models.t5gemma2.protocol import MAX_PASSAGE_TOKENS
from kalm_rag.states.pooling import check_ratio

FUSION, OWN = "fusion", "self"
"""Teachers that need no model: retrieval scores, and the model itself as it enters the stage, unpooled."""


class Stage(str, Enum):
    """A part of the recipe."""

    GENERAL = "general"
    HARD = "hard"
    DISTIL = "distil"
    ALL = "all"


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Everything that shapes a run. The same config, base and data give the same weights, on one machine.

    Attributes:
        stage: Which part of the recipe; ``"all"`` is the three one after another.
        split: Labelled queries to learn from.
        dev_split: Labelled queries to measure on; None holds out a tenth of `split`.
        dev_queries: Most held-out queries of a folder.
        steps: Batches of a stage.
        lists: Queries per batch.
        candidates: Passages per query.
        accumulate: Parts a batch is computed in: less memory, the same gradient.
        learning_rate: Peak; None is 1e-5, or 1e-4 with `lora`.
        lora: Rank of low-rank updates of the blocks' matrices, folded in at the end; 0 learns all weights.
        distil: Share of the soft labels in the loss of stage ``distil``.
        teacher: Where soft labels come from: ``"fusion"`` (BM25 + MiniLM), ``"self"`` (the model as it enters the
            stage, unpooled), or a model's name or folder.
        anchor: Weight of the yes/no loss of each pair, which keeps P(yes) a probability.
        slack: Mined negatives must score this far (in margin) below the best relevant passage.
        ratios: Pooling ratios learnt and measured.
        snapshots: Checkpoints averaged at the end of a stage.
        max_tokens: Where passages are cut while learning.
        checkpointing: Compute layers again instead of keeping them: less memory, slower.
        seed: Fixes every draw.
        instructions: What queries are asked under, where a folder has no ``instructions.jsonl``.
    """

    stage: Stage | str = Stage.ALL
    split: str = "train"
    dev_split: str | None = None
    dev_queries: int = 100
    steps: int = 1000
    lists: int = 8
    candidates: int = 8
    accumulate: int = 1
    learning_rate: float | None = None
    lora: int = 0
    distil: float = 0.7
    teacher: str = FUSION
    anchor: float = 0.2
    slack: float = 1.0
    ratios: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    snapshots: int = 5
    max_tokens: int = MAX_PASSAGE_TOKENS
    checkpointing: bool = False
    seed: int = 0
    instructions: Instructions = field(default_factory=Instructions)

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "stage", Stage(self.stage))
        except ValueError as err:
            raise InputError(f"stage is {self.stage!r}; wanted one of {', '.join(s.value for s in Stage)}.") from err
        least = {"dev_queries": 1, "steps": 1, "lists": 1, "candidates": 2, "accumulate": 1, "snapshots": 1}
        for name, low in (least | {"max_tokens": 8, "lora": 0}).items():
            check_count(getattr(self, name), name, low)
        if not (0 <= self.distil <= 1 and self.slack >= 0 and self.anchor >= 0 and self.peak > 0):
            raise InputError(
                f"distil={self.distil}, slack={self.slack}, anchor={self.anchor}, learning_rate={self.learning_rate}; "
                f"wanted distil from 0 to 1, slack and anchor >= 0, learning_rate > 0."
            )
        if self.max_tokens > MAX_PASSAGE_TOKENS or not self.ratios:
            raise InputError(
                f"max_tokens={self.max_tokens}, ratios={self.ratios}; wanted max_tokens <= {MAX_PASSAGE_TOKENS}, at "
                f"least one ratio."
            )
        lowest = min(check_ratio(ratio) for ratio in self.ratios)
        if any(ratio % lowest for ratio in self.ratios):
            raise InputError(f"ratios are {self.ratios}; wanted multiples of the smallest.")

    @property
    def peak(self) -> float:
        """Peak learning rate."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-4 if self.lora else 1e-5

    @property
    def soft(self) -> float:
        """Share of the soft labels in this stage's loss."""
        return self.distil if self.stage is Stage.DISTIL else 0.0

    @property
    def usual_ratio(self) -> int:
        """The ratio that states have by default, or the smallest."""
        return DEFAULT_RATIO if DEFAULT_RATIO in self.ratios else min(self.ratios)
