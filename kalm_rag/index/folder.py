"""Files and other texts to passages of an index: reads, splits, and brings a collection up to what is there now.

Splitting and reading are left to well-kept libraries (langchain-text-splitters, BeautifulSoup, pypdf; extra ``files``).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from kalm_rag.errors import InputError, MissingDependencyError
from kalm_rag.index import ChromaIndex
from kalm_rag.index.collection import PAGE
from kalm_rag.index.results import AddReport
from kalm_rag.index.upkeep import BATCH

logger = logging.getLogger(__name__)

CHUNK_CHARACTERS = 700
"""Most characters a passage: 150 to 250 tokens, so that even code stays under pico's limit of 256."""
OVERLAP_CHARACTERS = 80
SUFFIXES = (".txt", ".md", ".rst", ".html", ".htm", ".pdf")
_RULES = f"v1 {CHUNK_CHARACTERS} {OVERLAP_CHARACTERS}"
"""Part of a source's digest, so that other splitting rules split again."""


@dataclass(frozen=True)
class Source:
    """One document: where it comes from, what it holds, how to get its text.

    Attributes:
        name: Name in the index, distinct; passages get the ids ``name#0``, ``name#1``, ...
        digest: Changes whenever the content does.
        load: Gives the text; called only if the digest is new.
    """

    name: str
    digest: str
    load: Callable[[], str]


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What bringing an index up to date did.

    Attributes:
        sources: Documents there are now.
        changed: Of them, new or changed ones, by name.
        removed: Documents that were indexed and are gone, by name.
        unreadable: Name to reason; what was indexed of them before stays.
        deleted: Records deleted.
        added: What writing the passages did.
    """

    sources: int
    changed: list[str]
    removed: list[str]
    unreadable: dict[str, str]
    deleted: int
    added: AddReport


@dataclass
class _Known:
    """What the collection holds of one source."""

    digest: str = ""
    chunks: int = -1
    ids: set[str] = field(default_factory=set)


def folder_sources(folder: Path) -> list[Source]:
    """List the documents of a folder (see `SUFFIXES`), sorted, named ``<folder>/<path below it>``.

    Hidden files and folders are left out.

    Raises:
        InputError: If it is no folder, or holds no document.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; wanted one with {', '.join(SUFFIXES)} files.")
    root = folder.resolve()
    paths = sorted(
        path
        for path in root.rglob("*")
        if path.suffix.lower() in SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    if not paths:
        raise InputError(f"{folder} holds no document; wanted {', '.join(SUFFIXES)} files in it or below.")
    return [
        Source(
            name=f"{root.name}/{path.relative_to(root).as_posix()}",
            digest=text_digest(path.read_bytes()),
            load=partial(read_file, path),
        )
        for path in paths
    ]


def text_digest(content: bytes) -> str:
    """Digest of a document's content and of the rules it is split by."""
    return hashlib.sha256(_RULES.encode() + b"\0" + content).hexdigest()[:24]


def read_file(path: Path) -> str:
    """Read the text of a document.

    Raises:
        MissingDependencyError: If HTML or PDF readers are not installed.
        InputError: If the file can't be read as what its name says.
    """
    suffix = path.suffix.lower()
    try:
        if suffix in (".html", ".htm"):
            soup = _extra("bs4").BeautifulSoup(path.read_bytes(), "html.parser")
            for tag in soup(["script", "style", "nav"]):
                tag.decompose()
            text = soup.get_text("\n", strip=True)
        elif suffix == ".pdf":
            text = "\n\n".join(page.extract_text() for page in _extra("pypdf").PdfReader(path).pages)
        else:
            text = path.read_bytes().decode("utf-8-sig", errors="replace")
    except MissingDependencyError:
        raise
    except Exception as err:  # parsers raise errors of many kinds for broken files
        raise InputError(f"{path.name} can't be read as {suffix}: {err}") from err
    return str(text).encode("utf-8", errors="replace").decode()  # PDFs can hold lone surrogates


def split_text(text: str) -> list[tuple[int, str]]:
    """Cut a text into passages at paragraph, line, sentence or word ends, whichever comes first.

    Returns:
        Pairs of start (characters) and passage, in order.

    Raises:
        MissingDependencyError: If the splitter is not installed.
    """
    splitter = _extra("langchain_text_splitters").RecursiveCharacterTextSplitter(
        chunk_size=CHUNK_CHARACTERS,
        chunk_overlap=OVERLAP_CHARACTERS,
        separators=["\n\n", "\n", ". ", " ", ""],
        add_start_index=True,
    )
    return [(int(d.metadata["start_index"]), str(d.page_content)) for d in splitter.create_documents([text])]


def sync(
    index: ChromaIndex,
    sources: Sequence[Source],
    *,
    scope: str,
    origin: str = "",
    progress: Callable[[Iterable[Source]], Iterable[Source]] = lambda items: items,
) -> SyncReport:
    """Bring a collection up to the documents there are: write what is new or changed, delete what is gone.

    A document is finished in one go or done again next time; unchanged passages of a changed document are left
    alone, and a passage whose text was seen before is not encoded again.

    Args:
        index: Where to write.
        sources: All documents of the scope.
        scope: Prefix of the names that these documents own; what the index has under it beyond them is deleted.
        origin: Where the documents lie, e.g. the folder's full path; noted with each passage. Another origin under
            the same scope is refused as long as it exists, so that two folders of one name can't delete each other's
            passages; a folder that was moved is adopted.
        progress: Wraps the iteration over documents, for a progress bar.

    Raises:
        InputError: If a name is outside the scope, or the scope belongs to another origin.
        StoreError: If states can't be written. What was finished before stays.
    """
    outside = [s.name for s in sources if not s.name.startswith(scope)]
    if outside:
        raise InputError(f"document {outside[0]!r} is outside the scope {scope!r}.")
    known = _known(index, scope, origin)
    changed: list[str] = []
    unreadable: dict[str, str] = {}
    added, deleted = AddReport(), 0
    batch: list[tuple[str, str, dict[str, Any]]] = []
    stale: list[str] = []
    for source in progress(sources):
        old = known.pop(source.name, _Known())
        if old.digest == source.digest and old.chunks == len(old.ids):
            continue
        try:
            records = list(_records(source, origin))
        except InputError as err:
            unreadable[source.name] = str(err)
            continue
        if records or old.ids:  # an empty document leaves nothing to remember it by
            changed.append(source.name)
        batch += records
        stale += old.ids - {i for i, _, _ in records}
        if len(batch) >= BATCH:
            added, deleted = added + _flush(index, batch), deleted + index.delete(stale)
            batch, stale = [], []
    added, deleted = added + _flush(index, batch), deleted + index.delete(stale)
    removed = sorted(known)
    deleted += index.delete([i for name in removed for i in sorted(known[name].ids)])
    return SyncReport(
        sources=len(sources), changed=changed, removed=removed, unreadable=unreadable, deleted=deleted, added=added
    )


def _known(index: ChromaIndex, scope: str, origin: str) -> dict[str, _Known]:
    """What the collection holds under a scope, by document."""
    known: dict[str, _Known] = {}
    offset = 0
    while ids := (page := index.collection.get(limit=PAGE, offset=offset, include=["metadatas"]))["ids"]:
        for i, meta in zip(ids, page["metadatas"], strict=True):
            source = str((meta or {}).get("source", ""))
            if source.startswith(scope) and meta is not None and "digest" in meta:
                _check_origin(str(meta.get("origin", "")), origin, scope)
                entry = known.setdefault(source, _Known(str(meta["digest"]), int(meta["chunks"])))
                if entry.digest != meta["digest"]:
                    entry.digest = ""  # a change was cut off half-way: do it again
                entry.ids.add(i)
        offset += len(ids)
    return known


def _check_origin(found: str, wanted: str, scope: str) -> None:
    if found and found != wanted and Path(found).exists():
        raise InputError(
            f"this collection holds {scope} from {found}; now {wanted} was given. Index it under another collection "
            f"name, or rename the folder."
        )


def _records(source: Source, origin: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    pieces = split_text(source.load())
    for number, (start, text) in enumerate(pieces):
        meta: dict[str, Any] = {"source": source.name, "start": start, "chunk": number, "chunks": len(pieces)}
        yield f"{source.name}#{number}", text, {**meta, "digest": source.digest, "origin": origin}


def _flush(index: ChromaIndex, batch: Sequence[tuple[str, str, dict[str, Any]]]) -> AddReport:
    return index.upsert([i for i, _, _ in batch], [t for _, t, _ in batch], [m for _, _, m in batch])


def _extra(module: str) -> Any:  # noqa: ANN401 - a module
    try:
        return import_module(module)
    except ImportError as err:
        raise MissingDependencyError(
            f"{module} is not installed; reading and splitting documents needs it. Run: pip install 'kalm-rag[files]'"
        ) from err
