"""TODO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.engines import plan_info
from glmtrt_helpers.engines.builder import build_engine
from glmtrt_helpers.engines.profiles import Profile, Range
from glmtrt_helpers.engines.session import TensorRTSession
from glmtrt_helpers.graphs.layer_errors import mark_layers
from glmtrt_helpers.graphs.reference import LAYER_CASE

if TYPE_CHECKING:
    from glmtrt_helpers.graphs.reference import Case


def layer_session(
    checkpoint: Checkpoint, dtype: str, case: Case | None = None, onnx_path: Path | None = None
) -> TensorRTSession:
    """An engine of the graph at onnx_path, for one case, whose outputs include its inner tensors, for `compare_layers`.

    Nothing of it stays on the disk. What becomes an output cannot be fused away: the engine is a little slower, and
    may round at other places, than the one that is looked into. case: `reference.LAYER_CASE` by default.
    """

    case = case or LAYER_CASE
    source = onnx_path or plan_info.plan_path(checkpoint, dtype).with_suffix(".onnx")
    marked = source.with_name(f"{source.stem}.marked.onnx")
    plan = marked.with_suffix(".plan")
    exact = [Range(n, n, n) for n in (case.batch, case.sequence, case.past)]
    try:
        mark_layers(source, marked, checkpoint.num_layers)
        build_engine(checkpoint, dtype, [Profile(case.name, *exact)], onnx_path=marked)
        return TensorRTSession.open(checkpoint, dtype, plan)
    finally:
        for file in (marked, plan, plan_info.info_path(plan)):
            file.unlink(missing_ok=True)
