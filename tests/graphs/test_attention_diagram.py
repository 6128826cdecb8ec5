"""The picture of an attention layer: it shows the attention, every arrow is the graph's, and it stays readable."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper, parser
from support.exporting import exported_copy
from test_layered import overlapping, rectangles

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.export import exporting
from glmtrt_helpers.graphs.attention_diagram import _Picture, _shared, draw_layer
from glmtrt_helpers.graphs.scopes import DATA, GraphIndex


def picture_of(path: Path, layer: int) -> _Picture:
    index = GraphIndex(load_graph(path))
    scope = f"transformer.layers.{layer}.attention"
    members = {i for i in index.inside(scope) if index.kinds[index.nodes[i].output[0]] == DATA}
    return _Picture(index, members | _shared(index, members), scope)


def titles(picture: _Picture) -> list[str]:
    return [box.lines[0] for box in picture.boxes.values()]


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("layer", [0, 1])
def test_the_attention_can_be_seen(tmp_path: Path, dtype: str, layer: int) -> None:
    path = exported_copy(tmp_path).directory / f"model.{dtype}.onnx"
    picture = picture_of(path, layer)
    shown = titles(picture)
    # q and k, each with a half for the position and one for the block position.
    assert shown.count("Rotary") == 4 and shown.count("Concat with past") == 2 and shown.count("Softmax") == 1
    assert shown.count("MatMul") == 4 and "Where hidden: -10000" in shown
    # sqrt(16) times the layer's number; layer 0 has nothing to multiply back.
    assert f"Div ÷ {4 * (layer + 1)}" in shown and ("Mul × 2" in shown) == (layer == 1)
    edge = {"position_ids", "attention_mask", f"past_key_values.{layer}.key", f"past_key_values.{layer}.value"}
    edge |= {f"present.{layer}.key", f"present.{layer}.value", "hidden states", "to the residual"}
    assert edge <= set(shown) and {"query_key_value", "dense"} <= set(shown)
    assert {"cos table", "sin table"} <= set(shown) and len([name for name in shown if "table" in name]) == 2
    assert shown.count("to the residual") == 1  # what is prepared for the other layers, too, does not leave
    assert not {"Shape", "Slice", "Neg", "Unsqueeze", "Transpose", "Add"} & set(shown) and len(shown) <= 60


def test_arrows_are_the_ways_of_the_data(tmp_path: Path) -> None:
    """From the keys' Concat the arrows lead over the scores to the Softmax; the values join behind it."""
    picture = picture_of(exported_copy(tmp_path).directory / "model.fp16.onnx", 1)
    below: dict[str, set[str]] = {}
    for start, end in picture.edges:
        below.setdefault(start, set()).add(end)

    def reach(key: str) -> set[str]:
        found: set[str] = set()
        pending = [key]
        while pending:
            for other in below.get(pending.pop(), ()):
                if other not in found:
                    found.add(other)
                    pending.append(other)
        return found

    def names(keys: set[str]) -> set[str]:
        return {picture.boxes[key].lines[0] for key in keys}

    assert {"Softmax", "present.1.key", "to the residual"} <= names(reach("input past_key_values.1.key"))
    from_values = names(reach("input past_key_values.1.value"))
    assert {"present.1.value", "to the residual"} <= from_values and "Softmax" not in from_values
    assert "Rotary" in names(reach("input position_ids")) and "present.1.value" not in names(
        reach("input position_ids")
    )
    assert {"Softmax"} <= names(reach("input attention_mask")) and not {"present.1.key"} & names(
        reach("input attention_mask")
    )
    assert set(picture.boxes) == {key for edge in picture.edges for key in edge}


@pytest.mark.parametrize("layer", [0, 1])
def test_the_svg_is_tidy_and_always_the_same(tmp_path: Path, layer: int) -> None:
    path = exported_copy(tmp_path).directory / "model.fp16.onnx"
    svg = draw_layer(path, layer)
    assert svg == draw_layer(path, layer)
    picture = picture_of(path, layer)
    assert len(rectangles(svg)) == len(picture.boxes) and not overlapping(svg)
    texts = [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]
    assert all(line in texts for box in picture.boxes.values() for line in box.lines)
    assert "(total, batch, 4, 16)" in texts and f"layer {layer}, attention" in (texts[0] or "")
    assert len(svg) < 40_000


def test_a_torchscript_export_is_folded_alike(tmp_path: Path) -> None:
    checkpoint = exported_copy(tmp_path)
    path = exporting.export_model(checkpoint, "fp16", exporter="torchscript").path
    shown = titles(picture_of(path, 1))
    assert shown.count("Rotary") == 4 and shown.count("Concat with past") == 2 and len(shown) <= 60


SHARED = """
<ir_version: 8, opset_import: ["" : 18]>
small (float[n, 4] x) => (float[n, 4] y)
{
    h = MatMul (x, w)
    flat = Reshape (h, minus)
    probabilities = Softmax (h)
    back = Reshape (probabilities, whole)
    joined = MatMul (back, w)
    biased = Add (joined, b)
    y = Mul (biased, flat)
}
"""


def test_only_what_has_one_reader_is_folded() -> None:
    """h is read twice, so its Reshape is a box of its own; the bias and the second Reshape join what is before them."""
    model = parser.parse_model(SHARED)
    constants = {"w": np.zeros((4, 4), np.float32), "b": np.zeros(4, np.float32), "minus": np.array([-1]),
                 "whole": np.array([-1, 4])}  # fmt: skip
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    for node in model.graph.node:
        node.name = f"/transformer/layers.0/attention/{node.op_type}"
    index = GraphIndex(model)
    picture = _Picture(index, set(range(7)), "transformer.layers.0.attention")
    inside = [(box.lines[0], box.lines[1]) for key, box in picture.boxes.items() if key.startswith("node")]
    assert inside == [
        ("MatMul", "h"), ("Reshape", "flat"), ("Softmax", "Reshape"), ("MatMul", "Add"), ("Mul", "y")
    ]  # fmt: skip


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkbookError, match=r"no node of transformer\.layers\.2\.attention"):
        draw_layer(exported_copy(tmp_path).directory / "model.fp16.onnx", 2)
