"""ONNX Runtime over a graph, whole or in slices: the same numbers, and no more weights in a slice than allowed."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from support.exporting import exported_copy

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.export import exporting
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.sessions import onnxruntime as onnxruntime_module
from glmtrt_helpers.sessions.onnxruntime import OrtSession, SlicedOrtSession, cut


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return exported_copy(tmp_path)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("slice_bytes", [1, 40_000, 10**9])
def test_slices_give_the_numbers_of_the_whole(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, dtype: str, slice_bytes: int
) -> None:
    monkeypatch.setattr(onnxruntime_module, "SLICE_BYTES", slice_bytes)
    path = exporting.onnx_path(checkpoint, dtype)
    whole, sliced = OrtSession(path, optimize=False), SlicedOrtSession(path)
    assert (len(sliced._slices) == 1) == (slice_bytes == 10**9)
    for batch, sequence, past in ((1, 5, 0), (2, 1, 9)):
        flat = example_inputs(checkpoint, batch, sequence, past, loading.DTYPES[dtype])
        expected, actual = whole.run(flat), sliced.run(flat)
        assert list(actual) == list(expected)
        for name, tensor in expected.items():
            if dtype == "fp32":
                assert np.array_equal(actual[name], tensor), name
            else:  # the whole graph keeps fp32 between matmuls where a cut rounds
                error = np.abs(actual[name].astype("f4") - tensor.astype("f4")).max()
                assert error <= 4e-3 * np.abs(tensor).max(), name
    assert sorted(p.name for p in checkpoint.directory.glob("*.onnx")) == ["model.fp16.onnx", "model.fp32.onnx"]


def test_every_slice_stays_below_the_limit(checkpoint: Checkpoint) -> None:
    model = load_graph(exporting.onnx_path(checkpoint, "fp32"))
    sizes = {t.name: int(np.prod(t.dims)) * 2 for t in model.graph.initializer}
    limit = 60_000
    parts = list(cut(model, limit))
    assert len(parts) > 4
    used = {name for part in parts for node in part.graph.node for name in node.input}
    kept = [node for node in model.graph.node if used & set(node.output) or {"logits"} & set(node.output)]
    assert sum(len(part.graph.node) for part in parts) >= len(kept)
    for part in parts:
        mine = [sizes[tensor.name] for tensor in part.graph.initializer]
        assert sum(mine) <= limit or max(mine) > limit  # a larger one is in a slice of its own
    passed = {value.name for part in parts for value in part.graph.input}
    cast = {node.output[0] for node in model.graph.node if node.op_type == "Cast" and node.input[0] in sizes}
    assert cast and not passed & cast  # a weight passed in fp32 would be the memory that slicing saves


def test_a_missing_or_broken_graph_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkbookError, match=r"model\.fp16\.onnx is missing: give the path"):
        OrtSession(tmp_path / "model.fp16.onnx")
    (tmp_path / "model.fp16.onnx").write_bytes(b"garbage")
    with pytest.raises(WorkbookError, match="is not an ONNX model"):
        OrtSession(tmp_path / "model.fp16.onnx")
    graph = '<ir_version: 8, opset_import: ["" : 18]> g (float x) => (float y) { y = NoSuchOperator(x) }'
    onnx.save(onnx.parser.parse_model(graph), tmp_path / "model.fp16.onnx")
    with pytest.raises(WorkbookError, match="does not load"):
        OrtSession(tmp_path / "model.fp16.onnx")
