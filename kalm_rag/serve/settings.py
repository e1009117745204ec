"""How a server is run: what it serves, where it listens, what it refuses. Plain data, which workers get as JSON."""

from __future__ import annotations

import ipaddress
import json
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from kalm_rag.checks import check_count
from kalm_rag.errors import InputError

KEY_VARIABLE = "KALM_RAG_API_KEY"
"""The environment variable that holds the API key. It is in no setting, so that it is never written down."""


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """What a server serves and what it refuses.

    Attributes:
        db: Folder of the Chroma database; None, without `chroma`, serves reranking of texts alone.
        chroma: URL of a Chroma server, such as ``http://localhost:8000``, in place of `db`.
        collection: The collection that is searched, whose ids can be ranked, and which is written to.
        create: Whether an absent collection is made.
        model: What `Reranker.from_pretrained` takes; None takes the collection's, or pico.
        embedder: What makes the vectors; None takes the bundled one.
        device: ``cpu``, ``cuda``; None takes CUDA where there is one.
        host: Where it listens.
        insecure: Whether it may listen beyond this machine, and to any name, without an API key.
        threads: Requests worked on at a time.
        queue: Most requests worked on and waiting; those above are refused with 429.
        timeout: Most seconds of a request, waiting included; then it is answered with 504.
        max_body_bytes: Longest body of a request.
        max_documents: Most documents ranked at once, and most candidates of a search.
        max_passages: Most passages written, or ids deleted, at once.
        max_characters: Longest text.
        warmup: Whether a question is ranked before the server says that it is ready.

    Raises:
        InputError: If a number is out of range, or arguments don't go together.
    """

    db: str | None = None
    chroma: str | None = None
    collection: str = "passages"
    create: bool = False
    model: str | None = None
    embedder: str | None = None
    device: str | None = None
    host: str = "127.0.0.1"
    insecure: bool = False
    threads: int = 8
    queue: int = 64
    timeout: float = 30.0
    max_body_bytes: int = 8 * 2**20
    max_documents: int = 1000
    max_passages: int = 256
    max_characters: int = 100_000
    warmup: bool = False

    def __post_init__(self) -> None:
        for name in ("threads", "queue", "max_body_bytes", "max_documents", "max_passages", "max_characters"):
            check_count(getattr(self, name), name)
        if not 0.0 < self.timeout < float("inf"):
            raise InputError(f"timeout is {self.timeout!r}; wanted seconds above 0.")
        if self.db is not None and self.chroma is not None:
            raise InputError("db and chroma were both given; wanted one database.")
        if self.chroma is not None:
            self.chroma_address()

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:  # a name, which may be anywhere
            return False

    def check_exposure(self, key: str | None) -> None:
        """Refuse to listen beyond this machine to whoever comes.

        Raises:
            InputError: If there is no API key, `host` is no loopback address, and `insecure` was not said.
        """
        if key is None and not self.local and not self.insecure:
            raise InputError(
                f"host is {self.host!r}, which others can reach, and there is no API key. Set {KEY_VARIABLE}, listen "
                f"on 127.0.0.1, or say --insecure."
            )

    def chroma_address(self) -> tuple[str, int, bool]:
        """Host, port and whether it speaks HTTPS, of the Chroma server.

        Raises:
            InputError: If `chroma` is no such URL.
        """
        try:
            url = urlsplit(self.chroma or "")
            secure = url.scheme == "https"
            port = url.port if url.port is not None else 443 if secure else 8000
        except ValueError as err:
            raise InputError(f"chroma is {self.chroma!r}, which is no URL ({err}).") from err
        if url.scheme not in ("http", "https") or not url.hostname:
            raise InputError(f"chroma is {self.chroma!r}; wanted a URL such as http://localhost:8000.")
        return url.hostname, port, secure

    def to_json(self) -> str:
        """Write them down, for a worker."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ServeSettings:
        """Read what `to_json` wrote."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**fields)
