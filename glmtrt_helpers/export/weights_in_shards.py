"""Take the weights out of a traced graph: each becomes an address in a shard."""

import onnx_ir as ir

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.packing import Packing, scale_name
from glmtrt_helpers.checkpoints.shards import StoredTensor


def refer_to_shards(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Point every weight into its shard; nodes in the graph convert it where the graph computes in another dtype."""
    graph = model.graph
    for name in [name for name in graph.initializers if name in checkpoint.tensors]:
        traced = graph.initializers.pop(name)
        computed = traced.dtype
        assert computed is not None
        if name in checkpoint.packed:
            _dequantize(graph, traced, name, checkpoint)
        else:
            weight = _register(graph, name, checkpoint.tensors[name])
            traced.replace_all_uses_with(_cast(graph, weight, computed))


def _cast(graph: ir.Graph, weight: ir.Value, computed: ir.DataType) -> ir.Value:
    """The weight in the dtype that the graph computes in."""
    if weight.dtype == computed:
        return weight
    return _insert(graph, ir.node("Cast", [weight], {"to": computed}, name=f"{weight.name}.cast"), weight, computed)


def _insert(graph: ir.Graph, node: ir.Node, like: ir.Value, computed: ir.DataType) -> ir.Value:
    """Put a node that converts a weight before those that read it: at the beginning, after the node it reads."""
    (output,) = node.outputs
    output.name, output.shape, output.type = f"{like.name}.{computed.name.lower()}", like.shape, ir.TensorType(computed)
    made = [producer for value in node.inputs if value is not None and (producer := value.producer())]
    if made:
        graph.insert_after(made[0], node)
    else:
        graph.insert_before(graph[0], node)
    return output


def _dequantize(graph: ir.Graph, traced: ir.Value, name: str, checkpoint: Checkpoint) -> None:
    """DequantizeLinear of a packed weight and its scale, (k, n), in place of the Transpose that a linear layer has.

    So ONNX Runtime fuses it with the MatMul, and TensorRT keeps it packed.
    """
    packing, computed = checkpoint.packed[name], traced.dtype
    assert computed is not None
    weight = _register(graph, name, checkpoint.tensors[name], packing)
    # In fp32 it is the scale that is cast: ONNX Runtime folds that, and would not fuse a cast of the weight.
    scale = _cast(graph, _register(graph, scale_name(name), checkpoint.tensors[scale_name(name)]), computed)
    attributes = {"axis": 0, "block_size": packing.group} if packing.group else {"axis": 1}
    node = ir.node("DequantizeLinear", [weight, scale], attributes, name=f"{name}.dequantize")
    output = _insert(graph, node, weight, computed)
    for user in list(traced.uses()):
        assert user.node.op_type == "Transpose", f"{name} is multiplied, and its Transpose stands between"
        user.node.outputs[0].replace_all_uses_with(output)
        graph.remove(user.node, safe=True)


def _register(graph: ir.Graph, name: str, stored: StoredTensor, packing: Packing | None = None) -> ir.Value:
    """An initializer whose data are a range of bytes of the shard."""
    shape, dtype = ir.Shape(stored.shape), ir.DataType.from_short_name(stored.dtype.lower())
    if packing:
        k, columns = stored.shape
        shape, dtype = ir.Shape((k, columns * 8 // packing.bits)), ir.DataType[f"INT{packing.bits}"]
    data = ir.ExternalTensor(
        stored.file.name,
        stored.offset,
        stored.nbytes,
        dtype,
        shape=shape,
        name=name,
        base_dir=str(stored.file.parent),
    )
    weight = ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=data)
    graph.register_initializer(weight)
    return weight
