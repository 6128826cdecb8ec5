"""What TensorRT's ONNX parser says about a graph, directly and through Polygraphy. Parsing needs no GPU."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import onnx

from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError


class Parsed(NamedTuple):
    """A builder and its strongly typed network as the parser filled it; errors is empty where all of it was parsed.

    The parser owns the weights that it mapped: it has to live until the network has been built.
    """

    builder: Any
    network: Any
    parser: Any
    errors: list[str]


def parse(trt: Any, log: Any, model: Path | bytes) -> Parsed:
    """Parse an ONNX file, or a serialized model that holds its own weights. trt: the package's module."""
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    complete = parser.parse(model) if isinstance(model, bytes) else parser.parse_from_file(str(model))
    errors = [] if complete else [_sentence(parser.get_error(index)) for index in range(parser.num_errors)]
    return Parsed(builder, network, parser, errors)


def _sentence(error: Any) -> str:
    """The operator, the node and the parser's reason, without the line of TensorRT's source that found it."""
    reason = error.desc().strip().rpartition("Assertion failed: ")[2]
    return f"{error.node_operator() or 'model'} {error.node_name()!r}: {reason}"


def tensorrt_errors(model: str | Path | onnx.ModelProto) -> list[str]:
    """One sentence for each thing that TensorRT's parser cannot read; empty means that it reads all of it.

    A path is parsed in its own folder, where its external weights are; a model in memory must hold its weights.
    """
    trt = tensorrt_package.choose(building=True).module
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)  # the parser's own errors are returned, not logged
    return parse(trt, log, model.SerializeToString() if isinstance(model, onnx.ModelProto) else Path(model)).errors


def inspect_capability(path: Path) -> str:
    """Polygraphy's summary of the parts that TensorRT cannot parse: operator, node and reason of each.

    `polygraphy inspect capability` can also cut the graph into the parts that are parsed and those that are not
    (--with-partitioning); here the files that it writes are thrown away.
    """
    package = tensorrt_package.choose(building=True)
    environment = {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": str(int(package.name == "tensorrt-rtx"))}
    polygraphy = [sys.executable, "-c", "import sys; from polygraphy.tools import main; sys.exit(main())"]
    command = [*polygraphy, "inspect", "capability", str(path.resolve())]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    _, found, summary = done.stdout.partition("===== Summary =====\n")
    if found:
        return "\n".join(line.strip() for line in summary.splitlines() if not line.startswith("[I]"))
    if done.returncode:
        raise WorkbookError(f"Polygraphy could not inspect {path}: {(done.stderr or done.stdout).strip()[-300:]}")
    return ""
