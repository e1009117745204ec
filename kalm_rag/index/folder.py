"""Documents to records of an index: lists a folder, and brings a collection up to what is there now."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kalm_rag.errors import InputError
from kalm_rag.index import ChromaIndex
from kalm_rag.index.collection import pages
from kalm_rag.index.readers import SUFFIXES, DocumentText, read_bytes, read_file
from kalm_rag.index.results import AddReport
from kalm_rag.index.splitting import RULES, fit_passages, split_text
from kalm_rag.index.writer import BATCH

Record = tuple[str, str, dict[str, Any]]
"""Id, text and metadata of a passage."""


@dataclass(frozen=True)
class Document:
    """One document: its name, what it holds, how to get its text.

    Attributes:
        name: Name in the index, distinct; passages get the ids ``name#0``, ``name#1``, ...
        digest: Changes whenever the content does.
        load: Gives the text; called only if the digest is new.
    """

    name: str
    digest: str
    load: Callable[[], DocumentText]


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    Attributes:
        documents: Those that can be read, sorted by name.
        unreadable: Name to reason of those that can't; a folder's name ends with a slash.
        scope: Prefix of all names.
        origin: Where the folder lies.
    """

    documents: list[Document]
    unreadable: dict[str, str]
    scope: str
    origin: str


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What bringing an index up to date did. A document is in one of the first five lists.

    Attributes:
        new: Documents that were not indexed before, by name.
        changed: Documents whose content is another one now.
        unchanged: Documents that are as they were.
        empty: Documents without any text, e.g. scanned PDFs.
        binary: Documents that are no text, whatever their names say.
        unreadable: Name to reason; what was indexed of them before stays.
        removed: Documents that were indexed and are gone.
        encodings: Encoding of each new or changed document that was not UTF-8.
        deleted: Records deleted.
        added: What writing the passages did.
    """

    new: list[str]
    changed: list[str]
    unchanged: list[str]
    empty: list[str]
    binary: list[str]
    unreadable: dict[str, str]
    removed: list[str]
    encodings: dict[str, str]
    deleted: int
    added: AddReport

    @property
    def documents(self) -> int:
        """Documents there are now."""
        return sum(map(len, (self.new, self.changed, self.unchanged, self.empty, self.binary, self.unreadable)))


@dataclass
class _Known:
    """What the collection holds of one document."""

    digest: str = ""
    chunks: int = -1
    ids: set[str] = field(default_factory=set)

    def holds(self, document: Document) -> bool:
        """Whether all passages of the document as it is now are there."""
        return self.digest == document.digest and self.chunks == len(self.ids)


def folder_documents(folder: Path) -> Listing:
    """List the documents of a folder (see `SUFFIXES`), named ``<folder>/<path below it>``.

    Hidden files and folders are left out, links to folders are not followed. Bytes of a name that are no UTF-8 stand
    as escapes in the document's name.

    Raises:
        InputError: If it is no folder, or can't be listed.
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; wanted one with {', '.join(SUFFIXES)} files.")
    root = folder.resolve()
    documents: dict[str, Document] = {}
    unreadable: dict[str, str] = {}

    def locked(err: OSError) -> None:
        if Path(err.filename) == root:
            raise InputError(f"{folder} can't be listed: {err.strerror or err}") from err
        unreadable[f"{_name(root, Path(err.filename))}/"] = f"it can't be listed: {err.strerror or err}"

    for parent, folders, files in os.walk(root, onerror=locked):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for path in (Path(parent, name) for name in sorted(files) if not name.startswith(".")):
            name = _name(root, path)
            try:
                if path.suffix.lower() not in SUFFIXES or not _is_file(path):
                    continue
                if name in documents:
                    raise InputError("another file's name is the same in UTF-8; rename one of them.")
                documents[name] = Document(name, text_digest(read_bytes(path)), partial(read_file, path))
            except InputError as err:
                unreadable.setdefault(name, str(err))
    listed = [documents[name] for name in sorted(documents)]
    return Listing(listed, unreadable, scope=f"{_utf8(root.name)}/", origin=_utf8(str(root)))


def _is_file(path: Path) -> bool:
    """Whether it is a file, not a pipe (which would be waited for); a link to nothing is an error, not a no."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except OSError as err:
        raise InputError(f"it can't be opened: {err.strerror or err}") from err


def _name(root: Path, path: Path) -> str:
    return _utf8(f"{root.name}/{path.relative_to(root).as_posix()}")


def _utf8(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def text_digest(content: bytes) -> str:
    """Digest of a document's content and of the rules it is split by."""
    return hashlib.sha256(RULES.encode() + b"\0" + content).hexdigest()[:24]


def sync(
    index: ChromaIndex,
    documents: Sequence[Document],
    *,
    scope: str,
    origin: str = "",
    unreadable: Mapping[str, str] | None = None,
    progress: Callable[[Iterable[Document]], Iterable[Document]] = lambda items: items,
) -> SyncReport:
    """Bring a collection up to the documents there are: write what is new or changed, delete what is gone.

    A document is finished in one go or done again next time; unchanged passages of a changed document are left
    alone. Passages are cut so that the model reads all of each. Nothing is deleted of what can't be read now.

    Args:
        index: Where to write.
        documents: All documents of the scope.
        scope: Prefix of the names that these documents own; what the index has under it beyond them is deleted.
        origin: Where the documents lie, e.g. the folder's full path; noted with each passage. Another origin under
            the same scope is refused as long as it exists, so that two folders of one name can't delete each other's
            passages; a folder that was moved is adopted.
        unreadable: Name to reason of further documents, which are there but can't be read; a name that ends with a
            slash stands for all documents below.
        progress: Wraps the iteration over documents, for a progress bar.

    Raises:
        InputError: If a name is outside the scope, or the scope belongs to another origin.
        StoreError: If states can't be written. What was finished before stays.
    """
    outside = [d.name for d in documents if not d.name.startswith(scope)]
    if outside:
        raise InputError(f"document {outside[0]!r} is outside the scope {scope!r}.")
    known = _known(index, scope, origin)
    locked = dict(unreadable or {})
    encodings: dict[str, str] = {}
    kinds: dict[str, list[str]] = {"new": [], "changed": [], "unchanged": [], "empty": [], "binary": []}
    changes = _Changes(index)
    for document in progress(documents):
        old = known.pop(document.name, None)
        if old is not None and old.holds(document):
            kinds["unchanged"].append(document.name)
            continue
        try:
            read = document.load()
        except InputError as err:
            locked[document.name] = str(err)
            continue
        records = _records(index, document, read, origin)
        kind = ("new" if old is None else "changed") if records else "binary" if read.binary else "empty"
        kinds[kind].append(document.name)
        if read.encoding:
            encodings[document.name] = read.encoding
        changes.add(records, (old.ids if old is not None else set()) - {i for i, _, _ in records})
    folders = tuple(name for name in locked if name.endswith("/"))
    kinds["removed"] = sorted(name for name in known if name not in locked and not name.startswith(folders))
    for name in kinds["removed"]:
        changes.add([], known[name].ids)
    changes.write()
    return SyncReport(**kinds, unreadable=locked, encodings=encodings, deleted=changes.deleted, added=changes.added)


@dataclass
class _Changes:
    """Records to write and to delete, a batch at a time: what replaces a document is there before the old one goes."""

    index: ChromaIndex
    added: AddReport = field(default_factory=AddReport)
    deleted: int = 0
    _records: list[Record] = field(default_factory=list)
    _stale: list[str] = field(default_factory=list)

    def add(self, records: Sequence[Record], stale: Iterable[str]) -> None:
        self._records += records
        self._stale += stale
        if len(self._records) >= BATCH:
            self.write()

    def write(self) -> None:
        rows = self._records
        self.added += self.index.upsert([i for i, _, _ in rows], [t for _, t, _ in rows], [m for _, _, m in rows])
        self.deleted += self.index.delete(self._stale)
        self._records, self._stale = [], []


def _known(index: ChromaIndex, scope: str, origin: str) -> dict[str, _Known]:
    """What the collection holds under a scope, by document."""
    known: dict[str, _Known] = {}
    for page in pages(index.collection, ["metadatas"]):
        for i, meta in zip(page["ids"], page["metadatas"], strict=True):
            source = str((meta or {}).get("source", ""))
            if source.startswith(scope) and meta is not None and "digest" in meta and "chunks" in meta:
                _check_origin(str(meta.get("origin", "")), origin, scope)
                entry = known.setdefault(source, _Known(str(meta["digest"]), int(meta["chunks"])))
                if entry.digest != meta["digest"]:
                    entry.digest = ""  # a change was cut off half-way: do it again
                entry.ids.add(i)
    return known


def _check_origin(found: str, wanted: str, scope: str) -> None:
    if found and found != wanted and Path(found).exists():
        raise InputError(
            f"this collection holds {scope} from {found}; now {wanted} was given. Index it under another collection "
            f"name, or rename the folder."
        )


def _records(index: ChromaIndex, document: Document, read: DocumentText, origin: str) -> list[Record]:
    """Passages of a document, each with where it stands and what it is a part of."""
    shared: dict[str, Any] = {"title": read.title or Path(document.name).stem, "origin": origin}
    shared |= {"source": document.name, "digest": document.digest}
    pieces = split_text(read.text)
    if pieces:
        pieces = fit_passages(pieces, partial(_tokens, index, shared))
    shared["chunks"] = len(pieces)
    return [
        (f"{document.name}#{number}", text, {"start": start, "chunk": number, **shared})
        for number, (start, text) in enumerate(pieces)
    ]


def _tokens(index: ChromaIndex, metadata: Mapping[str, Any], texts: Sequence[str]) -> list[tuple[int, int]]:
    """Tokens that the model reads of each record, and those the record has."""
    read = [index.home.rule.text(text, metadata) or "" for text in texts]
    return [(len(row.ids), row.total_tokens) for row in index.engine.backbone.tokenize(read)]
