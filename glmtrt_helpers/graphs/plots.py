"""TODO."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from glmtrt_helpers.core import display
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.graphs.layer_errors import LayerError, first_difference


def plot_layer_errors(errors: Sequence[LayerError], title: str = "") -> Figure:
    """Error at every point over the largest value there, beside what is allowed; the first one beyond is marked."""
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    x = range(len(errors))
    # Equal numbers have no place on a log axis: they lie on a floor below all others.
    floor = min((e.error / e.scale for e in errors if e.error > 0), default=1e-8) / 3

    def curve(values: Sequence[float]) -> list[float]:
        return [max(value / error.scale, floor) for value, error in zip(values, errors, strict=True)]

    axis.plot(x, curve([e.tolerance for e in errors]), color="#777777", linestyle="--", label="allowed")
    if all(e.own_error is not None for e in errors):
        axis.plot(
            x, curve([e.own_error or 0.0 for e in errors]), color=display.DECODE, marker=".", label="PyTorch fp16"
        )
    axis.plot(x, curve([e.error for e in errors]), color=display.PREFILL, marker="o", markersize=4, label="the graph")
    first = first_difference(errors)
    if first:
        at = list(errors).index(first)
        axis.axvline(at, color=display.ALARM, linewidth=1)
        axis.annotate(f"first beyond: {first.name}", (at, 1), xycoords=("data", "axes fraction"), xytext=(4, -4),
                      textcoords="offset points", color=display.ALARM, va="top")  # fmt: skip
    axis.set_yscale("log")
    axis.set_ylim(top=10 * axis.get_ylim()[1])  # room for the mark's text above the curves
    axis.set_ylabel("largest error / largest value")
    axis.set_xticks(*_ticks(errors), rotation=90, fontsize=8)
    axis.set_title(title or "Where the graph begins to differ from PyTorch", loc="left", pad=22)  # above the legend
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
    plt.close(figure)
    return figure


def _ticks(errors: Sequence[LayerError]) -> tuple[list[int], list[str]]:
    """Every point where there is room for its name, else the input of every layer."""
    if len(errors) <= 40:
        return list(range(len(errors))), [error.name for error in errors]
    chosen = [i for i, error in enumerate(errors) if error.point.part in ("embeddings", "input_layernorm", "logits")]
    return chosen, [errors[i].name.replace(" input_layernorm", "") for i in chosen]


def netron_view(onnx_path: str | Path, height: int = 600) -> Any:
    """An IPython IFrame of the whole graph in netron, served on a free local port; replaces the view before.

    It lives as long as the kernel. Who reads the notebook without one has the picture of `draw_layer`.
    """
    import netron
    from IPython.display import IFrame

    load_graph(onnx_path)  # a missing file should be the workbook's error, not a blank frame
    netron.stop()
    # Without a handler netron would set up logging for the whole process, and every library would start to talk.
    quiet = logging.NullHandler()
    logging.getLogger().addHandler(quiet)
    try:
        host, port = netron.start(str(onnx_path), address=("127.0.0.1", 0), browse=False)
    finally:
        logging.getLogger().removeHandler(quiet)
    return IFrame(f"http://{host}:{port}", width="100%", height=height)
