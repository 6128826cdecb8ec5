"""Sessions by the name of their backend, which backends can be opened here, and which is the fastest."""

from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper
from support.command_line import InProcess
from support.exporting import editing, exported_copy

from glmtrt_helpers.chat import backends
from glmtrt_helpers.checkpoints import checkpoint as checkpoint_module
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import plan_info
from glmtrt_helpers.engines.builder import build_engine
from glmtrt_helpers.sessions.onnxruntime import OrtSession, SlicedOrtSession
from glmtrt_helpers.sessions.pytorch import TorchSession


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    monkeypatch.setattr(tensorrt_package, "gpus", list)
    return exported_copy(tmp_path)


def test_sessions_by_name(checkpoint: Checkpoint) -> None:
    for name, kind in (("torch", TorchSession), ("ort", OrtSession)):
        session = backends.open_session(checkpoint, name, "fp32")
        assert isinstance(session, kind) and session.backend == name and session.dtype == "float32"
    with pytest.raises(WorkbookError, match="'gpu' is not a backend of this workbook: choose torch, ort, tensorrt"):
        backends.open_session(checkpoint, "gpu")


@pytest.mark.parametrize(("which", "name"), [("output", "present.1.value"), ("input", "past_key_values.1.value")])
def test_a_graph_with_other_inputs_or_outputs_is_refused(
    checkpoint: Checkpoint, glmtrt: InProcess, which: str, name: str
) -> None:
    with editing(checkpoint.directory / "model.fp16.onnx") as model:
        values = getattr(model.graph, which)
        (value,) = (value for value in values if value.name == name)
        values.remove(value)
        if which == "input":  # it becomes a constant, as when a tracer takes an empty cache for one
            model.graph.initializer.append(numpy_helper.from_array(np.zeros((0, 1, 4, 16), np.float16), name))
    status, lines = glmtrt("chat", checkpoint.directory, "--backend", "ort", "--prompt", "a")
    assert status == 1 and f"is not the graph of a step of this checkpoint, which differs in {name!r}" in lines[-1]


def test_reasons_name_what_is_missing(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(backends.unavailable(checkpoint)) == ["tensorrt", "cuda"]
    assert "needs an NVIDIA GPU" in backends.unavailable(checkpoint)["cuda"]
    assert "an engine needs one" in backends.unavailable(checkpoint)["tensorrt"]
    plan = build_engine(checkpoint, "fp16").plan
    assert "an engine needs one" in backends.unavailable(checkpoint)["tensorrt"], "the plan is fine, the GPU is missing"
    assert backends.best_backend(checkpoint) == ("ort", backends.unavailable(checkpoint)["tensorrt"])
    ada = tensorrt_package.Gpu("NVIDIA GeForce RTX 4090", (8, 9), 25 * 10**9)
    monkeypatch.setattr(tensorrt_package, "gpus", lambda: [ada])
    assert "tensorrt" not in backends.unavailable(checkpoint)
    plan.write_bytes(plan.read_bytes()[:-1])
    assert "is truncated" in backends.unavailable(checkpoint)["tensorrt"]
    for damage in (b"{", b"[]", b'{"format": 3}', b"\xff\xfe"):
        plan_info.info_path(plan).write_bytes(damage)
        assert backends.best_backend(checkpoint)[0] == "ort"
        assert "plan.json" in backends.unavailable(checkpoint)["tensorrt"], "a damaged JSON disables its backend alone"
    plan.unlink()
    assert "05_build_profiles" in backends.unavailable(checkpoint)["tensorrt"]
    monkeypatch.setattr(tensorrt_package, "gpus", list)
    checkpoint.code.write_text(checkpoint.code.read_text() + "\n")
    assert "another version of modeling_chatglm.py" in backends.unavailable(checkpoint)["ort"]
    (checkpoint.directory / "model.fp16.onnx").unlink()
    assert "03_export_onnx" in backends.unavailable(checkpoint)["ort"]
    assert backends.best_backend(checkpoint)[0] == "torch"


def test_a_large_checkpoint_runs_in_slices_and_prefers_pytorch(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert backends.best_backend(checkpoint)[0] == "ort"
    assert not isinstance(backends.open_session(checkpoint, "ort"), SlicedOrtSession)
    monkeypatch.setattr(checkpoint_module, "LARGE_BYTES", 1000)
    assert isinstance(backends.open_session(checkpoint, "ort"), SlicedOrtSession)
    assert backends.best_backend(checkpoint)[0] == "torch"


def test_the_fastest_that_can_run_is_chosen(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    missing: dict[str, str] = {}
    monkeypatch.setattr(backends, "unavailable", lambda *_: missing)
    assert backends.best_backend(checkpoint) == ("cuda", "")
    missing |= {"cuda": "no GPU."}
    assert backends.best_backend(checkpoint) == ("tensorrt", "")
    missing |= {"tensorrt": "no plan.", "ort": "no graph."}
    assert backends.best_backend(checkpoint) == ("torch", "no plan.")
    missing |= {"torch": "no PyTorch."}
    with pytest.raises(WorkbookError, match=r"no backend can be opened: no GPU\. no plan\. no graph\. no PyTorch\."):
        backends.best_backend(checkpoint)
