"""LangChain: a two-phase retriever in an LCEL chain, steered by the chain's own prompt. Offline, in under a minute."""

from __future__ import annotations

from langchain_core.documents import Document
from langchain_core.language_models import FakeListChatModel
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.runnables import RunnablePassthrough

from kalm_rag.langchain import KaLMChroma, KaLMRetriever

PASSAGES = {
    "cluster": "In winter the bees form a cluster around the queen and warm it by moving their flight muscles.",
    "lifetime": "Winter bees live for six months, summer bees for six weeks.",
    "bumblebee": "Bumblebees can fly at lower temperatures than honey bees because they shiver to warm up.",
    "dance": "Worker bees do the waggle dance to tell the others how far away flowers are.",
    "smoke": "Beekeepers use smoke because it masks the alarm scent and makes the bees calm.",
    "honey": "Honey keeps for years: it holds too little water for bacteria to grow.",
}
PROMPT = ChatPromptTemplate(
    [
        ("system", "You teach biology. Explain how animals behave.\n\n<context>\n{context}\n</context>"),
        ("human", "Find passages that explain how something works.\n\nQuestion: {question}\nAnswer:"),
    ]
)


def numbered(documents: list[Document]) -> str:
    """Documents as the prompt shows them."""
    return "\n".join(f"[{i}] {d.page_content}" for i, d in enumerate(documents, start=1))


def main() -> None:
    """Index, ask, show what moved."""
    store = KaLMChroma("lcel-example")  # persist_directory="db" keeps passages and their states
    store.add_texts(list(PASSAGES.values()), ids=list(PASSAGES))  # the same ids again replace, and don't double
    # The retriever reads its instructions out of the app's prompt: documents, question and labels are left out.
    retriever = KaLMRetriever(vectorstore=store, k=3, instructions=PROMPT, keep_retrieval_score=True)
    model = FakeListChatModel(responses=["They huddle around the queen and shiver [1]."])
    # model = ChatOpenAI(model="gpt-4o-mini")  # a real model: from langchain_openai import ChatOpenAI
    chain = {"context": retriever | numbered, "question": RunnablePassthrough()} | PROMPT | model | StrOutputParser()

    question = "How do bees keep each other warm?"
    print(f"system: {retriever.instructions.system}\ntask:   {retriever.instructions.task}\n")
    for place, document in enumerate(retriever.invoke(question), start=1):
        was, score = document.metadata["retrieval_rank"], document.metadata["relevance_score"]
        arrow = "↑" if place < was else "↓" if place > was else "="
        print(f"{place} {arrow} (was {was})  {score:.3f}  {document.page_content}")
    print(f"\n{chain.invoke(question)}")


if __name__ == "__main__":
    main()
