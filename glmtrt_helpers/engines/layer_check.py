"""Notebook 05: an engine whose inner tensors are outputs, to compare it with PyTorch layer by layer."""

from __future__ import annotations

from pathlib import Path

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.engines import plan_info
from glmtrt_helpers.engines.builder import build_engine
from glmtrt_helpers.engines.profiles import Profile, Range
from glmtrt_helpers.engines.session import TensorRTSession
from glmtrt_helpers.graphs.layer_errors import mark_layers
from glmtrt_helpers.graphs.reference import LAYER_CASE, Case


def layer_session(
    checkpoint: Checkpoint, dtype: str, case: Case = LAYER_CASE, onnx_path: Path | None = None
) -> TensorRTSession:
    """A session for `compare_layers`: an engine of the graph at onnx_path for one case, its inner tensors as outputs.

    The graph and the engine are deleted once the session is open. What is an output cannot be fused away: this engine
    is a little slower, and may round in other places, than the one that it stands for.
    """
    source = onnx_path or plan_info.plan_path(checkpoint, dtype).with_suffix(".onnx")
    marked = source.with_name(f"{source.stem}.marked.onnx")
    plan = marked.with_suffix(".plan")
    batch, sequence, past = (Range(size, size, size) for size in (case.batch, case.sequence, case.past))
    try:
        mark_layers(source, marked, checkpoint.num_layers)
        build_engine(checkpoint, dtype, [Profile(case.name, batch, sequence, past)], onnx_path=marked)
        return TensorRTSession.open(checkpoint, dtype, plan)
    finally:
        for file in (marked, plan, plan_info.info_path(plan)):
            file.unlink(missing_ok=True)
