"""TODO."""

from collections.abc import Collection

import onnx_ir as ir

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint

_STORED = {"F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "F32": ir.DataType.FLOAT}


def refer_to_shards(model: ir.Model, checkpoint: Checkpoint, wanted: ir.DataType) -> None:
    """Point every weight into its shard; where it is stored in another dtype, a Cast in the graph converts it."""
    graph = model.graph
    for name in [name for name in graph.initializers if name in checkpoint.tensors]:
        stored = checkpoint.tensors[name]
        value = graph.initializers.pop(name)
        data = ir.ExternalTensor(
            stored.file.name, stored.offset, stored.nbytes, _STORED[stored.dtype], shape=ir.Shape(stored.shape),
            name=name, base_dir=str(checkpoint.directory),
        )  # fmt: skip
        weight = ir.Value(name=name, shape=ir.Shape(stored.shape), type=ir.TensorType(data.dtype), const_value=data)
        if data.dtype == wanted:
            value.replace_all_uses_with(weight)
        else:
            cast = ir.node("Cast", [weight], {"to": wanted}, name=f"{name}.cast")
            cast.outputs[0].name = f"{name}.{wanted.name.lower()}"
            cast.outputs[0].shape, cast.outputs[0].type = weight.shape, ir.TensorType(wanted)
            value.replace_all_uses_with(cast.outputs[0])
            graph.insert_before(graph[0], cast)
        graph.register_initializer(weight)


def make_inputs(model: ir.Model, names: Collection[str]) -> None:
    """Take weights out of the graph: what runs it hands them in, by name, with every call."""
    graph = model.graph
    for name in [name for name in graph.initializers if name in names]:
        value = graph.initializers.pop(name)
        value.const_value = None
        graph.inputs.append(value)
