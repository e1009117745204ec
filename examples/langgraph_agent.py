"""LangGraph: an agent searches, sees by P(yes) that nothing fits, asks otherwise, and answers. Offline, in seconds.

What the caller is after travels in the run's config, not in the agent's words.
    pip install 'kalm-rag[pico,langchain]' langgraph && python langgraph_agent.py
"""

from __future__ import annotations

from typing import Any

from langchain_core.language_models import GenericFakeChatModel
from langchain_core.messages import AIMessage, HumanMessage
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import create_retriever_tool
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition

from kalm_rag.langchain import KaLMChroma, KaLMRetriever

PASSAGES = {
    "cluster": "In winter the bees form a cluster around the queen and warm it by moving their flight muscles.",
    "lifetime": "Winter bees live for six months, summer bees for six weeks.",
    "bumblebee": "Bumblebees can fly at lower temperatures than honey bees because they shiver to warm up.",
}
ASKED = ("price of a heating system", "how do bees keep each other warm in winter?")


def main() -> None:
    """Build the graph, run it, show what each search gave."""
    store = KaLMChroma("agent-example")
    store.add_texts(list(PASSAGES.values()), ids=list(PASSAGES))
    retriever = KaLMRetriever(vectorstore=store, keep_retrieval_score=True)
    search = create_retriever_tool(retriever, "search", "Facts on bees.", response_format="content_and_artifact")
    calls = [AIMessage("", tool_calls=[{"name": "search", "args": {"query": q}, "id": q}]) for q in ASKED]
    model = GenericFakeChatModel(messages=iter([*calls, AIMessage("They huddle around the queen and shiver.")]))
    # a real one: model = ChatOpenAI(model="gpt-4o-mini").bind_tools([search])

    def think(state: MessagesState) -> dict[str, Any]:
        return {"messages": [model.invoke(state["messages"])]}

    def found_something(state: MessagesState) -> bool:
        return any(document.metadata["relevance_score"] > 0.5 for document in state["messages"][-1].artifact)

    def retry(state: MessagesState) -> dict[str, Any]:
        return {"messages": [HumanMessage("Nothing fits. Search with other words.")]}

    graph = StateGraph(MessagesState).add_node(think).add_node(retry).add_node("tools", ToolNode([search]))
    graph.add_edge(START, "think").add_conditional_edges("think", tools_condition, ["tools", END])
    graph.add_conditional_edges("tools", found_something, {True: "think", False: "retry"}).add_edge("retry", "think")
    config: RunnableConfig = {"configurable": {"kalm_instructions": "Find how something works.", "kalm_top_n": 2}}
    for message in graph.compile().invoke({"messages": [HumanMessage("Why don't bees freeze?")]}, config)["messages"]:
        print(f"{message.type}: {getattr(message, 'tool_calls', None) or message.content}")
        for place, found in enumerate(getattr(message, "artifact", None) or [], start=1):
            was, score = found.metadata["retrieval_rank"], found.metadata["relevance_score"]
            arrow = "↑" if place < was else "↓" if place > was else "="
            print(f"  {place} {arrow} (was {was}) {score:.3f} {found.id}")


if __name__ == "__main__":
    main()
