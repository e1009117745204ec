"""pico, the bundled model: a frozen public encoder and a small decoder of ours."""

from __future__ import annotations
