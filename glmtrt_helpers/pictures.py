"""Tables and pictures that the notebooks and the command line share. Chinese shows in all of them."""

from __future__ import annotations

import html
import importlib
import importlib.util
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich.console import Console
from rich.table import Table

from glmtrt_helpers.profiles import Memory, Profile, describe

if TYPE_CHECKING:  # a table needs no PyTorch
    import torch

    from glmtrt_helpers.inputs import Call

# One colour for one meaning, in every picture of the workbook; readable without colour vision, too.
SEEN, HIDDEN, PADDING = "#dbe9f6", "#2f4b6e", "#e9e4da"
PREFILL, DECODE, ALARM = "#3b75af", "#e08214", "#c0392b"
MEMORY_COLOURS = ("#2f4b6e", "#3b75af", "#9ebcda", "#e08214")


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
    _small_pictures()


def _small_pictures() -> None:
    """In a notebook, figures become pictures of 64 colours: a quarter of the bytes, and nothing to see of it."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is not None:
        plt.get_fignums()  # loads the notebook's backend, which sets a formatter of its own
        importlib.import_module("matplotlib_inline.backend_inline")
        shell.display_formatter.formatters["image/png"].for_type(Figure, _png)


def _png(figure: Figure) -> bytes:
    from PIL import Image

    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", bbox_inches="tight")
    Image.open(full).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str = "", console: Any = None) -> None:
    """Print a table, as text in a terminal and as HTML in a notebook; numbers are set flush right."""
    numeric = [
        bool(rows) and all(isinstance(row[i], int | float) and not isinstance(row[i], bool) for row in rows)
        for i in range(len(columns))
    ]
    table = Table(title=title or None, title_justify="left", header_style="bold")
    for column, number in zip(columns, numeric, strict=True):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    cells = [[format_cell(cell) for cell in row] for row in rows]
    for row in cells:
        table.add_row(*row)
    if console is None and Console().is_jupyter:
        from IPython.display import display

        text = io.StringIO()
        Console(file=text, width=115, force_jupyter=False).print(table)
        views = {"text/html": _html_table(columns, cells, numeric, title), "text/plain": text.getvalue()}
        display(views, raw=True)
    else:
        (console or Console()).print(table)


def _html_table(columns: Sequence[str], cells: Sequence[Sequence[str]], numeric: Sequence[bool], title: str) -> str:
    """A browser aligns columns itself; a table drawn with characters is crooked wherever Chinese is in it."""
    align = [f' style="text-align:{"right" if number else "left"};white-space:pre-wrap"' for number in numeric]

    def line(tag: str, row: Sequence[str]) -> str:
        filled = (f"<{tag}{style}>{html.escape(cell)}</{tag}>" for cell, style in zip(row, align, strict=True))
        return f"<tr>{''.join(filled)}</tr>"

    caption = f'<caption style="text-align:left">{html.escape(title)}</caption>' if title else ""
    body = "\n".join(line("td", row) for row in cells)
    return (
        f'<table style="margin-left:0">{caption}\n<thead>{line("th", columns)}</thead>\n<tbody>{body}</tbody></table>'
    )


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
        hidden, padding = np.asarray(mask[row, 0]), np.array([piece == "<pad>" for piece in pieces[row]])
        picture = hidden.astype(int) + (hidden & padding)
        axis.imshow(picture, cmap=ListedColormap([SEEN, HIDDEN, PADDING]), vmin=0, vmax=2, aspect="equal")
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


def draw_profiles(profiles: Sequence[Profile], calls: Sequence[Call] = (), title: str = "") -> Figure:
    """The profiles as boxes over (past, sequence), with the shapes that a chat asked for; those outside are marked."""
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for profile, colour in zip(profiles, (PREFILL, DECODE, "#777777"), strict=False):
        past, sequence = profile.past, profile.sequence
        # Half a token around it, so that a box that is one token thin can be seen on a logarithmic axis.
        x, y = _edges(past.min, past.max), _edges(sequence.min, sequence.max)
        axis.add_patch(
            Rectangle((x[0], y[0]), x[1] - x[0], y[1] - y[0], facecolor=colour, alpha=0.25, edgecolor=colour,
                      label=describe(profile))
        )  # fmt: skip
        axis.plot([past.opt], [sequence.opt], marker="*", markersize=11, color=colour, linestyle="")
    asked = sorted({(call.past, call.sequence, call.shapes["input_ids"][0]) for call in calls})
    inside = [any(profile.covers(b, s, p) for profile in profiles) for p, s, b in asked]
    for fits, colour, label in ((True, "#333333", "asked for"), (False, ALARM, "asked for, outside every profile")):
        points = [(p, s) for (p, s, _), is_in in zip(asked, inside, strict=True) if is_in is fits]
        if points:
            axis.plot(*zip(*points, strict=True), marker="." if fits else "x", color=colour, linestyle="", label=label)
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_yscale("log", base=2)
    top = max([p.past.max for p in profiles] + [p for p, _, _ in asked] + [2])
    axis.set_xlim(-0.6, 2 * top)
    axis.set_ylim(0.6, 2 * max([p.sequence.max for p in profiles] + [s for _, s, _ in asked]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axis.set_xlabel("past (tokens in the cache)")
    axis.set_ylabel("sequence (new tokens)")
    axis.set_title(title or "What the engine is built for (stars: tuned for) and what the chat asked", loc="left")
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    plt.close(figure)
    return figure


def _edges(low: int, high: int) -> tuple[float, float]:
    return (-0.4, 0.4) if high == 0 else (low * 0.85, high * 1.15)


def draw_phases(phases: Mapping[str, tuple[float, int]]) -> Figure:
    """Seconds that a build spent in each phase; phases contain each other, so they do not add up."""
    longest = sorted(phases.items(), key=lambda item: item[1][0])[-8:]
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.3 * len(longest)), layout="constrained")
    axis.barh(
        [f"{phase} ({steps:,} steps)" for phase, (_, steps) in longest], [s for _, (s, _) in longest], color=PREFILL
    )
    axis.set_xlabel("seconds, phases inside phases")
    plt.close(figure)
    return figure


def draw_memory(memory: Memory) -> Figure:
    """One engine's predicted GPU memory, part by part, beside the sizes of cards."""
    figure, axis = plt.subplots(figsize=(9, 1.7), layout="constrained")
    left = 0.0
    for (part, nbytes), colour in zip(asdict(memory).items(), MEMORY_COLOURS, strict=True):
        axis.barh([0], [nbytes / 1e9], left=[left], color=colour, label=f"{part} {nbytes / 1e9:.2f}", height=0.5)
        left += nbytes / 1e9
    for size in (16, 24, 32, 48):
        axis.axvline(size, color="#555555", linestyle=":")
        axis.annotate(f"{size} GB card", (size, 0.42), fontsize=8, ha="right", rotation=0)
    axis.set_ylim(-0.4, 0.6)
    axis.set_xlim(0, max(50.0, 1.05 * left))
    axis.set_yticks([])
    axis.set_xlabel(f"GB on the GPU, {left:.2f} in all")
    axis.legend(frameon=False, ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    plt.close(figure)
    return figure


def draw_measured_memory(path: Path) -> Figure:
    """Predicted (bars) and measured (dots) memory of the engines in a file of measurements."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True, layout="constrained")
    labels = [f"{row['batch']} x {row['prompt']}, past {row['past']}" for row in kept["rows"]]
    for axis, part, colour in zip(axes, ("cache", "io", "activations"), MEMORY_COLOURS[1:], strict=True):
        axis.barh(labels, [row["predicted"][part] / 1e6 for row in kept["rows"]], color=colour, alpha=0.6)
        axis.plot([row["measured"][part] / 1e6 for row in kept["rows"]], labels, "o", color="#222222")
        axis.set_xlabel(f"{part}, MB")
    figure.suptitle(f"Largest batch x prompt, past: {kept['about']}", fontsize=10)
    plt.close(figure)
    return figure


def draw_choice(pieces: Sequence[str], plain: Sequence[float], kept: Sequence[float], title: str) -> Figure:
    """Probabilities of the best tokens before (pale) and after temperature, top_k and top_p."""
    figure, axis = plt.subplots(figsize=(9, 2.6), layout="constrained")
    x = np.arange(len(pieces))
    axis.bar(x - 0.2, plain, width=0.4, color="#d9d9d9", label="softmax of the scores")
    axis.bar(x + 0.2, kept, width=0.4, color=PREFILL, label="what is drawn from")
    axis.set_xticks(x, [_label(piece) for piece in pieces])
    axis.set_ylabel("probability")
    axis.set_title(title, loc="left")
    axis.legend(frameon=False)
    plt.close(figure)
    return figure


def draw_rounds(prompts: Sequence[int], answers: Sequence[int], limit: int) -> Figure:
    """Tokens of prompt and answer, round by round, below the limit of the context."""
    figure, axis = plt.subplots(figsize=(9, 2.6), layout="constrained")
    axis.bar(range(len(prompts)), prompts, color=PREFILL, label="prompt, all rounds before told again")
    axis.bar(range(len(prompts)), answers, bottom=prompts, color=DECODE, label="answer")
    axis.axhline(limit, color=ALARM, linestyle="--", label=f"limit, {limit}")
    axis.set_xlabel("round")
    axis.set_ylabel("tokens")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.close(figure)
    return figure


def turn(draw: Callable[..., Any], **choices: Any) -> Any:
    """A widget that calls `draw` with what the reader chooses; the notebook shows a static picture before it."""
    import ipywidgets

    made = ipywidgets.interactive(draw, {"auto_display": True}, **choices)
    for widget in made.children[:-1]:
        widget.style.description_width = "initial"  # a long name would be cut
    return made
