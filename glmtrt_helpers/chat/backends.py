"""Notebook 06: sessions by the name of their backend, and which backends can be opened here."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.identity import open_export
from glmtrt_helpers.core.artifacts import cli_options
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.plan_info import check_plan
from glmtrt_helpers.inputs.names import input_names, output_names
from glmtrt_helpers.sessions.base import Session
from glmtrt_helpers.sessions.onnxruntime import OrtSession, plain_session

BACKENDS = ("torch", "ort", "tensorrt", "cuda")


def open_session(checkpoint: Checkpoint, backend: str, dtype: str = "fp16") -> Session:
    """The session of a backend by name.

    torch runs the source with its weights in dtype, ort the exported graph of dtype, tensorrt its engine; cuda, the
    one-kernel engine of notebook 07, reads the shards.
    Raises WorkbookError for an unknown backend, and for a graph or an engine that is missing or out of date.
    """
    if backend == "torch":
        from glmtrt_helpers.checkpoints.loading import DTYPES, load_bounded  # PyTorch, which the others do not need
        from glmtrt_helpers.sessions.pytorch import TorchSession

        return TorchSession(load_bounded(checkpoint, DTYPES[dtype]))
    if backend == "ort":
        path = checkpoint.directory / f"model.{dtype}.onnx"
        # Packed weights stay packed in ONNX Runtime's own kernel; those of fp16 would be copied into fp32.
        sliced = checkpoint.is_large and not checkpoint.packed
        session = plain_session(checkpoint, path) if sliced else OrtSession(path)
        names = {*input_names(checkpoint.num_layers), *output_names(checkpoint.num_layers)}
        if other := names ^ {*session.inputs, *session.output_names}:
            raise WorkbookError(
                f"{path} is not the graph of a step of this checkpoint, which differs in {min(other)!r}: run notebook "
                f"03_export_onnx or `glmtrt export {path.parent}{cli_options(path)}` again."
            )
        return session
    if backend == "tensorrt":
        from glmtrt_helpers.engines.session import TensorRTSession  # cuda-python

        return TensorRTSession.open(checkpoint, dtype)
    if backend == "cuda":
        from glmtrt_helpers.fast.cuda_session import CudaSession  # cuda-python

        return CudaSession.open(checkpoint, dtype)
    raise WorkbookError(f"{backend!r} is not a backend of this workbook: choose {', '.join(BACKENDS)}.")


def unavailable(checkpoint: Checkpoint, dtype: str = "fp16") -> dict[str, str]:
    """For every backend that cannot be opened here, the reason; without opening any."""
    from glmtrt_helpers.fast.cuda_session import CudaSession  # cuda-python

    reasons = {}
    model = checkpoint.directory / f"model.{dtype}"
    checks: dict[str, Callable[[], object]] = {
        "tensorrt": lambda: check_plan(checkpoint, model.with_name(f"{model.name}.plan")),
        "ort": lambda: open_export(model.with_name(f"{model.name}.onnx")),
        "cuda": lambda: CudaSession.check(checkpoint, dtype),
    }
    for backend, check in checks.items():
        try:
            check()
        except WorkbookError as error:
            reasons[backend] = str(error)
    if importlib.util.find_spec("torch") is None:
        reasons["torch"] = "PyTorch is not installed."
    return reasons


def best_backend(checkpoint: Checkpoint, dtype: str = "fp16") -> tuple[str, str]:
    """The fastest backend that can be opened here, and, where it is on the CPU, why TensorRT cannot."""
    missing = unavailable(checkpoint, dtype)
    # ONNX Runtime casts every weight in every call, and runs a large checkpoint in slices: there PyTorch is faster.
    slow = checkpoint.is_large and not checkpoint.packed
    order = ("cuda", "tensorrt", "torch", "ort") if slow else ("cuda", "tensorrt", "ort", "torch")
    for backend in order:
        if backend not in missing:
            return backend, "" if backend == "cuda" else missing.get("tensorrt", "")
    raise WorkbookError("no backend can be opened: " + " ".join(missing.values()))
