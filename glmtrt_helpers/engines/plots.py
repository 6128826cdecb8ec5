"""TODO."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from glmtrt_helpers.core.display import ALARM, DECODE, PREFILL
from glmtrt_helpers.engines.memory_prediction import EngineMemory
from glmtrt_helpers.engines.profiles import Profile, describe

if TYPE_CHECKING:
    from glmtrt_helpers.inputs.recording import Call

MEMORY_COLOURS = ("#2f4b6e", "#3b75af", "#9ebcda", "#e08214")


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


def draw_memory(memory: EngineMemory) -> Figure:
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
