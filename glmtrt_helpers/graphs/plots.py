"""Notebook 04's pictures: the errors along the layers, and the whole graph in netron."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from glmtrt_helpers.core import display
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.graphs.layer_errors import LayerError, first_difference


def plot_layer_errors(errors: Sequence[LayerError], title: str = "", what: str = "the graph") -> Figure:
    """Error and tolerance at every point, relative to the largest value there; marks the first one over tolerance.

    what: was compared, for the legend.
    """
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    x = range(len(errors))
    # An error of 0 has no place on a log axis: it is drawn below all others.
    floor = min((e.error / e.scale for e in errors if e.error > 0), default=1e-8) / 3

    def curve(values: Sequence[float]) -> list[float]:
        return [max(value / error.scale, floor) for value, error in zip(values, errors, strict=True)]

    axis.plot(x, curve([e.tolerance for e in errors]), color="#777777", linestyle="--", label="tolerance")
    if all(e.own_error is not None for e in errors):
        axis.plot(
            x, curve([e.own_error or 0.0 for e in errors]), color=display.DECODE, marker=".", label="PyTorch fp16"
        )
    axis.plot(x, curve([e.error for e in errors]), color=display.PREFILL, marker="o", markersize=4, label=what)
    first = first_difference(errors)
    if first:
        at = list(errors).index(first)
        late = at > 2 / 3 * len(errors)  # then the name has no room on the right
        axis.axvline(at, color=display.ALARM, linewidth=1)
        axis.annotate(
            f"first over tolerance: {first.name}",
            (at, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if late else 4, -4),
            textcoords="offset points",
            ha="right" if late else "left",
            color=display.ALARM,
            va="top",
        )
    axis.set_yscale("log")
    display.plain_ticks(axis.yaxis)
    axis.set_ylim(top=10 * axis.get_ylim()[1])  # room for the annotation above the curves
    axis.set_ylabel("largest error / largest value")
    axis.set_xticks(*_ticks(errors), rotation=90, fontsize=8)
    axis.set_title(title or f"Error of {what}, layer by layer", loc="left", pad=22)  # above the legend
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
    plt.close(figure)
    return figure


def _ticks(errors: Sequence[LayerError]) -> tuple[list[int], list[str]]:
    """Positions and names of the ticks: every point if the names fit, else one point of each layer."""
    if len(errors) <= 40:
        return list(range(len(errors))), [error.name for error in errors]
    selected = [i for i, error in enumerate(errors) if error.point.part in ("input_layernorm", "logits")]
    return selected, [errors[i].name.replace(" input_layernorm", "") for i in selected]


def netron_view(onnx_path: str | Path, height: int = 600) -> Any:
    """An IPython IFrame of the whole graph in netron, served on a free local port; ends the previous view.

    It lives as long as the kernel; without a kernel the notebook shows the picture of `draw_layer`.
    """
    import netron.server
    from IPython.display import IFrame

    class Offline(netron.server._HTTPRequestHandler):
        """Its page asks ipinfo.io where it is and reports to Google Analytics: that is taken out, and forbidden."""

        def _write(self, status: int, kind: str | None, content: bytes | None) -> None:
            if kind == "text/javascript" and content:
                content = re.sub(rb"await (consent|telemetry)\(\);", b"", content)
            super()._write(status, kind, content)

        def end_headers(self) -> None:
            self.send_header("Content-Security-Policy", "connect-src 'self' blob: data:")
            super().end_headers()

    load_graph(onnx_path)  # a missing file is reported here, not as a blank frame
    netron.stop()
    # Without a handler on the root logger, netron configures logging, and every library's log would be printed.
    quiet = logging.NullHandler()
    logging.getLogger().addHandler(quiet)
    netron.server._HTTPRequestHandler = Offline
    try:
        host, port = netron.start(str(onnx_path), address=("127.0.0.1", 0), browse=False)
    finally:
        logging.getLogger().removeHandler(quiet)
    return IFrame(f"http://{host}:{port}", width="100%", height=height)
