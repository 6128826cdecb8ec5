"""The diagram of an attention layer: it shows the attention, every edge is the graph's, and it stays readable."""

import itertools
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath
from onnx import numpy_helper, parser
from support.exporting import exported_copy, path_of

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.export.exporting import export_model
from glmtrt_helpers.graphs import attention_diagram
from glmtrt_helpers.graphs.attention_diagram import Box, Diagram, draw_layer, layer_nodes

SVG = "{http://www.w3.org/2000/svg}"
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


def diagram_of(path: Path, layer: int) -> Diagram:
    return attention_diagram.attention_diagram(load_graph(path), layer)


def titles(diagram: Diagram) -> list[str]:
    return [box.lines[0] for box in diagram.boxes.values()]


def rectangles(svg: str) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of the boxes, which have a rounding of 5."""
    found = [element for element in ElementTree.fromstring(svg).iter(SVG + "rect") if element.get("rx") == "5"]
    sizes = [[float(element.get(name) or 0) for name in ("x", "y", "width", "height")] for element in found]
    return [(x, y, x + w, y + h) for x, y, w, h in sizes]


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_attention_can_be_seen(tmp_path: Path, dtype: str, layer: int) -> None:
    path = exported_copy(tmp_path).directory / f"model.{dtype}.onnx"
    diagram = diagram_of(path, layer)
    shown = titles(diagram)
    # q and k, each with a half for the position and one for the block position.
    assert shown.count("Rotary") == 4 and shown.count("Concat with past") == 2 and shown.count("Softmax") == 1
    assert shown.count("MatMul") == 4 and "Where hidden: -10000" in shown
    # sqrt(16) times the layer's number; layer 0 has nothing to multiply back.
    folded = ", ".join(line for box in diagram.boxes.values() for line in box.lines)
    assert f"Div ÷ {4 * (layer + 1)}," in folded and ("Mul × 2" in folded) == (layer == 1)
    expected = {"position_ids", "attention_mask", f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"}
    expected |= {f"present.{layer}.key", f"present.{layer}.value", "hidden states", "to the residual"}
    assert expected | {"query_key_value", "dense", "cos table", "sin table"} <= set(shown)
    assert len([name for name in shown if "table" in name]) == 2
    assert shown.count("to the residual") == 1  # what is prepared for the other layers, too, does not leave
    assert not {"Shape", "Slice", "Neg", "Unsqueeze", "Transpose", "Add"} & set(shown) and len(shown) == 37


def test_edges_are_the_data_flow(tmp_path: Path) -> None:
    """From the keys' Concat the edges lead over the scores to the Softmax; the values join after it."""
    diagram = diagram_of(exported_copy(tmp_path).directory / "model.fp16.onnx", 1)

    def reached(key: str) -> set[str]:
        keys = {key}
        while more := {end for start, end in diagram.edges if start in keys} - keys:
            keys |= more
        return {diagram.boxes[other].lines[0] for other in keys}

    assert {"Softmax", "present.1.key", "to the residual"} <= reached("input past_key_values.1.key")
    from_values = reached("input past_key_values.1.value")
    assert {"present.1.value", "to the residual"} <= from_values and "Softmax" not in from_values
    from_positions, from_mask = reached("input position_ids"), reached("input attention_mask")
    assert "Rotary" in from_positions and "present.1.value" not in from_positions
    assert "Softmax" in from_mask and "present.1.key" not in from_mask
    assert set(diagram.boxes) == {key for edge in diagram.edges for key in edge} and len(diagram.edges) == 49


def test_all_layers_are_drawn_alike(tmp_path: Path) -> None:
    """Box by box and edge by edge at the same place, whatever the layer's number, its factors and its nodes' names."""
    path = exported_copy(tmp_path).directory / "model.fp16.onnx"
    first, second = diagram_of(path, 0), diagram_of(path, 1)
    keys = {key: f"{99 - i}" for i, key in enumerate(second.boxes)}
    last = Diagram(0, {}, [(keys[start], keys[end]) for start, end in second.edges])
    for key, box in second.boxes.items():
        lines = (re.sub(r"([×÷]) [\d.]+", r"\1 316.784", line.replace(".1.", ".27.")) for line in box.lines)
        last.boxes[keys[key]] = Box(tuple(lines), box.kind)
    layouts = [attention_diagram._layout(diagram) for diagram in (first, second, last)]
    places = [[(node["center"]["x"], node["center"]["y"]) for node in layout.nodes] for layout in layouts]
    assert np.allclose(places[0], places[1], atol=1) and np.allclose(places[1], places[2], atol=1)
    kinds = [[box.kind for box in diagram.boxes.values()] for diagram in (first, second)]
    assert kinds[0] == kinds[1] and draw_layer(path, 1) == draw_layer(path, 1)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_svg_is_whole_and_tidy(tmp_path: Path, layer: int) -> None:
    path = exported_copy(tmp_path).directory / "model.fp16.onnx"
    diagram, svg = diagram_of(path, layer), draw_layer(path, layer)
    root, boxes = ElementTree.fromstring(svg), rectangles(svg)
    assert len(boxes) == len(diagram.boxes)
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
    _, _, width, height = map(float, (root.get("viewBox") or "").split())
    assert all(left > 0 and right < width and top > 60 and bottom < height for left, top, right, bottom in boxes)
    assert width <= 1200 and root.get("width") == "100%" and len(svg) < 40_000  # it shrinks with the page
    # Every edge goes down, from the lower border of one box to the upper border of another.
    place = dict(zip(diagram.boxes, boxes, strict=True))
    lines = list(root.iter(SVG + "polyline"))
    for (start, end), line in zip(diagram.edges, lines, strict=True):
        points = [tuple(map(float, point.split(","))) for point in (line.get("points") or "").split()]
        for (x, y), (left, _, right, _), border in (
            (points[0], place[start], place[start][3]), (points[-1], place[end], place[end][1])
        ):  # fmt: skip
            assert left - 0.2 <= x <= right + 0.2 and abs(y - border) < 0.3
        heights = [y for _, y in points]
        assert heights == sorted(heights)


@pytest.mark.parametrize("layer", [0, 1])
def test_text_stays_inside_its_box(tmp_path: Path, layer: int) -> None:
    """Measured in DejaVu Sans, the first font that the SVG asks for; and no two lines of a box touch."""
    path = exported_copy(tmp_path).directory / "model.fp16.onnx"
    svg = draw_layer(path, layer)
    texts = [element for element in ElementTree.fromstring(svg).iter(SVG + "text") if element.get("text-anchor")]
    boxes = [(box, place) for box, place in zip(diagram_of(path, layer).boxes.values(), rectangles(svg), strict=True)]
    expected = [(line, place, i) for box, place in boxes for i, line in enumerate(box.lines)]
    for text, (line, (left, top, right, bottom), i) in zip(texts, expected, strict=True):
        assert text.text == line
        font = FontProperties(fname=FONTS / ("DejaVuSans.ttf" if i else "DejaVuSans-Bold.ttf"))
        half = TextPath((0, 0), line.replace("_", "x"), size=10 if i else 11.5, prop=font).get_extents().width / 2
        x, y = float(text.get("x") or 0), float(text.get("y") or 0)
        assert left + 2 <= x - half and x + half <= right - 2
        assert top + 11.5 + 15 * i <= y <= min(top + 16.5 + 15 * i, bottom - 4)


def test_a_torchscript_export_is_folded_alike(tmp_path: Path) -> None:
    path = export_model(exported_copy(tmp_path), "fp16", exporter="torchscript").path
    shown = titles(diagram_of(path, 1))
    assert shown.count("Rotary") == 4 and shown.count("Concat with past") == 2 and len(shown) <= 60


SHARED = """
<ir_version: 8, opset_import: ["" : 18]>
small (float[n, 4] x) => (float[n, 4] y)
{
    h = MatMul (x, w)
    flat = Reshape (h, minus)
    probabilities = Softmax (h)
    back = Reshape (probabilities, whole)
    scaled = Mul (back, half)
    joined = MatMul (scaled, w)
    biased = Add (joined, b)
    y = Mul (biased, flat)
}
"""


def test_only_what_has_one_reader_is_folded() -> None:
    """h is read twice, so its Reshape is a box of its own; bias, factor and second Reshape join the box before."""
    model = parser.parse_model(SHARED)
    constants = {"w": np.zeros((4, 4), np.float32), "b": np.zeros(4, np.float32), "minus": np.array([-1]),
                 "whole": np.array([-1, 4]), "half": np.array(0.5, np.float32)}  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    for node in model.graph.node:
        node.name = f"/transformer/layers.0/attention/{node.op_type}"
    boxes = attention_diagram.attention_diagram(model, 0).boxes
    inside = {(box.lines[0], box.lines[1]) for key, box in boxes.items() if key.startswith("node")}
    assert inside == {("MatMul", "h"), ("Reshape", "flat"), ("Softmax", "Reshape, Mul × 0.5"), ("MatMul", "Add"),
                      ("Mul", "y")}  # fmt: skip


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkbookError, match=r"no node of transformer\.layers\.2\.attention"):
        draw_layer(exported_copy(tmp_path).directory / "model.fp16.onnx", 2)


def test_layer_nodes_are_the_layers_own(checkpoint: Checkpoint) -> None:
    model = load_graph(path_of(checkpoint))
    attention = [layer_nodes(model, layer) for layer in range(2)]
    for layer, nodes in enumerate(attention):
        kinds = [node.op_type for node in nodes]
        # Four matmuls: query_key_value, scores, context, dense.
        assert kinds.count("Softmax") == 1 and kinds.count("MatMul") == 4 and kinds.count("Where") == 1
        written = {name for node in nodes for name in node.output}
        assert {f"present.{layer}.key", f"present.{layer}.value"} <= written
        assert f"present.{1 - layer}.key" not in written
    names = [{node.name for node in nodes} for nodes in attention]
    assert names[0].isdisjoint(names[1])
    mlp = layer_nodes(model, 1, "mlp")
    assert [node.op_type for node in mlp].count("Tanh") == 1 and names[1].isdisjoint(node.name for node in mlp)
    whole = {node.name for node in layer_nodes(model, 1, "")}
    assert names[1] | {node.name for node in mlp} < whole
    for layer, part in ((2, "attention"), (0, "feed_forward")):
        with pytest.raises(WorkbookError, match=f"no node of transformer.layers.{layer}.{part}"):
            layer_nodes(model, layer, part)
