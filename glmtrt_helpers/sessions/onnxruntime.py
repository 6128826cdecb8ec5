"""The `ort` backend: ONNX Runtime over an exported graph, whole or in slices.

On a CPU, ONNX Runtime casts fp16 weights to fp32 for every matmul, and as the cast of a weight depends on no input, it
casts them all first: 18 GB for the real model. A slice is a run of nodes with few enough weights; between slices only
activations are kept, which the cuts round to the dtype of the graph.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.identity import open_export
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.inputs.names import PAST
from glmtrt_helpers.sessions.base import Session

SLICE_BYTES = 600_000_000  # of weights in a slice; a vocabulary matrix of the real model alone has 1.07 GB


def plain_session(checkpoint: Checkpoint, path: str | Path) -> OrtSession:
    """ONNX Runtime over the graph as it is written, in memory that a laptop has."""
    return SlicedOrtSession(path) if checkpoint.is_large else OrtSession(path, optimize=False)


class OrtSession(Session):
    """A bare ONNX Runtime session, on the CPU unless `providers` say otherwise.

    optimize: ONNX Runtime's default optimisations copy fp16 weights into fp32; without them the weights stay mapped.
    Raises WorkbookError as `open_export` does, and for a graph that ONNX Runtime does not load.
    """

    backend = "ort"

    def __init__(
        self, path: str | Path, *, optimize: bool = True, providers: Sequence[str] = ("CPUExecutionProvider",)
    ):
        import onnxruntime  # slow to import, and absent where only TensorRT runs

        path = Path(path)
        open_export(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised, not printed as well
        # DequantizeLinear and MatMul become one MatMulNBits, which also rounds the activations to 8 bits.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
        if not optimize:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            options.enable_cpu_mem_arena = options.enable_mem_pattern = False  # what a run took is freed at its end
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:
            first = str(error).strip().splitlines()[0]
            raise WorkbookError(f"ONNX Runtime does not load {path}: {first}; export it again.") from error
        self.inputs = {tensor.name: tensor for tensor in self.session.get_inputs()}
        self.output_names = [tensor.name for tensor in self.session.get_outputs()]
        half = self.session.get_outputs()[0].type == "tensor(float16)"
        self.dtype = np.dtype(np.float16 if half else np.float32)

    def empty_past(self, batch: int) -> dict[str, np.ndarray]:
        shapes = {name: tensor.shape for name, tensor in self.inputs.items() if name.startswith(PAST)}
        return {name: np.zeros((0, batch, *shape[2:]), self.dtype) for name, shape in shapes.items()}

    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        arrays = {name: np.ascontiguousarray(flat[name]) for name in self.inputs}
        return dict(zip(self.output_names, self.session.run(self.output_names, arrays), strict=True))


class SlicedOrtSession(OrtSession):
    """ONNX Runtime over slices of the graph at `path`: some seconds per call, and a fraction of the memory."""

    def __init__(self, path: str | Path):
        super().__init__(path, optimize=False)
        self._slices: list[OrtSession] = []
        for number, part in enumerate(cut(load_graph(path), SLICE_BYTES)):
            # Beside the whole graph, whose weights it reads; gone as soon as it is loaded.
            file = Path(path).with_name(f".{Path(path).stem}.{os.getpid()}.{number}.onnx")
            try:
                file.write_bytes(part.SerializeToString())
                self._slices.append(OrtSession(file, optimize=False))
            finally:
                file.unlink(missing_ok=True)

    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        known = {name: np.ascontiguousarray(flat[name]) for name in self.inputs}
        for number, part in enumerate(self._slices):
            known |= part.run(known)
            needed = {*self.output_names, *(name for later in self._slices[number + 1 :] for name in later.inputs)}
            known = {name: array for name, array in known.items() if name in needed}
        return {name: known[name] for name in self.output_names}


def cut(model: onnx.ModelProto, slice_bytes: int) -> Iterator[onnx.ModelProto]:
    """Slices of a graph, in the order in which they have to run; tensors pass between them by name.

    slice_bytes: of weights in a slice; a unit with more than that is a slice of its own.
    """
    graph = model.graph
    sizes = {tensor.name: _nbytes(tensor) for tensor in graph.initializer}
    initializers = {tensor.name: tensor for tensor in graph.initializer}
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.output, *graph.value_info)}
    parts = _group(_units(list(graph.node), set(initializers)), sizes, slice_bytes)
    made = [{name for node in part for name in node.output} for part in parts]
    used = [{name for node in part for name in node.input if name} for part in parts]
    outputs = {value.name for value in graph.output}
    for number, part in enumerate(parts):
        enters = used[number] - made[number] - set(initializers)
        later = set().union(*used[number + 1 :], outputs)
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
    return int(np.prod(tensor.dims, dtype=np.int64)) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _units(nodes: list[onnx.NodeProto], constant: set[str]) -> list[list[onnx.NodeProto]]:
    """The nodes in an order that can run, each with the nodes before it that compute its weights, as a Cast does.

    Such a unit is not cut: otherwise a weight in fp32 would pass between slices.
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
