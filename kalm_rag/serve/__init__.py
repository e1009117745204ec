"""The HTTP door: rerank, search and passages, in the shapes that clients of Cohere, Jina, vLLM and TEI speak already.

`Door` does what is asked and knows no HTTP (an MCP door, or a page, goes through it too); `make_app` speaks HTTP.
"""

from __future__ import annotations
