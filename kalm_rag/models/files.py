"""A model folder's files as untrusted data: JSON and digests, every failure a `ModelError` that names the file.

Knows no model. Nothing here runs what a file holds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from kalm_rag.errors import MissingDependencyError, ModelError

_SHOWN = 400
"""Most characters of a library's own message that are repeated."""


@contextmanager
def blaming(path: Path, advice: str) -> Iterator[None]:
    """Turn whatever a library raises over a file's content into one error that names the file.

    Args:
        path: The file (or folder) whose content is read inside the block.
        advice: What to do about it, a sentence.

    Raises:
        ModelError: For any exception, but for a lack of memory or of a package, which are no fault of the file.
    """
    try:
        yield
    except (ModelError, MissingDependencyError, MemoryError):
        raise
    except Exception as err:  # transformers, tokenizers and safetensors raise many kinds on files that lie
        raise ModelError(f"{path} can't be used ({type(err).__name__}: {str(err)[:_SHOWN]}). {advice}") from err


def read_object(path: Path, advice: str) -> dict[str, Any]:
    """Read a JSON file that holds one object.

    Args:
        path: The file.
        advice: What to do if it can't be read, a sentence.

    Raises:
        ModelError: If it is missing, unreadable, no JSON, or JSON of something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError as err:
        raise ModelError(f"{path.parent} has no readable {path.name}: there is no such file. {advice}") from err
    except (OSError, ValueError, RecursionError) as err:
        kind = f"{type(err).__name__}: {str(err)[:_SHOWN]}"
        raise ModelError(f"{path.parent} has no readable {path.name} ({kind}). {advice}") from err
    if not isinstance(found, dict):
        raise ModelError(f"{path} holds {type(found).__name__}; wanted a JSON object. {advice}")
    return found


def digest_file(path: Path) -> str:
    """Sha256 of a file, hex; read once per process for as long as the file is not written again.

    Raises:
        ModelError: If it can't be read.
    """
    try:
        seen = path.stat()
        return _digest(path.resolve(), seen.st_ino, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns)
    except OSError as err:
        raise ModelError(f"{path} can't be read ({err}). Check that it is there and may be read.") from err


@lru_cache(1024)
def _digest(path: Path, *_written: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def digest_files(files: list[Path]) -> str:
    """Sha256 over the digests of files, in the order given, hex.

    Raises:
        ModelError: If one can't be read.
    """
    return hashlib.sha256("".join(map(digest_file, files)).encode()).hexdigest()
