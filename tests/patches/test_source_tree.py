"""Rewriting keeps every byte outside the touched statements, in any layout that Python allows."""

import libcst as cst
import pytest

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.patches.source_tree import Edits, Source, begin_with, callee, text

LAYOUTS = {
    "as it is": lambda code: code,
    "CRLF": lambda code: code.replace("\n", "\r\n"),
    "BOM": lambda code: "\ufeff" + code,
    "BOM and CRLF": lambda code: "\ufeff" + code.replace("\n", "\r\n"),
    "tabs": lambda code: code.replace("    ", "\t"),
    "one space": lambda code: code.replace("    ", " "),
    "no line end at the end": lambda code: code.rstrip("\n"),
    "white space at the end": lambda code: code + "\n\n   \n",
    "white space at line ends": lambda code: code.replace(":\n", ":  \t\n"),
    "encoding line": lambda code: "# -*- coding: utf-8 -*-\n" + code,
}

BEFORE = '''\
"""模型。"""


def f(x):
    """Doc."""
    # above
    if x:  # beside

        # first
        y = (1 +
                2)

        z = """a
    b"""
        # last
    # after
    gone = x

    return y


def g(x): return x ;   # no block
'''
AFTER = BEFORE.replace(
    '''\
    # above
    if x:  # beside

        # first
        y = (1 +
                2)

        z = """a
    b"""
        # last
    # after
    gone = x

    return y
''',
    '''\
    x = 7
    # above
    # beside

    # first
    y = (1 +
            2)

    z = """a
    b"""
    # last
    # after

    return yes
''',
)


def edit(code: str) -> str:
    """Begin f with `x = 7`, unwrap the branch, drop `gone = x`, and return `yes`."""
    source, edits = Source(code), Edits()
    function = source.find(cst.FunctionDef)[0]
    edits.rewrites[function] = lambda node: begin_with(node, "x = 7")
    edits.unwrapped.add(source.find(cst.If)[0])
    edits.dropped.add(next(line for line in source.find(cst.SimpleStatementLine) if "gone" in source.names(line)))
    returned = source.find(cst.Return, function)[0].value
    assert returned is not None
    edits.rewrites[returned] = lambda name: name.with_changes(value="yes")
    return source.rewritten(edits)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_touched_statements_change(layout: str) -> None:
    lay_out = LAYOUTS[layout]
    assert edit(lay_out(BEFORE)) == lay_out(AFTER)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_edits_nothing_changes(layout: str) -> None:
    code = LAYOUTS[layout](BEFORE)
    assert Source(code).rewritten(Edits()) == code


def test_mixed_line_ends_stay_mixed() -> None:
    code = "a = 1\r\nb = 2\nc = 3\r\n"
    source, edits = Source(code), Edits()
    edits.rewrites[source.find(cst.Integer)[1]] = lambda node: node.with_changes(value="9")
    assert source.rewritten(edits) == "a = 1\r\nb = 9\nc = 3\r\n"


def test_a_branch_on_one_line_becomes_its_line() -> None:
    source, edits = Source("def f(x):\n  # why\n  if x: a = 1; b = 2  # both\n  return a\n"), Edits()
    edits.unwrapped.add(source.find(cst.If)[0])
    assert source.rewritten(edits) == "def f(x):\n  # why\n  a = 1; b = 2  # both\n  return a\n"


def test_comments_of_a_last_statement_stay_in_its_block() -> None:
    source, edits = Source("def f(x):\n    pass\n    if x:\n        y = 1\n        # end\n\nz = 2\n"), Edits()
    edits.unwrapped.add(source.find(cst.If)[0])
    assert source.rewritten(edits) == "def f(x):\n    pass\n    y = 1\n    # end\n\nz = 2\n"


def test_a_branch_that_lost_its_statements_leaves_its_comments() -> None:
    code = "def f(x):\n    # one\n    if x:\n        # two\n        y = 1\n    # three\n    return x\n"
    source, edits = Source(code), Edits()
    edits.unwrapped.add(source.find(cst.If)[0])
    edits.dropped.add(source.find(cst.SimpleStatementLine)[0])
    assert source.rewritten(edits) == "def f(x):\n    # one\n    # two\n    # three\n    return x\n"


def test_sites_count_lines_as_an_editor_does() -> None:
    """A form feed or U+2028 in a string ends no line; the byte order mark is not in the first."""
    source = Source('\ufeffa = "x\u2028y\\f"\r\n\r\n# c\r\ndef f():\r\n    return 1\r\n')
    assert source.site(source.find(cst.FunctionDef)[0]).line == 4
    assert source.site(source.find(cst.Return)[0]).text == "return 1"


@pytest.mark.parametrize(("code", "line"), [("x = 1\ny = (2,\n", 2), ("print 'hello'\n", 1), ("a = 1\n  b = 2\n", 2)])
def test_refuses_what_is_not_python_with_its_line(code: str, line: int) -> None:
    with pytest.raises(WorkbookError, match=rf"line {line}: this is not Python source"):
        Source(code)


@pytest.mark.parametrize("code", ["\x0cx = 1\n", "x = 1\0\n"])
def test_refuses_what_cannot_be_written_back(code: str) -> None:
    with pytest.raises(WorkbookError, match=r"cannot be kept byte for byte|not Python"):
        Source(code)


@pytest.mark.parametrize(
    "code",
    [
        f"x = {'not ' * 200}1\n",
        f"x = {'+'.join('1' * 9000)}\n",
        "x = 'a'" + " 'b'" * 2000 + "\n",
    ],
)
def test_refuses_what_is_nested_too_deep(code: str) -> None:
    """Also a row of strings, which is deep for libcst alone."""
    with pytest.raises(WorkbookError, match="nested more than 100 levels deep"):
        Source(code)


def test_expressions_compare_in_one_layout() -> None:
    source = Source("x = not ( (mask==0) . all( ) ) if True else (  # why\n  F . embedding( a,b ))\n")
    assert text(source.find(cst.UnaryOperation)[0]) == "not (mask == 0).all()"
    assert [callee(call) for call in source.find(cst.Call)] == ["all", "embedding"]
