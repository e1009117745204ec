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
    """Everything that shapes a run. The same config, base and data give the same weights, on one machine."""

    stage: Stage | str = Stage.ALL  # which part of the recipe; "all" is the three one after another
    split: str = "train"  # labelled queries to learn from
    dev_split: str | None = None  # labelled queries to measure on; None holds out a tenth of `split`
    dev_queries: int = 100  # most held-out queries of a folder
    steps: int = 1000  # batches of a stage
    lists: int = 8  # queries per batch
    candidates: int = 8  # passages per query
    accumulate: int = 1  # parts a batch is computed in: less memory, the same gradient
    learning_rate: float | None = None  # peak; None is 1e-5, or 1e-4 with `lora`
    lora: int = 0  # rank of low-rank updates of the blocks' matrices, folded in at the end; 0 learns all weights
    distil: float = 0.7  # share of the soft labels in the loss of stage distil
    # where soft labels come from: "fusion" (BM25 + MiniLM), "self" (the model as it enters the stage, unpooled), or a
    # model's name or folder
    teacher: str = FUSION
    anchor: float = 0.2  # weight of the yes/no loss of each pair, which keeps P(yes) a probability
    slack: float = 1.0  # mined negatives must score this far (in margin) below the best relevant passage
    ratios: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # pooling ratios learnt and measured
    snapshots: int = 5  # checkpoints averaged at the end of a stage
    max_tokens: int = MAX_PASSAGE_TOKENS  # where passages are cut while learning
    checkpointing: bool = False  # compute layers again instead of keeping them: less memory, slower
    seed: int = 0  # fixes every draw
    # what queries are asked under, where a folder has no instructions.jsonl
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
