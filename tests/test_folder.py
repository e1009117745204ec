"""A folder in, an index out: only what changed is touched, what is gone goes, nothing half-done is trusted."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import write_documents
from test_index import toy_vectors

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import InputError, StoreError
from kalm_rag.index.folder import Document, SyncReport, folder_documents, sync, text_digest
from kalm_rag.index.readers import DocumentText, read_file
from kalm_rag.index.splitting import CHUNK_CHARACTERS, split_text

pytest.importorskip("langchain_text_splitters", reason="extra 'files' is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs")


@pytest.fixture
def index(tiny: Reranker, tmp_path: Path) -> Iterator[ChromaIndex]:
    with ChromaIndex.open(tmp_path / "db", model=tiny, embedder=toy_vectors) as opened:
        yield opened


def run(index: ChromaIndex, folder: Path) -> SyncReport:
    listing = folder_documents(folder)
    return sync(index, listing.documents, scope="docs/", unreadable=listing.unreadable)


def test_readers(folder: Path) -> None:
    assert read_file(folder / "page.html").text == "Title\nBody text"
    assert "Hello from a PDF" in read_file(folder / "sub" / "paper.pdf").text
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert read_file(folder / "latin.txt").text == "café"
    (folder / "broken.pdf").write_bytes(b"not a pdf")
    with pytest.raises(InputError, match=r"broken\.pdf can't be read as \.pdf"):
        read_file(folder / "broken.pdf")


def test_splitting_covers_the_text() -> None:
    text = "\n\n".join(f"Paragraph {i}. " + "some words " * 40 for i in range(9))
    pieces = split_text(text)
    assert all(len(piece) <= CHUNK_CHARACTERS for _, piece in pieces)
    assert all(text[start : start + len(piece)] == piece for start, piece in pieces)
    covered = set()
    for start, piece in pieces:
        covered |= set(range(start, start + len(piece)))
    assert all(text[i].isspace() for i in set(range(len(text))) - covered)
    assert split_text("") == []


def test_a_second_run_encodes_nothing_and_a_third_only_what_changed(index: ChromaIndex, folder: Path) -> None:
    first = run(index, folder)
    assert (first.documents, len(first.new), first.empty) == (10, 9, ["docs/empty.txt"])
    assert first.added.encoded == len(index) > 10
    again = run(index, folder)
    assert (again.new, again.changed, again.added.records, again.added.encoded) == ([], [], 0, 0)

    (folder / "note1.txt").write_text("Note 1 is now about something else.")
    (folder / "note2.txt").unlink()
    (folder / "copy.txt").write_text("Note 3 is about subject 3.")
    long = folder / "long.md"
    long.write_text(long.read_text()[: CHUNK_CHARACTERS * 2])
    third = run(index, folder)
    assert (third.new, third.changed) == (["docs/copy.txt"], ["docs/long.md", "docs/note1.txt"])
    assert third.removed == ["docs/note2.txt"]
    assert third.added.encoded <= 3  # note1 and the new end of long.md; copy.txt's text was seen before
    assert third.added.from_store >= 1
    assert index.collection.get(ids=["docs/note2.txt#0"])["ids"] == []
    assert index.verify().clean
    sources = {str(m["source"]) for m in index.collection.get(include=["metadatas"])["metadatas"]}
    assert sources == {d.name for d in folder_documents(folder).documents} - {"docs/empty.txt"}


def test_a_run_cut_off_is_finished_by_the_next(
    index: ChromaIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete = ChromaIndex.delete

    def cut(self: ChromaIndex, ids: list[str]) -> int:
        raise StoreError("pulled the plug")

    run(index, folder)
    long = folder / "long.md"
    long.write_text(long.read_text()[: CHUNK_CHARACTERS + 200])
    monkeypatch.setattr(ChromaIndex, "delete", cut)
    with pytest.raises(StoreError, match="pulled the plug"):
        run(index, folder)
    monkeypatch.setattr(ChromaIndex, "delete", delete)
    report = run(index, folder)
    assert "docs/long.md" in report.changed
    assert report.deleted > 0
    chunks = index.collection.get(where={"source": "docs/long.md"}, include=["metadatas"])["metadatas"]
    assert len(chunks) == chunks[0]["chunks"]


def test_unreadable_files_are_told_and_keep_what_was_indexed(index: ChromaIndex, folder: Path) -> None:
    run(index, folder)
    (folder / "sub" / "paper.pdf").write_bytes(b"broken now")
    report = run(index, folder)
    assert list(report.unreadable) == ["docs/sub/paper.pdf"]
    assert index.collection.get(ids=["docs/sub/paper.pdf#0"])["ids"]


def refuse(monkeypatch: pytest.MonkeyPatch, path: Path) -> None:
    """Make a file or folder unreadable, also for a root who reads everything."""
    scandir, read_bytes = os.scandir, Path.read_bytes
    denied = PermissionError(errno.EACCES, "Permission denied", str(path))

    def listed(at: str) -> object:
        if Path(at) == path:
            raise denied
        return scandir(at)

    def opened(self: Path) -> bytes:
        if self == path:
            raise denied
        return read_bytes(self)

    monkeypatch.setattr(os, "scandir", listed)
    monkeypatch.setattr(Path, "read_bytes", opened)


def test_what_cannot_be_read_now_is_kept_and_told(
    index: ChromaIndex, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unreadable file was a traceback, and passages of a locked subfolder were deleted with exit code 0."""
    run(index, folder)
    before = len(index)
    refuse(monkeypatch, folder / "sub")
    refuse(monkeypatch, folder / "note1.txt")
    report = run(index, folder)
    assert report.unreadable == {
        "docs/sub/": "it can't be listed: Permission denied",
        "docs/note1.txt": "it can't be opened: Permission denied",
    }
    assert (len(index), report.removed, report.deleted, len(report.unchanged)) == (before, [], 0, 7)
    monkeypatch.undo()
    report = run(index, folder)
    assert (report.unreadable, len(report.unchanged), report.documents) == ({}, 9, 10)


def test_a_folder_that_cannot_be_listed_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looked empty, so everything indexed of it would have been deleted."""
    refuse(monkeypatch, folder)
    with pytest.raises(InputError, match="docs can't be listed: Permission denied"):
        folder_documents(folder)


def test_a_file_that_vanishes_meanwhile_is_told(index: ChromaIndex, folder: Path) -> None:
    """A file deleted between the listing and the reading was a traceback; the next run sees that it is gone."""
    run(index, folder)
    (folder / "note1.txt").write_text("Changed.")
    (folder / "lost.txt").symlink_to(folder / "nowhere.txt")
    listing = folder_documents(folder)
    (folder / "note1.txt").unlink()
    report = sync(index, listing.documents, scope="docs/", unreadable=listing.unreadable)
    assert list(report.unreadable) == ["docs/lost.txt", "docs/note1.txt"]
    assert index.collection.get(ids=["docs/note1.txt#0"])["ids"]
    (folder / "lost.txt").unlink()
    assert run(index, folder).removed == ["docs/note1.txt"]


def test_names_that_are_no_utf8(index: ChromaIndex, folder: Path) -> None:
    """One such name, from an old archive, stopped the whole run."""
    try:
        with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as file:
            file.write("A café.")
    except OSError:
        pytest.skip("this file system holds UTF-8 names only")
    report = run(index, folder)
    assert r"docs/caf\udce9.txt" in report.new
    assert len(run(index, folder).unchanged) == 10
    (folder / r"caf\udce9.txt").write_text("A name that spells it out.")
    assert "rename one of them" in run(index, folder).unreadable[r"docs/caf\udce9.txt"]


def test_pipes_are_not_waited_for(folder: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(folder / "pipe.txt")
    assert "docs/pipe.txt" not in {d.name for d in folder_documents(folder).documents}


def test_encodings_and_binaries_are_counted(index: ChromaIndex, folder: Path) -> None:
    """UTF-16 and binary files were indexed as noise, without a word."""
    (folder / "wide.txt").write_bytes("Käse aus Zürich".encode("utf-16"))
    (folder / "program.txt").write_bytes(b"\x7fELF" + bytes(range(256)) * 8)
    report = run(index, folder)
    assert report.encodings == {"docs/wide.txt": "utf-16"}
    assert report.binary == ["docs/program.txt"]
    assert report.documents == 12 == len(report.new) + len(report.empty) + len(report.binary)
    assert index.collection.get(ids=["docs/wide.txt#0"])["documents"] == ["Käse aus Zürich"]


def test_an_emptied_folder_empties_its_part_of_the_index(index: ChromaIndex, folder: Path) -> None:
    """It was an error, so the passages of the last document stayed for ever."""
    run(index, folder)
    shutil.rmtree(folder)
    folder.mkdir()
    report = run(index, folder)
    assert (report.documents, len(report.removed), len(index)) == (0, 9, 0)


def test_passages_have_titles_and_fit_the_model(index: ChromaIndex, folder: Path) -> None:
    (folder / "guide.md").write_text("# A guide\n\n" + "word-with(lots)of[signs]; " * 400)
    run(index, folder)
    found = index.collection.get(where={"source": "docs/guide.md"}, include=["documents", "metadatas"])
    assert {meta["title"] for meta in found["metadatas"]} == {"A guide"}
    assert all(row.total_tokens == len(row.ids) for row in index.engine.backbone.tokenize(found["documents"]))
    assert index.collection.get(ids=["docs/note1.txt#0"])["metadatas"][0]["title"] == "note1"


def test_wrong_folders(tmp_path: Path, index: ChromaIndex) -> None:
    with pytest.raises(InputError, match="is no folder"):
        folder_documents(tmp_path / "nope")
    with pytest.raises(InputError, match="outside the scope"):
        sync(index, [Document("x", "y", lambda: DocumentText(text=""))], scope="docs/")


def test_two_scopes_leave_each_other_alone(index: ChromaIndex, folder: Path) -> None:
    run(index, folder)
    before = len(index)
    other = [Document("other/one", text_digest(b"1"), lambda: DocumentText(text="Another corpus."))]
    sync(index, other, scope="other/")
    assert len(index) == before + 1
    assert sync(index, [], scope="other/").removed == ["other/one"]
    assert len(index) == before


def test_two_folders_of_one_name_do_not_delete_each_other(index: ChromaIndex, folder: Path, tmp_path: Path) -> None:
    twin = tmp_path / "elsewhere" / "docs"
    twin.mkdir(parents=True)
    (twin / "only.txt").write_text("The only text here.")
    sync(index, folder_documents(folder).documents, scope="docs/", origin=str(folder))
    before = len(index)
    with pytest.raises(InputError, match="this collection holds docs/ from"):
        sync(index, folder_documents(twin).documents, scope="docs/", origin=str(twin))
    assert len(index) == before
    (tmp_path / "new").mkdir()
    moved = folder.rename(tmp_path / "new" / "docs")
    report = sync(index, folder_documents(moved).documents, scope="docs/", origin=str(moved))
    assert (report.changed, report.removed) == ([], [])  # a moved folder is the same documents
