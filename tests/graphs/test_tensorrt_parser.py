"""What TensorRT's parser says: the well-known sentence on a Squeeze without axes, and nothing on a correct graph."""

from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper
from support.exporting import path_of

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.graphs.tensorrt_parser import inspect_capability, parse, tensorrt_errors

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
    assert tensorrt_errors(tmp_path / "missing.onnx")


@pytest.mark.slow
def test_an_export_is_parsed_and_built_without_a_gpu(checkpoint: Checkpoint) -> None:
    assert tensorrt_errors(path_of(checkpoint)) == []
    log = tensorrt_rtx.Logger(tensorrt_rtx.Logger.ERROR)
    builder, network, parser, errors = parse(tensorrt_rtx, log, path_of(checkpoint))
    assert errors == [] and network.get_flag(tensorrt_rtx.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    config = builder.create_builder_config()
    for sequence, past in (((1, 8, 64), (0, 0, 0)), ((1, 1, 1), (1, 32, 128))):
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            sizes = []
            for s, p in zip(sequence, past, strict=True):
                total = {"input_ids": (1, s), "position_ids": (1, 2, s), "attention_mask": (1, 1, s, s + p)}
                sizes.append(total.get(tensor.name, (p, 1, 4, 16)))
            profile.set_shape(tensor.name, *sizes)
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None
    del parser


def test_polygraphy_names_operator_node_and_reason(tmp_path: Path) -> None:
    model = lookup("axes")
    model.graph.node[0].op_type = "FancySqueeze"
    model.opset_import.append(helper.make_opsetid("my.company", 1))
    model.graph.node[0].domain = "my.company"
    onnx.save(model, tmp_path / "broken.onnx")
    said = inspect_capability(tmp_path / "broken.onnx")
    assert "FancySqueeze" in said and "rotary/Squeeze" in said
    assert "not supported" in said or "Plugin not found" in said  # 1.6, and 1.7
    onnx.save(lookup("axes"), tmp_path / "correct.onnx")
    assert inspect_capability(tmp_path / "correct.onnx") == ""
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.onnx", "correct.onnx"]
