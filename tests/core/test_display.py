"""Tables read the same in a terminal and in a notebook."""

import io

import matplotlib
import pytest

from glmtrt_helpers.chat.plots import draw_choice
from glmtrt_helpers.core.display import format_cell, print_table, use_workbook_style


def test_cells_are_formatted_by_kind() -> None:
    cells = [format_cell(cell) for cell in (True, False, 1234567, 0.000123456, "你好")]
    assert cells == ["yes", "no", "1,234,567", "0.000123", "你好"]


def test_a_notebook_gets_html_and_text(monkeypatch: pytest.MonkeyPatch) -> None:
    views: dict[str, str] = {}
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda data, raw: views.update(data))
    print_table(["piece", "bytes"], [("<n>", 1234), ("你好", 6)], "Pieces")
    assert "<caption" in views["text/html"] and "&lt;n&gt;" in views["text/html"] and "你好" in views["text/html"]
    assert '<td style="text-align:right;white-space:pre-wrap">1,234</td>' in views["text/html"]
    assert '<td style="text-align:left;white-space:pre-wrap">你好</td>' in views["text/html"]
    assert "Pieces" in views["text/plain"] and "1,234" in views["text/plain"]


def test_a_terminal_gets_text(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(["piece", "bytes"], [("你好", 6)])
    text = capsys.readouterr().out
    assert "piece" in text and "你好" in text and "<td" not in text


def test_a_plot_gets_text() -> None:
    """Dollar signs are no formula, and what no font draws is no error."""
    with matplotlib.rc_context():
        use_workbook_style()
        figure = draw_choice(["$$", r"$\frac$", "\ud800", "你"], [0.1] * 4, [0.2] * 4, "$$")
        figure.savefig(io.BytesIO())
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["$$", r"$\frac$", r"\ud800", "你"]
