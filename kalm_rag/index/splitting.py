"""Texts to passages that a model reads whole. Splitting is left to langchain-text-splitters (extra ``files``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kalm_rag.errors import require

CHUNK_CHARACTERS = 700
"""Most characters per passage: 150 to 250 tokens of prose. One passage in twenty of documentation, one in seven of code
has more than the 256 that pico reads at once; `fit_passages` cuts finer what a model doesn't read whole."""
OVERLAP_CHARACTERS = 80
RULES = f"v2 {CHUNK_CHARACTERS} {OVERLAP_CHARACTERS}"
"""Part of a document's digest, so that other splitting rules split again."""

_ENDS = ["\n\n", "\n", ". ", "。", "！", "？", " "]
"""Where a text is cut, the best first."""
_LEAST = 64
"""Characters that are not cut finer, however many tokens they have."""

Piece = tuple[int, str]
"""Start in the text (characters) and passage."""


def split_text(text: str, size: int = CHUNK_CHARACTERS, overlap: int = OVERLAP_CHARACTERS) -> list[Piece]:
    """Cut a text into passages at paragraph, line, sentence or word ends, whichever comes first.

    A passage has at most `size` characters and repeats at most `overlap` of the one before it.

    Raises:
        MissingDependencyError: If the splitter is not installed.
    """
    splitter = require("langchain_text_splitters", "files", "splitting documents").RecursiveCharacterTextSplitter(
        chunk_size=size,
        chunk_overlap=min(overlap, size // 4),
        separators=_ENDS,
        keep_separator="end",
        add_start_index=True,
    )
    pieces: list[Piece] = []
    for found in splitter.create_documents([text]):
        start, piece = int(found.metadata["start_index"]), str(found.page_content)
        # A run without any space, which the splitter would take apart character by character
        pieces += [(start + at, piece[at : at + size]) for at in range(0, len(piece), size)]
    return pieces


def fit_passages(pieces: Sequence[Piece], read: Callable[[Sequence[str]], Sequence[tuple[int, int]]]) -> list[Piece]:
    """Cut passages that are longer than the model reads again, finer, until it reads all of each.

    `read` gives, for each passage, the tokens that the model would read of it and those it has.
    """
    fitting: list[Piece] = []
    for (start, text), (tokens, total) in zip(pieces, read([text for _, text in pieces]), strict=True):
        if tokens >= total or len(text) <= _LEAST:
            fitting.append((start, text))
        else:
            finer = split_text(text, max(_LEAST, int(0.9 * len(text) * tokens / total)))
            fitting += fit_passages([(start + at, piece) for at, piece in finer], read)
    return fitting
