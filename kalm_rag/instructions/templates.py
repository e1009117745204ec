"""Template text to parts: literal text and slots. One parser per format, none of which ever formats the template.

Knows no framework and no roles but those that a Jinja template names itself (``{% chat role="system" %}``).
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kalm_rag.errors import InputError


@dataclass(frozen=True)
class Slot:
    """A place that the app fills per query: documents, question, history, or anything else."""

    name: str


Part = str | Slot
Parts = list[Part]
Values = Mapping[str, object]
"""Partial variables by name; a callable is called for its value."""

_NAME = r"[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*"
_BRACES = re.compile(r"\{(" + _NAME + r")\}")
_JINJA = re.compile(r"(\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\})", re.DOTALL)
_MUSTACHE = re.compile(r"(\{\{\{.*?\}\}\}|\{\{.*?\}\})", re.DOTALL)
_LOOKS_JINJA = re.compile(r"\{%|\{\{-?\s*" + _NAME + r"\s*(\|[^{}]*)?-?\}\}")
_LOOKS_MUSTACHE = re.compile(r"\{\{\s*[#^/]\s*" + _NAME + r"\s*\}\}")


def parse(template: str, template_format: str, values: Values) -> Parts:
    """Cut a template of one message into parts; partial variables are filled in.

    Args:
        template: The template's own text.
        template_format: ``f-string`` (LangChain: ``{{`` is a brace), ``braces`` (LlamaIndex: ``{name}`` only),
            ``jinja2``, ``mustache``, ``literal`` (no slots), or ``plain`` (of unknown make: told by its looks).
        values: Partial variables.

    Raises:
        InputError: If there is no such format.

    Example:
        >>> parse('Answer as {{"a": 1}}: {question}', "f-string", {})
        ['Answer as {', '"a": 1}', ': ', Slot(name='question')]
    """
    if template_format == "literal":
        return [template] if template else []
    parsers: dict[str, Callable[[str, Values], Parts]] = {
        "f-string": _parse_fstring,
        "braces": _parse_braces,
        "jinja2": _parse_jinja,
        "mustache": _parse_mustache,
        "plain": _parse_plain,
    }
    if template_format not in parsers:
        raise InputError(f"template format is {template_format!r}; wanted one of {', '.join(parsers)}.")
    return parsers[template_format](template, values)


def value_of(name: str, values: Values) -> Part:
    """Text of a partial variable, or the slot where it has none.

    Raises:
        InputError: If its callable fails.
    """
    if name not in values:
        return Slot(name)
    value = values[name]
    if callable(value):
        try:
            value = value()
        except Exception as err:
            raise InputError(f"partial variable {name!r} could not be computed: {err}") from err
    return value if isinstance(value, str) else str(value)


def _parse_plain(template: str, values: Values) -> Parts:
    if _LOOKS_MUSTACHE.search(template):
        return _parse_mustache(template, values)
    if _LOOKS_JINJA.search(template):
        return _parse_jinja(template, values)
    return _parse_fstring(template, values)


def _parse_fstring(template: str, values: Values) -> Parts:
    parts: Parts = []
    try:
        for text, name, _, _ in string.Formatter().parse(template):
            if text:
                parts.append(text)
            if name is not None:
                if not re.fullmatch(_NAME + r"(\[[^\]]*\])*", name):
                    raise ValueError(name)  # JSON that nobody escaped
                parts.append(value_of(name, values))
    except ValueError:
        return _parse_braces(template, values)
    return parts


def _parse_braces(template: str, values: Values) -> Parts:
    pieces = _BRACES.split(template)  # text, name, text, name, text
    return [value_of(p, values) if i % 2 else p for i, p in enumerate(pieces) if i % 2 or p]


def _parse_mustache(template: str, values: Values) -> Parts:
    """Sections are loops over documents or flags, so an unfilled one leaves a slot; a filled true one its body."""
    parts: Parts = []
    hidden: list[str] = []  # open sections whose bodies are left out
    for piece in _MUSTACHE.split(template):
        if not _MUSTACHE.fullmatch(piece):
            if piece and not hidden:
                parts.append(piece)
            continue
        tag = piece.strip("{}").strip()
        sign, name = (tag[0], tag[1:].strip()) if tag and tag[0] in "#^/&!>" else ("", tag)
        if sign in ("#", "^"):
            shown = name in values and bool(values[name]) == (sign == "#")
            if hidden or not shown:
                if not hidden:
                    parts.append(Slot(name))
                hidden.append(name)
        elif sign == "/" and hidden and hidden[-1] == name:
            hidden.pop()
        elif sign in ("", "&") and not hidden:
            parts.append(value_of(name, values))
    return parts


def _parse_jinja(template: str, values: Values) -> Parts:
    return [part for _, parts in jinja_messages(template, values) for part in parts]


def jinja_messages(template: str, values: Values) -> list[tuple[str, Parts]]:
    """Parts of a Jinja template, by role: ``{% chat role="system" %}`` opens a message, all else is the human's.

    Loops are documents or history, so each is a slot. Of a condition the first branch is kept, unless a partial
    variable decides it. Comments, macros and assignments leave nothing.
    """
    reader = _JinjaReader(values)
    raw = False
    for piece in _JINJA.split(template):
        if raw or not _JINJA.fullmatch(piece):
            raw = raw and _tag(piece) != "endraw"
            if raw or _tag(piece) != "endraw":
                reader.add(piece)
        elif piece.startswith("{%"):
            raw = _tag(piece) == "raw"
            reader.tag(piece.strip("{}%").strip("-+ \t\n"))
        elif piece.startswith("{{"):
            reader.expression(piece.strip("{}").strip("-+ \t\n"))
    return [(role, parts) for role, parts in reader.messages if parts]


def _tag(piece: str) -> str:
    return piece[2:-2].strip("-+ \t\n") if piece.startswith("{%") and piece.endswith("%}") else ""


class _JinjaReader:
    """Walks over the pieces of a Jinja template; what stands in a branch or block not taken is left out."""

    def __init__(self, values: Values) -> None:
        self.messages: list[tuple[str, Parts]] = [("human", [])]
        self._values = values
        self._open: list[tuple[str, bool]] = []  # block name, whether its body is left out

    def add(self, part: Part) -> None:
        if part != "" and not any(hidden for _, hidden in self._open):
            self.messages[-1][1].append(part)

    def expression(self, source: str) -> None:
        constant = re.fullmatch(r"""(["'])(.*)\1""", source, re.DOTALL)
        name = re.match(_NAME, source)
        if constant:
            self.add(constant[2])
        else:
            self.add(value_of(name[0], self._values) if name else Slot(source))

    def tag(self, source: str) -> None:
        word, _, rest = source.partition(" ")
        if word == "for":
            self.add(Slot(rest.rpartition(" in ")[2].strip()))
            self._open.append(("for", True))
        elif word in ("macro", "call"):
            self._open.append((word, True))
        elif word == "set" and "=" not in rest:
            self._open.append(("set", True))
        elif word == "if":
            self._open.append(("if", not self._holds(rest)))
        elif word in ("elif", "else") and self._open and self._open[-1][0] in ("if", "taken"):
            name, hidden = self._open.pop()
            taken = not hidden or name == "taken"  # of an elif nothing is known: the first branch or the else stands
            self._open.append(("taken" if taken else "if", taken or word == "elif"))
        elif word == "chat":
            role = re.search(r"""role\s*=\s*["'](\w+)["']""", rest)
            self.messages.append((role[1] if role else "human", []))
        elif word == "endchat":
            self.messages.append(("human", []))
        elif word.startswith("end") and self._open and self._open[-1][0].replace("taken", "if") == word[3:]:
            self._open.pop()

    def _holds(self, condition: str) -> bool:
        negated = condition.startswith("not ")
        name = condition.removeprefix("not ").strip()
        if name in self._values:
            return bool(self._values[name]) != negated
        return not negated
