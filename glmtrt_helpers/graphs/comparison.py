"""Two ONNX files side by side: what differs between them, and the first node at which they part.

For "it worked with the other exporter", or with the file of last week. Weights are compared by name, type and shape,
wherever their bytes are; constants by value.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import helper, numpy_helper

from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.graphs.scopes import CONSTANT, GraphIndex
from glmtrt_helpers.graphs.summary import describe, is_weight, true_inputs


@dataclass(frozen=True)
class Difference:
    """What differs, as each file has it; "" where one has nothing."""

    what: str
    first: str
    second: str


def compare_graphs(first: str | Path, second: str | Path) -> list[Difference]:
    """The differences of two graphs; none if they compute the same in the same order, whatever tensors are called.

    Only the graphs are read. Raises WorkbookError for a file that is missing or no ONNX model.
    """
    models = load_graph(first), load_graph(second)
    differences = []
    for parts in (_opsets, _interface, _node_counts, _weights):
        left, right = map(parts, models)
        for name in dict.fromkeys([*left, *right]):
            if left.get(name) != right.get(name):
                differences.append(Difference(name, left.get(name, ""), right.get(name, "")))
    return differences + _parting(*map(GraphIndex, models))


def _opsets(model: onnx.ModelProto) -> dict[str, str]:
    return {f"opset {entry.domain}".strip(): str(entry.version) for entry in model.opset_import}


def _interface(model: onnx.ModelProto) -> dict[str, str]:
    """Types and shapes of inputs and outputs; how a dynamic dimension is called makes no difference."""
    tensors = [("input", value) for value in true_inputs(model)] + [("output", value) for value in model.graph.output]
    texts = {}
    for kind, value in tensors:
        described = describe(value)
        dims = ", ".join("?" if isinstance(size, str) else str(size) for size in described.dims)
        texts[f"{kind} {value.name}"] = f"{described.dtype} ({dims})"
    return texts


def _node_counts(model: onnx.ModelProto) -> dict[str, str]:
    counts = Counter(node.op_type for node in model.graph.node)
    return {f"nodes of type {kind}": str(count) for kind, count in sorted(counts.items())}


def _weights(model: onnx.ModelProto) -> dict[str, str]:
    return {
        f"weight {tensor.name}": f"{helper.tensor_dtype_to_np_dtype(tensor.data_type).name} {tuple(tensor.dims)}"
        for tensor in model.graph.initializer
        if is_weight(tensor)
    }


def _parting(left: GraphIndex, right: GraphIndex) -> list[Difference]:
    """The first nodes, in the order of computation, that do not do the same with the same."""
    pairs = zip(_meanings(left), _meanings(right), strict=False)
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), min(len(left.nodes), len(right.nodes)))
    if at == len(left.nodes) == len(right.nodes):
        return []
    both = left, right
    own = [_attributes(index.nodes[at]) if at < len(index.nodes) else {} for index in both]
    texts = []
    for index, mine, other in zip(both, own, own[::-1], strict=True):
        differing = sorted(name for name in {*mine, *other} if mine.get(name) != other.get(name))
        shown = [mine.get(name, f"no {name}") for name in differing] if all(own) else []
        texts.append(", ".join([_node_text(index, at), *shown]))
    return [Difference("the first node that differs", *texts)]


def _attributes(node: onnx.NodeProto) -> dict[str, str]:
    return {attribute.name: str(helper.printable_attribute(attribute))[:80] for attribute in node.attribute}


def _meanings(index: GraphIndex) -> Iterator[tuple[object, ...]]:
    """What each node does and with what: its type, attributes and constants, and how far back each tensor was made."""
    for i, node in enumerate(index.nodes):
        attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
        reads: list[object] = []
        for name in node.input:
            if name in index.producer and index.kinds.get(name) != CONSTANT:
                reads.append(i - index.producer[name])
            elif index.stored(name):
                reads += [_value(tensor) for tensor in index.stored(name)]
            else:
                reads.append(name)
        yield node.domain, node.op_type, attributes, reads


def _value(tensor: onnx.TensorProto) -> tuple[object, ...]:
    if is_weight(tensor):
        return tensor.name, tensor.data_type, tuple(tensor.dims)
    return tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes()


def _node_text(index: GraphIndex, i: int) -> str:
    if i >= len(index.nodes):
        return "the graph ends"
    node = index.nodes[i]
    constants = [index.scalar(name) for name in node.input]
    values = ", ".join(f"{value:g}" for value in constants if value is not None)
    scope = index.scopes[i] or "no module"
    return f"{i}: {node.op_type} {node.name}" + f" with {values}" * bool(values) + f", in {scope}"
