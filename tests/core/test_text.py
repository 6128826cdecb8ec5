"""What comes from outside is shown as text."""

import builtins
import io
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from support.command_line import InProcess

from glmtrt_helpers.core.display import print_rich, print_table
from glmtrt_helpers.core.text import as_html, printable, shorten, tell
from glmtrt_helpers.graphs.summary import summarize

HOSTILE = "a\x1b[31m\x9b2J\x1b]0;t\x07 \u202eb\u2066\udcff [red]c[/red] :smile:"
SHOWN = r"a\x1b[31m\x9b2J\x1b]0;t\x07 \u202eb\u2066\udcff [red]c[/red] :smile:"


def test_what_steers_a_terminal_is_spelt_out() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("over\rwritten\u2028\x7f\x00\u061c") == r"over\rwritten\u2028\x7f\x00\u061c"
    text = "你好，\n\t👩‍👩‍👧 ❤️ 🇨🇳 naïve עברית العربية ไทย"
    assert printable(text) == text and printable(printable(HOSTILE)) == SHOWN
    assert as_html("<b>\x1b") == r"&lt;b&gt;\x1b"


def test_pieces_of_a_sequence_are_as_harmless_as_the_whole() -> None:
    assert "".join(printable(piece) for piece in HOSTILE) == SHOWN


def test_tables_show_it_as_text(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print_table([f"column {HOSTILE}"], [(HOSTILE,)], f"title {HOSTILE}")
    assert capsys.readouterr().out.count(SHOWN) == 3
    views: dict[str, str] = {}
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda data, raw: views.update(data))
    print_table([f"<column> {HOSTILE}"], [(HOSTILE,)], f"<title> {HOSTILE}")
    assert views["text/html"].count(SHOWN) == views["text/plain"].count(SHOWN) == 3
    assert "&lt;title&gt;" in views["text/html"]


def test_the_names_in_a_graph_are_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    name, shown = HOSTILE.replace("\udcff", ""), SHOWN.replace(r"\udcff", "")
    edges = [helper.make_tensor_value_info(edge, TensorProto.FLOAT, [name]) for edge in (name, "y")]
    graph = helper.make_graph([helper.make_node(name, [name], ["y"])], "graph", edges[:1], edges[1:])
    path = tmp_path / "a[bold]\x1b.onnx"
    onnx.save(helper.make_model(graph, producer_name=name), path)
    print_rich(summarize(path))
    out = capsys.readouterr().out
    # The producer, the node's type, the input, and one dimension of each side.
    assert out.count(shown) == 5 and r"a[bold]\x1b.onnx" in out and not set("\x1b\x9b\u202e") & set(out)


def test_an_error_and_a_note_are_text(glmtrt: InProcess, tmp_path: Path) -> None:
    code, (line,) = glmtrt("inspect", tmp_path / "x\n\x1b[2J\udcff")
    assert code == 1 and r"x\n\x1b[2J\udcff is missing" in line
    stream = io.StringIO()
    tell(HOSTILE, stream)
    assert stream.getvalue() == SHOWN + "\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("short\n  text", "short text"),
        ("exactly twenty chars", "exactly twenty chars"),
        ("a sentence that is cut", "a sentence that ..."),
        ("onewordthatislongerthanthat", "onewordthatislon ..."),
    ],
)
def test_a_long_text_is_cut_after_a_word(text: str, shown: str) -> None:
    assert shorten(text, 20) == shown and len(shown) <= 20


def test_a_notebook_is_told_on_standard_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its standard error is a red box. A command's standard output is its result, and stays so."""
    tell("a note")
    assert capsys.readouterr() == ("", "a note\n")
    monkeypatch.setattr(builtins, "get_ipython", lambda: None, raising=False)
    tell("a note")
    assert capsys.readouterr() == ("a note\n", "")
