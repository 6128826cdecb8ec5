"""Tables read the same in a terminal and in a notebook."""

import pytest

from glmtrt_helpers.core.display import format_cell, print_table


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
