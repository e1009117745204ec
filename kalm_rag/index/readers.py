"""Files to text: plain text in any encoding, HTML, PDF; bounded, so that no file takes all memory.

Reading is left to well-kept libraries (BeautifulSoup, pypdf, charset-normalizer; extra ``files``).
"""

from __future__ import annotations

import codecs
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from kalm_rag.errors import InputError, MissingDependencyError, require

SUFFIXES = (".txt", ".md", ".rst", ".html", ".htm", ".pdf")
MAX_BYTES = 100_000_000
"""Largest file that is read."""
MAX_PAGES = 10_000
"""Most pages of a PDF."""
MAX_PDF_CHARACTERS = 50_000_000
"""Most text of a PDF: a small file can unpack to more than memory holds (each stream is bounded by pypdf itself)."""

_BOMS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_ENCODINGS = (
    *("cp1252", "cp1250", "cp1251", "koi8_r", "cp1253", "cp1254", "cp1255", "cp1256"),
    *("cp932", "euc_jp", "gb18030", "big5", "cp949"),
)
"""What a text that is no UTF may be in, the likeliest first: it decides where two read equally well."""
_BINARY = re.compile(rb"[\x00-\x07\x0e-\x1a\x1c-\x1f]")
"""Bytes that texts don't hold: C0 without white space, backspace and escape, which logs and manuals do."""
_MOST_BINARY = 0.03
_SAMPLE = 1_000_000
"""Bytes an encoding is told by."""
_BLOCKS = (
    *("address", "article", "aside", "blockquote", "body", "br", "caption", "dd", "details", "div", "dl", "dt"),
    *("fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6", "head", "header", "hr"),
    *("html", "legend", "li", "main", "ol", "option", "p", "pre", "section", "summary", "table", "tbody", "tfoot"),
    *("thead", "title", "tr", "ul"),
)
"""Tags that begin and end a line; all others stand in the middle of one."""
_UNREAD = ("script", "style", "nav", "template")


@dataclass(frozen=True, kw_only=True)
class DocumentText:
    """What reading a document gave.

    Attributes:
        text: Its text, valid Unicode.
        title: Title it gives itself, or empty.
        encoding: What the text was decoded from, where that was not UTF-8; else empty.
        binary: Whether it holds no text, whatever its name says; `text` is empty then.
    """

    text: str
    title: str = ""
    encoding: str = ""
    binary: bool = False


def read_file(path: Path) -> DocumentText:
    """Read the text of a document.

    Raises:
        MissingDependencyError: If the reader of its kind is not installed.
        InputError: If the file can't be opened, is larger than is read, or is not what its name says.
    """
    suffix = path.suffix.lower()
    try:
        return _READERS.get(suffix, _read_plain)(read_bytes(path))
    except (MissingDependencyError, InputError):
        raise
    except Exception as err:  # parsers raise errors of many kinds for broken files
        raise InputError(f"{path.name} can't be read as {suffix}: {err}") from err


def read_bytes(path: Path) -> bytes:
    """A file's bytes; InputError if it can't be opened, or is larger than `MAX_BYTES`."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise InputError(f"it has {size / 1e6:,.0f} MB; at most {MAX_BYTES / 1e6:,.0f} MB are read. Split it.")
        return path.read_bytes()
    except OSError as err:
        raise InputError(f"it can't be opened: {err.strerror or err}") from err


def decode(raw: bytes, declared: str | None = None) -> tuple[str, str] | None:
    """Text of a file's bytes and its encoding; None if they are no text.

    `declared` is the encoding that the file itself names, tried before guessing, which needs charset-normalizer.
    """
    for mark, encoding in _BOMS.items():
        if raw.startswith(mark):
            return raw.decode(encoding, errors="replace"), encoding.removesuffix("-sig")
    if b"\0" in raw:  # UTF-16 without its mark has one in nearly every other place, where it is a western text
        sample = raw[: _SAMPLE // 2 * 2]
        even, odd = sample[::2].count(0), sample[1::2].count(0)
        if min(even, odd) * 20 < max(even, odd) > 0.3 * len(sample) / 2:
            encoding = "utf-16-le" if odd > even else "utf-16-be"
            return raw.decode(encoding, errors="replace"), encoding
        return None
    if len(_BINARY.findall(raw)) > _MOST_BINARY * len(raw):
        return None
    try:
        return raw.decode("utf-8"), "utf-8"
    except UnicodeDecodeError as err:
        start = raw.rfind(b"\n", 0, max(0, err.start - _SAMPLE // 2)) + 1
        encoding = _declared(declared) or _guess(raw[start : start + _SAMPLE])
        return raw.decode(encoding, errors="replace"), encoding


def _declared(name: str | None) -> str:
    try:
        return "" if name is None else codecs.lookup(name).name
    except LookupError:
        return ""


def _guess(sample: bytes) -> str:
    """The likeliest encoding of a text that is no UTF-8."""
    found = _extra("charset_normalizer").from_bytes(sample, cp_isolation=list(_ENCODINGS))
    names = [
        (match.chaos, -match.coherence, _ENCODINGS.index(name))
        for match in found
        for name in match.could_be_from_charset  # those that give the same text
        if name in _ENCODINGS
    ]
    return _ENCODINGS[min(names)[2]] if names else _ENCODINGS[0]


def _read_plain(raw: bytes) -> DocumentText:
    if (decoded := decode(raw)) is None:
        return DocumentText(text="", binary=True)
    text, encoding = decoded
    return DocumentText(text=_valid(text), encoding=encoding.removeprefix("utf-8"))


def _read_markdown(raw: bytes) -> DocumentText:
    read = _read_plain(raw)
    heading = re.search(r"^# +(\S.*)$", read.text, flags=re.MULTILINE)
    return replace(read, title=heading[1].strip(" #") if heading else "")


def _read_html(raw: bytes) -> DocumentText:
    """Text as a browser would break it: lines end at blocks and breaks, not at bold words and links."""
    bs4 = _extra("bs4")
    detector = _extra("bs4.dammit").EncodingDetector
    if (decoded := decode(raw, detector.find_declared_encoding(raw, is_html=True))) is None:
        return DocumentText(text="", binary=True)
    page, closed, rest = decoded[0].rpartition("-->")
    page += closed + rest.replace("<!--", "")  # comments that never end: each would be looked for to the page's end
    with warnings.catch_warnings():  # that it is XHTML, or short: both are read as they are
        warnings.simplefilter("ignore")
        soup = bs4.BeautifulSoup(page, "html.parser")
    title = " ".join(soup.title.get_text().split()) if soup.title is not None else ""
    lines = (re.sub(r"[^\S\n]+$|^ ", "", line) for line in "".join(_html_parts(soup)).split("\n"))
    text = "\n".join(line for line in lines if line.strip())
    return DocumentText(text=_valid(text), title=_valid(title), encoding=decoded[1].removeprefix("utf-8"))


def _html_parts(soup: Any) -> Iterator[str]:  # noqa: ANN401 - BeautifulSoup's own type
    """Texts in their order, with line ends around blocks; each tag is seen once, however deep or wide a page is."""
    declared = _extra("bs4.element").PreformattedString  # comments, doctypes
    stack: list[tuple[Any, bool]] = [(soup, False)]
    while stack:
        node, is_pre = stack.pop()
        if isinstance(node, str):
            if not isinstance(node, declared):
                yield str(node) if is_pre else re.sub(r"\s+", " ", node)
        elif node.name not in _UNREAD:
            yield "\n" if node.name in _BLOCKS else ""
            stack.append(("\n" if node.name in _BLOCKS else " " if node.name in ("td", "th") else "", True))
            stack += [(child, is_pre or node.name == "pre") for child in reversed(node.contents)]


def _read_pdf(raw: bytes) -> DocumentText:
    pypdf = _extra("pypdf")
    try:
        reader = pypdf.PdfReader(BytesIO(raw))
        if reader.is_encrypted and not reader.decrypt(""):
            raise InputError("it is encrypted; wanted a PDF that opens without a password.")
        pages = len(reader.pages)
    except pypdf.errors.DependencyError as err:
        raise InputError(f"it is encrypted, and {err}. To read it, run: pip install cryptography") from err
    if pages > MAX_PAGES:
        raise InputError(f"it has {pages:,} pages; at most {MAX_PAGES:,} are read. Split it.")
    texts: list[str] = []
    room = MAX_PDF_CHARACTERS
    for page in reader.pages:
        texts.append(page.extract_text())
        room -= len(texts[-1])
        if room < 0:
            raise InputError(f"it unpacks to more than {MAX_PDF_CHARACTERS:,} characters. Split it.")
    title = reader.metadata.title if reader.metadata is not None else None
    return DocumentText(text=_valid("\n\n".join(texts)), title=_valid(title.strip()) if isinstance(title, str) else "")


def _valid(text: str) -> str:
    """Without lone surrogates, which PDFs and UTF-16 can hold."""
    return text.encode("utf-8", errors="replace").decode()


def _extra(module: str) -> Any:  # noqa: ANN401 - a module
    return require(module, "files", "reading documents")


_READERS: dict[str, Callable[[bytes], DocumentText]] = {
    ".html": _read_html,
    ".htm": _read_html,
    ".md": _read_markdown,
    ".pdf": _read_pdf,
}
