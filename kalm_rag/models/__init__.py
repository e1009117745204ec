"""The two families of models behind one protocol, and the names they go by."""

from __future__ import annotations
