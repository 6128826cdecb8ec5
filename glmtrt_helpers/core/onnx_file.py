"""Read an ONNX file without its weights."""

from pathlib import Path

import onnx
from google.protobuf.message import DecodeError

from glmtrt_helpers.core.artifacts import missing_graph
from glmtrt_helpers.core.errors import WorkbookError


def load_graph(onnx_path: str | Path) -> onnx.ModelProto:
    """The graph without its weights. Raises WorkbookError for a file that is missing or no ONNX model."""
    path = Path(onnx_path)
    if not path.is_file():
        raise WorkbookError(missing_graph(path))
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except DecodeError:
        model = onnx.ModelProto()
    # An empty file is a valid message as well, without any node.
    if not model.graph.node:
        raise WorkbookError(f"{path} is not an ONNX model, or was not written to its end: export it again.")
    return model
