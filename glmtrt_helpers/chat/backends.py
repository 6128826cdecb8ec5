"""Which backends can run here, and the session of one by name, over the files that the earlier steps left."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.artifacts import missing_graph
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.plan_info import check_plan
from glmtrt_helpers.sessions.base import Session
from glmtrt_helpers.sessions.onnxruntime import OrtSession, plain_session

BACKENDS = ("torch", "ort", "tensorrt")


def open_session(checkpoint: Checkpoint, backend: str, dtype: str = "fp16") -> Session:
    """The session of a backend by name.

    torch runs the source, in fp32 where dtype is fp32; ort runs the exported graph, tensorrt the engine of dtype.
    Raises WorkbookError for an unknown backend and for a graph or an engine that is missing or stale.
    """
    if backend == "torch":
        from glmtrt_helpers.checkpoints.loading import DTYPES, load_bounded  # PyTorch, which the others go without
        from glmtrt_helpers.sessions.pytorch import TorchSession

        return TorchSession(load_bounded(checkpoint, DTYPES[dtype]))
    if backend == "ort":
        path = checkpoint.directory / f"model.{dtype}.onnx"
        return plain_session(checkpoint, path) if checkpoint.is_large else OrtSession(path)
    if backend == "tensorrt":
        from glmtrt_helpers.engines.session import TensorRTSession  # cuda-python

        return TensorRTSession.open(checkpoint, dtype)
    raise WorkbookError(f"{backend!r} is no backend of this workbook: choose {', '.join(BACKENDS)}.")


def unavailable(checkpoint: Checkpoint, dtype: str = "fp16") -> dict[str, str]:
    """For every backend that cannot be opened here, why; without opening any."""
    reasons = unavailable_files(checkpoint, [checkpoint.directory / f"model.{dtype}"])
    if importlib.util.find_spec("torch") is None:
        reasons["torch"] = "PyTorch is not installed."
    return reasons


def unavailable_files(checkpoint: Checkpoint, models: Sequence[Path]) -> dict[str, str]:
    """Why ort and tensorrt cannot open these models; a model is the path of its graph and its plan without suffix."""
    reasons = {}
    try:
        for model in models:
            check_plan(checkpoint, model.with_name(f"{model.name}.plan"))
    except WorkbookError as error:
        reasons["tensorrt"] = str(error)
    graphs = [model.with_name(f"{model.name}.onnx") for model in models]
    for graph in [graph for graph in graphs if not graph.exists()][:1]:
        reasons["ort"] = missing_graph(graph)
    return reasons


def best_backend(checkpoint: Checkpoint, dtype: str = "fp16") -> tuple[str, str]:
    """The fastest backend that can be opened here, and why no faster one."""
    return first_available(checkpoint, unavailable(checkpoint, dtype))


def first_available(checkpoint: Checkpoint, missing: Mapping[str, str]) -> tuple[str, str]:
    """The fastest backend that is not `missing`, and why TensorRT is, if it is."""
    # ONNX Runtime casts every weight at every call; of a large checkpoint it runs slices, and PyTorch is faster.
    order = ("tensorrt", "torch", "ort") if checkpoint.is_large else ("tensorrt", "ort", "torch")
    for backend in order:
        if backend not in missing:
            return backend, missing.get("tensorrt", "")
    raise WorkbookError("no backend can be opened: " + " ".join(missing.values()))
