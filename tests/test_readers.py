"""Files to text: encodings, binaries, HTML lines, PDFs that are locked or too large; texts to passages that fit."""

from __future__ import annotations

import random
from io import BytesIO
from pathlib import Path

import pytest
from documents import one_page_pdf

from kalm_rag import Reranker
from kalm_rag.errors import InputError
from kalm_rag.index import readers
from kalm_rag.index.readers import read_file
from kalm_rag.index.splitting import CHUNK_CHARACTERS, fit_passages, split_text

pytest.importorskip("langchain_text_splitters", reason="extra 'files' is not installed")

GERMAN = "Käse aus Zürich, Grüße an die Börse. Öfen für Übung.\nUnd noch eine Zeile, über Äpfel."
FRENCH = "Le café est près de l'hôtel, ça va être génial."
POLISH = "Zażółć gęślą jaźń. Proszę państwa, to jest łatwe zdanie."
RUSSIAN = (
    "Привет, как дела? Это проверка кодировки текста. "
    + "Москва является столицей России и самым большим городом. " * 3
    + "Конец."
)
JAPANESE = "これは文字コードの検査です。日本語の文章。"


def read(folder: Path, name: str, content: bytes) -> readers.DocumentText:
    path = folder / name
    path.write_bytes(content)
    return read_file(path)


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        *((GERMAN, encoding) for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32")),
        *((text, "cp1252") for text in (GERMAN, FRENCH, "café", "It’s a “quoted” text – with dashes.")),
        *((POLISH, "cp1250"), (RUSSIAN, "cp1251"), (RUSSIAN, "koi8-r"), (RUSSIAN, "utf-16")),
        *((JAPANESE, encoding) for encoding in ("cp932", "euc-jp", "utf-16")),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".html"])
def test_texts_are_read_in_whatever_encoding(tmp_path: Path, text: str, encoding: str, suffix: str) -> None:
    """Everything was taken for UTF-8: UTF-16 was indexed as noise, other encodings lost their letters."""
    found = read(tmp_path, f"file{suffix}", text.encode(encoding))
    assert found.text == (" ".join(text.split()) if suffix == ".html" else text)
    assert not found.binary
    assert bool(found.encoding) == (encoding not in ("utf-8", "utf-8-sig"))


def test_an_encoding_that_html_names_is_believed(tmp_path: Path) -> None:
    page = "<html><head><meta charset='cp1255'></head><body>שלום</body></html>"
    assert read(tmp_path, "page.html", page.encode("cp1255")).text == "שלום"


@pytest.mark.parametrize("suffix", [".txt", ".md", ".rst", ".html"])
def test_binary_files_are_told_apart(tmp_path: Path, suffix: str) -> None:
    """A picture or a program under a text's name was indexed as noise, without a word."""
    png = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(range(256))
    for content in (random.Random(0).randbytes(2000), png, b"\x7fELF\x02\x01\x01" + b"\x00" * 9, b"text\x00" * 9):
        found = read(tmp_path, f"file{suffix}", content)
        assert (found.binary, found.text) == (True, "")
    colours = read(tmp_path, f"log{suffix}", b"\x1b[31mred\x1b[0m and N\x08NA\x08AM\x08ME\n")
    assert not colours.binary  # a log with colours and a manual page with overstrikes are texts


def test_html_lines_end_at_blocks_only(tmp_path: Path) -> None:
    """Every bold word and every link began a line of its own, so sentences were cut to pieces."""
    page = b"""<html><head><title>A  title</title><style>p {}</style></head><body><nav>menu</nav>
    <p>One <b>bold</b> word, a <a href="x">link</a>,
    and H<sub>2</sub>O.</p><ul><li>first<li>second</ul>a<br>b<!-- no -->
    <table><tr><td>left</td><td>right</td></tr></table><pre>  def f():
      return 1</pre></body></html>"""
    found = read(tmp_path, "page.html", page)
    assert found.title == "A title"
    assert found.text.split("\n") == [
        *("A title", "One bold word, a link, and H2O.", "first", "second", "a", "b", "left right"),
        *(" def f():", "     return 1"),
    ]


def test_html_of_any_depth_and_width_is_walked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines were made by moving tags about: deep or long pages took minutes, as each move looked at all neighbours."""
    bs4 = pytest.importorskip("bs4", reason="extra 'files' is not installed")
    for name in ("index", "insert_before", "insert_after", "find_parent"):
        monkeypatch.setattr(bs4.Tag, name, lambda *_: pytest.fail("looks at its neighbours"))
    deep = read(tmp_path, "deep.html", b"<div>" * 3000 + b"x<nav>menu</nav><script>no</script>")
    assert deep.text == "x"
    assert read(tmp_path, "wide.html", b"<p>One <b>bold</b> word.</p>" * 500).text == "\n".join(
        ["One bold word."] * 500
    )


@pytest.mark.filterwarnings("error")
def test_xhtml_is_read_without_a_word(tmp_path: Path) -> None:
    page = b"<?xml version='1.0' encoding='utf-8'?><html xmlns='http://www.w3.org/1999/xhtml'><p>A page.</p></html>"
    assert read(tmp_path, "page.html", page).text == "A page."
    assert read(tmp_path, "short.html", b"other.html").text == "other.html"
    assert read(tmp_path, "open.html", b"<p>a<!-- no --> b <!-- never closed").text == "a b never closed"


def test_titles(tmp_path: Path) -> None:
    assert read(tmp_path, "a.md", b"intro\n\n# The title #\n\n# Another").title == "The title"
    assert read(tmp_path, "a.txt", b"# no title").title == ""


def pdf_with(tmp_path: Path, *, pages: int = 1, password: str | None = None) -> bytes:
    pypdf = pytest.importorskip("pypdf", reason="extra 'files' is not installed")
    writer = pypdf.PdfWriter()
    for _ in range(pages):
        writer.append(BytesIO(one_page_pdf("Hello from a PDF")))
    writer.add_metadata({"/Title": "A paper"})
    if password is not None:
        writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    made = BytesIO()
    writer.write(made)
    return made.getvalue()


def test_pdfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PDF under a password gave a page of parser errors; one of a million pages or characters had no bound."""
    found = read(tmp_path, "a.pdf", pdf_with(tmp_path, pages=2))
    assert (found.title, found.text) == ("A paper", "Hello from a PDF\n\nHello from a PDF")
    assert read(tmp_path, "open.pdf", pdf_with(tmp_path, password="")).text == "Hello from a PDF"
    with pytest.raises(InputError, match="it is encrypted; wanted a PDF that opens without a password"):
        read(tmp_path, "locked.pdf", pdf_with(tmp_path, password="secret"))
    monkeypatch.setattr(readers, "MAX_PDF_CHARACTERS", 20)
    with pytest.raises(InputError, match="unpacks to more than 20 characters"):
        read(tmp_path, "bomb.pdf", pdf_with(tmp_path, pages=3))
    monkeypatch.setattr(readers, "MAX_PAGES", 2)
    with pytest.raises(InputError, match="it has 3 pages; at most 2 are read"):
        read(tmp_path, "long.pdf", pdf_with(tmp_path, pages=3))


def test_files_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unreadable file was a traceback, and a file of any size was read into memory."""
    with pytest.raises(InputError, match="can't be opened: No such file"):
        read_file(tmp_path / "gone.txt")
    (tmp_path / "large.txt").write_bytes(b"x" * 2_000_000)
    monkeypatch.setattr(readers, "MAX_BYTES", 1_000_000)
    with pytest.raises(InputError, match="it has 2 MB; at most 1 MB are read"):
        read_file(tmp_path / "large.txt")


def test_passages_end_with_their_sentence() -> None:
    """The full stop went to the beginning of the next passage."""
    text = "A sentence of some words stands here. " * 60
    assert all(piece.endswith(".") and piece.startswith("A") for _, piece in split_text(text))


def test_a_run_without_spaces_is_cut_in_one_go() -> None:
    """50 MB without a space were taken apart character by character, in a minute."""
    text = "some words " + "x" * 1_000_000 + " and more"
    pieces = split_text(text)
    assert len(pieces) == pytest.approx(1_000_000 / CHUNK_CHARACTERS, abs=3)
    assert max(len(piece) for _, piece in pieces) == CHUNK_CHARACTERS
    assert all(text[start : start + len(piece)] == piece for start, piece in pieces)
    assert pieces[0][1] == "some words"
    assert pieces[-1][1].endswith("and more")


def test_passages_fit_the_model(pico: Reranker) -> None:
    """One in twenty of our own splitter's passages has more than 256 tokens, of code one in seven."""

    def tokens(texts: list[str]) -> list[tuple[int, int]]:
        return [(min(256, row.total_tokens), row.total_tokens) for row in pico.backbone.tokenize(texts)]

    text = "".join(f"x[{i}] = {{'a': ({i}, [{i * i}])}}; " for i in range(200)) + "".join(
        f"第{i}段中文文本内容。" for i in range(200)
    )
    rough = split_text(text)
    assert sum(total > read for read, total in tokens([piece for _, piece in rough])) > len(rough) / 2
    fitting = fit_passages(rough, tokens)
    assert all(total == read for read, total in tokens([piece for _, piece in fitting]))
    assert all(text[start : start + len(piece)] == piece for start, piece in fitting)
    covered = {at for start, piece in fitting for at in range(start, start + len(piece))}
    assert all(text[at].isspace() for at in set(range(len(text))) - covered)
    assert fit_passages(split_text("x"), lambda texts: [(1, 9)]) == [(0, "x")]  # what can't be cut stays
