"""Which backends can run, and the session of each by name."""

from pathlib import Path

import pytest
from support.exporting import exported_copy

from glmtrt_helpers.chat import backends
from glmtrt_helpers.checkpoints import checkpoint as checkpoint_module
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.sessions.onnxruntime import SlicedOrtSession


def test_backends_by_name(tmp_path: Path) -> None:
    checkpoint = exported_copy(tmp_path)
    with pytest.raises(WorkbookError, match="'gpu' is no backend of this workbook: choose torch, ort, tensorrt"):
        backends.open_session(checkpoint, "gpu")
    assert "05_build_profiles" in backends.unavailable(checkpoint)["tensorrt"]
    assert backends.best_backend(checkpoint)[0] == "ort"
    (checkpoint.directory / "model.fp16.onnx").unlink()
    assert backends.best_backend(checkpoint)[0] == "torch" and "03_export" in backends.unavailable(checkpoint)["ort"]


def test_a_large_checkpoint_gets_slices_and_prefers_pytorch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_package, "gpus", list)
    checkpoint = exported_copy(tmp_path)
    assert backends.best_backend(checkpoint)[0] == "ort"
    assert not isinstance(backends.open_session(checkpoint, "ort"), SlicedOrtSession)
    monkeypatch.setattr(checkpoint_module, "LARGE_BYTES", 1000)
    assert isinstance(backends.open_session(checkpoint, "ort"), SlicedOrtSession)
    assert backends.best_backend(checkpoint)[0] == "torch"
