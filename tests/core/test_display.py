"""Tables read the same in a terminal and in a notebook."""

import io

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image

from glmtrt_helpers.chat.plots import draw_choice
from glmtrt_helpers.core import display
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


def test_a_wide_table_folds_only_its_wide_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    views: dict[str, str] = {}
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setattr("IPython.display.display", lambda data, raw: views.update(data))
    print_table(["GPU", "verdict"], [("RTX 4090", "long " * 40)])
    assert '<td style="text-align:left;white-space:pre">RTX 4090</td>' in views["text/html"]
    assert '<td style="text-align:left;white-space:pre-wrap">long ' in views["text/html"]


def test_a_small_marker_keeps_its_colour() -> None:
    """Few pixels, beside an area of many shades of one other colour."""
    figure, axis = plt.subplots()
    axis.imshow(np.linspace(0, 1, 10_000).reshape(100, 100), cmap="Blues")
    axis.plot([50], [50], marker="*", color=display.DECODE)
    with Image.open(io.BytesIO(display._png(figure))) as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3).astype(int)
    plt.close(figure)
    wanted = [int(display.DECODE[i : i + 2], 16) for i in (1, 3, 5)]
    assert abs(pixels - wanted).max(axis=1).min() <= 12


def test_columns_of_numbers_are_aligned_right(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where they are formatted already or some are missing; what only contains a number is text."""
    columns = ["share", "seconds", "name", "version"]
    print_table(columns, [("88.7%", 59.3, "1 layer", "1.6.1"), ("4.8%", "", "12", "2")])
    line = next(line for line in capsys.readouterr().out.splitlines() if "4.8%" in line)
    assert line == "│  4.8% │         │ 12      │ 2       │"


@pytest.mark.parametrize(
    ("cell", "number"),
    [("12", True), ("-0.051", True), ("1.0e-05", True), ("1,234", True), ("9%", True), (True, False), ("85, 86", False),
     ("1.6.1", False), ("2 x 4", False), ("yes", False)],
)  # fmt: skip
def test_what_reads_as_a_number(cell: object, number: bool) -> None:
    assert display._is_number(cell) is number


def test_a_logarithmic_axis_has_plain_numbers() -> None:
    """The style shows a formula as it is written, and matplotlib's powers of ten are formulas."""
    with matplotlib.rc_context():
        use_workbook_style()
        figure, axis = plt.subplots()
        axis.plot([1, 1000], [1e-5, 1e-1])
        axis.set_xscale("log")
        axis.set_yscale("log")
        display.plain_ticks(axis.xaxis, axis.yaxis)
        figure.canvas.draw()
        labels = [label.get_text() for along in (axis.xaxis, axis.yaxis) for label in along.get_ticklabels()]
        plt.close(figure)
    assert {"1,000", "0.001"} <= set(labels) and not any("$" in label for label in labels)


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
