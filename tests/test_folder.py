"""A folder in, an index out: only what changed is touched, what is gone goes, nothing half-done is trusted."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import write_documents
from test_index import toy_vectors

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import InputError, StoreError
from kalm_rag.index.folder import CHUNK_CHARACTERS, Source, folder_sources, read_file, split_text, sync, text_digest

pytest.importorskip("langchain_text_splitters", reason="extra 'files' is not installed")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs")


@pytest.fixture
def index(tiny: Reranker, tmp_path: Path) -> Iterator[ChromaIndex]:
    with ChromaIndex.open(tmp_path / "db", model=tiny, embedder=toy_vectors) as opened:
        yield opened


def run(index: ChromaIndex, folder: Path) -> object:
    return sync(index, folder_sources(folder), scope="docs/")


def test_readers(folder: Path) -> None:
    assert read_file(folder / "page.html") == "Title\nBody text"
    assert "Hello from a PDF" in read_file(folder / "sub" / "paper.pdf")
    (folder / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    assert read_file(folder / "latin.txt") == "caf\ufffd"
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
    assert (first.sources, len(first.changed)) == (10, 9)  # the empty one leaves nothing
    assert first.added.encoded == len(index) > 10
    again = run(index, folder)
    assert (again.changed, again.added.records, again.added.encoded) == ([], 0, 0)

    (folder / "note1.txt").write_text("Note 1 is now about something else.")
    (folder / "note2.txt").unlink()
    (folder / "copy.txt").write_text("Note 3 is about subject 3.")
    long = folder / "long.md"
    long.write_text(long.read_text()[: CHUNK_CHARACTERS * 2])
    third = run(index, folder)
    assert sorted(third.changed) == ["docs/copy.txt", "docs/long.md", "docs/note1.txt"]
    assert third.removed == ["docs/note2.txt"]
    assert third.added.encoded <= 3  # note1 and the new end of long.md; copy.txt's text was seen before
    assert third.added.from_store >= 1
    assert index.collection.get(ids=["docs/note2.txt#0"])["ids"] == []
    assert index.verify().clean
    sources = {str(m["source"]) for m in index.collection.get(include=["metadatas"])["metadatas"]}
    assert sources == {s.name for s in folder_sources(folder)} - {"docs/empty.txt"}


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


def test_wrong_folders(tmp_path: Path, index: ChromaIndex) -> None:
    with pytest.raises(InputError, match="is no folder"):
        folder_sources(tmp_path / "nope")
    (tmp_path / "bare").mkdir()
    with pytest.raises(InputError, match="holds no document"):
        folder_sources(tmp_path / "bare")
    with pytest.raises(InputError, match="outside the scope"):
        sync(index, [Source("x", "y", str)], scope="docs/")


def test_two_scopes_leave_each_other_alone(index: ChromaIndex, folder: Path) -> None:
    run(index, folder)
    before = len(index)
    other = [Source("other/one", text_digest(b"1"), lambda: "Another corpus.")]
    sync(index, other, scope="other/")
    assert len(index) == before + 1
    assert sync(index, [], scope="other/").removed == ["other/one"]
    assert len(index) == before


def test_two_folders_of_one_name_do_not_delete_each_other(index: ChromaIndex, folder: Path, tmp_path: Path) -> None:
    twin = tmp_path / "elsewhere" / "docs"
    twin.mkdir(parents=True)
    (twin / "only.txt").write_text("The only text here.")
    sync(index, folder_sources(folder), scope="docs/", origin=str(folder))
    before = len(index)
    with pytest.raises(InputError, match="this collection holds docs/ from"):
        sync(index, folder_sources(twin), scope="docs/", origin=str(twin))
    assert len(index) == before
    (tmp_path / "new").mkdir()
    moved = folder.rename(tmp_path / "new" / "docs")
    report = sync(index, folder_sources(moved), scope="docs/", origin=str(moved))
    assert (report.changed, report.removed) == ([], [])  # a moved folder is the same documents
