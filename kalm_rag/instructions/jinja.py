"""Jinja templates to messages, over the syntax tree of jinja2's own parser. Nothing is compiled, rendered or called.

jinja2 is imported when the first such template comes. Roles are those that the template names itself, in LlamaIndex's
blocks ``{% chat role="system" %}``; all else is the human's.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from kalm_rag.errors import InputError
from kalm_rag.instructions.pieces import Piece, Slot, Values, check_length, fill, value_of

if TYPE_CHECKING:
    from jinja2 import Environment, nodes
    from jinja2.parser import Parser

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "lteq": operator.le,
    "gt": operator.gt,
    "gteq": operator.ge,
    "in": lambda value, group: value in group,
    "notin": lambda value, group: value not in group,
}
_TESTS: dict[str, Callable[[Any], bool]] = {
    "defined": lambda value: True,
    "undefined": lambda value: False,
    "none": lambda value: value is None,
    "true": lambda value: value is True,
    "false": lambda value: value is False,
    "string": lambda value: isinstance(value, str),
    "mapping": lambda value: isinstance(value, Mapping),
}
_FILTERS: dict[str, Callable[[str], str]] = {
    "lower": str.lower,
    "upper": str.upper,
    "trim": str.strip,
    "string": str,
}


class TemplateSyntaxError(InputError):
    """A template that is not of the format it was read as."""


class _UnknownError(Exception):
    """An expression whose value hangs on what the app fills in later."""


def jinja_messages(template: str, values: Values) -> list[tuple[str, list[Piece]]]:
    """Pieces of a Jinja template, by role.

    Loops are documents or history, so each is a slot. A condition that partial variables and constants decide is
    decided; else its first branch is kept (of ``if not x`` the other one). Comments, macros and assignments leave
    nothing; a name that is assigned a constant has it from there on.

    Raises:
        TemplateSyntaxError: If jinja2 can't parse it, or it is nested too deeply.
        InputError: If a partial variable's callable fails.
    """
    reader = _TemplateReader(values)
    try:
        reader.read(_parse(template))
    except RecursionError as err:
        raise TemplateSyntaxError("the Jinja template is nested too deeply to be read.") from err
    return [(role, pieces) for role, pieces in reader.messages if pieces]


def _parse(template: str) -> list[nodes.Node]:
    from jinja2 import TemplateError

    try:
        return _environment().parse(template).body
    except (TemplateError, ValueError, OverflowError) as err:  # jinja2 lets int() and float() fail on their own
        line = getattr(err, "lineno", None)
        where = f" in line {line}" if line is not None else ""
        raise TemplateSyntaxError(
            f"the template is no Jinja{where}: {err}. Mend it, or give Instructions(system=..., task=...)."
        ) from err


class _TemplateReader:
    """Walks over the statements of a Jinja template and gathers what it shows."""

    def __init__(self, values: Values) -> None:
        from jinja2 import nodes

        self.messages: list[tuple[str, list[Piece]]] = [("human", [])]
        self._values = dict(values)
        self._nodes = nodes
        self._chars = 0

    def read(self, body: Sequence[nodes.Node]) -> None:
        """Read statements one after the other."""
        nodes = self._nodes
        for node in body:
            if isinstance(node, nodes.Output):
                for shown in node.nodes:
                    self._show(shown)
            elif isinstance(node, nodes.If):
                self.read(self._branch(node))
            elif isinstance(node, nodes.For):
                self._add(Slot(self._name(node.iter)))
            elif isinstance(node, nodes.Assign):
                self._assign(node)
            elif isinstance(node, nodes.CallBlock):
                self._message(node)
            elif isinstance(node, nodes.With | nodes.Block | nodes.FilterBlock | nodes.Scope):
                self.read(node.body)

    def _message(self, node: nodes.CallBlock) -> None:
        if not isinstance(node.call.node, self._nodes.ExtensionAttribute):
            return  # a macro's call
        (role,) = node.call.args
        self.messages.append((str(role.value) if isinstance(role, self._nodes.Const) else "human", []))
        self.read(node.body)
        self.messages.append(("human", []))

    def _add(self, piece: Piece) -> None:
        if piece != "":
            self.messages[-1][1].append(piece)
            self._chars = check_length(self._chars + (len(piece) if isinstance(piece, str) else 0))

    def _show(self, node: nodes.Node) -> None:
        """What ``{{ node }}`` leaves: text where it is known, else a slot."""
        nodes = self._nodes
        if isinstance(node, nodes.TemplateData):
            self._add(node.data)
        elif isinstance(node, nodes.Const):
            self._add(str(node.value))
        elif isinstance(node, nodes.Concat):
            for inner in node.nodes:
                self._show(inner)
        elif isinstance(node, nodes.Add):
            self._show(node.left)
            self._show(node.right)
        elif isinstance(node, nodes.CondExpr):
            chosen = node.expr1 if self._holds(node.test, first=True) else node.expr2
            if chosen is not None:
                self._show(chosen)
        elif isinstance(node, nodes.Filter):
            self._show_filtered(node)
        else:
            self._add(fill(self._name(node), self._values))

    def _show_filtered(self, node: nodes.Filter) -> None:
        try:
            self._add(str(self._value(node)))
        except _UnknownError:
            bare: nodes.Node | None = node
            while isinstance(bare, self._nodes.Filter):
                bare = bare.node
            if bare is not None:
                self._show(bare)

    def _name(self, node: nodes.Node) -> str:
        """Dotted name of the variable in an expression, the first that stands in it; "" if there is none."""
        nodes = self._nodes
        if isinstance(node, nodes.Name):
            return str(node.name)
        if isinstance(node, nodes.Getattr):
            owner = self._name(node.node)
            return f"{owner}.{node.attr}" if owner else ""
        children = [*node.args, node.node] if isinstance(node, nodes.Call) else node.iter_child_nodes()
        return next((name for child in children if (name := self._name(child))), "")

    def _assign(self, node: nodes.Assign) -> None:
        if isinstance(node.target, self._nodes.Name):
            self._values.pop(node.target.name, None)
            if isinstance(node.node, self._nodes.Const):  # nothing that could grow: lists of lists of lists, say
                self._values[node.target.name] = node.node.value

    def _branch(self, node: nodes.If) -> list[nodes.Node]:
        """Body of the branch that stands; of an ``elif`` that nothing decides the ``else`` does."""
        if self._holds(node.test, first=True):
            return node.body
        return next((other.body for other in node.elif_ if self._holds(other.test, first=False)), node.else_)

    def _holds(self, test: nodes.Node, *, first: bool) -> bool:
        """Whether a condition is true; where nothing decides it, the first one is, unless it is negated."""
        try:
            return self._truth(test)
        except _UnknownError:
            return first and not isinstance(test, self._nodes.Not)

    def _value(self, node: nodes.Node) -> Any:  # noqa: ANN401 - whatever the app filled in
        """Value of an expression of names, constants, comparisons and simple tests and filters.

        No arithmetic, calls or attributes: a template may come from anywhere, and ``9 ** 9 ** 9`` is one.

        Raises:
            _UnknownError: If something in it is not known.
        """
        nodes = self._nodes
        if isinstance(node, nodes.Const):
            return node.value
        if isinstance(node, nodes.Name) and node.name in self._values:
            return value_of(node.name, self._values)
        if isinstance(node, nodes.List | nodes.Tuple):
            return [self._value(item) for item in node.items]
        if isinstance(node, nodes.Not):
            return not self._truth(node.node)
        if isinstance(node, nodes.And | nodes.Or):
            return self._both(node)
        if isinstance(node, nodes.Compare) and len(node.ops) == 1:
            return self._compare(node)
        if isinstance(node, nodes.Test) and node.name in _TESTS:
            return _TESTS[node.name](self._value(node.node))
        if isinstance(node, nodes.Filter) and node.name in _FILTERS and node.node is not None:
            value = self._value(node.node)
            return _FILTERS[node.name](value if isinstance(value, str) else str(value))
        raise _UnknownError

    def _truth(self, node: nodes.Node) -> bool:
        value = self._value(node)
        try:
            return bool(value)
        except Exception as err:  # an array, say
            raise _UnknownError from err

    def _both(self, node: nodes.And | nodes.Or) -> bool:
        """``and``, ``or``: one side may decide alone."""
        decides = isinstance(node, self._nodes.Or)
        unknown = False
        for side in (node.left, node.right):
            try:
                if self._truth(side) == decides:
                    return decides
            except _UnknownError:
                unknown = True
        if unknown:
            raise _UnknownError
        return not decides

    def _compare(self, node: nodes.Compare) -> bool:
        (other,) = node.ops
        left, right = self._value(node.expr), self._value(other.expr)
        try:
            return bool(_COMPARISONS[other.op](left, right))
        except Exception as err:  # 1 < "a": the app's own rendering would fail
            raise _UnknownError from err


@lru_cache(maxsize=1)
def _environment() -> Environment:
    """jinja2 with its own extensions and the blocks of LlamaIndex's rich templates."""
    from jinja2 import Environment, nodes
    from jinja2.ext import Extension

    class RoleBlocks(Extension):
        """``{% chat role="system" %} ... {% endchat %}`` as a call block whose argument is the role."""

        tags = {"chat"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Parser) -> nodes.Node:
            tag = next(parser.stream)
            role: nodes.Expr = nodes.Const("human")
            while parser.stream.current.type != "block_end":
                name = parser.stream.expect("name").value
                parser.stream.expect("assign")
                given = parser.parse_expression()
                role = given if name == "role" else role
            body = parser.parse_statements(("name:endchat",), drop_needle=True)
            return nodes.CallBlock(self.call_method("chat", [role]), [], [], body).set_lineno(tag.lineno)

    built_in = ("jinja2.ext.do", "jinja2.ext.loopcontrols")
    return Environment(extensions=[*built_in, RoleBlocks], keep_trailing_newline=True, autoescape=False)
