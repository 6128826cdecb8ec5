"""Take the weights out of a traced graph: each becomes an address in a shard, or an input of the graph."""

import onnx_ir as ir

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.shards import StoredTensor


def refer_to_shards(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Point every weight into its shard; a Cast in the graph converts it where the graph computes in another dtype."""
    graph = model.graph
    for name in [name for name in graph.initializers if name in checkpoint.tensors]:
        traced = graph.initializers.pop(name)
        weight = _stored_weight(name, checkpoint.tensors[name])
        computed = traced.dtype
        assert computed is not None
        if weight.dtype == computed:
            traced.replace_all_uses_with(weight)
        else:
            cast = ir.node("Cast", [weight], {"to": computed}, name=f"{name}.cast")
            cast.outputs[0].name = f"{name}.{computed.name.lower()}"
            cast.outputs[0].shape, cast.outputs[0].type = weight.shape, ir.TensorType(computed)
            traced.replace_all_uses_with(cast.outputs[0])
            graph.insert_before(graph[0], cast)
        graph.register_initializer(weight)


def _stored_weight(name: str, stored: StoredTensor) -> ir.Value:
    """An initializer whose data are a range of bytes of the shard."""
    shape, dtype = ir.Shape(stored.shape), ir.DataType.from_short_name(stored.dtype.lower())
    data = ir.ExternalTensor(
        stored.file.name,
        stored.offset,
        stored.nbytes,
        dtype,
        shape=shape,
        name=name,
        base_dir=str(stored.file.parent),
    )
    return ir.Value(name=name, shape=shape, type=ir.TensorType(dtype), const_value=data)
