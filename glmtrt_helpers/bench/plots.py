"""Pictures of measurements: steps next to their bounds (notebook 07), and memory over time (notebooks 03 and 05)."""

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

# Colour and marker of each engine in every picture; the colours are those of Okabe and Ito.
LOOKS = {
    "torch-eager": ("#7f7f7f", "o"),
    "torch-graph": ("#009e73", "^"),
    "ort-cuda": ("#cc79a7", "v"),
    "ort-cpu": ("#cc79a7", "v"),
    "classical": ("#56b4e9", "s"),
    "torch-compile": ("#0072b2", "<"),
    "cuda": ("#d55e00", "D"),
}
FLOOR = "#333333"
READING, MATMULS = ("#2f4b6e", "#9ebcda"), "#e08214"
COLOURS = {"matmul": READING[0], "attention": LOOKS["cuda"][0], "the rest": READING[1]}  # kinds of kernels
FAR = 4  # an engine slower than this many floors is only listed in the legend, or it would flatten the others


def plot_roofline(checkpoint: Checkpoint, report: Report, about: str = "") -> Figure:
    """Every measured step: operations per byte that it must read (x), operations per second that it reached (y).

    The roof is the bandwidth on the left and the matmul rate on the right; a point's distance below it is time lost.
    """
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    intensities: list[float] = []
    for engine, rows in _by_engine(report.rows).items():
        for phase in ("decode", "prefill"):
            steps = [row for row in rows if row.phase == phase]
            least = [bounds(checkpoint, report, phase, row.batch, row.past, row.dtype) for row in steps]
            x = [b.flop / b.nbytes for b in least]
            y = [b.flop / row.median_ms / 1e9 for b, row in zip(least, steps, strict=True)]
            intensities += x
            fill: dict[str, Any] = {} if phase == "decode" else {"markerfacecolor": "white"}
            axis.plot(x, y, linestyle="", label=f"{engine}, {phase}" if steps else None, **_look(engine), **fill)
    ridge = 1e3 * report.matrix_tflop_s / report.copy_bandwidth_gb_s
    x_roof = np.geomspace(min([1.0, *intensities]) / 2, 4 * max([ridge, *intensities]), 200)
    roof = np.minimum(report.copy_bandwidth_gb_s * x_roof / 1e3, report.matrix_tflop_s)
    label = f"roof: {report.copy_bandwidth_gb_s:,.0f} GB/s,\n{report.matrix_tflop_s:,.0f} TFLOP/s in fp16"
    axis.plot(x_roof, roof, color=FLOOR, label=label)
    axis.axvline(ridge, color=FLOOR, linestyle=":", linewidth=1, label=f"ridge: {ridge:,.0f} operations per byte")
    axis.set_xscale("log")
    axis.set_yscale("log")
    display.plain_ticks(axis.xaxis, axis.yaxis)
    axis.set_xlabel("operations per byte that must be read")
    axis.set_ylabel("TFLOP/s reached")
    return _finish(figure, axis, "Roofline of the measured steps", about)


def plot_past(checkpoint: Checkpoint, report: Report, about: str = "") -> Figure:
    """Milliseconds of a decode step at batch 1 over its past, with the bound and the weights' part of it."""
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    rows = [row for row in report.rows if row.phase == "decode" and row.batch == 1]
    weights = floor_ms(checkpoint, report, "decode", 1, 0)
    grouped = _by_engine(rows)
    far = {engine for engine, steps in grouped.items() if min(row.median_ms for row in steps) > FAR * weights}
    far = far if far != set(grouped) else set()
    for engine, steps in grouped.items():
        steps = sorted(steps, key=lambda row: row.past)
        if engine in far:
            axis.plot([], [], label=f"{engine}: {steps[0].median_ms:.0f}, above the picture", **_look(engine))
        else:
            axis.plot([row.past for row in steps], [row.median_ms for row in steps], label=engine, **_look(engine))
    pasts = np.linspace(0, 1.05 * max([row.past for row in rows], default=checkpoint.max_length), 50)
    least = [bounds(checkpoint, report, "decode", 1, int(past)).least for past in pasts]
    axis.plot(pasts, least, color=FLOOR, label="weights and cache read once")
    axis.axhline(weights, color=FLOOR, linestyle=":", label="weights alone")
    axis.set_ylim(0)
    axis.set_xlim(0)
    axis.set_xlabel("past (tokens in the cache)")
    axis.set_ylabel("milliseconds per decode step")
    return _finish(figure, axis, "Decode step over its past, batch 1", about)


def plot_batches(checkpoint: Checkpoint, report: Report, about: str = "", past: int = speed.BATCH_PAST) -> Figure:
    """Tokens per second of all sequences together, over how many are decoded at once, with the bound."""
    figure, axis = plt.subplots(figsize=(9, 3.8), layout="constrained")
    rows = [row for row in report.rows if row.phase == "decode" and row.past == past]
    for engine, steps in _by_engine(rows).items():
        steps = sorted(steps, key=lambda row: row.batch)
        axis.plot([row.batch for row in steps], [row.tokens_per_s for row in steps], label=engine, **_look(engine))
    batches = np.unique(np.geomspace(1, max([row.batch for row in rows], default=1) * 2, 40).astype(int))
    least = [bounds(checkpoint, report, "decode", int(batch), past).least for batch in batches]
    axis.plot(batches, 1000 * batches / least, color=FLOOR, label="bound")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    display.plain_ticks(axis.xaxis, axis.yaxis)
    axis.set_xlabel("batch (sequences decoded together)")
    axis.set_ylabel("tokens per second")
    return _finish(figure, axis, f"Decode throughput over the batch, past {past}", about)


def plot_memory(report: Report, about: str = "") -> Figure:
    """GPU memory of each engine, with the bytes of its weights."""
    figure, axis = plt.subplots(figsize=(9, 1.2 + 0.35 * len(report.memory)), layout="constrained")
    names = [entry["engine"] for entry in report.memory]
    sizes = [entry["bytes"] / 1e9 for entry in report.memory]
    for row, (name, size) in enumerate(zip(names, sizes, strict=True)):
        axis.barh([row], [size], color=_look(name)["color"])
        _label(axis, f"{size:.2f}", size, row)
    weights = report.weights_bytes / 1e9
    axis.axvline(weights, color=FLOOR, linestyle=":", zorder=0.5, label=f"weights {weights:.2f}")
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * max([weights, *sizes]))
    axis.set_xlabel("GB on the GPU once it is open")
    return _finish(figure, axis, "Memory", about)


def plot_bounds(
    checkpoint: Checkpoint, report: Report, phase: str = "decode", batch: int = 1, past: int = 512, dtype: str = "fp16"
) -> Figure:
    """The parts of a step's bound, and which of them is the bound."""
    least = bounds(checkpoint, report, phase, batch, past, dtype)
    figure, axis = plt.subplots(figsize=(9, 1.9), layout="constrained")
    axis.barh([0], [least.weights], color=READING[0], label=f"weights {least.weights:.2f}")
    axis.barh([0], [least.cache], left=[least.weights], color=READING[1], label=f"cache {least.cache:.2f}")
    axis.barh([1], [least.matmuls], color=MATMULS, label=f"matmuls {least.matmuls:.2f}")
    axis.axvline(least.least, color=FLOOR, linestyle=":")
    axis.set_yticks([0, 1], ["reading", "computing"])
    axis.invert_yaxis()
    axis.set_xlabel("milliseconds")
    tokens = batch * (past if phase == "prefill" else 1)
    title = f"{phase}, batch {batch}, {past} tokens, {dtype}: bound by {least.bound_by}, {least.least:.2f} ms"
    return _finish(figure, axis, f"{title}, {1000 * tokens / least.least:,.0f} tokens/s", "milliseconds")


def plot_layer(checkpoint: Checkpoint, report: Report, step: Step, about: str = "") -> Figure:
    """One layer of a recorded step on a time line, with the time that reading its weights takes."""
    kernels, floor = one_layer(step), layer_floor_us(checkpoint, report)
    figure, axis = plt.subplots(figsize=(9, 1.5 + 0.24 * len(kernels)), layout="constrained")
    start, end = kernels[0].start_us, max(kernel.end_us for kernel in kernels)
    for row, kernel in enumerate(kernels):
        axis.barh([row], [kernel.duration_us], left=[kernel.start_us - start], color=COLOURS[kind_of(kernel.name)])
        _label(axis, f"{kernel.duration_us:.1f}", kernel.end_us - start, row)
    axis.barh([len(kernels)], [floor], color="white", edgecolor=FLOOR, hatch="///")
    _label(axis, f"{floor:.1f}", floor, len(kernels))
    labels = [*(short_name(kernel.name) for kernel in kernels), "its weights, read once"]
    axis.set_yticks(range(len(labels)), labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.08 * max(floor, end - start))
    axis.set_xlabel(f"microseconds, {end - start:.0f} in total ({about})")
    for kind, colour in COLOURS.items():
        axis.barh([0], [0], color=colour, label=kind)
    title = f"One layer of {step.engine}: {step.phase}, batch {step.batch}, {step.past} tokens"
    axis.set_title(title, loc="left", pad=20)
    axis.legend(frameon=False, ncols=3, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.1)
    plt.close(figure)
    return figure


def plot_usage(usages: Mapping[str, Usage], weights: int, without_weights: int) -> Figure:
    """Memory over time of several commands, one below the other.

    without_weights: bytes that such a command takes where there are next to none, a dashed line. weights: bytes, which
    the dotted line adds to it.
    """
    size = (9, 0.4 + 2.1 * len(usages))
    shared: dict[str, Any] = {"sharex": True, "sharey": True, "squeeze": False}
    figure, axes = plt.subplots(len(usages), 1, figsize=size, layout="constrained", **shared)
    for axis, (name, usage) in zip(axes[:, 0], usages.items(), strict=True):
        _draw_usage(axis, name, usage)
        for style, nbytes, label in (("--", 0, "without weights"), (":", weights, "and the weights once")):
            axis.axhline((without_weights + nbytes) / 1e9, color="#222222", linestyle=style, linewidth=1, label=label)
    axes[0, 0].set_ylim(0, 1.35 * axes[0, 0].get_ylim()[1])  # room for the names of the phases
    axes[0, 0].set_xlim(0, 1.15 * max(usage.seconds for usage in usages.values()))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), frameon=False, fontsize=8, loc="outside right upper")
    axes[-1, 0].set_xlabel("seconds")
    figure.supylabel("GB", fontsize=10)
    plt.close(figure)
    return figure


def _draw_usage(axis: Axes, name: str, usage: Usage) -> None:
    seconds = [sample.seconds for sample in usage.samples]
    anonymous = [sample.anonymous / 1e9 for sample in usage.samples]
    mapped = [sample.mapped / 1e9 for sample in usage.samples]
    colours = [display.PREFILL, display.SEEN]
    axis.stackplot(seconds, [anonymous, mapped], colors=colours, labels=["anonymous", "file-backed"])
    axis.set_title(f"{name}: at most {usage.peak_anonymous / 1e9:.2f} GB anonymous", loc="left")
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "xytext": (3, 0), "textcoords": "offset points"}
    place["bbox"] = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # a later phase may begin behind the name
    for number, (begin, phase) in enumerate(usage.phases):
        axis.axvline(begin, color=display.DECODE, linewidth=0.8)
        label = phase.removesuffix(", KB")  # the unit of the progress bar
        axis.annotate(label, (begin, 0.97 - 0.11 * (number % 4)), fontsize=8, va="top", color="#8a4b08", **place)


def _by_engine(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by engine, in the order of LOOKS."""
    engines = dict.fromkeys([*LOOKS, *(row.engine for row in rows)])
    grouped = {engine: [row for row in rows if row.engine == engine] for engine in engines}
    return {engine: its_rows for engine, its_rows in grouped.items() if its_rows}


def _look(engine: str) -> dict[str, Any]:
    colour, marker = LOOKS.get(engine, ("#000000", "x"))
    return {"color": colour, "marker": marker, "markersize": 6}


def _finish(figure: Figure, axis: Axes, title: str, about: str) -> Figure:
    """Title, and a legend on the right under what the measurement was made on."""
    axis.set_title(title, loc="left")
    corner: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "alignment": "left"}
    axis.legend(frameon=False, fontsize=8, title=about.replace(", ", "\n"), title_fontsize=8, **corner)
    plt.close(figure)
    return figure


def _label(axis: Axes, text: str, x: float, y: float) -> None:
    """A number to the right of a bar's end."""
    axis.annotate(text, (x, y), xytext=(3, 0), textcoords="offset points", va="center", fontsize=8)
