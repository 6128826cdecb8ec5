"""Which module of the PyTorch source each node of a graph came from, and what kind of thing each tensor is.

The dynamo exporter writes the module's path into a node's metadata, the TorchScript exporter into its name; what an
optimiser added since has neither, and belongs where its neighbours belong.
"""

import ast
import math
from collections.abc import Iterator

import onnx
from onnx import numpy_helper

CONSTANT, SHAPE, DATA = "constant", "shape", "data"
_DYNAMO_KEY = "pkg.torch.onnx.name_scopes"


def written_scope(node: onnx.NodeProto) -> str | None:
    """Path of the module that the exporter noted, as in `transformer.layers.0.attention`; None where it noted none."""
    for entry in node.metadata_props:
        if entry.key == _DYNAMO_KEY:
            names = ast.literal_eval(entry.value)  # ["", module, module.submodule, ..., the operation itself]
            return str(names[-2]) if len(names) > 1 else ""
    return ".".join(node.name.split("/")[1:-1]) if node.name.startswith("/") else None


class GraphIndex:
    """Lookups over one graph, whose nodes are in an order in which they can run.

    nodes: as in the graph. producer: index of the node that writes a tensor. readers: indexes of those that read it.
    kinds: per tensor CONSTANT (known at export), SHAPE (follows from the sizes of the inputs) or DATA.
    scopes: per node the path of its module, "" for the outermost.
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
        self.scopes = self._adopt([written_scope(node) for node in self.nodes])

    def _kind(self, node: onnx.NodeProto) -> str:
        kinds = {self.kinds.get(name, CONSTANT) for name in node.input if name}
        if node.op_type in ("Shape", "Size"):
            return CONSTANT if kinds <= {CONSTANT} else SHAPE
        return next((kind for kind in (DATA, SHAPE) if kind in kinds), CONSTANT)

    def _adopt(self, noted: list[str | None]) -> list[str]:
        """Give a node without a scope that of the node before it or, where only constants go in, of the node behind."""
        for i, node in enumerate(self.nodes):
            if noted[i] is None:
                before = (noted[self.producer[name]] for name in node.input if name in self.producer)
                noted[i] = next((scope for scope in before if scope is not None), None)
        for i in reversed(range(len(self.nodes))):
            if noted[i] is None:
                behind = (noted[j] for name in self.nodes[i].output for j in self.readers.get(name, ()))
                noted[i] = next((scope for scope in behind if scope is not None), None)
        return [scope or "" for scope in noted]

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
        values = [attribute.t for attribute in node.attribute if attribute.name == "value"]
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
        """Data tensors that a set of nodes reads and does not write, each once, in order."""
        seen = set()
        for i in sorted(members):
            for name in self.nodes[i].input:
                if self.kinds.get(name) == DATA and self.producer.get(name) not in members and name not in seen:
                    seen.add(name)
                    yield name

    def leaving(self, members: set[int]) -> Iterator[str]:
        """Data tensors that a set of nodes writes and that are outputs, or read outside for more than their size."""
        for i in sorted(members):
            for name in self.nodes[i].output:
                outside = any(
                    j not in members and self.nodes[j].op_type not in ("Shape", "Size")
                    for j in self.readers.get(name, ())
                )
                if self.kinds[name] == DATA and (outside or name in self.outputs):
                    yield name
