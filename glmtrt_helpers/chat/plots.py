"""Notebook 06: token probabilities before and after sampling settings, the length of rounds, and sliders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from glmtrt_helpers.core.display import ALARM, BEFORE, DECODE, PREFILL, plain_ticks
from glmtrt_helpers.inputs.plots import _label


def draw_choice(pieces: Sequence[str], before: Sequence[float], after: Sequence[float], title: str) -> Figure:
    """Probabilities of the likeliest tokens before and after temperature, top_k and top_p."""
    figure, axis = plt.subplots(figsize=(9, 2.6), layout="constrained")
    x = np.arange(len(pieces))
    axis.bar(x - 0.2, before, width=0.4, color=BEFORE, label="softmax of the scores")
    axis.bar(x + 0.2, after, width=0.4, color=PREFILL, label="after temperature, top_k, top_p")
    axis.set_xticks(x, [_label(piece) for piece in pieces])
    axis.set_yscale("log")  # one token may have nearly all of the probability
    plain_ticks(axis.yaxis)
    axis.set_ylabel("probability")
    axis.set_title(title, loc="left")
    axis.legend(frameon=False)
    plt.close(figure)
    return figure


def draw_rounds(prompts: Sequence[int], answers: Sequence[int], limit: int) -> Figure:
    """Tokens of prompt and answer, round by round, against the context limit."""
    figure, axis = plt.subplots(figsize=(9, 2.6), layout="constrained")
    axis.bar(range(len(prompts)), prompts, color=PREFILL, label="prompt, with all earlier rounds")
    axis.bar(range(len(prompts)), answers, bottom=prompts, color=DECODE, label="answer")
    axis.axhline(limit, color=ALARM, linestyle="--", label=f"limit, {limit}")
    axis.set_xlabel("round")
    axis.set_ylabel("tokens")
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    plt.close(figure)
    return figure


def interact(draw: Callable[..., Any], **choices: Any) -> Any:
    """Sliders and menus whose values `draw` is called with; choices as `ipywidgets.interactive` takes them."""
    panel = ipywidgets.interactive(draw, {"auto_display": True}, **choices)
    for widget in panel.children[:-1]:
        widget.style.description_width = "initial"  # a long name would be cut
    return panel
