"""Locating: a fault planted in one node of one layer is found there, and nothing is found in sound graphs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.exporting import damaged, exported_copy, path_of, set_alpha_once, swap_past

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.export import exporting
from glmtrt_helpers.graphs.locate import locate
from glmtrt_helpers.graphs.reference import CASES
from glmtrt_helpers.graphs.scopes import GraphIndex

Damage = Callable[[onnx.ModelProto], None]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return exported_copy(tmp_path)


def nodes_of(model: onnx.ModelProto, kind: str, module: str) -> list[onnx.NodeProto]:
    index = GraphIndex(model)
    return [n for n, scope in zip(index.nodes, index.scopes, strict=True) if n.op_type == kind and scope == module]


def drop_sign(model: onnx.ModelProto) -> None:
    """One of the minus signs of the rotary embedding in layer 1."""
    node = nodes_of(model, "Neg", "transformer.layers.1.attention")[0]
    node.op_type = "Identity"


def halve_scores(model: onnx.ModelProto) -> None:
    """The factor that undoes the division by the layer's number, in layer 1."""
    index = GraphIndex(model)
    for node in nodes_of(model, "Mul", "transformer.layers.1.attention"):
        for i, name in enumerate(node.input):
            if index.scalar(name) == 2.0:
                model.graph.initializer.append(numpy_helper.from_array(np.float32(1.0), "another"))
                node.input[i] = "another"
                return
    raise AssertionError("no factor 2")


@pytest.mark.parametrize(
    ("damage", "layer", "kinds"),
    [
        (set_alpha_once(0, 1, 3.0), 0, {"Mul"}),
        (set_alpha_once(1, 0, 3.0), 1, {"Mul"}),
        (drop_sign, 1, {"Identity", "Concat"}),
        (halve_scores, 1, {"Softmax"}),  # without the factor its Mul writes what PyTorch has one step earlier
    ],
)
def test_the_node_at_fault_is_named(checkpoint: Checkpoint, damage: Damage, layer: int, kinds: set[str]) -> None:
    for dtype in ("fp16", "fp32"):
        found = locate(checkpoint, dtype, damaged(checkpoint, dtype, damage))
        assert found.first is not None and found.first.point.layer == layer
        assert found.fault is not None and found.fault.node.op_type in kinds, (dtype, str(found.fault))
        assert found.fault.module.startswith(f"transformer.layers.{layer}")


def test_a_wrong_input_shows_where_it_is_read(checkpoint: Checkpoint) -> None:
    found = locate(checkpoint, "fp16", damaged(checkpoint, "fp16", swap_past(1)), CASES[2])
    assert found.fault is not None and found.fault.module.startswith("transformer.layers.1.attention")
    assert "past_key_values.1" in " ".join(found.fault.node.input)


def test_an_overflow_is_located(checkpoint: Checkpoint) -> None:
    """60,000 times a LayerNorm's output is more than fp16 can hold, so what follows is infinite, then not a number."""
    found = locate(checkpoint, "fp16", damaged(checkpoint, "fp16", set_alpha_once(1, 0, 60000.0)))
    assert found.first is not None and found.first.point.layer == 1
    assert found.fault is not None and found.fault.node.op_type == "Mul"


@pytest.mark.parametrize(("dtype", "exporter", "opset"), [("fp16", "dynamo", 18), ("fp32", "torchscript", 17)])
def test_nothing_is_found_in_a_sound_graph(checkpoint: Checkpoint, dtype: str, exporter: str, opset: int) -> None:
    path = path_of(checkpoint, dtype)
    if exporter == "torchscript":
        path = exporting.export_model(checkpoint, dtype, exporter=exporter, opset=opset).path
    found = locate(checkpoint, dtype, path)
    assert found.first is None and found.fault is None
