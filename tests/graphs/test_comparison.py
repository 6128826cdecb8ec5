"""Two graphs side by side: what was changed is listed, and nothing else."""

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import helper
from support.exporting import editing, exported_copy, path_of, replace_weight, set_alpha_once, swap_past

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.export import exporting
from glmtrt_helpers.graphs.comparison import compare_graphs

Damage = Callable[[onnx.ModelProto], None]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return exported_copy(tmp_path)


def changed(checkpoint: Checkpoint, damage: Damage) -> Path:
    path = checkpoint.directory / "changed.onnx"
    path.write_bytes(path_of(checkpoint).read_bytes())
    with editing(path) as model:
        damage(model)
    return path


def differences(checkpoint: Checkpoint, damage: Damage) -> dict[str, tuple[str, str]]:
    found = compare_graphs(path_of(checkpoint), changed(checkpoint, damage))
    return {each.what: (each.first, each.second) for each in found}


def rename_all(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.name += "_renamed"
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name.startswith("mul"):
                    names[i] = name + "_renamed"


def test_names_and_places_of_weights_make_no_difference(checkpoint: Checkpoint) -> None:
    assert differences(checkpoint, lambda model: None) == {}
    assert differences(checkpoint, rename_all) == {}
    assert differences(checkpoint, replace_weight("transformer.final_layernorm.weight")) == {}, "only stored elsewhere"


def test_a_changed_constant_is_found_at_its_node(checkpoint: Checkpoint) -> None:
    found = differences(checkpoint, set_alpha_once(1, 0, 3.0))
    ((first, second),) = found.values()
    assert "Mul" in first and "with 7.4" in first and "with 3" in second and "transformer.layers.1" in second


def test_attributes_that_differ_are_shown(checkpoint: Checkpoint) -> None:
    def damage(model: onnx.ModelProto) -> None:
        (axis, *_) = [each for node in model.graph.node if node.op_type == "Softmax" for each in node.attribute]
        axis.i = 1

    ((first, second),) = differences(checkpoint, damage).values()
    assert "Softmax" in first and first.endswith(", axis = -1") and second.endswith(", axis = 1")


def test_a_node_that_reads_something_else_is_found(checkpoint: Checkpoint) -> None:
    ((first, second),) = differences(checkpoint, swap_past(1)).values()
    assert "transformer.layers.1.attention" in first and first == second, "the same node, with other inputs"


def test_a_node_more_and_a_static_input_are_listed(checkpoint: Checkpoint) -> None:
    def damage(model: onnx.ModelProto) -> None:
        model.graph.node.append(helper.make_node("Identity", ["logits"], ["more"], "one_more"))
        model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2

    found = differences(checkpoint, damage)
    assert found["nodes of type Identity"] == ("", "1")
    assert found["input input_ids"] == ("int64 (?, ?)", "int64 (2, ?)")
    assert "one_more" in found["the first node that differs"][1]
    assert found["the first node that differs"][0] == "the graph ends"


def test_another_exporter_and_opset(checkpoint: Checkpoint) -> None:
    other = exporting.export_model(checkpoint, "fp32", exporter="torchscript", opset=17).path
    found = {each.what: (each.first, each.second) for each in compare_graphs(path_of(checkpoint, "fp32"), other)}
    assert found["opset"] == ("18", "17")
    assert not any(what.startswith(("input", "output", "weight")) for what in found)
