"""Which PyTorch module each node of a graph came from, and whether a tensor is a constant, a shape or data.

The dynamo exporter writes the module's path into a node's metadata, the TorchScript exporter into its name. A node that
an optimizer added has neither, and takes the path of a neighbour.
"""

import ast
import math
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import helper, numpy_helper

CONSTANT, SHAPE, DATA = "constant", "shape", "data"
_DYNAMO_KEY = "pkg.torch.onnx.name_scopes"


# Attributes of a Constant, of which exporters use the first, and the type of the numbers in the others.
_CONSTANTS = {"value": None, "value_int": "i8", "value_ints": "i8", "value_float": "f4", "value_floats": "f4"}


def _constant(attribute: onnx.AttributeProto) -> onnx.TensorProto:
    kind = _CONSTANTS[attribute.name]
    return numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), kind)) if kind else attribute.t


def written_scope(node: onnx.NodeProto) -> str | None:
    """The module's path as the exporter wrote it, such as `transformer.layers.0.attention`; None if it wrote none."""
    for entry in node.metadata_props:
        if entry.key == _DYNAMO_KEY:
            names = ast.literal_eval(entry.value)  # ["", module, module.submodule, ..., the operation itself]
            return str(names[-2]) if len(names) > 1 else ""
    return ".".join(node.name.split("/")[1:-1]) if node.name.startswith("/") else None


class GraphIndex:
    """Lookups over one graph, whose nodes are topologically sorted.

    nodes: in the graph's order. producer: index of the node that writes a tensor. readers: indexes of those that read
    it. kinds: CONSTANT (known at export), SHAPE (follows from the sizes of the inputs) or DATA, by tensor.
    scopes: the path of each node's module, "" for the outermost.
    """

    def __init__(self, model: onnx.ModelProto):
        self.model = model
        self.nodes = list(model.graph.node)
        self.producer = {name: i for i, node in enumerate(self.nodes) for name in node.output if name}
        self.readers: dict[str, list[int]] = {}
        for i, node in enumerate(self.nodes):
            for name in node.input:
                self.readers.setdefault(name, []).append(i)
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {value.name for value in model.graph.output}
        self.kinds = dict.fromkeys((value.name for value in model.graph.input), DATA)
        self.kinds |= dict.fromkeys(self.initializers, CONSTANT)
        for node in self.nodes:
            self.kinds |= dict.fromkeys(node.output, self._kind(node))
        self.scopes = self._with_neighbours([written_scope(node) for node in self.nodes])

    def _kind(self, node: onnx.NodeProto) -> str:
        kinds = {self.kinds.get(name, CONSTANT) for name in node.input if name}
        if node.op_type in ("Shape", "Size"):
            return CONSTANT if kinds <= {CONSTANT} else SHAPE
        return next((kind for kind in (DATA, SHAPE) if kind in kinds), CONSTANT)

    def _with_neighbours(self, scopes: list[str | None]) -> list[str]:
        """Give a node without a scope that of the node before it or, if it reads only constants, of the one after."""
        for i, node in enumerate(self.nodes):
            if scopes[i] is None:
                before = (scopes[self.producer[name]] for name in node.input if name in self.producer)
                scopes[i] = next((scope for scope in before if scope is not None), None)
        for i in reversed(range(len(self.nodes))):
            if scopes[i] is None:
                after = (scopes[j] for name in self.nodes[i].output for j in self.readers.get(name, ()))
                scopes[i] = next((scope for scope in after if scope is not None), None)
        return [scope or "" for scope in scopes]

    def data_inputs(self, i: int) -> list[str]:
        """The tensors of kind DATA that a node reads, in order."""
        return [name for name in self.nodes[i].input if self.kinds.get(name) == DATA]

    def stored(self, name: str) -> list[onnx.TensorProto]:
        """The tensors in the file that a constant is made from; none for what is not a constant."""
        if self.kinds.get(name) != CONSTANT:
            return []
        if name in self.initializers:
            return [self.initializers[name]]
        node = self.nodes[self.producer[name]]
        values = [_constant(attribute) for attribute in node.attribute if attribute.name in _CONSTANTS]
        return values + [tensor for other in node.input for tensor in self.stored(other)]

    def scalar(self, name: str) -> float | None:
        """The number that a constant of one element holds; None for any other tensor."""
        tensors = self.stored(name)
        if len(tensors) != 1 or tensors[0].external_data or math.prod(tensors[0].dims) != 1:
            return None
        return float(numpy_helper.to_array(tensors[0]).reshape(-1)[0])

    def inside(self, path: str) -> set[int]:
        """Indexes of the nodes of the module at `path` and of the modules in it."""
        return {i for i, scope in enumerate(self.scopes) if scope == path or scope.startswith(path + ".")}

    def entering(self, members: set[int]) -> Iterator[str]:
        """Data tensors that a set of nodes reads and does not write, each once, in the graph's order."""
        seen = set()
        for i in sorted(members):
            for name in self.nodes[i].input:
                if self.kinds.get(name) == DATA and self.producer.get(name) not in members and name not in seen:
                    seen.add(name)
                    yield name

    def leaving(self, members: set[int]) -> Iterator[str]:
        """Data tensors that a set of nodes writes and that are graph outputs, or read outside for more than a size."""
        for i in sorted(members):
            for name in self.nodes[i].output:
                outside = any(
                    j not in members and self.nodes[j].op_type not in ("Shape", "Size")
                    for j in self.readers.get(name, ())
                )
                if self.kinds[name] == DATA and (outside or name in self.outputs):
                    yield name
