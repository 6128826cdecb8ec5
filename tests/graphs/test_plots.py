"""The layer plot marks the first point over its tolerance; netron serves the graph and leaves logging alone."""

import logging
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.exporting import damaged, path_of, replace_weight

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.graphs.layer_errors import compare_layers
from glmtrt_helpers.graphs.plots import netron_view, plot_layer_errors


def test_the_plot_marks_the_first_point_over_its_tolerance(checkpoint: Checkpoint) -> None:
    path = damaged(checkpoint, "fp16", replace_weight("transformer.layers.1.mlp.dense_4h_to_h.bias"))
    errors = compare_layers(checkpoint, onnx_path=path)
    (axis,) = plot_layer_errors(errors).axes
    assert axis.get_yscale() == "log" and "largest" in axis.get_ylabel()
    assert [text.get_text() for text in axis.texts] == ["first over tolerance: layer 1 mlp"]
    axis.figure.canvas.draw()
    assert axis.texts[0].get_window_extent().x1 < axis.get_window_extent().x1, "beside a late point, its left has room"
    lines = {str(line.get_label()): np.asarray(line.get_ydata()) for line in axis.lines}
    at = [error.name for error in errors].index("layer 1 mlp")
    assert lines["the graph"][at] == pytest.approx(errors[at].error / errors[at].scale)
    assert (lines["the graph"] <= lines["tolerance"]).tolist() == [error.ok for error in errors]
    assert "PyTorch fp16" in lines and (lines["PyTorch fp16"] > 0).all()
    # The embeddings are exact, and still drawn.
    assert errors[0].error == 0 and 0 < lines["the graph"][0] < lines["the graph"][1:].min()
    assert [label.get_text() for label in axis.get_xticklabels()] == [error.name for error in errors]
    figure = plot_layer_errors(errors, "", "the engine")
    assert "the engine" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    figure.canvas.draw()
    assert not any("$" in label.get_text() for label in figure.axes[0].get_yticklabels())
    correct = [replace(error, error=0.0) for error in errors]
    assert not plot_layer_errors(correct).axes[0].texts
    # 28 layers have no room for every name.
    many = [replace(e, point=replace(e.point, layer=i)) for i in range(28) for e in errors[1:9]]
    labels = [label.get_text() for label in plot_layer_errors(many).axes[0].get_xticklabels()]
    assert labels == [f"layer {i}" for i in range(28)]


def test_netron_serves_the_graph_and_leaves_logging_alone(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    import netron

    root = logging.getLogger()
    monkeypatch.setattr(root, "handlers", [])  # pytest's own would hide that netron adds one
    level = root.level
    first = netron_view(path_of(checkpoint))
    second = netron_view(path_of(checkpoint, "fp32"), height=321)
    try:
        assert first.src != second.src and second.height == 321
        served = urllib.request.urlopen(f"{second.src}/data/model.fp32.onnx", timeout=10).read()
        assert served == path_of(checkpoint, "fp32").read_bytes()
        # The page connects to this server only, and does not even ask.
        with urllib.request.urlopen(f"{second.src}/index.html", timeout=10) as page:
            assert page.headers["Content-Security-Policy"] == "connect-src 'self' blob: data:"
        script = urllib.request.urlopen(f"{second.src}/browser.js", timeout=10).read()
        assert b"https://ipinfo.io" in script and b"await consent" not in script and b"await telemetry" not in script
        # The previous view has ended, instead of showing the new graph at its old address.
        with pytest.raises(OSError):
            urllib.request.urlopen(first.src, timeout=1)
        assert root.handlers == [] and root.level == level
    finally:
        netron.stop()


def test_a_missing_graph_is_an_error_and_not_a_blank_frame(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(WorkbookError, match="make a working copy with `glmtrt copy"):
        netron_view(tmp_path / "model.fp16.onnx")
