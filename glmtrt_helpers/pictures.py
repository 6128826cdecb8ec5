"""Tables and pictures that the notebooks and the command line share. Chinese shows in all of them."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from glmtrt_helpers.inputs import Call

# One colour for one meaning, in every picture of the workbook; readable without colour vision, too.
SEEN, HIDDEN, PADDING = "#dbe9f6", "#2f4b6e", "#e9e4da"
PREFILL, DECODE, ALARM = "#3b75af", "#e08214", "#c0392b"


def use_workbook_style() -> None:
    """Set matplotlib up: a font that falls back to Noto Sans SC for Chinese, quiet axes, figures of a page's width."""
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
        }
    )


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "", console: Any = None) -> None:
    """Print a table, as text in a terminal and as HTML in a notebook; numbers are set flush right."""
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for index, column in enumerate(columns):
        number = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*(format_cell(cell) for cell in row))
    (console or Console()).print(table)


def print_rich(*tables: Any) -> None:
    """Print anything that rich can draw, as text in a terminal and as HTML in a notebook."""
    Console().print(*tables)


def format_cell(cell: Any) -> str:
    """A table cell: ints with thousands marks, floats with three digits, yes and no for booleans."""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.3g}"
    return str(cell)


def draw_mask(flat: Mapping[str, torch.Tensor], pieces: Sequence[Sequence[str]]) -> Figure:
    """The attention mask of each row of a batch: who (down) may see whom (across).

    flat: inputs of one call. pieces: per row, the text of every key column (past first), for the labels.
    """
    mask = flat["attention_mask"]
    batch, _, sequence, total = mask.shape
    size = 0.22 * max(total, 8)
    figure, axes = plt.subplots(1, batch, figsize=(batch * (size + 1.2), size + 1.0), squeeze=False)
    for row, axis in enumerate(axes[0]):
        padding = torch.tensor([piece == "<pad>" for piece in pieces[row]])
        picture = mask[row, 0].int() + (mask[row, 0] & padding[None, :]).int()
        axis.imshow(picture.numpy(), cmap=ListedColormap([SEEN, HIDDEN, PADDING]), vmin=0, vmax=2, aspect="equal")
        axis.set_xticks(range(total), [_label(piece) for piece in pieces[row]], rotation=90, fontsize=8)
        axis.set_yticks(range(sequence), [_label(piece) for piece in pieces[row][total - sequence :]], fontsize=8)
        axis.set_xticks(np.arange(-0.5, total), minor=True)
        axis.set_yticks(np.arange(-0.5, sequence), minor=True)
        axis.grid(which="minor", color="white", linewidth=0.6)
        axis.tick_params(which="both", length=0)
        axis.set_title(f"row {row}: light = seen, dark = hidden")
    plt.close(figure)
    return figure


def _label(piece: str) -> str:
    return piece if len(piece) <= 10 else piece[:9] + "…"


def draw_positions(flat: Mapping[str, torch.Tensor], pieces: Sequence[str], row: int = 0) -> Figure:
    """The two rows of position_ids over the tokens of one sequence."""
    positions = flat["position_ids"][row]
    figure, axis = plt.subplots(figsize=(max(5.0, 0.32 * len(pieces)), 2.6))
    for line, (name, colour) in enumerate((("position", PREFILL), ("block position", DECODE))):
        values = positions[line].tolist()
        axis.plot(values, drawstyle="steps-mid", color=colour, label=name)
        for x, value in enumerate(values):
            axis.annotate(str(value), (x, value), textcoords="offset points", xytext=(0, 4), ha="center",
                          fontsize=7, color=colour)  # fmt: skip
    axis.set_xticks(range(len(pieces)), [_label(piece) for piece in pieces], rotation=90, fontsize=8)
    axis.legend(frameon=False, loc="upper left")
    plt.close(figure)
    return figure


def draw_calls(calls: Sequence[Call]) -> Figure:
    """The recorded calls of a chat: new tokens on top of the cache, call by call."""
    figure, axis = plt.subplots(figsize=(9, 2.8))
    index = range(len(calls))
    colours = [PREFILL if call.kind == "prefill" else DECODE for call in calls]
    axis.bar(index, [call.past for call in calls], color="#d9d9d9", label="past (cache)")
    axis.bar(index, [call.sequence for call in calls], bottom=[call.past for call in calls], color=colours)
    axis.bar([0], [0], color=PREFILL, label="prefill")
    axis.bar([0], [0], color=DECODE, label="decode")
    axis.set_xlabel("call of forward")
    axis.set_ylabel("tokens")
    axis.legend(frameon=False, loc="upper left", ncols=3)
    plt.close(figure)
    return figure


def turn(draw: Callable[..., Any], **choices: Any) -> Any:
    """A widget that calls `draw` with what the reader chooses; the notebook shows a static picture before it."""
    import ipywidgets

    return ipywidgets.interactive(draw, **choices)


def bare_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty canvas for a drawing."""
    figure, axis = plt.subplots(figsize=(width, height))
    axis.set_axis_off()
    plt.close(figure)
    return figure, axis
