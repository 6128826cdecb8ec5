"""Read and rewrite Python source by its syntax tree (libcst): every byte outside the touched statements stays."""

import ast
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NoReturn, TypeVar

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider

from glmtrt_helpers.checkpoints.python_source import ADVICE, parse_source, too_deep
from glmtrt_helpers.core.errors import WorkbookError

_Node = TypeVar("_Node", bound=cst.CSTNode)


@dataclass(frozen=True, order=True)
class Site:
    """A place in a source: line from 1, and the text of that line."""

    line: int
    text: str


@dataclass
class Edits:
    """Changes to make, by nodes of the unchanged tree.

    rewrites: how a node is replaced, innermost first. dropped: statements to remove. unwrapped: branches to replace by
    their body. Comments of dropped and unwrapped statements pass to the statement after them.
    """

    rewrites: dict[cst.CSTNode, Callable[[Any], cst.CSTNode]] = field(default_factory=dict)
    dropped: set[cst.CSTNode] = field(default_factory=set)
    unwrapped: set[cst.CSTNode] = field(default_factory=set)


class Source:
    """Parsed source. Raises WorkbookError for what is not Python, and for what libcst cannot write back unchanged."""

    def __init__(self, code: str):
        # libcst drops a byte order mark, and some white space at the end.
        self._mark = "\ufeff" if code.startswith("\ufeff") else ""
        text = code.removeprefix("\ufeff").rstrip()
        self._end = code[len(self._mark) + len(text) :]
        self._lines = re.split(r"\r\n|\r|\n", text)
        parse_source(text)  # refuses what libcst's parser, which has no bound, would crash on
        try:
            self.module = cst.parse_module(text)
            self._positions = MetadataWrapper(self.module, unsafe_skip_copy=True).resolve(PositionProvider)
        except cst.ParserSyntaxError as error:
            raise WorkbookError(f"line {error.raw_line}: libcst cannot parse this source: {ADVICE}.") from None
        except RecursionError:  # to libcst a long row of strings is deep, too
            raise too_deep() from None
        if self.module.code != text:
            raise WorkbookError(f"this source has control characters that cannot be kept byte for byte: {ADVICE}.")
        self._children: dict[cst.CSTNode, list[cst.CSTNode]] = {}
        self._parents: dict[cst.CSTNode, cst.CSTNode] = {}
        waiting: list[cst.CSTNode] = [self.module]
        while waiting:
            node = waiting.pop()
            self._children[node] = list(node.children)
            self._parents |= dict.fromkeys(self._children[node], node)
            waiting += self._children[node]

    def find(self, kind: type[_Node], inside: cst.CSTNode | None = None) -> list[_Node]:
        """All nodes of a kind, `inside` itself included, in the order of the source."""
        nodes: list[_Node] = []
        waiting = [inside or self.module]
        while waiting:
            node = waiting.pop()
            if isinstance(node, kind):
                nodes.append(node)
            waiting += reversed(self._children[node])
        return nodes

    def around(self, node: cst.CSTNode) -> Iterator[cst.CSTNode]:
        """The nodes around a node, from the inside out."""
        while node in self._parents:
            node = self._parents[node]
            yield node

    def names(self, inside: cst.CSTNode) -> set[str]:
        """Every name that occurs in a node."""
        return {name.value for name in self.find(cst.Name, inside)}

    def site(self, node: cst.CSTNode) -> Site:
        """Where a node begins."""
        line = self._positions[node].start.line
        return Site(line, self._lines[line - 1].strip())

    def refuse(self, node: cst.CSTNode, why: str) -> NoReturn:
        """Raise WorkbookError: line, what is wrong there, and what to do."""
        site = self.site(node)
        raise WorkbookError(f"line {site.line}: {why} ({site.text}): {ADVICE}.")

    def rewritten(self, edits: Edits) -> str:
        """The source with the edits made."""
        return self._mark + cst.ensure_type(self.module.visit(_Rewriter(edits)), cst.Module).code + self._end


@lru_cache(maxsize=8)
def parse(code: str) -> Source:
    """The parsed source; cached, because one source is inspected several times."""
    return Source(code)


class _Rewriter(cst.CSTTransformer):
    def __init__(self, edits: Edits):
        super().__init__()
        self.edits = edits

    def on_leave(self, original_node: Any, updated_node: Any) -> Any:
        updated_node = super().on_leave(original_node, updated_node)
        rewrite = self.edits.rewrites.get(original_node)
        return rewrite(updated_node) if rewrite else updated_node

    def leave_IndentedBlock(
        self, original_node: cst.IndentedBlock, updated_node: cst.IndentedBlock
    ) -> cst.IndentedBlock:
        body: list[Any] = []
        carried: list[cst.EmptyLine] = []  # comments that lost their statement
        for before, statement in zip(original_node.body, updated_node.body, strict=True):
            kept: list[Any] = [statement]
            after: list[cst.EmptyLine] = []
            if before in self.edits.dropped:
                kept, after = [], _leading_lines(statement)
            elif before in self.edits.unwrapped:
                kept, after = _unwrap(cst.ensure_type(statement, cst.If))
            if kept:
                kept[0] = kept[0].with_changes(leading_lines=[*carried, *_leading_lines(kept[0])])
                carried = []
            body, carried = body + kept, carried + after
        return updated_node.with_changes(body=body, footer=[*carried, *updated_node.footer])


def _unwrap(branch: cst.If) -> tuple[list[Any], list[cst.EmptyLine]]:
    """The statements of a branch under the comments that stood above them, and the comments at its end."""
    suite = branch.body
    if isinstance(suite, cst.SimpleStatementSuite):
        return [cst.SimpleStatementLine(suite.body, branch.leading_lines, suite.trailing_whitespace)], []
    block = cst.ensure_type(suite, cst.IndentedBlock)
    beside = [cst.EmptyLine(comment=block.header.comment)] if block.header.comment else []
    leading = [*branch.leading_lines, *beside]
    if not block.body:  # everything in it was dropped
        return [], [*leading, *block.footer]
    first = block.body[0].with_changes(leading_lines=[*leading, *_leading_lines(block.body[0])])
    return [first, *block.body[1:]], [*block.footer]


def _leading_lines(statement: cst.CSTNode) -> list[cst.EmptyLine]:
    return [*getattr(statement, "leading_lines", ())]


def text(node: cst.CSTNode) -> str:
    """An expression in one fixed layout, for comparisons."""
    return ast.unparse(ast.parse(f"({cst.Module([]).code_for_node(node)}\n)", mode="eval"))


def callee(call: cst.BaseExpression) -> str:
    """The last name of what is called: `embedding` for F.embedding(...), "" for anything but a call."""
    if not isinstance(call, cst.Call):
        return ""
    func = call.func.attr if isinstance(call.func, cst.Attribute) else call.func
    return func.value if isinstance(func, cst.Name) else ""


def keyword(arg: cst.Arg) -> str:
    """The keyword of an argument, "" for a positional one."""
    return arg.keyword.value if arg.keyword else ""


def parameters(function: cst.FunctionDef) -> set[str]:
    """Names of a function's parameters."""
    return {parameter.name.value for parameter in (*function.params.params, *function.params.kwonly_params)}


def begin_with(function: cst.FunctionDef, line: str) -> cst.FunctionDef:
    """Put a statement first in a function, after its docstring."""
    block = cst.ensure_type(function.body, cst.IndentedBlock)
    at = 0 if function.get_docstring() is None else 1
    return function.with_changes(
        body=block.with_changes(body=[*block.body[:at], cst.parse_statement(line), *block.body[at:]])
    )
