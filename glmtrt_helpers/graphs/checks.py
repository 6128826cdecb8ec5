"""Notebook 04: what will fail later, seen in the graph alone.

Static dimensions, dead or missing inputs, operators that TensorRT refuses, weights that are not the checkpoint's.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import numpy_helper, shape_inference

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.identity import open_export
from glmtrt_helpers.graphs.scopes import CONSTANT, DATA, GraphIndex
from glmtrt_helpers.graphs.summary import describe, true_inputs
from glmtrt_helpers.inputs.names import axis_names, input_names, output_names

# Valid in ONNX, refused by TensorRT's parser; a clean export has none of them.
_NAME, _FACTOR = re.compile(r"[A-Za-z_]\w*|\?"), re.compile(r"(?<![\w.])\d+(?=\*)")
_SEQUENCE_OPS = ("SplitToSequence", "SequenceAt", "SequenceConstruct", "ConcatFromSequence")


@dataclass(frozen=True)
class StaticDimension:
    """An axis whose size changes during a chat and is a constant in the graph."""

    tensor: str
    axis: int
    meaning: str
    size: int


def static_dimensions(model: onnx.ModelProto) -> list[StaticDimension]:
    """Axes of inputs and outputs that have a fixed size although it changes during a chat."""
    static = []
    described = {value.name: describe(value).dims for value in [*true_inputs(model), *model.graph.output]}
    batch = next(iter(described.get("input_ids", ())), None)
    for name, dims in described.items():
        # A cache of this name that begins with the batch is another model's, whose other axes are not known.
        foreign = "." in name and isinstance(batch, str) and dims[:1] == (batch,)
        axes = {} if foreign else axis_names(name)
        for axis, size in enumerate(dims):
            if axis in axes and isinstance(size, int):
                static.append(StaticDimension(name, axis, axes[axis], size))
    return static


def dead_inputs(model: onnx.ModelProto) -> list[str]:
    """Inputs that are declared but whose values reach no output; reading only an input's shape does not count."""
    producers = {name: node for node in model.graph.node for name in node.output}
    seen: set[str] = set()
    pending = [value.name for value in model.graph.output]
    while pending:
        name = pending.pop()
        if name in seen:
            continue
        seen.add(name)
        node = producers.get(name)
        if node is not None and node.op_type not in ("Shape", "Size"):
            pending += _reads(node)
    return [value.name for value in true_inputs(model) if value.name not in seen]


def _reads(node: onnx.NodeProto) -> list[str]:
    """Tensors that a node reads, including those read in the branches of an If or the body of a Loop."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for inner in attribute.g.node:
            names += _reads(inner)
        names += [value.name for value in attribute.g.output]
    return names


def missing_inputs(model: onnx.ModelProto, num_layers: int) -> list[str]:
    """Inputs that `forward` has and the graph does not; the usual one is attention_mask, 115 tensors instead of 116."""
    present = {value.name for value in true_inputs(model)}
    return [name for name in input_names(num_layers) if name not in present]


def problems(onnx_path: str | Path, checkpoint: Checkpoint | None = None) -> list[str]:
    """What will fail later, one sentence each; empty if nothing will. Raises as `summarize` does.

    checkpoint: what the graph was exported from; without it, weights are not compared and the number of layers is taken
    from the graph's outputs.
    """
    path = Path(onnx_path)
    export = open_export(path)
    model = export.model
    layers = checkpoint.num_layers if checkpoint else sum(v.name.endswith(".key") for v in model.graph.output)
    found = list(_missing_or_static(model, layers, ours=bool(checkpoint or export.origin)))
    found += [f"input {name} is declared, but its values reach no output." for name in dead_inputs(model)]
    inferred, contradiction = _with_shapes(model)
    found += [contradiction] if contradiction else []
    found += list(_refused_operators(inferred))
    found += list(_frozen_sizes(inferred))
    # Another exporter may fold weights, or keep them in the file.
    found += list(_misplaced_weights(model, checkpoint)) if checkpoint and export.origin else []
    return found


def _missing_or_static(model: onnx.ModelProto, layers: int, ours: bool) -> Iterator[str]:
    for found in static_dimensions(model):
        where = f"axis {found.axis} of {found.tensor} ({found.meaning})"
        yield f"{where} is static ({found.size}): export with a larger example and a dynamic dimension there."
    outputs = {value.name for value in model.graph.output}
    expected = len(input_names(layers)) + len(output_names(layers))
    tensors = f"{len(true_inputs(model)) + len(outputs)} tensors instead of {expected}"
    # A graph of another model may have a cache with these names, too.
    doubt = "" if ours else "if this is ChatGLM-6B, "
    for name in missing_inputs(model, layers) if ours or layers else ():
        yield f"input {name} is missing ({tensors}): {doubt}it was lost while tracing."
    yield from (f"output {name} is missing." for name in output_names(layers) if ours and name not in outputs)


def _with_shapes(model: onnx.ModelProto) -> tuple[onnx.ModelProto, str]:
    """The graph with the types and shapes of all tensors that can be inferred, and what contradicts that, or ""."""
    try:
        return shape_inference.infer_shapes(model, data_prop=True), ""
    except shape_inference.InferenceError as error:
        first = str(error).strip().splitlines()[0]
        return model, f"the shapes written in the file contradict each other: {first}."


def _refused_operators(model: onnx.ModelProto) -> Iterator[str]:
    index = GraphIndex(model)
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    for node in model.graph.node:
        if node.op_type == "Range" and types.get(node.output[0]) == onnx.TensorProto.FLOAT16:
            yield f"{node.name} is a Range in half precision, which ONNX Runtime and TensorRT refuse."
        # The shape of a size or a constant is known, so TensorRT can tell which axes to drop.
        if (
            node.op_type == "Squeeze"
            and index.kinds[node.input[0]] == DATA
            and len(node.input) + len(node.attribute) < 2
        ):
            yield f"{node.name} is a Squeeze without axes, which TensorRT refuses on a dynamic dimension."
        if node.op_type in _SEQUENCE_OPS:
            yield f"{node.name} is a {node.op_type}, which TensorRT refuses: fold it with optimize_ir."


def _frozen_sizes(model: onnx.ModelProto) -> Iterator[str]:
    """Nodes that give a constant size to an axis whose size is dynamic before them: right for one shape only.

    The first of them says where; the others, with the same sizes, are counted.
    """
    index = GraphIndex(model)
    dims = {value.name: describe(value).dims for value in (*model.graph.value_info, *true_inputs(model))}
    # A size is known by these names, as in "4*batch"; what it is elsewhere, nobody knows.
    symbols = {size for value in true_inputs(model) for size in describe(value).dims if isinstance(size, str)}
    found: dict[tuple[int, ...], list[int]] = {}
    for i, node in enumerate(index.nodes):
        if node.op_type in ("Reshape", "Expand") and index.kinds.get(node.input[0]) == DATA:
            before, target = dims.get(node.input[0]), _target(index, node.input[1])
            names = {name for size in before or () if isinstance(size, str) for name in _NAME.findall(size)}
            frozen = _frozen(node.op_type, before, target) if before and target and names <= symbols else ()
            if frozen:
                found.setdefault(frozen, []).append(i)
    for sizes, members in found.items():
        node, scope = index.nodes[members[0]], index.scopes[members[0]] or "no module"
        others = f" (and {len(members) - 1} more)" if len(members) > 1 else ""
        yield (
            f"{node.op_type} {node.name} in {scope} turns a dynamic dimension into a part of "
            f"{' x '.join(map(str, sizes))}{others}: the graph is right for that size only; export it with other sizes "
            "and dynamic dimensions."
        )


def _target(index: GraphIndex, name: str) -> tuple[int | None, ...]:
    """The sizes that a Reshape or an Expand asks for; None for one that is not a constant, or is copied or inferred."""
    stored = index.stored(name)
    if len(stored) == 1 and not stored[0].external_data and index.kinds.get(name) == CONSTANT:
        return tuple(size if size > 0 else None for size in numpy_helper.to_array(stored[0]).reshape(-1).tolist())
    producer = index.producer.get(name)
    if producer is None or index.nodes[producer].op_type != "Concat":
        return ()
    parts = [_target(index, part) or (None,) for part in index.nodes[producer].input]
    return tuple(size for part in parts for size in part)


def _frozen(kind: str, before: tuple[int | str, ...], target: tuple[int | None, ...]) -> tuple[int, ...]:
    """The constant sizes of a target that no constant sizes of the tensor before it explain; none where all are."""
    if kind == "Expand":
        pairs = zip(before[::-1], target[::-1], strict=False)
        return tuple(size for old, size in pairs if isinstance(old, str) and size is not None and size > 1)
    if kept := _kept_axes(before, target):
        # The axes stay in place, so one of size 1 instead of a dynamic one is a batch of 1, and no new axis.
        ones = [new for old, new in zip(before[:kept], target[:kept], strict=True) if isinstance(old, str) and new == 1]
        if ones:
            return tuple(ones)
    left = math.prod(n if isinstance(n, int) else math.prod(map(int, _FACTOR.findall(n))) for n in before)
    sizes = [size for size in target if size is not None and size > 1]
    return () if left % math.prod(sizes) == 0 else tuple(sizes)


def _kept_axes(before: tuple[int | str, ...], target: tuple[int | None, ...]) -> int:
    """The number of leading axes that a Reshape keeps in their places, as far as constant sizes show it; else 0.

    They show it where an axis keeps its size, or where the axes after them are split or merged, as 64 into 4 x 16.
    """
    if len(before) == len(target) and any(old == new and old != 1 for old, new in zip(before, target, strict=True)):
        return len(before)
    for kept in range(1, min(len(before), len(target))):
        old, new = before[kept:], target[kept:]
        sizes = [size for size in (*old, *new) if isinstance(size, int)]
        if len(sizes) == len(old) + len(new) and math.prod(sizes[: len(old)]) == math.prod(sizes[len(old) :]) != 1:
            return kept
    return 0


def _misplaced_weights(model: onnx.ModelProto, checkpoint: Checkpoint) -> Iterator[str]:
    """One sentence for all weights that are not the checkpoint's, with the first as an example."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    wrong = []
    for name, shape in checkpoint.graph_shapes.items():
        tensor = stored.get(name)
        if tensor is None:
            wrong.append(f"{name} is not an initializer (it was folded or renamed)")
        elif tuple(tensor.dims) != shape:
            wrong.append(f"{name} has shape {tuple(tensor.dims)} instead of {shape}")
    if wrong:
        yield f"weights that are not the checkpoint's: {len(wrong)}, the first: {wrong[0]}; export again."
