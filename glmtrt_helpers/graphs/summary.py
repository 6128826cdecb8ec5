"""Notebook 04: look into an exported graph before anything runs it: what it holds, what it lacks, what it looks like.

Everything here reads the graph only; the weights, which lie in the checkpoint's shards, are measured but never read.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import helper, shape_inference
from rich.table import Table

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.config import expected_shapes
from glmtrt_helpers.core.artifacts import is_part
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.graphs.scopes import DATA, GraphIndex
from glmtrt_helpers.inputs.names import axis_names, input_names, output_names

# What ONNX can say and TensorRT's parser refuses; a clean export has none of it.
_SEQUENCE_OPS = ("SplitToSequence", "SequenceAt", "SequenceConstruct", "ConcatFromSequence")


@dataclass(frozen=True)
class TensorInfo:
    """A tensor at the graph's edge: dims are sizes where they are fixed, names where they are free."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSummary:
    """What a graph holds. Bytes of weights lie outside the file, in the shards that it points into."""

    path: Path
    producer: str
    opset: int
    nodes: dict[str, int]  # by type, most frequent first
    parameters: int
    weight_bytes: int
    file_bytes: int
    inputs: list[TensorInfo]
    outputs: list[TensorInfo]

    def __rich__(self) -> Table:
        table = Table(title=str(self.path), title_justify="left", show_header=False)
        common = ", ".join(f"{kind} {count}" for kind, count in list(self.nodes.items())[:8])
        table.add_row("producer, opset", f"{self.producer}, {self.opset}")
        table.add_row("nodes", f"{sum(self.nodes.values()):,} ({common}, ...)")
        table.add_row("parameters", f"{self.parameters:,}")
        table.add_row("bytes of weights, in the shards", f"{self.weight_bytes:,}")
        table.add_row("bytes of the file itself", f"{self.file_bytes:,}")
        for kind, tensors in (("inputs", self.inputs), ("outputs", self.outputs)):
            # Layers repeat: the first and the last tensors say it all.
            shown = tensors if len(tensors) <= 7 else [*tensors[:5], *tensors[-2:]]
            text = "\n".join(f"{t.name} {t.dtype} ({', '.join(map(str, t.dims))})" for t in shown)
            table.add_row(f"{len(tensors)} {kind}", text)
        return table


@dataclass(frozen=True)
class StaticDimension:
    """An axis that a chat moves and the graph holds fixed."""

    tensor: str
    axis: int
    meaning: str
    size: int


def summarize(onnx_path: str | Path) -> GraphSummary:
    """Count what a graph holds, from the file and the sizes of the shards it points into.

    Raises WorkbookError for a missing file, one that is not ONNX, and for weights that are not where it says.
    """
    path = Path(onnx_path)
    model = load_graph(path)
    check_weights(path, model)
    kinds = Counter(node.op_type for node in model.graph.node)
    weights = [tensor for tensor in model.graph.initializer if _is_weight(tensor)]
    return GraphSummary(
        path=path,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opset=next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        nodes=dict(kinds.most_common()),
        parameters=sum(_elements(tensor) for tensor in weights),
        weight_bytes=sum(_location(tensor)[2] for tensor in weights if tensor.external_data),
        file_bytes=path.stat().st_size,
        inputs=[_describe(value) for value in _true_inputs(model)],
        outputs=[_describe(value) for value in model.graph.output],
    )


def _true_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs a caller must give; old files list their initializers among them."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initializers]


def _describe(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim)
    return TensorInfo(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, dims)


def _is_weight(tensor: onnx.TensorProto) -> bool:
    """A parameter of the model, not a constant that the exporter made: stored outside, or named as one."""
    return bool(tensor.external_data) or tensor.name.endswith((".weight", ".bias"))


def _elements(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims)


def _location(tensor: onnx.TensorProto) -> tuple[str, int, int]:
    """(file name, offset, bytes) of a tensor stored outside the graph."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    needed = _elements(tensor) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return entries["location"], int(entries.get("offset", 0)), int(entries.get("length", needed))


def check_weights(path: Path, model: onnx.ModelProto) -> None:
    """Raise WorkbookError unless every weight stored outside lies inside an existing file."""
    for tensor in model.graph.initializer:
        if not tensor.external_data:
            continue
        location, offset, length = _location(tensor)
        shard = path.parent / location
        if not shard.is_file():
            raise WorkbookError(
                f"{shard} is missing, but {path.name} keeps {tensor.name!r} in it: the graph lies apart from its "
                "checkpoint, put it back beside the shards or export it again."
            )
        if offset + length > shard.stat().st_size:
            raise WorkbookError(
                f"{shard} ends at byte {shard.stat().st_size:,}, but {path.name} expects {tensor.name!r} up to byte "
                f"{offset + length:,}: the shard was cut or replaced since the export, export again."
            )


def static_dimensions(model: onnx.ModelProto) -> list[StaticDimension]:
    """Axes of inputs and outputs that are numbers although a chat moves them: batch, sequence and past."""
    pinned = []
    for value in [*_true_inputs(model), *model.graph.output]:
        axes = axis_names(value.name)
        for axis, size in enumerate(_describe(value).dims):
            if axis in axes and isinstance(size, int):
                pinned.append(StaticDimension(value.name, axis, axes[axis], size))
    return pinned


def dead_inputs(model: onnx.ModelProto) -> list[str]:
    """Inputs that are declared but whose values reach no output; to read an input's shape is not to read it."""
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
    return [value.name for value in _true_inputs(model) if value.name not in seen]


def _reads(node: onnx.NodeProto) -> list[str]:
    """Tensors a node reads, those that the branches of an If or the body of a Loop read included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for inner in attribute.g.node:
            names += _reads(inner)
        names += [value.name for value in attribute.g.output]
    return names


def missing_inputs(model: onnx.ModelProto, num_layers: int) -> list[str]:
    """Inputs that `forward` takes and the graph does not; the famous one is attention_mask, 115 tensors for 116."""
    present = {value.name for value in _true_inputs(model)}
    return [name for name in input_names(num_layers) if name not in present]


def problems(onnx_path: str | Path, checkpoint: Checkpoint | None = None) -> list[str]:
    """What will fail later, a sentence each; an empty list is a clean bill. Raises as `summarize` does.

    checkpoint: what the graph was exported from; without one its weights are not compared and the number of layers is
    what the graph's outputs say. A part of the fast decoder is not expected to have the whole one's inputs and outputs.
    """
    path = Path(onnx_path)
    model = load_graph(path)
    check_weights(path, model)
    layers = checkpoint.num_layers if checkpoint else sum(v.name.endswith(".key") for v in model.graph.output)
    found = [] if is_part(path) else list(_missing_or_pinned(model, layers))
    found += [f"input {name} is declared, but its values reach no output." for name in dead_inputs(model)]
    found += list(_refused_operators(model))
    found += list(_misplaced_weights(model, checkpoint)) if checkpoint else []
    return found


def _missing_or_pinned(model: onnx.ModelProto, layers: int) -> Iterator[str]:
    for pin in static_dimensions(model):
        where = f"axis {pin.axis} of {pin.tensor} ({pin.meaning})"
        yield f"{where} is pinned to {pin.size}: export with a larger example and a dynamic dimension there."
    outputs = {value.name for value in model.graph.output}
    expected = len(input_names(layers)) + len(output_names(layers))
    tensors = f"{len(_true_inputs(model)) + len(outputs)} tensors instead of {expected}"
    for name in missing_inputs(model, layers):
        yield f"input {name} is missing ({tensors}): it was traced away."
    yield from (f"output {name} is missing." for name in output_names(layers) if name not in outputs)


def _refused_operators(model: onnx.ModelProto) -> Iterator[str]:
    index = GraphIndex(model)
    try:
        inferred = shape_inference.infer_shapes(model)
    except shape_inference.InferenceError as error:
        yield f"the shapes written in the file contradict each other: {str(error).strip().splitlines()[0]}."
        inferred = model
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    for node in model.graph.node:
        if node.op_type == "Range" and types.get(node.output[0]) == onnx.TensorProto.FLOAT16:
            yield f"{node.name} is a Range in half precision, which ONNX Runtime and TensorRT refuse."
        # On a size or a constant every dimension is known, and TensorRT can tell which to drop.
        if (
            node.op_type == "Squeeze"
            and index.kinds[node.input[0]] == DATA
            and len(node.input) + len(node.attribute) < 2
        ):
            yield f"{node.name} is a Squeeze without axes, which TensorRT refuses on a dynamic dimension."
        if node.op_type in _SEQUENCE_OPS:
            yield f"{node.name} is a {node.op_type}, which TensorRT refuses: fold it with optimize_ir."


def _misplaced_weights(model: onnx.ModelProto, checkpoint: Checkpoint) -> Iterator[str]:
    """One sentence for the weights that are not the checkpoint's, with the first as an example."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    wrong = []
    for name, shape in expected_shapes(checkpoint.config).items():
        tensor, source = stored.get(name), checkpoint.tensors[name]
        if tensor is None:
            wrong.append(f"{name} is no initializer of its own (it was folded or renamed)")
        elif tuple(tensor.dims) != shape:
            wrong.append(f"{name} has shape {tuple(tensor.dims)} for {shape}")
        elif tensor.external_data and source.offset is not None:
            at = _location(tensor)
            if at != (source.file.name, source.offset, source.nbytes):
                wrong.append(f"{name} is read from {at}, it lies at {(source.file.name, source.offset, source.nbytes)}")
    if wrong:
        yield f"weights that are not the checkpoint's: {len(wrong)}, the first: {wrong[0]}; export again."
