"""Template text to pieces: literal text and slots. One parser per format, none of which ever formats the template.

Time grows with the length of the template, whatever stands in it. Knows no framework and no roles.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterator, Sequence

from kalm_rag.errors import InputError
from kalm_rag.instructions.jinja import TemplateSyntaxError, jinja_messages
from kalm_rag.instructions.pieces import Piece, Slot, Values, check_length, fill

_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_BRACES = re.compile(r"\{(" + _NAME + r")\}")
_FIELD = re.compile(_NAME + r"(\[[^\]]*\])*")
_MUSTACHE_SECTION = re.compile(r"\{\{\s*[#^/]\s*" + _NAME + r"\s*\}\}")
_JINJA_TAG = re.compile(r"\{[{%#]")


def parse(template: str, template_format: str, values: Values) -> list[Piece]:
    """Cut a template of one message into pieces; partial variables are filled in.

    Args:
        template: The template's own text.
        template_format: ``f-string`` (LangChain: ``{{`` is a brace), ``braces`` (LlamaIndex: ``{name}`` only),
            ``jinja2``, ``mustache``, ``literal`` (no slots), or ``plain`` (of unknown make: see `format_of`).
        values: Partial variables.

    Raises:
        InputError: If there is no such format, the text (partial variables filled in) is longer than
            `MAX_PROMPT_CHARS`, or jinja2 can't parse what is said to be Jinja.

    Example:
        >>> parse('Answer as {{"a": 1}}: {question}', "f-string", {})
        ['Answer as {', '"a": 1}', ': ', Slot(name='question')]
    """
    if template_format == "plain":
        template_format = format_of([template], values)
    if template_format not in _PARSERS:
        raise InputError(f"template format is {template_format!r}; wanted one of {', '.join([*_PARSERS, 'plain'])}.")
    check_length(len(template))
    pieces = _PARSERS[template_format](template, values)
    check_length(sum(len(piece) for piece in pieces if isinstance(piece, str)))
    return pieces


def format_of(templates: Sequence[str], values: Values) -> str:
    """Tell the format of a prompt of unknown make, over all its messages.

    It is the one in which most slots for documents and the question are found, then most slots of any name. Among
    equals Jinja comes first where there are statements (``{% ... %}``), else f-strings: in them ``{{name}}`` is an
    ordinary way to write a brace, while ``{name}`` is none in Jinja.

    Example:
        >>> format_of(["Answer as {{json}}. Context: {context}"], {}), format_of(["Context: {{ context }}"], {})
        ('f-string', 'jinja2')
    """
    text = "\n".join(templates)
    formats = ["f-string"]
    if _JINJA_TAG.search(text):
        formats = ["jinja2", "f-string"] if "{%" in text else ["f-string", "jinja2"]
    if _MUSTACHE_SECTION.search(text):
        formats = ["mustache", *formats]
    if len(formats) == 1:
        return formats[0]
    found: dict[str, tuple[int, int]] = {}
    for name in formats:
        try:
            slots = {p for t in templates for p in parse(t, name, values) if isinstance(p, Slot)}
        except TemplateSyntaxError:
            continue
        found[name] = (sum(slot.takes_documents or slot.takes_query for slot in slots), len(slots))
    return max(found, key=lambda name: found[name])  # the first of equals


def _parse_fstring(template: str, values: Values) -> list[Piece]:
    pieces: list[Piece] = []
    try:
        for text, name, _, _ in string.Formatter().parse(template):
            if text:
                pieces.append(text)
            if name is not None:
                if not _FIELD.fullmatch(name):
                    raise ValueError(name)  # JSON that nobody escaped
                pieces.append(fill(name, values))
    except ValueError as err:
        if isinstance(err, InputError):
            raise
        return _parse_braces(template, values)
    return pieces


def _parse_braces(template: str, values: Values) -> list[Piece]:
    found = _BRACES.split(template)  # text, name, text, name, text
    return [fill(p, values) if i % 2 else p for i, p in enumerate(found) if i % 2 or p]


def _parse_jinja(template: str, values: Values) -> list[Piece]:
    return [piece for _, pieces in jinja_messages(template, values) for piece in pieces]


def _parse_mustache(template: str, values: Values) -> list[Piece]:
    """Sections are loops over documents or flags, so an unfilled one leaves a slot; a filled true one its body."""
    pieces: list[Piece] = []
    hidden: list[str] = []  # open sections whose bodies are left out
    for text, tag in _split_mustache(template):
        if text and not hidden:
            pieces.append(text)
        if tag is None:
            continue
        sign, name = (tag[0], tag[1:].strip()) if tag and tag[0] in "#^/&!>" else ("", tag)
        if sign in ("#", "^"):
            shown = name in values and bool(values[name]) == (sign == "#")
            if hidden or not shown:
                if not hidden:
                    pieces.append(Slot(name))
                hidden.append(name)
        elif sign == "/" and hidden and hidden[-1] == name:
            hidden.pop()
        elif sign in ("", "&") and not hidden:
            pieces.append(fill(name, values))
    return pieces


def _split_mustache(template: str) -> Iterator[tuple[str, str | None]]:
    """Text and the tag behind it (None behind the last), each character looked at a few times at most."""
    last = {closer: template.rfind(closer) for closer in ("}}}", "}}")}
    at, opened = 0, template.find("{{")
    while opened >= 0:
        closers = ["}}}", "}}"] if template.startswith("{{{", opened) else ["}}"]
        closer = next((c for c in closers if last[c] >= opened + len(c)), None)
        if closer is None:
            break
        end = template.index(closer, opened + len(closer)) + len(closer)
        yield template[at:opened], template[opened:end].strip("{}").strip()
        at, opened = end, template.find("{{", end)
    yield template[at:], None


_PARSERS: dict[str, Callable[[str, Values], list[Piece]]] = {
    "f-string": _parse_fstring,
    "braces": _parse_braces,
    "jinja2": _parse_jinja,
    "mustache": _parse_mustache,
    "literal": lambda template, values: [template] if template else [],
}
