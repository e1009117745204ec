"""Whose instructions hold: given ones, the engine's around, followed ones, overrides."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from llama_index.core import PromptTemplate, VectorStoreIndex
from llama_index.core.agent.workflow import ReActAgent, ToolCallResult
from llama_index.core.base.response.schema import Response
from llama_index.core.evaluation import RetrieverEvaluator
from llama_index.core.llms import CompletionResponse, MockLLM
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.query_engine import CustomQueryEngine, RetrieverQueryEngine
from llama_index.core.response_synthesizers.no_text import NoText
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
from llama_index.core.tools import FunctionTool, RetrieverTool, function_tool
from llama_index.core.workflow import StartEvent, StopEvent, Workflow, step
from llama_nodes import EMBEDDING, QUERY, documents, engine_of, expected, got, index_of, make_nodes, same, scored

from kalm_rag import Instructions, Reranker
from kalm_rag.errors import InputError
from kalm_rag.llama_index import KaLMChromaVectorStore, KaLMNodePostprocessor

LAW = Instructions(task="Find statutes only.")
LAWS = Instructions(task="Find laws.")


class TestInstructions:
    def test_what_can_be_given(self, tiny: Reranker) -> None:
        nodes = scored()
        prompt = PromptTemplate("Find statutes only.\n\nContext:\n{context_str}\n\nQuestion: {query_str}\nAnswer:")
        for given in (LAW, "Find statutes only.", prompt, {"task": "Find statutes only."}):
            post = KaLMNodePostprocessor(reranker=tiny, instructions=given, top_n=None)
            same(got(post.postprocess_nodes(nodes, query_str=QUERY)), expected(tiny, nodes, LAW))
            assert post.preview(QUERY) == tiny.preview(QUERY, LAW)
        assert got(post.postprocess_nodes(nodes, query_str=QUERY)) != expected(tiny, nodes)  # they do steer

    @pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
    def test_auto_follows_the_prompt_of_the_engine_around(self, vectors: KaLMChromaVectorStore, is_async: bool) -> None:
        """One postprocessor in two query engines: each query has the instructions of its own engine's prompt, now."""
        engine = vectors.parts.get()[0]
        post = vectors.as_postprocessor(instructions="auto", top_n=None)
        index = index_of(vectors, documents())

        def template(task: str) -> PromptTemplate:
            return PromptTemplate(f"{task}\n\nContext:\n{{context_str}}\n\nQuestion: {{query_str}}\nAnswer:")

        apps = {task: engine_of(index, post, text_qa_template=template(task)) for task in ("Find laws.", "Find jokes.")}

        def check(app: Any, task: str) -> None:
            response = asyncio.run(app.aquery(QUERY)) if is_async else app.query(QUERY)
            nodes = response.source_nodes
            same(got(nodes), expected(engine, nodes, Instructions(task=task)))

        for task, app in apps.items():
            check(app, task)
        apps["Find laws."].update_prompts({"response_synthesizer:text_qa_template": template("Find poems.")})
        check(apps["Find laws."], "Find poems.")
        assert post.preview(QUERY) == engine.preview(QUERY)  # nobody around: the defaults

    def test_auto_follows_the_engine_around_an_apps_wrapper(self, vectors: KaLMChromaVectorStore) -> None:
        """The engine lists the app's own fall-back, which calls ours: its prompt was not found."""

        class Guarded(BaseNodePostprocessor):
            inner: BaseNodePostprocessor

            def _postprocess_nodes(
                self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
            ) -> list[NodeWithScore]:
                return self.inner.postprocess_nodes(nodes, query_bundle)

        prompt = PromptTemplate("Find laws.\n\nContext:\n{context_str}\n\nQuestion: {query_str}\nAnswer:")
        guarded = Guarded(inner=vectors.as_postprocessor(instructions="auto", top_n=None))
        app = engine_of(index_of(vectors, documents()), guarded, text_qa_template=prompt)
        nodes = app.query(QUERY).source_nodes
        same(got(nodes), expected(vectors.parts.get()[0], nodes, Instructions(task="Find laws.")))

    def test_auto_follows_whatever_holds_the_prompt(self, vectors: KaLMChromaVectorStore) -> None:
        """Patterns for own engines: none of them lists the postprocessor, and 'auto' was without effect."""
        index, asked = index_of(vectors, documents()), "Find laws.\n\nContext:\n{context_str}\n\nQuestion: {query_str}"
        post = vectors.as_postprocessor(instructions="auto", top_n=None)

        class Own(CustomQueryEngine):
            retriever: BaseRetriever
            reranker: BaseNodePostprocessor
            qa_prompt: PromptTemplate

            def custom_query(self, query_str: str) -> Response:
                nodes = self.reranker.postprocess_nodes(self.retriever.retrieve(query_str), query_str=query_str)
                return Response("", source_nodes=nodes)

        class Reranking(BaseRetriever):
            def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
                nodes = index.as_retriever(similarity_top_k=10).retrieve(query_bundle)
                return post.postprocess_nodes(nodes, query_bundle)

        class Flow(Workflow):
            qa_prompt = PromptTemplate("Class attributes are not read.")

            def __init__(self) -> None:
                super().__init__(timeout=20)
                self.prompt = PromptTemplate(asked)

            @step
            async def rerank(self, ev: StartEvent) -> StopEvent:
                nodes = await index.as_retriever(similarity_top_k=10).aretrieve(ev.query)
                return StopEvent(result=await post.apostprocess_nodes(nodes, query_str=ev.query))

        async def flow() -> list[NodeWithScore]:
            return list(await Flow().run(query=QUERY))

        prompt, retriever = PromptTemplate(asked), index.as_retriever(similarity_top_k=10)
        own = Own(retriever=retriever, reranker=post, qa_prompt=prompt)
        inside = RetrieverQueryEngine.from_args(Reranking(), llm=MockLLM(max_tokens=4), text_qa_template=prompt)
        for nodes in (own.query(QUERY).source_nodes, inside.query(QUERY).source_nodes, asyncio.run(flow())):
            same(got(nodes), expected(vectors.parts.get()[0], nodes, LAWS))

    def test_auto_follows_the_agent_that_searches(self, vectors: KaLMChromaVectorStore) -> None:
        class Searching(MockLLM):
            def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
                done = "Observation:" in prompt.split(QUERY)[-1]
                call = f'Thought: I look.\nAction: search\nAction Input: {{"input": "{QUERY}"}}'
                return CompletionResponse(text="Thought: I know.\nAnswer: Nile." if done else call)

        post, seen = vectors.as_postprocessor(instructions="auto", top_n=None), list[NodeWithScore]()
        retriever = index_of(vectors, documents()).as_retriever(similarity_top_k=10)
        tool = RetrieverTool.from_defaults(retriever, [post], name="search", description="Searches.")

        async def run() -> None:
            agent = ReActAgent(tools=[tool], llm=Searching(), system_prompt="Look for laws.", streaming=False)
            handler = agent.run(QUERY)
            async for event in handler.stream_events():
                if isinstance(event, ToolCallResult):
                    seen.extend(event.tool_output.raw_output)
            assert str(await handler) == "Nile."

        asyncio.run(run())
        engine, words = vectors.parts.get()[0], f"input is {QUERY}"  # the tool's wording, less its line ends
        texts = [n.node.get_content(metadata_mode=MetadataMode.EMBED) for n in seen]
        truth = engine.rank(words, texts, instructions=Instructions(system="Look for laws."))
        assert [n.score for n in seen] == pytest.approx([r.probability for r in truth], abs=1e-5)

    def test_auto_without_an_engine_around_is_told(self, tiny: Reranker, caplog: pytest.LogCaptureFixture) -> None:
        """An evaluator of retrievers, say, has no prompt to follow; a warning once, then a line per query."""
        post = KaLMNodePostprocessor(reranker=tiny, instructions="auto")
        retriever = VectorStoreIndex(make_nodes(), embed_model=EMBEDDING).as_retriever()
        evaluator = RetrieverEvaluator.from_metric_names(["mrr"], retriever=retriever, node_postprocessors=[post])
        with caplog.at_level("INFO", "kalm_rag.llama_index"):
            for _ in range(2):
                evaluator.evaluate(QUERY, ["n0"])
        told = [r.levelname for r in caplog.records if "found no query or chat engine" in r.getMessage()]
        assert told == ["WARNING", "INFO"]

    def test_the_llms_own_system_text_is_read(self, vectors: KaLMChromaVectorStore) -> None:
        """LlamaIndex puts ``llm.system_prompt`` before whatever an engine asks; it steered the LLM only."""
        llm = MockLLM(max_tokens=4, system_prompt="You are a {maritime} lawyer.")
        index = index_of(vectors, documents())
        prompt = PromptTemplate("Find laws.\n{context_str}\n{query_str}")
        query = index.as_query_engine(llm=llm, text_qa_template=prompt)
        assert Instructions.from_prompt(query) == Instructions(system=llm.system_prompt, task="Find laws.")
        chat = index.as_chat_engine(chat_mode="context", llm=llm, system_prompt="Be brief.")
        assert (Instructions.from_prompt(chat).system or "").startswith("You are a {maritime} lawyer.\nBe brief.")

    def test_auto_follows_a_chat_engine(self, vectors: KaLMChromaVectorStore) -> None:
        engine = vectors.parts.get()[0]
        post = vectors.as_postprocessor(instructions="auto", top_n=None)
        chat = index_of(vectors, documents()).as_chat_engine(
            chat_mode="context",
            llm=MockLLM(max_tokens=4),
            system_prompt="Only trust geographers.",
            node_postprocessors=[post],
            similarity_top_k=10,
        )
        nodes = chat.chat(QUERY).source_nodes
        wanted = Instructions.from_prompt(chat)
        assert wanted.system is not None
        assert "Only trust geographers." in wanted.system
        same(got(nodes), expected(engine, nodes, wanted))

    def test_follow_reads_the_prompt_at_each_query(self, vectors: KaLMChromaVectorStore) -> None:
        engine = vectors.parts.get()[0]
        post = vectors.as_postprocessor(top_n=None)
        app = engine_of(index_of(vectors, documents()), post)
        assert post.follow(app) is post
        for task in ("Find laws.", "Find jokes."):
            prompt = PromptTemplate(f"{task}\n{{context_str}}\n{{query_str}}")
            app.update_prompts({"response_synthesizer:text_qa_template": prompt})
            assert post.preview(QUERY) == engine.preview(QUERY, Instructions(task=task))
        with pytest.raises(InputError, match="prompt is int"):
            post.follow(3)

    def test_override_holds_for_one_thread_or_task_only(self, tiny: Reranker) -> None:
        post = KaLMNodePostprocessor(reranker=tiny, top_n=None)
        nodes = scored()
        plain, law = expected(tiny, nodes), expected(tiny, nodes, LAW)
        with post.use("Find statutes only."):
            same(got(post.postprocess_nodes(nodes, query_str=QUERY)), law)
            same(got(asyncio.run(post.apostprocess_nodes(nodes, query_str=QUERY))), law)
            with ThreadPoolExecutor(1) as pool:
                same(got(pool.submit(post.postprocess_nodes, nodes, None, QUERY).result()), plain)
            other = KaLMNodePostprocessor(reranker=tiny, top_n=None)
            same(got(other.postprocess_nodes(nodes, query_str=QUERY)), plain)
            with post.use(None):
                same(got(post.postprocess_nodes(nodes, query_str=QUERY)), plain)
        same(got(post.postprocess_nodes(nodes, query_str=QUERY)), plain)

        async def ask(task: str) -> dict[str, Any]:
            with post.use(task):
                await asyncio.sleep(0)
                return got(await post.apostprocess_nodes(nodes, query_str=QUERY))

        async def both() -> list[dict[str, Any]]:
            return await asyncio.gather(ask("Find statutes only."), ask("Find jokes."), ask("Find statutes only."))

        first, joke, again = asyncio.run(both())
        same(first, law)
        same(joke, expected(tiny, nodes, Instructions(task="Find jokes.")))
        same(again, law)


def test_auto_without_a_prompt_takes_the_defaults(vectors: KaLMChromaVectorStore) -> None:
    """A retriever tool, or an engine that only retrieves, has nothing to follow."""
    vectors.add(make_nodes())
    index = VectorStoreIndex.from_vector_store(vectors, embed_model=EMBEDDING)
    follower = vectors.as_postprocessor(top_n=2, instructions="auto")
    plain = vectors.as_postprocessor(top_n=2).postprocess_nodes(index.as_retriever().retrieve(QUERY), query_str=QUERY)
    engine = RetrieverQueryEngine(index.as_retriever(), NoText(llm=MockLLM()), node_postprocessors=[follower])
    answer = engine.query(QUERY)
    assert [n.score for n in answer.source_nodes] == [n.score for n in plain]
    tool = RetrieverTool.from_defaults(index.as_retriever(), node_postprocessors=[follower])
    assert len(tool.call(QUERY).raw_output) == 2  # the tool words the query in its own way


def test_instructions_may_be_assigned_as_a_task(vectors: KaLMChromaVectorStore) -> None:
    assigned = vectors.as_postprocessor()
    assigned.instructions = "Find rivers."  # type: ignore[assignment]
    given = vectors.as_postprocessor(instructions="Find rivers.")
    assert assigned.postprocess_nodes(scored(), query_str=QUERY) == given.postprocess_nodes(scored(), query_str=QUERY)


def qa(task: str) -> PromptTemplate:
    return PromptTemplate(task + "\n\nContext:\n{context_str}\n\nQuestion: {query_str}")


class Asking(CustomQueryEngine):
    """An engine whose own prompt is `prompt`, and which calls `work` in its answer."""

    prompt: PromptTemplate
    work: Callable[[], Awaitable[str]]

    def custom_query(self, query_str: str) -> str:
        return asyncio.run(self.acustom_query(query_str))

    async def acustom_query(self, query_str: str) -> str:
        return await self.work()


class Asks(Workflow):
    def __init__(self, prompt: PromptTemplate, work: Callable[[], Awaitable[str]]) -> None:
        super().__init__(timeout=60)
        self.prompt, self.work = prompt, work

    @step
    async def answer(self, ev: StartEvent) -> StopEvent:
        return StopEvent(result=await self.work())


async def in_create_task(work: Callable[[], Awaitable[str]]) -> str:
    return await asyncio.create_task(work())  # type: ignore[arg-type]


async def in_to_thread(work: Callable[[], Awaitable[str]]) -> str:
    return await asyncio.to_thread(lambda: asyncio.run(work()))  # type: ignore[arg-type]


async def in_gather(work: Callable[[], Awaitable[str]]) -> str:
    first, second = await asyncio.gather(work(), work())
    assert first == second
    return first


async def in_an_executor(work: Callable[[], Awaitable[str]]) -> str:
    run = contextvars.copy_context().run
    return await asyncio.get_running_loop().run_in_executor(None, run, lambda: asyncio.run(work()))  # type: ignore[arg-type]


class TestWhatRunsElsewhere:
    """A rerank in a task or thread of its own has no engine on its call stack: the defaults held."""

    @pytest.fixture
    def heard(self, tiny: Reranker) -> Callable[[], Awaitable[str]]:
        post = KaLMNodePostprocessor(reranker=tiny, instructions="auto")

        async def preview() -> str:
            await asyncio.sleep(0)
            return post.preview(QUERY)

        return preview

    @pytest.mark.parametrize("through", [in_create_task, in_to_thread, in_gather, in_an_executor])
    @pytest.mark.parametrize("kind", ["engine", "engine, sync", "workflow", "agent"])
    def test_auto_is_heard(
        self, tiny: Reranker, heard: Callable[[], Awaitable[str]], through: Callable[..., Awaitable[str]], kind: str
    ) -> None:
        async def work() -> str:
            return await through(heard)

        async def ask() -> str:
            if kind == "workflow":
                return str(await Asks(qa("Find laws."), work).run())
            return str(await Asking(prompt=qa("Find laws."), work=work).aquery(QUERY))

        if kind == "agent":
            if not hasattr(function_tool, "contextvars"):
                pytest.skip("this LlamaIndex runs plain function tools without their context")
            got = self.agents(work)
        else:
            got = str(Asking(prompt=qa("Find laws."), work=work).query(QUERY)) if "sync" in kind else asyncio.run(ask())
        wanted = Instructions(system="Find laws.") if kind == "agent" else LAWS
        assert got == tiny.preview(QUERY, wanted)
        assert asyncio.run(heard()) == tiny.preview(QUERY), "nobody is around any more"

    def agents(self, work: Callable[[], Awaitable[str]]) -> str:
        """What a plain function tool, which agents run in a thread, hears."""

        class Searching(MockLLM):
            def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
                done = "Observation:" in prompt.split(QUERY)[-1]
                call = 'Thought: I look.\nAction: search\nAction Input: {"question": "Nile"}'
                return CompletionResponse(text="Thought: I know.\nAnswer: Nile." if done else call)

        got: list[str] = []

        def search(question: str) -> str:
            """Search."""
            got.append(asyncio.run(work()))  # type: ignore[arg-type]
            return "found"

        async def run() -> None:
            tools = [FunctionTool.from_defaults(search, name="search")]
            await ReActAgent(tools=tools, llm=Searching(), system_prompt="Find laws.", streaming=False).run(QUERY)

        asyncio.run(run())
        return got[0]

    def test_the_innermost_wins_and_nothing_leaks(self, tiny: Reranker, heard: Callable[[], Awaitable[str]]) -> None:
        async def inside() -> str:
            return await in_gather(heard)

        async def nested(task: str) -> tuple[str, str, str]:
            """Before, in and after an engine within an engine, each in a task of its own."""
            seen: list[str] = []

            async def outer() -> str:
                seen.append(await in_create_task(heard))
                inner: Any = Asks(qa(f"{task} of the inner"), inside).run()
                seen.append(await in_create_task(heard))  # while it runs: its caller isn't inside
                seen.append(str(await inner))
                seen.append(await in_to_thread(heard))
                return ""

            await Asking(prompt=qa(task), work=outer).aquery(QUERY)
            assert seen[0] == seen[1] == seen[3]
            return seen[0], seen[2], await in_create_task(heard)

        async def together() -> list[tuple[str, str, str]]:
            return await asyncio.gather(*(nested(f"Find {n}") for n in range(8)))

        for n, (before, within, after) in enumerate(asyncio.run(together())):
            assert before == tiny.preview(QUERY, Instructions(task=f"Find {n}"))
            assert within == tiny.preview(QUERY, Instructions(task=f"Find {n} of the inner"))
            assert after == tiny.preview(QUERY)

    def test_a_task_that_outlives_its_engine_follows_it_no_more(
        self, tiny: Reranker, heard: Callable[[], Awaitable[str]]
    ) -> None:
        async def main() -> str:
            over, left = asyncio.Event(), list[asyncio.Task[str]]()

            async def late() -> str:
                await over.wait()
                return await heard()

            async def work() -> str:
                left.append(asyncio.create_task(late()))
                raise RuntimeError("it fails")

            with pytest.raises(RuntimeError, match="it fails"):
                await Asking(prompt=qa("Find laws."), work=work).aquery(QUERY)
            over.set()
            return await left[0]

        assert asyncio.run(main()) == tiny.preview(QUERY)

    def test_a_loop_in_an_engine_has_engines_of_its_own(
        self, tiny: Reranker, heard: Callable[[], Awaitable[str]]
    ) -> None:
        """The call stack shows who started the event loop; its tasks' engines are further in."""

        async def inner() -> str:
            return str(await Asking(prompt=qa("Find poems."), work=lambda: in_create_task(heard)).aquery(QUERY))

        got = Asking(prompt=qa("Find laws."), work=inner).query(QUERY)
        assert str(got) == tiny.preview(QUERY, Instructions(task="Find poems."))
