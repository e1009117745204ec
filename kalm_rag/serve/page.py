"""The page at ``/``: one file that fetches nothing from elsewhere, and headers that hold it to that.

Its script and style are allowed by their hashes; nothing else runs, whatever text a passage holds.
"""

from __future__ import annotations

import base64
import hashlib
import re
from functools import lru_cache
from importlib.resources import files

from fastapi.responses import Response

_INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def page_response() -> Response:
    """The page, which is the same for everybody: it holds no key and no passage."""
    text, policy = _read()
    headers = {
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
        "cache-control": "no-cache",
    }
    return Response(text, media_type="text/html; charset=utf-8", headers=headers)


def content_policy(text: str) -> str:
    """The Content-Security-Policy of a page: its own script, style and server, and nothing else.

    Example:
        >>> content_policy("<style>p {}</style><script>go()</script>").split("; ")[2]
        "style-src 'sha256-SNJDlN1Iy2mnt7DOjQIyDb2LQE6O5PQiSZomcdzawQ4='"
    """
    sources = {kind: _hash(body) for kind, body in _INLINE.findall(text)}
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; connect-src 'self'; "
        f"img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        f"require-trusted-types-for 'script'"
    )


@lru_cache(maxsize=1)
def _read() -> tuple[str, str]:
    text = files("kalm_rag.serve").joinpath("page.html").read_text(encoding="utf-8")
    return text, content_policy(text)


def _hash(body: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"
