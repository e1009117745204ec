"""The command line. `kalm-rag` runs `app`."""

from __future__ import annotations

from kalm_rag.cli.app import app

__all__ = ["app"]
