"""Slices of a graph: the same numbers, in an order that can run, with no more weights in a slice than allowed."""

from pathlib import Path

import numpy as np
import pytest

from glmtrt_helpers.chat import backends
from glmtrt_helpers.checkpoints import checkpoint as checkpoint_module
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.export import exporting
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.patches import patching
from glmtrt_helpers.sessions.onnxruntime import OrtSession, SlicedOrtSession, cut


@pytest.fixture
def checkpoint(tiny_random: Path) -> Checkpoint:
    patching.patch_checkpoint(tiny_random)
    opened = open_checkpoint(tiny_random)
    for dtype in ("fp16", "fp32"):
        exporting.export_model(opened, dtype)
    return opened


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("slice_bytes", [1, 40_000, 10**9])
def test_slices_give_the_numbers_of_the_whole(checkpoint: Checkpoint, dtype: str, slice_bytes: int) -> None:
    path = exporting.onnx_path(checkpoint, dtype)
    whole = OrtSession(path, optimize=False)
    sliced = SlicedOrtSession(path, slice_bytes=slice_bytes)
    for batch, sequence, past in ((1, 5, 0), (2, 1, 9)):
        flat = example_inputs(checkpoint, batch, sequence, past, loading.DTYPES[dtype])
        wanted, got = whole.run(flat), sliced.run(flat)
        assert list(got) == list(wanted)
        for name, tensor in wanted.items():
            if dtype == "fp32":
                assert np.array_equal(got[name], tensor), name
            else:  # the whole graph keeps fp32 between products where a cut rounds
                assert np.abs(got[name].astype("f4") - tensor.astype("f4")).max() <= 4e-3 * np.abs(tensor).max(), name
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
        assert sum(mine) <= limit or max(mine) > limit  # one that is larger stands in a slice of its own
    passed = {value.name for part in parts for value in part.graph.input}
    cast = {node.output[0] for node in model.graph.node if node.op_type == "Cast" and node.input[0] in sizes}
    assert cast and not passed & cast  # a weight in fp32 that travelled would be the memory that slicing saves


def test_a_large_checkpoint_gets_slices_and_prefers_pytorch(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensorrt_package, "gpus", list)
    assert backends.best_backend(checkpoint)[0] == "ort"
    assert not isinstance(backends.open_session(checkpoint, "ort"), SlicedOrtSession)
    monkeypatch.setattr(checkpoint_module, "LARGE_BYTES", 1000)
    assert isinstance(backends.open_session(checkpoint, "ort"), SlicedOrtSession)
    assert backends.best_backend(checkpoint)[0] == "torch"
