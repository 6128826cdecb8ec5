"""The rotary tables are folded and the weights are not, dimensions have names, and no node names this machine."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.export import graph_passes
from glmtrt_helpers.export.exporting import onnx_path
from glmtrt_helpers.inputs.names import input_names, output_names


def tables(checkpoint: Checkpoint, dtype: str) -> list[onnx.TensorProto]:
    """Constants with two dimensions: nothing but the rotary tables."""
    initializers = load_graph(onnx_path(checkpoint, dtype)).graph.initializer
    return [tensor for tensor in initializers if len(tensor.dims) == 2 and not tensor.external_data]


@pytest.mark.parametrize("dtype", loading.DTYPES)
def test_tables_are_pytorchs_own_and_stored_once(exported: Checkpoint, dtype: str) -> None:
    """To the bit, for PyTorch computed both, here; late positions too, where fp16 angles are far from fp32 ones."""
    torch_dtype = loading.DTYPES[dtype]
    model = loading.load_model(exported, torch_dtype, code=exported.pristine_code)
    rotary = model.transformer.layers[0].attention.rotary_emb
    cos, sin = rotary(torch.zeros(1, dtype=torch_dtype), seq_len=exported.max_length)
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in tables(exported, dtype)]
    assert [table.shape for table in stored] == [(exported.max_length, exported.head_size // 2)] * 2
    for table in (cos, sin):
        assert any(np.array_equal(table[:, 0].numpy(), array) for array in stored)


def test_dimensions_have_names(exported: Checkpoint) -> None:
    model = load_graph(onnx_path(exported, "fp16")).graph
    shape = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.input, *model.output, *model.value_info)
    }
    assert list(shape)[: len(model.input) + len(model.output)] == input_names(2) + output_names(2)
    assert shape["input_ids"] == ["batch", "sequence"] and shape["position_ids"] == ["batch", 2, "sequence"]
    assert shape["attention_mask"] == ["batch", 1, "sequence", "total"]
    assert shape["past_key_values.1.value"] == ["past", "batch", 4, 16]
    assert shape["present.1.key"] == ["total", "batch", 4, 16] and shape["logits"] == ["batch", "sequence", 480]
    inner = {dim for value in model.value_info for dim in shape[value.name] if isinstance(dim, str)}
    assert {"batch", "sequence", "total"} <= inner and not [
        dim for dim in inner if dim.startswith("s") and dim[1].isdigit()
    ]


def test_nodes_say_which_layer_they_came_from_and_nothing_of_this_machine(exported: Checkpoint) -> None:
    content = onnx_path(exported, "fp16").read_bytes()
    assert b"transformer.layers.1.attention" in content
    assert b"site-packages" not in content and str(exported.directory.parent).encode() not in content
    assert b"modeling_chatglm.py" not in content


def test_a_node_that_reads_a_weight_is_kept_whatever_else_is_folded(exported: Checkpoint) -> None:
    """inv_freq is no weight: it becomes a table. The transpose of a weight would be a second copy of it."""
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    g (float[n, 4] x) => (float[n, 4] y)
    <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float[4] inv_freq = {0, 1, 2, 3}>
    {
        t = Transpose (w)
        h = MatMul (x, t)
        a = Add (inv_freq, inv_freq)
        c = Cos (a)
        y = Mul (h, c)
    }
    """
    model = ir.from_proto(onnx.parser.parse_model(text))
    graph_passes.simplify(model, exported, {"w", "inv_freq"})
    assert [node.op_type for node in model.graph] == ["Transpose", "MatMul", "Mul"]
    table = model.graph.node(2).inputs[1]
    assert table is not None and table.const_value is not None and model.graph.initializers["w"].const_value is None
    assert np.array_equal(table.const_value.numpy(), torch.cos(torch.tensor([0.0, 2.0, 4.0, 6.0])).numpy())
