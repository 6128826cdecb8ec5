"""Notebook 05: profiles and recorded calls, the phases of a build, and GPU memory, predicted and measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from glmtrt_helpers.core.display import ALARM, DECODE, PREFILL
from glmtrt_helpers.engines.memory_prediction import EngineMemory
from glmtrt_helpers.engines.profiles import Profile, describe

if TYPE_CHECKING:  # recording imports PyTorch
    from glmtrt_helpers.inputs.recording import Call

PARTS = {
    "weights": ("weights", "#2f4b6e"),
    "cache": ("cache", "#3b75af"),
    "io": ("inputs and logits", "#9ebcda"),
    "activations": ("activations", "#e08214"),
}
CARDS = (16, 24, 32, 48)  # as they are sold; each is 2**30 bytes
TITLE = "What the engine is built for (star: opt) and the recorded calls"


def draw_profiles(profiles: Sequence[Profile], calls: Sequence[Call] = (), title: str = TITLE) -> Figure:
    """Profiles as rectangles over past and sequence, and recorded calls, with those outside every profile marked."""
    figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
    for profile, colour in zip(profiles, (PREFILL, DECODE, "#777777"), strict=False):
        _draw_profile(axis, profile, colour)
    shapes = sorted({(call.past, call.sequence, call.shapes["input_ids"][0]) for call in calls})
    for covered, colour, label in (
        (True, "#333333", "recorded call"),
        (False, ALARM, "recorded call, outside every profile"),
    ):
        points = [(p, s) for p, s, b in shapes if any(profile.covers(b, s, p) for profile in profiles) is covered]
        if points:
            marker = "." if covered else "x"
            axis.plot(*zip(*points, strict=True), marker=marker, color=colour, linestyle="", label=label)
    axis.set_xscale("symlog", base=2, linthresh=1)
    axis.set_yscale("log", base=2)
    axis.set_xlim(-0.6, 2 * max([profile.past.max for profile in profiles] + [past for past, _, _ in shapes] + [2]))
    axis.set_ylim(0.6, 2 * max([profile.sequence.max for profile in profiles] + [size for _, size, _ in shapes]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
    axis.set_xlabel("past (tokens in the cache)")
    axis.set_ylabel("sequence (new tokens)")
    axis.set_title(title, loc="left")
    axis.legend(frameon=False, fontsize=8, loc="upper right")
    plt.close(figure)
    return figure


def _draw_profile(axis: Axes, profile: Profile, colour: str) -> None:
    """With a margin, so that a profile of a single size is visible on a logarithmic axis."""
    (left, right), (bottom, top) = (
        (-0.4, 0.4) if size.max == 0 else (0.85 * size.min, 1.15 * size.max)
        for size in (profile.past, profile.sequence)
    )
    area = Rectangle((left, bottom), right - left, top - bottom, facecolor=colour, edgecolor=colour, alpha=0.25)
    area.set_label(describe(profile))
    axis.add_patch(area)
    axis.plot([profile.past.opt], [profile.sequence.opt], marker="*", markersize=11, color=colour, linestyle="")


def draw_phases(phases: Mapping[str, tuple[float, int]]) -> Figure:
    """Seconds of the longest phases of a build, each without the phases inside it, so that they add up."""
    longest = sorted(phases.items(), key=lambda item: item[1][0])[-8:]
    labels = [f"{phase} ({steps:,} steps)" for phase, (_, steps) in longest]
    figure, axis = plt.subplots(figsize=(8, 0.6 + 0.3 * len(longest)), layout="constrained")
    axis.barh(labels, [seconds for _, (seconds, _) in longest], color=PREFILL)
    axis.set_xlabel("seconds, without those of the phases inside")
    plt.close(figure)
    return figure


def draw_memory(memory: EngineMemory) -> Figure:
    """The predicted GPU memory of an engine, part by part, against the sizes of common cards."""
    figure, axis = plt.subplots(figsize=(9, 1.7), layout="constrained")
    left = 0.0
    for part, nbytes in asdict(memory).items():
        name, colour = PARTS[part]
        axis.barh([0], [nbytes / 1e9], left=[left], color=colour, label=f"{name} {nbytes / 1e9:.2f}", height=0.5)
        left += nbytes / 1e9
    for size in CARDS:
        there = size * 2**30 / 1e9
        axis.axvline(there, color="#555555", linestyle=":")
        axis.annotate(f"{size} GB card", (there, 0.42), (-4, 0), textcoords="offset points", fontsize=8, ha="right")
    axis.set_ylim(-0.4, 0.6)
    axis.set_xlim(0, max(54.0, 1.05 * left))
    axis.set_yticks([])
    axis.set_xlabel(f"GB on the GPU, {left:.2f} in total")
    axis.legend(frameon=False, ncols=4, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    plt.close(figure)
    return figure


def draw_measured_memory(path: Path) -> Figure:
    """Predicted (bars) and measured (dots) memory of the engines in a file of measurements."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True, layout="constrained")
    labels = [f"{row['batch']} x {row['prompt']}, past {row['past']}" for row in kept["rows"]]
    for axis, part in zip(axes, ("cache", "io", "activations"), strict=True):
        name, colour = PARTS[part]
        axis.barh(labels, [row["predicted"][part] / 1e6 for row in kept["rows"]], color=colour, alpha=0.6)
        axis.plot([row["measured"][part] / 1e6 for row in kept["rows"]], labels, "o", color="#222222")
        axis.set_xlabel(f"{name}, MB")
    figure.suptitle(f"Largest batch x prompt, past: {kept['about']}", fontsize=10)
    plt.close(figure)
    return figure
