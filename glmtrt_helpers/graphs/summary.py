"""Notebook 04: what an exported graph holds, before anything runs it.

Only the graph is read; the weights, which lie in the checkpoint's shards, are counted and never read.
"""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import helper
from rich.table import Table

from glmtrt_helpers.checkpoints.identity import open_export
from glmtrt_helpers.core.onnx_file import location as location
from glmtrt_helpers.graphs.scopes import GraphIndex

_MULTIPLY = ("MatMul", "Gemm", "Conv")  # by weights, if one of their inputs is a constant


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the graph. dims: the size of a static dimension, the name of a dynamic one."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphSummary:
    """What a graph holds. weight_bytes are those in the shards that the file points into."""

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
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            # Layers repeat: the first and the last tensors tell the rest.
            lines = [f"{t.name} {t.dtype} ({', '.join(map(str, t.dims))})" for t in tensors]
            text = "\n".join(lines if len(lines) <= 7 else [*lines[:5], "...", *lines[-2:]])
            table.add_row(f"{len(tensors)} {kind}{'s' if len(tensors) != 1 else ''}", text)
        return table


def summarize(onnx_path: str | Path) -> GraphSummary:
    """Count what a graph holds, from the file and the sizes of the shards it points into.

    Raises WorkbookError as `open_export` does: for a missing file, one that is not ONNX, and for weights that are not
    where it says.
    """
    path = Path(onnx_path)
    export = open_export(path)
    model = export.model
    kinds = Counter(node.op_type for node in model.graph.node)
    return GraphSummary(
        path=path,
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        opset=next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")),
        nodes=dict(kinds.most_common()),
        parameters=sum(math.prod(tensor.dims) for tensor in _parameters(model)),
        weight_bytes=sum(tensor.nbytes for tensor in export.external),
        file_bytes=path.stat().st_size,
        inputs=[describe(value) for value in true_inputs(model)],
        outputs=[describe(value) for value in model.graph.output],
    )


def true_inputs(model: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """Inputs that a caller must pass; old files list their initializers among the inputs, too."""
    initializers = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initializers]


def describe(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    dims = tuple(dim.dim_value if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim)
    return TensorInfo(value.name, helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, dims)


def is_weight(tensor: onnx.TensorProto) -> bool:
    """A parameter of the model, not a constant of the exporter: stored outside the file, or named like one."""
    return bool(tensor.external_data) or tensor.name.endswith((".weight", ".bias"))


def _parameters(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """All weights, each once: also those in the file that an exporter transposed and named anew, known by their use."""
    index = GraphIndex(model)
    used = [name for node in index.nodes if node.op_type in _MULTIPLY for name in node.input]
    tensors = [*filter(is_weight, model.graph.initializer), *(tensor for name in used for tensor in index.stored(name))]
    return [*{id(t): t for t in tensors if t.data_type != onnx.TensorProto.INT64 and math.prod(t.dims) > 1}.values()]
