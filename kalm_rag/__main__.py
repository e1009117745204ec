"""``python -m kalm_rag``: the command line where its script is not on the path."""

from __future__ import annotations

from kalm_rag.cli import app

if __name__ == "__main__":
    app(prog_name="kalm-rag")
