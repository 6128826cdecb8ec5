"""What TensorRT's ONNX parser says of a file. Parsing needs no GPU."""

from pathlib import Path
from typing import Any

import onnx

from glmtrt_helpers.errors import WorkbookError


def tensorrt_errors(model: str | Path | onnx.ModelProto) -> list[str]:
    """One sentence for each thing the parser of TensorRT-RTX cannot read; empty means that it reads all of it.

    A path is parsed where it lies, so that external weights are found; a model in memory must hold its weights.
    """
    try:
        import tensorrt_rtx
    except ImportError:
        raise WorkbookError("tensorrt-rtx is not installed: run `pip install -c constraints.txt -e .`.") from None
    trt: Any = tensorrt_rtx
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)  # the parser's own errors are returned, not logged
    network = trt.Builder(logger).create_network()
    parser = trt.OnnxParser(network, logger)
    if isinstance(model, onnx.ModelProto):
        parsed = parser.parse(model.SerializeToString())
    else:
        parsed = parser.parse_from_file(str(model))
    if parsed:
        return []
    return [_sentence(parser.get_error(index)) for index in range(parser.num_errors)]


def _sentence(error: Any) -> str:
    """The parser's reason, without the source line of the parser that found it."""
    reason = error.desc().strip().rpartition("Assertion failed: ")[2]
    return f"{error.node_operator() or 'model'} {error.node_name()!r}: {reason}"
