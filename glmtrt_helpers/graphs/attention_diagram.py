"""One attention layer of a graph as a picture: its data flow, with what is only bookkeeping left out.

A layer's attention is about a hundred nodes. Three things are folded so that the attention can be seen: arithmetic on
shapes disappears; Reshape, Transpose, Cast and the like join the box that feeds them; x·cos + rotate_half(x)·sin, seven
nodes, becomes one box.
"""

from pathlib import Path

import onnx
from onnx import numpy_helper

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.graphs.layered import Box, Edge, draw
from glmtrt_helpers.graphs.scopes import CONSTANT, DATA, GraphIndex

COLOURS = {
    "input or output": "#ffffff",
    "weights": "#f3e3c3",
    "product": "#a9cbe8",
    "rotary": "#d5c2e6",
    "cache": "#b5dfb0",
    "mask and softmax": "#f6bf91",
    "other": "#e5e7eb",
}
_LAYOUT = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Cast", "Identity", "Expand")
_KINDS = {"MatMul": "product", "Gemm": "product", "Softmax": "mask and softmax", "Where": "mask and softmax"}
_SIGNS = {"Mul": "× ", "Div": "÷ ", "Add": "+ ", "Where": "hidden: "}
_SHARED_SOURCES = {"position_ids", "attention_mask"}


def draw_attention(model: onnx.ModelProto, layer: int) -> str:
    """SVG of one layer's attention. Raises WorkbookError for a layer that the graph does not have."""
    index = GraphIndex(model)
    scope = f"transformer.layers.{layer}.attention"
    members = {i for i in index.inside(scope) if index.kinds[index.nodes[i].output[0]] == DATA}
    if not members:
        raise WorkbookError(
            f"the graph has no node of {scope}: layers count from 0, and TorchScript names may be gone."
        )
    count = len(members)
    members |= _shared(index, members)
    picture = _Picture(index, members, scope)
    title = f"layer {layer}, attention: {count} nodes on data, {len(picture.boxes)} boxes"
    return draw(picture.boxes, picture.edges, COLOURS, title)


def _shared(index: GraphIndex, members: set[int]) -> set[int]:
    """Nodes outside, noted with an earlier layer, that prepare positions or mask for all of them."""
    found: set[int] = set()
    for name in list(index.entering(members)):
        nodes: set[int] = set()
        sources: set[str] = set()
        pending = [name]
        while pending:
            tensor = pending.pop()
            if tensor not in index.producer:
                sources.add(tensor)
            elif index.producer[tensor] not in nodes | members:
                nodes.add(index.producer[tensor])
                node = index.nodes[index.producer[tensor]]
                pending += [other for other in node.input if index.kinds.get(other) == DATA]
        if sources <= _SHARED_SOURCES:
            found |= nodes
    return found


class _Picture:
    """Boxes and edges of a set of nodes. leader: per node the node whose box it is drawn in."""

    def __init__(self, index: GraphIndex, members: set[int], scope: str):
        self.index, self.members, self.scope = index, members, scope
        self.shapes = _shapes(index.model)
        self.boxes: dict[str, Box] = {}
        self.edges: list[Edge] = []
        self.leader = {i: i for i in sorted(members)}
        self.rotary: set[int] = set()
        for i in sorted(members):
            self._fold_rotary(i)
        for i in sorted(members):
            self._fold_behind(i)
        for i in sorted(set(self.leader.values())):
            self._add_group(i, [j for j in sorted(members) if self.leader[j] == i])
        self._add_outputs()

    def _data(self, i: int) -> list[str]:
        return [name for name in self.index.nodes[i].input if self.index.kinds.get(name) == DATA]

    def _readers(self, name: str) -> set[int]:
        """Nodes that read a tensor as data; to ask for its shape is not to read it."""
        return {j for j in self.index.readers.get(name, ()) if self.index.nodes[j].op_type not in ("Shape", "Size")}

    def _fold_rotary(self, i: int) -> None:
        """Fold Add(Mul(x, cos), Mul(Concat(Neg(Slice(x)), Slice(x)), sin)) into the Add's box."""
        index = self.index
        products = [index.producer.get(name) for name in self._data(i)]
        if index.nodes[i].op_type != "Add" or len(products) != 2 or None in products:
            return
        straight, turned = (product for product in products if product is not None)
        for join in (index.producer.get(name) for name in self._data(turned)):
            if join is not None and index.nodes[join].op_type == "Concat":
                nodes, roots = self._halves(join)
                if len(roots) == 1 and roots <= set(self._data(straight)):
                    self.leader |= dict.fromkeys(nodes | {straight, turned, join}, i)
                    self.rotary.add(i)

    def _halves(self, join: int) -> tuple[set[int], set[str]]:
        """The Neg and Slice nodes in front of a Concat, and the tensors that the halves are cut from."""
        nodes: set[int] = set()
        roots: set[str] = set()
        for name in self._data(join):
            for kind in ("Neg", "Slice"):
                i = self.index.producer.get(name)
                if i in self.members and self.index.nodes[i].op_type == kind:
                    nodes.add(i)
                    name = self._data(i)[0]
            roots.add(name)
        return nodes, roots

    def _fold_behind(self, i: int) -> None:
        """Let a node that only rearranges, or adds a product's bias, join the box of the only tensor that it reads."""
        node, data = self.index.nodes[i], self._data(i)
        if len(data) != 1 or data[0] in self.index.outputs or self.leader[i] != i:
            return
        before = self.index.producer.get(data[0])
        if before is None or before not in self.members or self._readers(data[0]) != {i}:
            return
        bias = node.op_type == "Add" and self.index.nodes[before].op_type == "MatMul"
        if (node.op_type in _LAYOUT or bias) and self.index.nodes[before].op_type != "Split":
            self.leader[i] = self.leader[before]

    def _add_group(self, leader: int, group: list[int]) -> None:
        """One box for nodes that are drawn together, and the edges that enter it."""
        nodes, key = [self.index.nodes[i] for i in group], f"node {leader}"
        written = {name for node in nodes for name in node.output}
        read = dict.fromkeys(name for i in group for name in self._data(i) if name not in written)
        weights = self._weights(nodes)
        kind = _KINDS.get(nodes[0].op_type, "other")
        head, rest = self._label(nodes[0]), [self._label(node) for node in nodes[1:]]
        if leader in self.rotary:
            kind, head, rest = "rotary", "Rotary", ["x·cos + rotate_half(x)·sin"]
        elif nodes[0].op_type == "Concat" and any(name.startswith("past_key_values.") for name in read):
            kind, head = "cache", "Concat with past"
        elif nodes[0].op_type == "Gather" and weights:
            kind = "rotary"
        parts = len(nodes[-1].output)
        last = nodes[-1].output[0]
        end = [_short(last), self._shape(last)] if parts == 1 else [f"{parts} × {self._shape(last)}"]
        lines = [head, ", ".join(rest), *end]
        self.boxes[key] = Box(tuple(line for line in lines if line), kind)
        self.boxes |= weights
        self.edges += [(self._source(name), key) for name in read] + [(name, key) for name in weights]

    def _source(self, name: str) -> str:
        """Key of the box that a tensor comes from; one that comes from outside gets a box."""
        producer = self.index.producer.get(name)
        if producer in self.members:
            return f"node {self.leader[producer]}"
        key = f"input {name}"
        lines = [name] if producer is None else ["hidden states", _short(name)]
        self.boxes[key] = Box((*lines, self._shape(name)), "input or output")
        return key

    def _add_outputs(self) -> None:
        for name in self.index.leaving(self.members):
            scopes = [self.index.scopes[j] for j in self._readers(name) - self.members]
            # What only the attention of other layers reads is the positions, prepared once for all of them.
            if name in self.index.outputs or not all(".attention" in scope for scope in scopes):
                lines = [name] if name in self.index.outputs else ["to the residual", _short(name)]
                self.boxes[f"output {name}"] = Box((*lines, self._shape(name)), "input or output")
                self.edges.append((self._source(name), f"output {name}"))

    def _label(self, node: onnx.NodeProto) -> str:
        """Operator, and the number that it works with where that is a constant: `Div ÷ 8`, `Gather [0]`."""
        for name in node.input:
            value = self._scalar(name) if self.index.kinds.get(name) == CONSTANT else None
            if value is not None and node.op_type in _SIGNS:
                return f"{node.op_type} {_SIGNS[node.op_type]}{value:.6g}"
            if value is not None and node.op_type == "Gather":
                return f"Gather [{value:.0f}]"
        return node.op_type

    def _roots(self, name: str) -> list[onnx.TensorProto]:
        """The stored tensors that a constant is made from."""
        if name in self.index.initializers:
            return [self.index.initializers[name]]
        if name not in self.index.producer:
            return []
        node = self.index.nodes[self.index.producer[name]]
        stored = [attribute.t for attribute in node.attribute if attribute.name == "value"]
        return stored + [root for other in node.input for root in self._roots(other)]

    def _scalar(self, name: str) -> float | None:
        roots = self._roots(name)
        if len(roots) != 1 or roots[0].external_data:
            return None
        array = numpy_helper.to_array(roots[0])
        return float(array.reshape(-1)[0]) if array.size == 1 else None

    def _weights(self, nodes: list[onnx.NodeProto]) -> dict[str, Box]:
        """A box for each module whose weights the nodes read, and for each table."""
        found: dict[str, list[str]] = {}
        for node in nodes:
            for root in (root for n in node.input if self.index.kinds.get(n) == CONSTANT for root in self._roots(n)):
                shape = f"({', '.join(map(str, root.dims))})"
                module, _, kind = root.name.rpartition(".")
                if kind in ("weight", "bias"):
                    found.setdefault(f"weight {module}", [module.rpartition(".")[2]]).append(f"{kind} {shape}")
                elif len(root.dims) > 1:
                    found[f"weight {root.name}"] = [_table_name(root), shape]
        return {key: Box(tuple(dict.fromkeys(lines)), "weights") for key, lines in found.items()}

    def _shape(self, name: str) -> str:
        return self.shapes.get(name, "")


def _short(name: str) -> str:
    """TorchScript's names carry the whole path of the module."""
    return name.rpartition("/")[2]


def _table_name(tensor: onnx.TensorProto) -> str:
    """Rotary tables show what they are in their first row, the angle 0."""
    if tensor.external_data:
        return tensor.name
    first = numpy_helper.to_array(tensor).reshape(tensor.dims[0], -1)[0]
    return "cos table" if (first == 1).all() else "sin table" if (first == 0).all() else tensor.name


def _shapes(model: onnx.ModelProto) -> dict[str, str]:
    """Shape of every tensor that the file tells one of, as text."""
    shapes = {}
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        dims = [
            str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?"
            for dim in value.type.tensor_type.shape.dim
        ]
        shapes[value.name] = f"({', '.join(dims)})" if set(dims) > {"?"} or "?" not in dims else ""
    return shapes


def layer_nodes(model: onnx.ModelProto, layer: int, part: str = "attention") -> list[onnx.NodeProto]:
    """The nodes that one part of a layer became, in order; part: a module of the layer, "" for all of it.

    Raises WorkbookError for a layer or a part that the graph does not have.
    """
    index = GraphIndex(model)
    path = f"transformer.layers.{layer}.{part}".rstrip(".")
    nodes = [index.nodes[i] for i in sorted(index.inside(path))]
    if not nodes:
        raise WorkbookError(
            f"the graph has no node of {path}: layers count from 0, parts are attention, mlp and so on."
        )
    return nodes


def draw_layer(onnx_path: str | Path, layer: int) -> str:
    """The attention of one layer as SVG text, for `IPython.display.SVG`; see `glmtrt_helpers/drawing.py`."""
    return draw_attention(load_graph(onnx_path), layer)
