"""One index, one question, three readers: instructions per request move the ranking; nothing is encoded again.

Runs offline in a few seconds. The three requests run at the same time on one reranker, as in a web service.
    pip install 'kalm-rag[pico,llama-index]' && python per_request_instructions.py
"""

from __future__ import annotations

import asyncio

import chromadb
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.llms import MockLLM

from kalm_rag import Instructions
from kalm_rag.llama_index import KaLMChromaVectorStore

QUESTION = "aspirin"
TEXTS = {
    "dose": "Adults take 300 to 900 mg of aspirin every four to six hours, and not more than 4 g a day.",
    "history": "Aspirin was first made by Felix Hoffmann at Bayer in 1897, and sold as a powder from 1899.",
    "chemistry": "Aspirin is acetylsalicylic acid, made of salicylic acid and acetic anhydride; it melts at 136 °C.",
    "risk": "Aspirin can cause stomach bleeding; children with a viral infection must not be given it.",
    "heart": "Low-dose aspirin after a heart attack lowers the risk of a second one, a large trial found.",
}
READERS = {
    "a chemist": Instructions(task="Find passages about chemical structure, synthesis and properties."),
    "a patient": Instructions(task="Find passages about dose, side effects and who must not take a medicine."),
    "a historian": Instructions(task="Find passages about who invented or sold something, and in which year."),
}


async def main() -> None:
    """Ask three times at once, each time under other instructions."""
    vector_store = KaLMChromaVectorStore(chromadb.EphemeralClient().create_collection("notes"))
    index = VectorStoreIndex.from_documents(
        [Document(id_=name, text=text) for name, text in TEXTS.items()],
        storage_context=StorageContext.from_defaults(vector_store=vector_store),
        embed_model=vector_store.as_embedding(),
    )
    reranker = vector_store.as_postprocessor(top_n=None, missing="raise")  # "raise": nothing may be encoded here
    llm = MockLLM(max_tokens=16)  # a real one: from llama_index.llms.openai import OpenAI; llm = OpenAI()
    app = index.as_query_engine(llm=llm, similarity_top_k=len(TEXTS), node_postprocessors=[reranker])

    async def ask(instructions: Instructions) -> list[str]:
        with reranker.use(instructions):  # holds for this request only
            response = await app.aquery(QUESTION)
        return [f"{node.node.ref_doc_id} {node.score:.2f}" for node in response.source_nodes]

    plain, *answers = await asyncio.gather(ask(Instructions()), *map(ask, READERS.values()))
    order = [entry.split()[0] for entry in plain]
    print(f"{QUESTION!r} for nobody in particular: {', '.join(plain)}")
    for reader, ranking in zip(READERS, answers, strict=True):
        ups = [order.index(entry.split()[0]) - now for now, entry in enumerate(ranking)]
        moves = [f"↑{up}" if up > 0 else f"↓{-up}" if up < 0 else "=" for up in ups]
        print(f"for {reader}: {', '.join(map(' '.join, zip(ranking, moves, strict=True)))}")


if __name__ == "__main__":
    asyncio.run(main())
