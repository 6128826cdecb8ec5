"""Notebook 08: a graph with a fault that the reader has to find."""

from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.export import exporting
from glmtrt_helpers.graphs.scopes import GraphIndex

_LAYER, _RIGHT, _WRONG = 2, 0.79788456, 0.5


def sixth_fault(checkpoint: Checkpoint) -> Path:
    """Write `sixth.onnx`, the fp16 export with one wrong constant, beside the export, and return its path.

    Raises WorkbookError if there is no export, or its nodes do not say which module they came from.
    """
    model = load_graph(exporting.onnx_path(checkpoint, "fp16"))
    index = GraphIndex(model)
    for i in sorted(index.inside(f"transformer.layers.{_LAYER}.mlp")):
        for which, name in enumerate(index.nodes[i].input):
            value = index.scalar(name)
            if value is not None and abs(value - _RIGHT) < 1e-3:
                model.graph.initializer.append(numpy_helper.from_array(np.array(_WRONG, np.float16), "val_gelu"))
                index.nodes[i].input[which] = "val_gelu"
                path = checkpoint.directory / "sixth.onnx"
                with replacing(path) as temporary:
                    onnx.save(model, str(temporary))
                return path
    raise WorkbookError(f"{exporting.onnx_path(checkpoint, 'fp16')} has no GELU in layer {_LAYER}: export it again.")
