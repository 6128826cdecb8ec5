"""Notebook 01's plots: positions, masks and the recorded calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from glmtrt_helpers.core.display import BEFORE, DECODE, HIDDEN, PADDING, PREFILL, SEEN
from glmtrt_helpers.core.text import printable

if TYPE_CHECKING:
    import torch

    from glmtrt_helpers.inputs.recording import Call


def draw_mask(flat: Mapping[str, torch.Tensor], pieces: Sequence[Sequence[str]]) -> Figure:
    """The attention mask of each row of a batch: who (down) may see whom (across).

    flat: inputs of one call. pieces: per row, the text of every key column (past first), for the labels.
    """
    mask = flat["attention_mask"]
    batch, _, sequence, total = mask.shape
    size = batch * (0.22 * max(total, 8) + 1.4), 0.22 * max(sequence, 4) + 1.7
    figure, axes = plt.subplots(1, batch, figsize=size, layout="constrained", squeeze=False)
    for row, axis in enumerate(axes[0]):
        hidden = np.asarray(mask[row, 0])
        padding = np.array([piece == "<pad>" for piece in pieces[row]])
        picture = hidden.astype(int) + (hidden & padding)
        axis.imshow(picture, cmap=ListedColormap([SEEN, HIDDEN, PADDING]), vmin=0, vmax=2, aspect="equal")
        axis.set_xticks(range(total), [_label(piece) for piece in pieces[row]], rotation=90, fontsize=8)
        axis.set_yticks(range(sequence), [_label(piece) for piece in pieces[row][total - sequence :]], fontsize=8)
        axis.set_xticks(np.arange(-0.5, total), minor=True)
        axis.set_yticks(np.arange(-0.5, sequence), minor=True)
        axis.grid(which="minor", color="white", linewidth=0.6)
        axis.tick_params(which="both", length=0)
        axis.set_xlabel("who is seen")
        axis.set_ylabel("who sees")
        axis.set_title(f"row {row} of the batch")
    colours = {"seen": SEEN, "hidden": HIDDEN, "hidden padding": PADDING}
    legend = [Patch(facecolor=colour, edgecolor="#999999", label=name) for name, colour in colours.items()]
    figure.legend(handles=legend, frameon=False, ncols=3, fontsize=8, loc="outside upper left")
    plt.close(figure)
    return figure


def _label(piece: str) -> str:
    return printable(piece if len(piece) <= 10 else piece[:9] + "…")


def draw_positions(flat: Mapping[str, torch.Tensor], pieces: Sequence[str], row: int = 0) -> Figure:
    """The two rows of position_ids over the tokens of one sequence."""
    position, block = flat["position_ids"][row].tolist()
    figure, axis = plt.subplots(figsize=(max(5.0, 0.32 * len(pieces)), 2.8))
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 7}
    for values, name, colour in ((position, "position", PREFILL), (block, "block position", DECODE)):
        axis.plot(values, drawstyle="steps-mid", color=colour, label=name)
        for x, value in enumerate(values):
            # The upper line has its number above it, the lower one below, so that none is printed over another.
            above = position[x] > block[x] if values is position else block[x] >= position[x]
            end, shift = ("bottom", 3) if above else ("top", -3)
            axis.annotate(str(value), (x, value), xytext=(0, shift), va=end, color=colour, **place)
    axis.margins(y=0.12)
    axis.set_xticks(range(len(pieces)), [_label(piece) for piece in pieces], rotation=90, fontsize=8)
    axis.legend(frameon=False, loc="upper left")
    plt.close(figure)
    return figure


def draw_calls(calls: Sequence[Call]) -> Figure:
    """The recorded calls of a chat: new tokens on top of the cache, call by call."""
    figure, axis = plt.subplots(figsize=(9, 2.8))
    index = range(len(calls))
    colours = [PREFILL if call.kind == "prefill" else DECODE for call in calls]
    axis.bar(index, [call.past for call in calls], color=BEFORE, label="past (cache)")
    axis.bar(index, [call.sequence for call in calls], bottom=[call.past for call in calls], color=colours)
    axis.bar([0], [0], color=PREFILL, label="prefill")
    axis.bar([0], [0], color=DECODE, label="decode")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("call of forward")
    axis.set_ylabel("tokens")
    axis.legend(frameon=False, loc="upper left", ncols=3)
    plt.close(figure)
    return figure
