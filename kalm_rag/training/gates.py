"""The last stage: which instructions are heard. The gate learns to tell specific texts from generic ones.

Only the gate changes, so scores without instructions stay as they were.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch.nn import functional

from kalm_rag.engine.reranker import Reranker
from kalm_rag.models.pico.backbone import PicoBackbone
from kalm_rag.training.instruct import generic, kind_of_text, split_query, split_side
from kalm_rag.training.lists import CandidateLists, embed

HEARD = 0.8
"""Gate of a specific instruction; a generic one's is 0. Of 0.3 to 1.3, with words or the side of a topic moved from
held-out queries into the instruction, 0.8 ranks best or within 0.012 of it on all five sets (r=4)."""

GENERIC_WEIGHT = 3.0
"""Weight of a generic pair: a generic text that is heard costs everybody, a specific one unheard leaves things as they
are."""


def fit_gates(backbone: PicoBackbone, lists: Sequence[CandidateLists], *, seed: int, pairs: int, steps: int) -> None:
    """Train the gate alone, in place, on pairs of a query and a generic or specific instruction.

    So many `pairs` of each kind are drawn from the lists; `steps` are batches of 256 of them.
    """
    rng = random.Random(f"gates-{seed}")
    queries, instructions, heard = _draw(lists, rng, pairs)
    engine = Reranker(backbone, ratio=1)
    vectors = [embed(engine, texts) for texts in (queries, instructions)]
    wanted = torch.tensor(heard)
    weights = torch.where(wanted == 0, GENERIC_WEIGHT, 1.0)
    decoder = backbone.decoder
    gate = decoder.gate.requires_grad_(True)
    solver = torch.optim.AdamW(gate.parameters(), lr=1e-3, weight_decay=0.05)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for group in solver.param_groups:
            group["lr"] = 1e-3 * (1 - step / steps)
        rows = torch.randint(len(wanted), (min(256, len(wanted)),), generator=generator)
        gates = decoder.gates(vectors[0][rows], vectors[1][rows])
        loss = functional.binary_cross_entropy(gates, wanted[rows], weight=weights[rows])
        solver.zero_grad()
        loss.backward()
        solver.step()
    gate.requires_grad_(False)


def _draw(lists: Sequence[CandidateLists], rng: random.Random, pairs: int) -> tuple[list[str], list[str], list[float]]:
    """Queries, instructions and how far each should be heard."""
    queries: list[str] = []
    instructions: list[str] = []
    for _ in range(pairs):
        source = rng.choice(lists)
        row = rng.randrange(len(source.queries))
        plain = generic(rng)
        query, told = _specific(source.queries[row], source.instructions[row].task, rng)
        queries += [source.queries[row], query]
        instructions += [plain, f"{generic(rng)} {told}" if rng.random() < 0.2 else told]
    return queries, instructions, [0.0, HEARD] * pairs


def _specific(text: str, own: str | None, rng: random.Random) -> tuple[str, str]:
    """A query with an instruction that must be heard: its own, or on a side of it, a kind of text, or a topic."""
    if own is not None:
        return text, own
    chance = rng.random()
    if chance < 0.25:
        return text, kind_of_text(rng)
    side = split_side(text, rng) if chance < 0.75 else None
    return side or split_query(text, rng) or (text, f"Focus on {text}.")
