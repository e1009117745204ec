"""Reranking nodes: scores, order, cuts, missing states, what is refused."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import uuid
from typing import Any

import pytest
from llama_index.core.schema import ImageNode, MetadataMode, NodeWithScore, QueryBundle, TextNode
from llama_nodes import QUERY, TEXTS, expected, got, make_nodes, same, scored
from pydantic import ValidationError

from kalm_rag import Reranker
from kalm_rag.errors import InputError, MissingStateError, StateMismatchError
from kalm_rag.llama_index import KaLMNodePostprocessor
from kalm_rag.store.memory import MemoryStore


class TestRanking:
    def test_scores_are_the_engines_and_best_comes_first(self, tiny: Reranker) -> None:
        nodes = scored()
        ranked = KaLMNodePostprocessor(reranker=tiny, top_n=None).postprocess_nodes(nodes, query_str=QUERY)
        same(got(ranked), expected(tiny, nodes))
        assert all(type(n.score) is float and 0.0 <= n.score <= 1.0 for n in ranked)
        json.dumps([n.to_dict() for n in ranked])

    def test_nothing_of_the_callers_is_changed(self, tiny: Reranker) -> None:
        nodes = scored()
        before = copy.deepcopy(nodes)
        for keep in (False, True):
            post = KaLMNodePostprocessor(reranker=tiny, keep_retrieval_score=keep)
            ranked = post.postprocess_nodes(nodes, query_str=QUERY)
            assert [n.to_dict() for n in nodes] == [n.to_dict() for n in before]
            assert not {id(n) for n in ranked} & {id(n) for n in nodes}
            assert all(n.node is not m.node for n in ranked for m in nodes) == keep

    def test_the_retrieval_score_is_kept_out_of_texts(self, tiny: Reranker) -> None:
        """It is an ordinary entry of the metadata: a print shows it, and the hash is the same after a round trip."""
        nodes = scored()
        ranked = KaLMNodePostprocessor(reranker=tiny, keep_retrieval_score=True).postprocess_nodes(
            nodes, query_str=QUERY
        )
        old = {n.node_id: n for n in nodes}
        for one in ranked:
            before = old[one.node_id]
            assert one.metadata["retrieval_score"] == before.score
            assert str(before.score) in str(one.metadata)
            assert one.node.hash == TextNode.from_dict(one.node.to_dict()).hash
            for mode in (MetadataMode.EMBED, MetadataMode.LLM, MetadataMode.NONE):
                assert one.node.get_content(metadata_mode=mode) == before.node.get_content(metadata_mode=mode)
        assert json.loads(ranked[0].node.to_json())["metadata"]["retrieval_score"] == old[ranked[0].node_id].score

    def test_top_n_and_threshold(self, tiny: Reranker) -> None:
        nodes = scored()
        whole = expected(tiny, nodes)
        cut = sorted(whole.values())[2]
        one = KaLMNodePostprocessor(reranker=tiny, top_n=1).postprocess_nodes(nodes, query_str=QUERY)
        assert [n.node_id for n in one] == list(whole)[:1]
        assert len(KaLMNodePostprocessor(reranker=tiny, top_n=99).postprocess_nodes(nodes, query_str=QUERY)) == 4
        high = KaLMNodePostprocessor(reranker=tiny, threshold=cut, top_n=None).postprocess_nodes(nodes, query_str=QUERY)
        assert set(got(high)) == {i for i, p in whole.items() if p >= cut}

    @pytest.mark.parametrize("score", [None, math.nan, math.inf])
    def test_odd_retrieval_scores_do_not_matter(self, tiny: Reranker, score: float | None) -> None:
        nodes = [NodeWithScore(node=n, score=score) for n in make_nodes()]
        ranked = KaLMNodePostprocessor(reranker=tiny, top_n=None, keep_retrieval_score=True).postprocess_nodes(
            nodes, query_str=QUERY
        )
        same(got(ranked), expected(tiny, nodes))

    def test_nodes_without_text_come_last_unscored(self, tiny: Reranker) -> None:
        bare = [TextNode(id_="empty", text=""), ImageNode(id_="image"), TextNode(id_="blank", text=" \n")]
        nodes = scored([*bare, *make_nodes()])
        ranked = KaLMNodePostprocessor(reranker=tiny, top_n=None).postprocess_nodes(nodes, query_str=QUERY)
        assert [n.node_id for n in ranked[4:]] == ["empty", "image", "blank"]
        assert [n.score for n in ranked[4:]] == [None] * 3
        strict = KaLMNodePostprocessor(reranker=tiny, top_n=None, threshold=0.0)
        assert len(strict.postprocess_nodes(nodes, query_str=QUERY)) == 4

    def test_duplicate_ids_and_equal_texts_keep_their_own_scores(self, tiny: Reranker) -> None:
        nodes = scored([TextNode(id_="a", text=TEXTS[0]), TextNode(id_="a", text=TEXTS[1]), TextNode(text=TEXTS[0])])
        ranked = KaLMNodePostprocessor(reranker=tiny, top_n=None).postprocess_nodes(nodes, query_str=QUERY)
        truth = {t: r.probability for t, r in zip(TEXTS[:2], tiny.score(QUERY, tiny.encode(TEXTS[:2])), strict=True)}
        assert [n.score for n in ranked] == pytest.approx([truth[n.text] for n in ranked], abs=1e-5)
        assert len(ranked) == 3

    def test_ratio(self, tiny: Reranker) -> None:
        """Without a store the engine makes states at the ratio; with one, stored states are pooled further."""
        nodes = scored()
        texts = [n.node.get_content(metadata_mode=MetadataMode.EMBED) for n in nodes]
        truth = {nodes[r.index].node_id: r.probability for r in tiny.rank(QUERY, texts, ratio=8)}
        for store in (None, MemoryStore(tiny.layout())):
            post = KaLMNodePostprocessor(reranker=tiny, ratio=8, store=store, top_n=None)
            assert got(post.postprocess_nodes(nodes, query_str=QUERY)) == pytest.approx(truth, abs=1e-2)
        wrong = KaLMNodePostprocessor(reranker=tiny, ratio=6, store=MemoryStore(tiny.layout()))
        with pytest.raises(StateMismatchError, match="multiple"):
            wrong.postprocess_nodes(nodes, query_str=QUERY)

    def test_metadata_mode_says_which_text(self, tiny: Reranker) -> None:
        nodes = scored()
        post = KaLMNodePostprocessor(reranker=tiny, metadata_mode=MetadataMode.NONE, top_n=None)
        ranked = post.postprocess_nodes(nodes, query_str=QUERY)
        truth = {nodes[r.index].node_id: r.probability for r in tiny.rank(QUERY, TEXTS)}
        same(got(ranked), truth)


class TestMissing:
    """Nodes that another retriever brought: nobody has made their states yet."""

    def test_encode_keeps_them_so_that_raise_passes_next(self, tiny: Reranker) -> None:
        store = MemoryStore(tiny.layout())
        nodes = scored()
        ranked = KaLMNodePostprocessor(reranker=tiny, store=store).postprocess_nodes(nodes, query_str=QUERY)
        assert store.stats().states == 4
        again = KaLMNodePostprocessor(reranker=tiny, store=store, missing="raise")
        assert got(again.postprocess_nodes(nodes, query_str=QUERY)) == got(ranked)

    def test_raise(self, tiny: Reranker) -> None:
        post = KaLMNodePostprocessor(reranker=tiny, store=MemoryStore(tiny.layout()), missing="raise")
        with pytest.raises(MissingStateError, match="4 of 4 candidates have no stored states"):
            post.postprocess_nodes(scored(), query_str=QUERY)

    def test_skip_keeps_retrieval_order_behind(self, tiny: Reranker) -> None:
        store = MemoryStore(tiny.layout())
        nodes = scored()
        store.put_many(tiny.encode([nodes[2].node.get_content(metadata_mode=MetadataMode.EMBED)]))
        post = KaLMNodePostprocessor(reranker=tiny, store=store, missing="skip", top_n=None)
        ranked = post.postprocess_nodes(nodes, query_str=QUERY)
        assert [n.node_id for n in ranked] == ["n2", "n0", "n1", "n3"]
        assert [n.score is None for n in ranked] == [False, True, True, True]

    def test_another_models_store_is_refused(self, tiny: Reranker) -> None:
        layout = tiny.layout()
        other = MemoryStore(type(layout)(**{**layout.__dict__, "fingerprint": "0" * 64}))
        with pytest.raises(StateMismatchError, match="0000"):
            KaLMNodePostprocessor(reranker=tiny, store=other).postprocess_nodes(scored(), query_str=QUERY)

    def test_without_a_store_repeated_nodes_are_not_encoded_again(self, tiny: Reranker) -> None:
        post = KaLMNodePostprocessor(reranker=tiny)
        text = f"A river named {uuid.uuid4()}."
        post.postprocess_nodes([NodeWithScore(node=TextNode(text=text))], query_str=QUERY)
        other = KaLMNodePostprocessor(reranker=tiny, missing="raise")  # another component, the same process
        assert other.postprocess_nodes([NodeWithScore(node=TextNode(text=text))], query_str=QUERY)


class TestBadInput:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"top_n": 0}, "top_n is 0; wanted a whole number >= 1"),
            ({"top_n": -1}, "top_n is -1"),
            ({"top_n": "3"}, "top_n is '3'"),
            ({"top_n": True}, "top_n is True"),
            ({"threshold": 1.5}, "threshold is 1.5"),
            ({"threshold": math.nan}, "threshold is nan"),
            ({"missing": "ignore"}, "missing is 'ignore'; wanted one of"),
            ({"topn": 3}, "Extra inputs are not permitted. Did you mean top_n?"),
            ({"top_k": 3}, "has no argument 'top_k'.* Did you mean top_n?"),
            ({"score_threshold": 0.5}, "KaLMNodePostprocessor has no argument .* Did you mean threshold?"),
            ({"instruction": "Find laws."}, "Did you mean instructions?"),
            ({"colour": "red"}, "has no argument 'colour'. Extra inputs are not permitted. \\[type"),
            ({"model": ""}, "model is ''"),
            ({"ratio": 0}, "ratio is 0"),
            ({"batch_size": 0}, "batch_size is 0"),
            ({"store": 3}, "store is int; wanted a StateStore"),
            ({"reranker": "pico"}, "reranker is str"),
            ({"instructions": 3}, "prompt is int"),
        ],
        ids=str,
    )
    def test_construction(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ValidationError, match=message):
            KaLMNodePostprocessor(**fields)

    def test_both_model_and_reranker(self, tiny: Reranker) -> None:
        with pytest.raises(ValidationError, match="reranker and model were both given"):
            KaLMNodePostprocessor(reranker=tiny, model="pico")

    def test_engine_fields_are_fixed(self) -> None:
        with pytest.raises(ValidationError, match="frozen"):
            KaLMNodePostprocessor().model = "nano"

    def test_queries(self, tiny: Reranker) -> None:
        post = KaLMNodePostprocessor(reranker=tiny)
        with pytest.raises(InputError, match="no query was given"):
            post.postprocess_nodes(scored())
        with pytest.raises(InputError, match="query holds a lone surrogate"):
            post.postprocess_nodes(scored(), query_str="\ud800")
        with pytest.raises(InputError, match="no query was given"):
            asyncio.run(post.apostprocess_nodes([]))
        assert post.postprocess_nodes([], query_str=QUERY) == []
        assert asyncio.run(post.apostprocess_nodes([], query_str=QUERY)) == []

    def test_values_changed_later_are_checked_too(self, tiny: Reranker) -> None:
        post = KaLMNodePostprocessor(reranker=tiny)
        post.top_n = 0
        with pytest.raises(InputError, match="top_n is 0"):
            post.postprocess_nodes(scored(), query_str=QUERY)


def test_real_relevance_with_the_bundled_model(pico: Reranker) -> None:
    texts = ["I like tea in the morning.", "Berlin is the capital of Germany.", "Paris is the capital of France."]
    nodes = [NodeWithScore(node=TextNode(text=t)) for t in texts]
    bundle = QueryBundle("What is the capital of France?")
    ranked = KaLMNodePostprocessor(reranker=pico, top_n=1).postprocess_nodes(nodes, query_bundle=bundle)
    assert ranked[0].node.get_content() == texts[2]
