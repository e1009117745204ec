"""The engine: passages in once, states out; queries in, relevances out."""

from __future__ import annotations
