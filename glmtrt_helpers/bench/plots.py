"""Notebook 07: what bounds a step, and measured steps drawn against it.

A step reads its weights and its cache through one memory, and multiplies meanwhile. Whichever takes longer at the rates
of the card is its bound. The rates were measured in the same run as the steps: of a large copy, bytes read and written
both counted, and of a large product in fp16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from glmtrt_helpers.bench import speed
from glmtrt_helpers.bench.kernel_trace import Step, kind_of, layer_floor_us, one_layer, short_name
from glmtrt_helpers.bench.results import Report, Row
from glmtrt_helpers.bench.roofline import bounds, floor_ms
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import display
from glmtrt_helpers.core.processes import Usage

# Colour and mark of each engine in every picture; the colours are those of Okabe and Ito.
LOOKS = {
    "torch-eager": ("#7f7f7f", "o"),
    "torch-graph": ("#009e73", "^"),
    "ort-cuda": ("#cc79a7", "v"),
    "ort-cpu": ("#cc79a7", "v"),
    "classical": ("#56b4e9", "s"),
    "fast": ("#d55e00", "D"),
}
FLOOR = "#333333"
READING, MULTIPLYING = ("#2f4b6e", "#9ebcda"), "#e08214"
FAR = 4  # times the floor: an engine beyond is named, not drawn, where it would flatten the others


def _by_engine(rows: Sequence[Row]) -> dict[str, list[Row]]:
    known = [*LOOKS, *(row.engine for row in rows)]
    grouped = {name: [row for row in rows if row.engine == name] for name in dict.fromkeys(known)}
    return {name: mine for name, mine in grouped.items() if mine}


def _look(engine: str) -> dict[str, Any]:
    colour, mark = LOOKS.get(engine, ("#000000", "x"))
    return {"color": colour, "marker": mark, "markersize": 6}


def _finish(figure: Figure, axis: Axes, title: str, about: str) -> Figure:
    axis.set_title(title, loc="left")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), title=about.replace(", ", "\n"),
               title_fontsize=8, alignment="left")  # fmt: skip
    plt.close(figure)
    return figure


def plot_roofline(checkpoint: Checkpoint, report: Report, about: str = "") -> Figure:
    """Every measured step: operations for each byte it must read (across), operations a second that it reached (up).

    The roof is the bandwidth on the left and the products on the right; a point's distance below it is time lost.
    """
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    reach: list[float] = []
    for engine, rows in _by_engine(report.rows).items():
        for phase in ("decode", "prefill"):
            mine = [row for row in rows if row.phase == phase]
            least = [bounds(checkpoint, report, phase, row.batch, row.past, row.dtype) for row in mine]
            x = [b.flop / b.nbytes for b in least]
            y = [b.flop / row.median_ms / 1e9 for b, row in zip(least, mine, strict=True)]
            reach += x
            filled: dict[str, Any] = {} if phase == "decode" else {"markerfacecolor": "white"}
            axis.plot(x, y, linestyle="", label=f"{engine}, {phase}" if mine else None, **_look(engine), **filled)
    corner = 1e3 * report.matrix_tflop_s / report.copy_bandwidth_gb_s
    across = np.geomspace(min([1.0, *reach]) / 2, 4 * max([corner, *reach]), 200)
    roof = np.minimum(report.copy_bandwidth_gb_s * across / 1e3, report.matrix_tflop_s)
    label = f"roof: {report.copy_bandwidth_gb_s:,.0f} GB/s,\n{report.matrix_tflop_s:,.0f} TFLOP/s in fp16"
    axis.plot(across, roof, color=FLOOR, label=label)
    axis.axvline(corner, color=FLOOR, linestyle=":", linewidth=1, label=f"corner: {corner:,.0f} operations a byte")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations for each byte that must be read")
    axis.set_ylabel("TFLOP/s reached")
    return _finish(figure, axis, "Steps under the roof", about)


def plot_past(checkpoint: Checkpoint, report: Report, about: str = "") -> Figure:
    """Milliseconds of a decode step of one sequence over its past, above the bound and the weights' part of it."""
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    rows = [row for row in report.rows if row.phase == "decode" and row.batch == 1]
    weights = floor_ms(checkpoint, report, "decode", 1, 0)
    grouped = _by_engine(rows)
    far = {name for name, mine in grouped.items() if min(row.median_ms for row in mine) > FAR * weights}
    far = far if far != set(grouped) else set()
    for engine, mine in grouped.items():
        mine = sorted(mine, key=lambda row: row.past)
        if engine in far:
            axis.plot([], [], label=f"{engine}: {mine[0].median_ms:.0f}, above the picture", **_look(engine))
        else:
            axis.plot([row.past for row in mine], [row.median_ms for row in mine], label=engine, **_look(engine))
    across = np.linspace(0, 1.05 * max([row.past for row in rows], default=checkpoint.max_length), 50)
    least = [bounds(checkpoint, report, "decode", 1, int(past)).least for past in across]
    axis.plot(across, least, color=FLOOR, label="weights and cache read once")
    axis.axhline(weights, color=FLOOR, linestyle=":", label="weights alone")
    axis.set_ylim(0)
    axis.set_xlim(0)
    axis.set_xlabel("past (tokens in the cache)")
    axis.set_ylabel("milliseconds of a decode step")
    return _finish(figure, axis, "What a longer past costs, batch 1", about)


def plot_batches(checkpoint: Checkpoint, report: Report, about: str = "", past: int = speed.BATCH_PAST) -> Figure:
    """Tokens a second of all sequences together, over how many are decoded at once, below the bound."""
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    rows = [row for row in report.rows if row.phase == "decode" and row.past == past]
    for engine, mine in _by_engine(rows).items():
        mine = sorted(mine, key=lambda row: row.batch)
        axis.plot([row.batch for row in mine], [row.tokens_per_s for row in mine], label=engine, **_look(engine))
    across = np.unique(np.geomspace(1, max([row.batch for row in rows], default=1) * 2, 40).astype(int))
    least = [bounds(checkpoint, report, "decode", int(batch), past).least for batch in across]
    axis.plot(across, [1000 * batch / ms for batch, ms in zip(across, least, strict=True)], color=FLOOR, label="bound")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    for along in (axis.xaxis, axis.yaxis):
        along.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axis.set_xlabel("batch (sequences decoded together)")
    axis.set_ylabel("tokens a second")
    return _finish(figure, axis, f"What a larger batch gives, past {past}", about)


def once_each(entries: Sequence[dict[str, Any]]) -> list[str]:
    """Names for what a run says of each engine: a second one of a name is that which was built for several rows."""
    names = [entry["engine"] for entry in entries]
    return [f"{name}, several rows" if name in names[:place] else name for place, name in enumerate(names)]


def plot_memory(report: Report, about: str = "") -> Figure:
    """What each engine took on the GPU, beside the bytes of its weights."""
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.35 * len(report.memory)), layout="constrained")
    for row, entry in enumerate(report.memory):
        axis.barh([row], [entry["bytes"] / 1e9], color=_look(entry["engine"])["color"])
        axis.annotate(f"{entry['bytes'] / 1e9:.2f}", (entry["bytes"] / 1e9, row), xytext=(3, 0), va="center",
                      textcoords="offset points", fontsize=8, bbox={"color": "white", "pad": 1})  # fmt: skip
    weights = report.weights_bytes / 1e9
    axis.axvline(weights, color=FLOOR, linestyle=":", zorder=0.5, label=f"weights {weights:.2f}")
    axis.set_yticks(range(len(report.memory)), once_each(report.memory))
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * max([report.weights_bytes, *(entry["bytes"] for entry in report.memory)]) / 1e9)
    axis.set_xlabel("GB on the GPU once it is open")
    return _finish(figure, axis, "Memory", about)


def plot_bounds(
    checkpoint: Checkpoint, report: Report, phase: str = "decode", batch: int = 1, past: int = 512, dtype: str = "fp16"
) -> Figure:
    """The parts of a step's bound, and which of them it is."""
    least = bounds(checkpoint, report, phase, batch, past, dtype)
    figure, axis = plt.subplots(figsize=(9, 1.9), layout="constrained")
    axis.barh([0], [least.weights], color=READING[0], label=f"weights {least.weights:.2f}")
    axis.barh([0], [least.cache], left=[least.weights], color=READING[1], label=f"cache {least.cache:.2f}")
    axis.barh([1], [least.products], color=MULTIPLYING, label=f"products {least.products:.2f}")
    axis.axvline(least.least, color=FLOOR, linestyle=":")
    axis.set_yticks([0, 1], ["reading", "multiplying"])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds")
    tokens = batch * (past if phase == "prefill" else 1)
    title = f"{phase}, batch {batch}, {past} tokens, {dtype}: bound by {least.bound_by}, {least.least:.2f} ms"
    return _finish(figure, axis, f"{title}, {1000 * tokens / least.least:,.0f} tokens/s", "milliseconds")


COLOURS = {"product": READING[0], "attention": LOOKS["fast"][0], "the rest": READING[1]}


def plot_layer(checkpoint: Checkpoint, report: Report, step: Step, about: str = "") -> Figure:
    """One layer of a recorded step on a time line, above the time in which its weights are read."""
    kernels, floor = one_layer(step), layer_floor_us(checkpoint, report)
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.24 * len(kernels)), layout="constrained")
    start, end = kernels[0].start_us, max(kernel.end_us for kernel in kernels)
    for row, kernel in enumerate(kernels):
        axis.barh([row], [kernel.duration_us], left=[kernel.start_us - start], color=COLOURS[kind_of(kernel.name)])
        axis.annotate(f"{kernel.duration_us:.1f}", (kernel.end_us - start, row), xytext=(3, 0), va="center", fontsize=8,
                      textcoords="offset points")  # fmt: skip
    axis.barh([len(kernels)], [floor], color="white", edgecolor=FLOOR, hatch="///")
    axis.annotate(f"{floor:.1f}", (floor, len(kernels)), xytext=(3, 0), va="center", fontsize=8,
                  textcoords="offset points")  # fmt: skip
    labels = [*(short_name(kernel.name) for kernel in kernels), "its weights, read once"]
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.08 * max(floor, end - start))
    axis.set_xlabel(f"microseconds, {end - start:.0f} in all ({about})")
    for kind, colour in COLOURS.items():
        axis.barh([0], [0], color=colour, label=kind)
    axis.set_title(
        f"One layer of {step.engine}: {step.phase}, batch {step.batch}, {step.past} tokens", loc="left", pad=20
    )
    axis.legend(frameon=False, ncols=3, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)
    plt.close(figure)
    return figure


def plot_usage(usages: Mapping[str, Usage], weights: int, title: str = "") -> Figure:
    """Memory over time of several commands, one below the other; the dotted line is the size of the weights (bytes)."""
    figure, axes = plt.subplots(
        len(usages), 1, figsize=(9, 0.4 + 2.1 * len(usages)), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (name, usage) in zip(axes[:, 0], usages.items(), strict=True):
        seconds = [sample.seconds for sample in usage.samples]
        parts = [
            [sample.anonymous / 1e9 for sample in usage.samples],
            [sample.mapped / 1e9 for sample in usage.samples],
        ]
        axis.stackplot(seconds, parts, colors=[display.PREFILL, display.SEEN], labels=["anonymous", "file-backed"])
        axis.axhline(weights / 1e9, color="#555555", linestyle=":", linewidth=1, label="the weights")
        axis.set_title(f"{name}: at most {usage.peak_anonymous / 1e9:.2f} GB anonymous", loc="left")
        for number, (begin, phase) in enumerate(usage.phases):
            axis.axvline(begin, color=display.DECODE, linewidth=0.8)
            axis.annotate(phase, (begin, 0.97 - 0.11 * (number % 4)), xycoords=("data", "axes fraction"), fontsize=8,
                          xytext=(3, 0), textcoords="offset points", va="top", color="#8a4b08")  # fmt: skip
    axes[0, 0].set_ylim(0, 1.35 * axes[0, 0].get_ylim()[1])  # room for the names of the phases
    axes[0, 0].set_xlim(0, 1.25 * max(usage.seconds for usage in usages.values()))
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper right")
    axes[-1, 0].set_xlabel("seconds")
    figure.supylabel("GB", fontsize=10)
    if title:
        figure.suptitle(title, fontsize=11)
    plt.close(figure)
    return figure
