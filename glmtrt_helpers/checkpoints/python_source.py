"""Python source read without running it: as text, as a syntax tree, and where it casts to half precision."""

import ast
import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.records import check_regular

DEEPEST = 100  # levels of the syntax tree; upstream has 17, and parsers crash at some thousand
_AGAIN = "copy it from the checkpoint again"
_HALF = {"half", "float16", "HalfTensor"}  # torch's names for it
_HALF_TYPES = {"torch.HalfTensor", "torch.cuda.HalfTensor"}  # what Tensor.type takes as a string
_TAKE_DTYPE = {"to", "type", "softmax", "log_softmax"}
# Where upstream rounds inv_freq, and what only P-tuning calls.
_NOT_FORWARD = {"__init__", "get_prompt"}


def read_source(path: Path) -> str:
    """The text of a source. Raises WorkbookError where it is no regular file or not UTF-8."""
    check_regular(path)
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise WorkbookError(f"{path} is not UTF-8 text ({error.reason}): {_AGAIN}.") from None


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Put the file's name before what was wrong in it."""
    try:
        yield
    except WorkbookError as error:
        raise WorkbookError(f"{path}: {error}") from None


def parse_source(code: str) -> ast.Module:
    """The syntax tree of a source. Raises WorkbookError, with the line, for what is not Python or nested too deep."""
    code = code.removeprefix("\ufeff")
    if "\0" in code:
        line = code[: code.index("\0")].count("\n") + 1
        raise WorkbookError(f"line {line}: this is not Python source (a null byte): {_AGAIN}.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in strings
            tree = ast.parse(code)
    except SyntaxError as error:
        raise WorkbookError(f"line {error.lineno}: this is not Python source ({error.msg}): {_AGAIN}.") from None
    except (RecursionError, MemoryError):  # of the parser's own stack
        raise too_deep() from None
    level: list[ast.AST] = [tree]
    for _ in range(DEEPEST):
        level = [child for node in level for child in ast.iter_child_nodes(node)]
        if not level:
            return tree
    raise too_deep(f"line {next((node.lineno for node in level if isinstance(node, ast.expr | ast.stmt)), 1)}: ")


def too_deep(where: str = "") -> WorkbookError:
    """The error for source that is nested too deep."""
    return WorkbookError(f"{where}this source is nested more than {DEEPEST} levels deep and is not parsed: {_AGAIN}.")


def half_casts(tree: ast.Module) -> list[ast.Call]:
    """Casts to fp16 that a forward runs whatever the model's dtype, in the order of the source.

    Those under a condition that names fp16 are not such.
    """
    visitor = _HalfCasts()
    visitor.visit(tree)
    visitor.found.clear()
    visitor.visit(tree)  # again: a function may stand above the name for fp16 that it uses
    return visitor.found


class _HalfCasts(ast.NodeVisitor):
    """A cast is `x.half()`, or a method that takes a dtype and gets one of torch's names for fp16."""

    def __init__(self) -> None:
        self.found: list[ast.Call] = []
        self._in_function = False
        self._torch: set[str] = set()  # names that this source has for torch, and for its fp16
        self._half: set[str] = set()

    def visit_Import(self, node: ast.Import) -> None:
        self._torch |= {alias.asname or "torch" for alias in node.names if alias.name.partition(".")[0] == "torch"}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.module and node.module.partition(".")[0] == "torch":
            self._half |= {alias.asname or alias.name for alias in node.names if alias.name in _HALF}

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {ast.unparse(target) for target in node.targets}
        self._half = self._half | names if self._is_half(node.value) else self._half - names
        self.generic_visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.Lambda) -> None:
        outside, self._in_function = self._in_function, getattr(node, "name", "") not in _NOT_FORWARD
        names = self._half
        self._half = names - {part.arg for part in ast.walk(node.args) if isinstance(part, ast.arg)}
        self.generic_visit(node)
        self._in_function = outside
        self._half = names | {name for name in self._half if name.startswith("self.")}

    visit_Lambda = visit_FunctionDef

    def visit_If(self, node: ast.If | ast.IfExp) -> None:
        if any(self._is_half(part) for part in ast.walk(node.test)):
            others = node.orelse if isinstance(node, ast.If) else [node.orelse]
            for part in others:
                self.visit(part)
        else:
            self.generic_visit(node)

    visit_IfExp = visit_If

    def visit_Call(self, node: ast.Call) -> None:
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        values = [*node.args, *(keyword.value for keyword in node.keywords)]
        cast = name in _TAKE_DTYPE and any(map(self._is_half, values))
        if self._in_function and (cast or (name == "half" and isinstance(node.func, ast.Attribute))):
            self.found.append(node)
        self.generic_visit(node)

    def _is_half(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Attribute) and node.attr in _HALF:
            return ast.unparse(node.value).partition(".")[0] in self._torch
        if isinstance(node, ast.Constant):
            return node.value in _HALF_TYPES
        return isinstance(node, ast.Name | ast.Attribute) and ast.unparse(node) in self._half
