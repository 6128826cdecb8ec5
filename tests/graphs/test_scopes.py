"""Which module a node came from and what kind a tensor is, on small graphs and on an export."""

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from support.exporting import path_of

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.graphs.scopes import CONSTANT, DATA, SHAPE, GraphIndex, written_scope

SMALL = """
<ir_version: 8, opset_import: ["" : 18]>
small (float[n, 4] x) => (float[n, 2] y)
{
    t = Transpose (w)
    h = MatMul (x, t)
    s = Shape (h)
    r = Reshape (h, s)
    a, b = Split <axis = 1, num_outputs = 2> (r)
    y = Add (a, b)
    z = Mul (r, r)
}
"""


def small() -> onnx.ModelProto:
    model = parser.parse_model(SMALL)
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((4, 4), np.float32), "w"))
    scoped = {"MatMul": "['', 'outer', 'outer.linear', 'linear']", "Add": "['', 'outer', 'add']"}
    for node in model.graph.node:
        if node.op_type in scoped:
            entry = node.metadata_props.add()
            entry.key, entry.value = "pkg.torch.onnx.name_scopes", scoped[node.op_type]
    return model


def test_kinds_follow_from_the_inputs() -> None:
    kinds = GraphIndex(small()).kinds
    assert {name: kinds[name] for name in "xwthsrab"} == {
        "x": DATA, "w": CONSTANT, "t": CONSTANT, "h": DATA, "s": SHAPE, "r": DATA, "a": DATA, "b": DATA
    }  # fmt: skip


def test_scopes_are_read_and_given_to_neighbours() -> None:
    index = GraphIndex(small())
    by_type = dict(zip((node.op_type for node in index.nodes), index.scopes, strict=True))
    linear = "outer.linear"
    # Transpose has only a weight before it and takes the scope after it; the others take the one before.
    assert by_type == {
        "Transpose": linear, "MatMul": linear, "Shape": linear, "Reshape": linear, "Split": linear, "Add": "outer",
        "Mul": linear,
    }  # fmt: skip
    assert index.inside("outer") == set(range(7)) and index.inside("outer.lin") == set()


def test_what_crosses_the_border_of_a_module() -> None:
    index = GraphIndex(small())
    members = {0, 1}
    assert list(index.entering(members)) == ["x"]
    assert list(index.leaving(members)) == ["h"]
    # A tensor read twice enters once; what is computed from weights alone is not data.
    assert list(index.entering({6})) == ["r"] and list(index.leaving({0})) == []
    assert list(index.leaving({3})) == ["r"] and list(index.leaving({5})) == ["y"]
    # h is read outside of {1, 3} by Shape alone.
    assert list(index.leaving({0, 1, 3})) == ["r"]


@pytest.mark.parametrize(
    ("name", "scope"),
    [("/transformer/layers.3/attention/MatMul_1", "transformer.layers.3.attention"), ("/Cast", ""), ("plain", None)],
)
def test_torchscript_writes_the_scope_into_the_name(name: str, scope: str | None) -> None:
    assert written_scope(onnx.helper.make_node("MatMul", ["a"], ["b"], name=name)) == scope


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_module_of_an_export_is_found_with_its_one_input(checkpoint: Checkpoint, dtype: str) -> None:
    index = GraphIndex(load_graph(path_of(checkpoint, dtype)))
    for layer in range(2):
        for module in (
            "input_layernorm",
            "attention.query_key_value",
            "attention.dense",
            "post_attention_layernorm",
            "mlp",
        ):
            members = index.inside(f"transformer.layers.{layer}.{module}")
            assert len(list(index.entering(members))) == 1, module
            assert len(list(index.leaving(members))) == 1, module
            weights = {root for i in members for root in index.nodes[i].input if root in index.initializers}
            expected = {name for name in checkpoint.tensors if name.startswith(f"transformer.layers.{layer}.{module}.")}
            assert expected <= weights, module
