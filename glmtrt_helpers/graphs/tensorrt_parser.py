"""What TensorRT's ONNX parser says of a file, by itself and through Polygraphy. Parsing needs no GPU."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError


def tensorrt_errors(model: str | Path | onnx.ModelProto) -> list[str]:
    """One sentence for each thing the parser of TensorRT cannot read; empty means that it reads all of it.

    A path is parsed where it lies, so that external weights are found; a model in memory must hold its weights.
    """
    trt = tensorrt_package.choose(building=True).module
    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)  # the parser's own errors are returned, not logged
    network = trt.Builder(logger).create_network()
    parser = trt.OnnxParser(network, logger)
    if isinstance(model, onnx.ModelProto):
        parsed = parser.parse(model.SerializeToString())
    else:
        parsed = parser.parse_from_file(str(model))
    if parsed:
        return []
    return [sentence(parser.get_error(index)) for index in range(parser.num_errors)]


def inspect_capability(path: Path) -> str:
    """Polygraphy's summary of the parts that TensorRT cannot parse: operator, node and reason of each.

    `polygraphy inspect capability` also cuts the graph into the parts that are read and those that are not
    (--with-partitioning); here the files that it writes are thrown away.
    """
    package = tensorrt_package.choose(building=True)
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": str(int(package.name == "tensorrt-rtx"))}
    with tempfile.TemporaryDirectory() as folder:
        command = ["polygraphy", "inspect", "capability", str(path.resolve())]
        code = "import sys; from polygraphy.tools import main; sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code, *command[1:]],
            capture_output=True, text=True, check=False, cwd=folder, env=environment,
        )  # fmt: skip
    _, found, summary = done.stdout.partition("===== Summary =====\n")
    if found:
        return "\n".join(line.strip() for line in summary.splitlines() if not line.startswith("[I]"))
    if done.returncode:
        raise WorkbookError(f"Polygraphy could not inspect {path}: {(done.stderr or done.stdout).strip()[-300:]}")
    return ""


def sentence(error: Any) -> str:
    """The parser's reason, without the source line of the parser that found it."""
    reason = error.desc().strip().rpartition("Assertion failed: ")[2]
    return f"{error.node_operator() or 'model'} {error.node_name()!r}: {reason}"
