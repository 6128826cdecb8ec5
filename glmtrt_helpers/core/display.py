"""Tables and the style of plots, for notebooks and the command line; Chinese text shows in both."""

from __future__ import annotations

import importlib
import importlib.util
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from glmtrt_helpers.core.text import as_html, printable

# One colour for one meaning in every plot of the workbook, readable without colour vision too.
SEEN, HIDDEN, PADDING, BEFORE = "#dbe9f6", "#2f4b6e", "#e9e4da", "#8c8c8c"
PREFILL, DECODE, ALARM = "#3b75af", "#e08214", "#c0392b"
# Characters in a row of a table in a notebook, and in a column that is not folded.
PAGE, SHORT = 115, 18
_NUMBER = re.compile(r"[-+]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?%?")


def use_workbook_style() -> None:
    """Set matplotlib up: Noto Sans SC where the font has no Chinese, plain axes, and small PNGs in a notebook."""
    spec = importlib.util.find_spec("zhplot")
    if spec and spec.origin:
        font_manager.fontManager.addfont(str(Path(spec.origin).parent / "fonts" / "NotoSansSC-Regular.ttf"))
    matplotlib.rcParams.update(
        {
            "font.family": ["DejaVu Sans", "Noto Sans SC"],
            "axes.unicode_minus": False,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "figure.dpi": 90,
            "figure.constrained_layout.use": True,
            "svg.hashsalt": "glmtrt",
            "text.parse_math": False,  # a prompt, a token or a name may hold two dollar signs
        }
    )
    _use_small_pngs()


def _use_small_pngs() -> None:
    """In a notebook, show figures as PNGs of 64 colours: a quarter of the bytes, and no visible difference."""
    from IPython import get_ipython  # slow to import, and plots are drawn without it too

    shell = get_ipython()
    if shell is not None:
        plt.get_fignums()  # loads the notebook's backend, which sets a formatter of its own
        importlib.import_module("matplotlib_inline.backend_inline")
        shell.display_formatter.formatters["image/png"].for_type(Figure, _png)


def _png(figure: Figure) -> bytes:
    from PIL import Image  # needed in a notebook only

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", bbox_inches="tight")
    rare_too = Image.Quantize.MAXCOVERAGE  # the default would give the colour of a small marker to its neighbours
    picture = Image.open(full).convert("RGB").quantize(64, method=rare_too, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue()


def plain_ticks(*along: Axis) -> None:
    """Numbers along a logarithmic axis as plain text: matplotlib's are formulas, which this style shows as written."""
    for axis in along:
        axis.set_major_formatter(lambda value, _: f"{value:,g}")
        axis.set_minor_formatter(NullFormatter())


class _Plain(Console):
    """A console on which strings are text: no markup, no names of emoji, nothing that steers a terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(printable(text), **{**options, "markup": False, "emoji": False})


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "") -> None:
    """Print a table, as text in a terminal and as HTML in a notebook; columns of numbers are aligned right."""
    numeric = [bool(rows) and all(_is_number(row[i]) for row in rows) for i in range(len(columns))]
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for column, number in zip(columns, numeric, strict=True):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    cells = [[format_cell(cell) for cell in row] for row in rows]
    for row in cells:
        table.add_row(*row)
    if _Plain().is_jupyter:
        from IPython.display import display  # only there in a notebook

        text = io.StringIO()
        _Plain(file=text, width=PAGE, force_jupyter=False).print(table)
        views = {"text/html": _html_table(columns, cells, numeric, title), "text/plain": text.getvalue()}
        display(views, raw=True)
    else:
        _Plain().print(table)


def _is_number(cell: Any) -> bool:
    """Also one that is formatted already, such as `12.5%`, and an empty cell, where there is none."""
    if isinstance(cell, str):
        return not cell or _NUMBER.fullmatch(cell) is not None
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def _html_table(columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool], title: str) -> str:
    """A table that the browser aligns: one drawn with characters is crooked where it holds Chinese text."""
    widths = [max(len(row[i]) for row in (columns, *cells)) for i in range(len(columns))]
    # In a table wider than the page, only the wide columns are folded.
    spaces = ["pre" if sum(widths) > PAGE and width <= SHORT else "pre-wrap" for width in widths]
    align = [
        f' style="text-align:{"right" if number else "left"};white-space:{space}"'
        for number, space in zip(numeric, spaces, strict=True)
    ]

    def line(tag: str, row: Sequence[str]) -> str:
        filled = (f"<{tag}{style}>{as_html(cell)}</{tag}>" for cell, style in zip(row, align, strict=True))
        return f"<tr>{''.join(filled)}</tr>"

    caption = f'<caption style="text-align:left">{as_html(title)}</caption>' if title else ""
    body = "\n".join(line("td", row) for row in cells)
    return (
        f'<table style="margin-left:0">{caption}\n<thead>{line("th", columns)}</thead>\n<tbody>{body}</tbody></table>'
    )


def print_rich(*tables: Any) -> None:
    """Print anything that rich can render, as text in a terminal and as HTML in a notebook."""
    _Plain().print(*tables)


def format_cell(cell: Any) -> str:
    """The text of a table cell: ints with thousands separators, floats with three digits, yes or no for booleans."""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.3g}"
    return str(cell)
