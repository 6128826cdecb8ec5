"""Notebook 07: what bounds a step, and measured steps drawn against it.

A step reads its weights and its cache through one memory, and multiplies meanwhile. Whichever takes longer at the rates
of the card is its bound. The rates were measured in the same run as the steps: of a large copy, bytes read and written
both counted, and of a large product in fp16.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from glmtrt_helpers import speed
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.profiles import BYTES, engine_weights
from glmtrt_helpers.speed import Report, Row, floor_ms, weight_products

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
# Of the rate in fp16. fp32 is multiplied as TF32, at half of it on every card that has TF32.
PRODUCT_RATE = {"fp16": 1.0, "fp32": 0.5}
_KEPT = ("copy_bandwidth_gb_s", "matrix_tflop_s", "weights_bytes", "memory", "build")
FAR = 4  # times the floor: an engine beyond is named, not drawn, where it would flatten the others


@dataclass(frozen=True)
class Bounds:
    """What a step has to do at least: milliseconds of each part, and flop and nbytes in all."""

    weights: float
    cache: float
    products: float
    flop: int
    nbytes: int

    @property
    def least(self) -> float:
        """Weights and cache come through one memory, one after the other; products are made meanwhile."""
        return max(self.weights + self.cache, self.products)

    @property
    def bound_by(self) -> str:
        if self.products > self.weights + self.cache:
            return "multiplying"
        return "reading the weights" if self.weights >= self.cache else "reading the cache"


def bounds(checkpoint: Checkpoint, report: Report, phase: str, batch: int, past: int, dtype: str = "fp16") -> Bounds:
    """The bounds of a decode step on a past, or of the prefill of a prompt of `past` tokens.

    Every weight is read once, and each key and value of the cache: 2 * layers * batch * past * hidden numbers, which a
    prefill writes instead. Attention makes two products with each of them for each new token; all tokens of a prompt
    see each other, but for a handful.
    """
    cells = 2 * checkpoint.num_layers * batch * past * checkpoint.hidden_size
    attention = 2 * cells * (past if phase == "prefill" else 1)
    flop = weight_products(checkpoint, phase, batch, past) + attention
    weights, cache = engine_weights(checkpoint, dtype), cells * BYTES[dtype]
    per_ms = report.copy_bandwidth_gb_s * 1e6
    products = flop / (report.matrix_tflop_s * PRODUCT_RATE[dtype] * 1e9)
    return Bounds(weights / per_ms, cache / per_ms, products, flop, weights + cache)


def load(path: Path) -> tuple[Report, str]:
    """A run that `glmtrt bench DIR --output` kept, and on what it was made. WorkbookError: missing or broken."""
    again = f"measure it with `glmtrt bench DIR --output {path}`"
    entry = read_json(path, again)
    try:
        rows = [Row(**row) for row in entry["rows"]]
        rest = {name: entry[name] for name in _KEPT}
        report = Report(**rest, rows=rows, missing=entry.get("missing", {}))
        if min(report.copy_bandwidth_gb_s, report.matrix_tflop_s, *(row.median_ms for row in rows)) <= 0:
            raise ValueError("a time or a rate that is not above zero")
        return report, about_run(entry)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorkbookError(f"{path} is no whole measurement ({error}): {again}.") from None


def read_json(path: Path, again: str) -> Any:
    """A kept file. WorkbookError: missing or broken; again: how one comes by it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise WorkbookError(f"{path} is missing: {again}.") from None
    except ValueError as error:
        raise WorkbookError(f"{path} is not JSON ({error}): {again}.") from None


def about_run(entry: dict[str, Any]) -> str:
    """The card, the day and the versions of a kept run, in a line."""
    packages = [f"{name} {entry['versions'][name]}" for name in ("torch", "tensorrt-rtx") if name in entry["versions"]]
    return ", ".join([entry["gpu"] or "a CPU", entry["date"], *packages])


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
