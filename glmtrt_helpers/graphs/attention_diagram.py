"""One attention layer of a graph as an SVG diagram of its data flow.

A layer's attention is about a hundred nodes. Four things are folded so that it stays readable: arithmetic on shapes is
left out; Reshape, Transpose, Cast and the like join the box that feeds them; so do a bias and a constant factor; and
x·cos + rotate_half(x)·sin, seven nodes, becomes one box. All layers then have the same structure, and the layout
depends on nothing else, so the diagrams of two layers can be compared box by box.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import graphlay
import onnx
from onnx import numpy_helper

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.core.text import as_html
from glmtrt_helpers.graphs.scopes import DATA, GraphIndex

COLOURS = {
    "input or output": "#ffffff",
    "weights": "#f3e3c3",
    "matmul": "#a9cbe8",
    "rotary": "#d5c2e6",
    "cache": "#b5dfb0",
    "mask and softmax": "#f6bf91",
    "other": "#e5e7eb",
}
_RESHAPING = ("Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Cast", "Identity", "Expand")
_KINDS = {"MatMul": "matmul", "Gemm": "matmul", "Softmax": "mask and softmax", "Where": "mask and softmax"}
_ROTARY = {"Add": ("Mul",), "Mul": ("Concat",), "Concat": ("Neg", "Slice"), "Neg": ("Slice",)}
_LABELS = {"Mul": "× {:.6g}", "Div": "÷ {:.6g}", "Add": "+ {:.6g}", "Where": "hidden: {:.6g}", "Gather": "[{:.0f}]"}
# Pixels: a bold character of 11.5 px, a plain one of 10 px, a line of text, padding, margin, title and legend.
_BOLD, _PLAIN, _LINE, _PAD, _MARGIN, _HEADER = 7.8, 6.2, 15.0, 7.0, 16.0, 68.0
_INK, _ARROW = "#222222", "#6b7280"
# What differs by layer, and takes most room in the last of 28: `Div ÷ 316.784` and `past_key_values.27.key`.
_FACTOR, _LAYER = re.compile(r"(?<=[×÷] )[\d.]+"), re.compile(r"(?<=past_key_values\.)\d+")
# Edges from a box with several readers may be long (others have weight 1): a box with one reader belongs beside it.
_SHARED_WEIGHT = 0.1
_LAYOUT = {
    "direction": "topbottom",
    "spacing": {"layer_gap": 34, "node_gap": 14, "dummy_gap": 12, "port_gap": 12},
    # Otherwise a line may enter a box from the side, and run there behind other boxes.
    "routing": {"style": "diagonal", "port_sides": "facing_only"},
}


@dataclass(frozen=True)
class Box:
    """A box of text. lines: the first is set in bold. kind: a key of COLOURS."""

    lines: tuple[str, ...]
    kind: str

    @property
    def width(self) -> float:
        """With room for the longest number where numbers differ by layer, so that all layers have the same layout."""
        lengths = [len(_LAYER.sub("27", _FACTOR.sub("316.784", line))) for line in self.lines]
        return max(lengths[0] * _BOLD, *(length * _PLAIN for length in lengths[1:]), 0) + 2 * _PAD

    @property
    def height(self) -> float:
        return len(self.lines) * _LINE + 2 * _PAD - 4


@dataclass
class Diagram:
    """Boxes by key, and edges (from, to) between keys. nodes: how many of the layer's nodes they stand for."""

    nodes: int = 0
    boxes: dict[str, Box] = field(default_factory=dict)
    edges: list[tuple[str, str]] = field(default_factory=list)


def draw_attention(model: onnx.ModelProto, layer: int) -> str:
    """SVG of one layer's attention. Raises WorkbookError for a layer that the graph does not have."""
    diagram = attention_diagram(model, layer)
    return _svg(diagram, f"layer {layer}, attention: {diagram.nodes} data nodes, drawn as {len(diagram.boxes)}")


def attention_diagram(model: onnx.ModelProto, layer: int) -> Diagram:
    """Boxes and edges of one layer's attention, in an order that its structure alone decides. Raises WorkbookError."""
    index = GraphIndex(model)
    scope = f"transformer.layers.{layer}.attention"
    members = {i for i in index.inside(scope) if index.kinds[index.nodes[i].output[0]] == DATA}
    if not members:
        raise WorkbookError(
            f"the graph has no node of {scope}: layers count from 0, and TorchScript names may be gone."
        )
    diagram = _Folding(index, members | _shared(index, members)).diagram
    diagram.nodes = len(members)
    return _in_canonical_order(diagram)


def _shared(index: GraphIndex, members: set[int]) -> set[int]:
    """Nodes outside, in the scope of an earlier layer, that prepare positions or mask for all layers."""
    prepared, shared = {"position_ids", "attention_mask"}, set()
    for i, node in enumerate(index.nodes):
        data = index.data_inputs(i)
        if data and prepared.issuperset(data):
            prepared.update(node.output)
            shared.add(i)
    for i in sorted(shared, reverse=True):
        if not any(j in members or j in shared for name in index.nodes[i].output for j in index.readers.get(name, ())):
            shared.remove(i)
    return shared - members


class _Folding:
    """Folds a set of nodes into the boxes and edges of a diagram. leader: per node the node whose box it joins."""

    def __init__(self, index: GraphIndex, members: set[int]):
        self.index, self.members, self.diagram = index, members, Diagram()
        self.shapes = _shapes(index.model)
        self.leader = {i: i for i in sorted(members)}
        self.rotary: set[int] = set()
        for i in sorted(members):
            self._fold_rotary(i)
        for i in sorted(members):
            self._fold_into_producer(i)
        for leader in sorted(set(self.leader.values())):
            self._add_group(leader, [i for i in sorted(members) if self.leader[i] == leader])
        self._add_outputs()

    def _readers(self, name: str) -> set[int]:
        """Nodes that read a tensor as data; to ask for its shape is not to read it."""
        return {j for j in self.index.readers.get(name, ()) if self.index.nodes[j].op_type not in ("Shape", "Size")}

    def _fold_rotary(self, i: int) -> None:
        """Fold Add(Mul(x, cos), Mul(Concat(Neg(Slice(x)), Slice(x)), sin)) into the Add's box."""
        nodes, pending = {i}, [i]
        while pending:
            node = pending.pop()
            for producer in map(self.index.producer.get, self.index.data_inputs(node)):
                followed = _ROTARY.get(self.index.nodes[node].op_type, ())
                if producer in self.members and self.index.nodes[producer].op_type in followed:
                    nodes.add(producer)
                    pending.append(producer)
        kinds = sorted(self.index.nodes[j].op_type for j in nodes)
        if kinds == ["Add", "Concat", "Mul", "Mul", "Neg", "Slice", "Slice"]:
            self.leader |= dict.fromkeys(nodes, i)
            self.rotary.add(i)

    def _fold_into_producer(self, i: int) -> None:
        """Let a node that only reshapes, scales or adds a bias join the box that it alone reads, if it reads no other.

        Only layers after the first multiply the scores by their number: a box for it would change the structure.
        """
        node, data = self.index.nodes[i], self.index.data_inputs(i)
        if len(data) != 1 or data[0] in self.index.outputs or self.leader[i] != i:
            return
        producer = self.index.producer.get(data[0])
        if producer not in self.members or self._readers(data[0]) != {i}:
            return
        bias = node.op_type == "Add" and self.index.nodes[producer].op_type == "MatMul"
        scale = node.op_type in ("Mul", "Div") and any(self.index.scalar(name) is not None for name in node.input)
        if (node.op_type in _RESHAPING or bias or scale) and self.index.nodes[producer].op_type != "Split":
            self.leader[i] = self.leader[producer]

    def _add_group(self, leader: int, group: list[int]) -> None:
        """Add one box for the nodes of a group, and the edges that enter it."""
        nodes, key = [self.index.nodes[i] for i in group], f"node {leader}"
        written = {name for node in nodes for name in node.output}
        read = dict.fromkeys(name for i in group for name in self.index.data_inputs(i) if name not in written)
        weights = self._weights(nodes)
        kind = _KINDS.get(nodes[0].op_type, "other")
        head, rest = self._label(nodes[0]), [self._label(node) for node in nodes[1:]]
        if leader in self.rotary:
            kind, head, rest = "rotary", "Rotary", ["x·cos + rotate_half(x)·sin"]
        elif nodes[0].op_type == "Concat" and any(name.startswith("past_key_values.") for name in read):
            kind, head = "cache", "Concat with past"
        elif nodes[0].op_type == "Gather" and weights:
            kind = "rotary"
        parts, last = len(nodes[-1].output), nodes[-1].output[0]
        end = [last, self.shapes[last]] if parts == 1 else [f"{parts} × {self.shapes[last]}"]
        self._add(key, [head, ", ".join(dict.fromkeys(rest)), *end], kind)
        for name, lines in weights.items():
            self._add(name, lines, "weights")
        self.diagram.edges += [(self._source(name), key) for name in read] + [(name, key) for name in weights]

    def _add(self, key: str, lines: list[str], kind: str) -> None:
        # TorchScript's names carry the whole path of the module.
        self.diagram.boxes[key] = Box(tuple(line.rpartition("/")[2] for line in lines if line), kind)

    def _source(self, name: str) -> str:
        """Key of the box that a tensor comes from; one that comes from outside gets a box."""
        producer = self.index.producer.get(name)
        if producer in self.members:
            return f"node {self.leader[producer]}"
        lines = [name] if producer is None else ["hidden states", name]
        self._add(f"input {name}", [*lines, self.shapes[name]], "input or output")
        return f"input {name}"

    def _add_outputs(self) -> None:
        for name in self.index.leaving(self.members):
            scopes = [self.index.scopes[j] for j in self._readers(name) - self.members]
            # What only the attention of other layers reads is the positions, prepared once for all of them.
            if name in self.index.outputs or not all(".attention" in scope for scope in scopes):
                lines = [name] if name in self.index.outputs else ["to the residual", name]
                self._add(f"output {name}", [*lines, self.shapes[name]], "input or output")
                self.diagram.edges.append((self._source(name), f"output {name}"))

    def _label(self, node: onnx.NodeProto) -> str:
        """Operator, and the number that it works with where that is a constant: `Div ÷ 8`, `Gather [0]`."""
        for value in map(self.index.scalar, node.input):
            if value is not None and node.op_type in _LABELS:
                return f"{node.op_type} {_LABELS[node.op_type].format(value)}"
        return node.op_type

    def _weights(self, nodes: list[onnx.NodeProto]) -> dict[str, list[str]]:
        """The lines of a box for each module whose weights the nodes read, and for each table."""
        boxes: dict[str, list[str]] = {}
        for root in (root for node in nodes for name in node.input for root in self.index.stored(name)):
            shape = f"({', '.join(map(str, root.dims))})"
            module, _, kind = root.name.rpartition(".")
            if kind in ("weight", "bias"):
                boxes.setdefault(f"weight {module}", [module.rpartition(".")[2]]).append(f"{kind} {shape}")
            elif len(root.dims) > 1:
                boxes[f"weight {root.name}"] = [_table_name(root), shape]
        return boxes


def _table_name(tensor: onnx.TensorProto) -> str:
    """Rotary tables show what they are in their first row, the angle 0."""
    if tensor.external_data:
        return tensor.name
    first = numpy_helper.to_array(tensor).reshape(tensor.dims[0], -1)[0]
    return "cos table" if (first == 1).all() else "sin table" if (first == 0).all() else tensor.name


def _shapes(model: onnx.ModelProto) -> dict[str, str]:
    """Shape of every tensor as text, empty where the file gives none."""
    shapes: dict[str, str] = defaultdict(str)
    for value in [*model.graph.input, *model.graph.output, *model.graph.value_info]:
        dims = [str(dim.dim_value or dim.dim_param or "?") for dim in value.type.tensor_type.shape.dim]
        shapes[value.name] = f"({', '.join(dims)})" if set(dims) != {"?"} else ""
    return shapes


def _in_canonical_order(diagram: Diagram) -> Diagram:
    """The same diagram, depth first from its outputs along the inputs: where a node stands in the file has no say."""
    ordered: dict[str, Box] = {}

    def visit(key: str) -> None:
        for start, end in diagram.edges:
            if end == key and start not in ordered:
                visit(start)
        ordered[key] = diagram.boxes[key]

    # The residual reads nearly everything; the graph's own outputs follow it.
    outputs = [key for key in diagram.boxes if key.startswith("output ")]
    for key in sorted(outputs, key=lambda key: (".key" in key, ".value" in key)):
        visit(key)
    edges = sorted(diagram.edges, key=lambda edge: list(ordered).index(edge[1]))
    return Diagram(diagram.nodes, ordered, edges)


def _layout(diagram: Diagram) -> Any:
    """graphlay's layout, which holds a center for every box and a polyline for every edge."""
    graph = graphlay.Graph()
    for key, box in diagram.boxes.items():
        # A label would break ties, and by default it is the key, which differs by layer.
        graph.node(key, width=box.width, height=box.height, label="")
    starts = [start for start, _ in diagram.edges]
    for start, end in diagram.edges:
        graph.edge(start, end, weight=1.0 if starts.count(start) == 1 else _SHARED_WEIGHT)
    return graphlay.layout(graph, options=_LAYOUT)


def _svg(diagram: Diagram, title: str) -> str:
    layout = _layout(diagram)
    low, high = layout.bounds["min"], layout.bounds["max"]
    left, top = _MARGIN - low["x"], _HEADER - low["y"]
    width, height = high["x"] + left + _MARGIN, high["y"] + top + _MARGIN
    parts = [
        # A width in percent, or JupyterLab, which shows an SVG as an image, cuts it off where the page is narrower.
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="100%" '
        f'style="max-width: {width:.0f}px; height: auto" '
        'font-family="DejaVu Sans, Verdana, sans-serif" font-size="11.5">',
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0.5 L8,4 L0,7.5 z" fill="{_ARROW}"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        f'<text x="{_MARGIN:.0f}" y="26" font-size="15" font-weight="bold" fill="{_INK}">{as_html(title)}</text>',
    ]
    x = _MARGIN
    for kind, colour in COLOURS.items():
        parts.append(f'<rect x="{x:.0f}" y="38" width="14" height="14" rx="3" fill="{colour}" stroke="{_ARROW}"/>')
        parts.append(f'<text x="{x + 20:.0f}" y="49" fill="{_INK}">{kind}</text>')
        x += 38 + len(kind) * 6.8
    for edge in layout.edges:
        points = " ".join(f"{point['x'] + left:.1f},{point['y'] + top:.1f}" for point in edge["points"])
        parts.append(f'<polyline points="{points}" fill="none" stroke="{_ARROW}" marker-end="url(#tip)"/>')
    for box, node in zip(diagram.boxes.values(), layout.nodes, strict=True):
        parts += _box(box, node["center"]["x"] + left, node["center"]["y"] + top)
    return "\n".join([*parts, "</svg>"])


def _box(box: Box, x: float, y: float) -> Iterator[str]:
    """A box whose centre is at (x, y), and its text."""
    left, top = x - box.width / 2, y - box.height / 2
    yield (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" rx="5" '
        f'fill="{COLOURS[box.kind]}" stroke="{_ARROW}"/>'
    )
    for i, line in enumerate(box.lines):
        style = 'font-size="10"' if i else 'font-weight="bold"'
        y = top + _PAD + 9 + i * _LINE
        yield f'<text {style} x="{x:.1f}" y="{y:.1f}" text-anchor="middle" fill="{_INK}">{as_html(line)}</text>'


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
    """The attention of one layer as SVG text, for `IPython.display.SVG`."""
    return draw_attention(load_graph(onnx_path), layer)
