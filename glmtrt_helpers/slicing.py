"""Cut a graph into slices, for ONNX Runtime on a machine that cannot hold all weights once they are cast.

On a CPU, ONNX Runtime casts fp16 weights to fp32 for every product, and as a cast of a weight depends on nothing, it
makes all of them first: 18 GB for the real model. A slice is a run of nodes with few enough weights; between slices
only activations are kept, which the cuts round to the dtype of the graph.
"""

from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import helper

SLICE_BYTES = 600_000_000  # of weights in a slice; a vocabulary matrix of the real model is 1.07 GB by itself


def cut(model: onnx.ModelProto, slice_bytes: int = SLICE_BYTES) -> Iterator[onnx.ModelProto]:
    """Slices of a graph, in the order in which they have to run; each takes and gives tensors by their names."""
    graph = model.graph
    sizes = {tensor.name: _nbytes(tensor) for tensor in graph.initializer}
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    parts = _group(_units(list(graph.node), set(initializers)), sizes, slice_bytes)
    made = [{name for node in part for name in node.output} for part in parts]
    used = [{name for node in part for name in node.input if name} for part in parts]
    wanted = {value.name for value in graph.output}
    for number, part in enumerate(parts):
        enters = used[number] - made[number] - set(initializers)
        later = set().union(*used[number + 1 :], wanted)
        leaves = made[number] & later
        yield helper.make_model(
            helper.make_graph(
                part,
                f"slice {number}",
                [helper.make_tensor_value_info(name, kinds[name], None) for name in sorted(enters)],
                [helper.make_tensor_value_info(name, kinds[name], None) for name in sorted(leaves)],
                [initializers[name] for name in sorted(used[number] & set(initializers))],
            ),
            opset_imports=model.opset_import,
            ir_version=model.ir_version,
        )


def _nbytes(tensor: onnx.TensorProto) -> int:
    return int(np.prod(tensor.dims, dtype=np.int64)) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _units(nodes: list[onnx.NodeProto], constant: set[str]) -> list[list[onnx.NodeProto]]:
    """The nodes in an order that can run: each one behind what is computed of weights alone for it.

    Such a unit is not cut: a weight in fp32 would travel between slices.
    """
    waiting: dict[str, onnx.NodeProto] = {}
    known = set(constant)
    units: list[list[onnx.NodeProto]] = []

    def with_its_weights(node: onnx.NodeProto) -> list[onnx.NodeProto]:
        unit: list[onnx.NodeProto] = []
        for name in node.input:
            if name in waiting:
                producer = waiting[name]
                for output in producer.output:
                    waiting.pop(output, None)
                unit += with_its_weights(producer)
        return [*unit, node]

    for node in nodes:
        if all(name in known for name in node.input if name):
            known.update(node.output)
            waiting.update(dict.fromkeys(node.output, node))
        else:
            units.append(with_its_weights(node))
    return units


def _group(units: list[list[onnx.NodeProto]], sizes: Mapping[str, int], limit: int) -> list[list[onnx.NodeProto]]:
    parts: list[list[onnx.NodeProto]] = [[]]
    seen: set[str] = set()
    for unit in units:
        fresh = {name for node in unit for name in node.input if name in sizes}
        if parts[-1] and sum(sizes[name] for name in seen | fresh) > limit:
            parts.append([])
            seen = set()
        seen |= fresh
        parts[-1] += unit
    return parts
