"""KaLM checkpoints: T5Gemma 2 by the published protocol, text path only."""

from __future__ import annotations
