"""What TensorRT's parser says: the famous sentence on a Squeeze without axes, and nothing on a sound graph."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from glmtrt_helpers.graphs.tensorrt_parser import inspect_capability, tensorrt_errors

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")


def lookup(*axes: str) -> onnx.ModelProto:
    """cos (length, 1, 64) squeezed, with or without axes, and looked up."""
    nodes = [
        helper.make_node("Squeeze", ["cos", *axes], ["table"], name="rotary/Squeeze"),
        helper.make_node("Gather", ["table", "position_ids"], ["out"]),
    ]
    inputs = [
        helper.make_tensor_value_info("cos", TensorProto.FLOAT, ["length", 1, 64]),
        helper.make_tensor_value_info("position_ids", TensorProto.INT64, ["sequence"]),
    ]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)]
    one = helper.make_tensor("axes", TensorProto.INT64, [1], [1])
    graph = helper.make_graph(nodes, "lookup", inputs, outputs, [one] if axes else [])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.skipif(
    tuple(map(int, tensorrt_rtx.__version__.split(".")[:2])) >= (1, 7), reason="1.7 parses it and fails while building"
)
def test_squeeze_without_axes_is_named() -> None:
    (error,) = tensorrt_errors(lookup())
    assert error.startswith("Squeeze 'rotary/Squeeze'") and "Cannot infer squeeze dimensions" in error


def test_squeeze_with_axes_is_read() -> None:
    assert tensorrt_errors(lookup("axes")) == []


def test_what_is_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"garbage")
    assert tensorrt_errors(tmp_path / "model.onnx")


def test_polygraphy_names_operator_node_and_reason(tmp_path: Path) -> None:
    model = lookup("axes")
    model.graph.node[0].op_type = "FancySqueeze"
    model.opset_import.append(helper.make_opsetid("my.company", 1))
    model.graph.node[0].domain = "my.company"
    onnx.save(model, tmp_path / "broken.onnx")
    said = inspect_capability(tmp_path / "broken.onnx")
    assert "FancySqueeze" in said and "rotary/Squeeze" in said
    assert "not supported" in said or "Plugin not found" in said  # 1.6, and 1.7
    onnx.save(lookup("axes"), tmp_path / "sound.onnx")
    assert inspect_capability(tmp_path / "sound.onnx") == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.onnx", "sound.onnx"]
