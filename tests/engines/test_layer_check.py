"""Engines whose inner tensors are outputs, compared with PyTorch layer by layer."""

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support import fake_gpu
from support.exporting import exported_copy

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.engines.layer_check import layer_session
from glmtrt_helpers.graphs.attention_diagram import layer_nodes
from glmtrt_helpers.graphs.layer_errors import compare_layers, first_difference, load_errors, save_errors


def test_layer_by_layer_on_a_fake_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inner tensors come back through raw addresses, within tolerance; no file and no memory is left."""
    checkpoint = exported_copy(tmp_path)
    before = sorted(checkpoint.directory.iterdir())
    gpu = fake_gpu.install(monkeypatch)
    session = layer_session(checkpoint, "fp16")
    assert sorted(checkpoint.directory.iterdir()) == before
    errors = compare_layers(checkpoint, "fp16", session=session)
    assert first_difference(errors) is None and len(errors) == 8 * checkpoint.num_layers + 3
    session.close()
    assert not gpu.blocks


@pytest.mark.gpu
def test_layer_by_layer_on_the_gpu(trained: Checkpoint) -> None:
    """An engine with inner tensors as outputs: all are within tolerance."""
    for dtype in ("fp16", "fp32"):
        opened = layer_session(trained, dtype)
        errors = compare_layers(trained, dtype, session=opened)
        opened.close()
        about = f"{tensorrt_package.gpus()[0].name}, {opened.info.package} {opened.info.version}"
        kept = Path(os.environ.get("GLMTRT_KEEP", trained.directory)) / f"layer_errors.{dtype}.json"
        save_errors(errors, kept, about)
        assert load_errors(kept) == (errors, about)
        assert first_difference(errors) is None and len(errors) == 8 * trained.num_layers + 3


@pytest.mark.gpu
def test_a_weak_mask_is_located_in_its_layer_on_the_gpu(trained: Checkpoint) -> None:
    model = onnx.load(trained.directory / "model.fp16.onnx", load_external_data=False)
    fill = next(node for node in layer_nodes(model, 2) if node.op_type == "Where")
    model.graph.initializer.append(numpy_helper.from_array(np.array(-1.0, np.float16), "weak"))
    fill.input[1] = "weak"
    damaged = trained.directory / "damaged.onnx"
    onnx.save(model, damaged)
    opened = layer_session(trained, "fp16", onnx_path=damaged)
    first = first_difference(compare_layers(trained, "fp16", onnx_path=damaged, session=opened))
    opened.close()
    assert first is not None and first.name == "layer 2 softmax"
