"""A LlamaIndex query engine whose reranker reads the states that indexing kept, and follows the app's own prompt.

Runs offline in a few seconds: the bundled model, Python's own language reference as documents, a mock LLM.
    pip install 'kalm-rag[pico,llama-index]' && python llamaindex_query_engine.py
"""

from __future__ import annotations

import tempfile
from pydoc_data.topics import topics

from llama_index.core import Document, PromptTemplate, StorageContext, VectorStoreIndex
from llama_index.core.llms import MockLLM
from llama_index.core.node_parser import SentenceSplitter

from kalm_rag.llama_index import KaLMChromaVectorStore

QUESTION = "How do I run cleanup code even when an exception is raised?"
PROMPT = PromptTemplate(
    "Explain statements of the language with their syntax.\n\nContext:\n{context_str}\n\nQuestion: {query_str}\nAnswer:"
)


def main() -> None:
    """Index, ask, show how the ranking moved."""
    names = ("try", "with", "raise", "exceptions", "return", "del", "context-managers", "break")
    documents = [Document(text=topics[name], metadata={"topic": name}) for name in names]

    # Index: each passage is encoded once; its vector goes to Chroma, its states into SQLite in the same folder.
    folder = tempfile.mkdtemp()
    vector_store = KaLMChromaVectorStore.from_params("reference", persist_dir=folder)
    index = VectorStoreIndex.from_documents(
        documents,
        storage_context=StorageContext.from_defaults(vector_store=vector_store),
        transformations=[SentenceSplitter(chunk_size=160, chunk_overlap=0)],
        embed_model=vector_store.as_embedding(),
    )
    print(f"{vector_store.verify().records} passages with their states in {folder}")

    # Query: 20 candidates by vector, the decoder alone over their states, the best 5.
    llm = MockLLM(max_tokens=16)  # a real one: from llama_index.llms.openai import OpenAI; llm = OpenAI()
    reranker = vector_store.as_postprocessor(top_n=5, instructions="auto", keep_retrieval_score=True)
    app = index.as_query_engine(llm=llm, similarity_top_k=20, node_postprocessors=[reranker], text_qa_template=PROMPT)
    response = app.query(QUESTION)

    before = [node.node_id for node in index.as_retriever(similarity_top_k=20).retrieve(QUESTION)]
    print(f"\n{QUESTION}\n{'P(yes)':>6}  {'move':<5} topic             passage")
    for now, node in enumerate(response.source_nodes):
        up = before.index(node.node_id) - now
        move = f"↑{up}" if up > 0 else f"↓{-up}" if up < 0 else "="
        text = " ".join(node.text.split())
        print(f"{node.score:6.3f}  {move:<5} {node.metadata['topic']:<17} {text:.70}")
    print(f"\nWhat the decoder reads:\n{reranker.follow(app).preview(QUESTION)}")


if __name__ == "__main__":
    main()
