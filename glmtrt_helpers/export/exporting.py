"""Notebook 03: export the patched model to ONNX without copying its weights.

The exporter is given weights without data. What it writes is the graph; every parameter is an initializer under its
state-dict name whose external data points into the checkpoint's own safetensors shard, at the tensor's byte offset.
"""

import gc
import io
import logging
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from glmtrt_helpers.checkpoints import identity, loading, shards
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.code_hash import announce
from glmtrt_helpers.checkpoints.loading import DTYPES
from glmtrt_helpers.checkpoints.packing import linkable_parts
from glmtrt_helpers.checkpoints.remote_code import fp16_only, remote_line
from glmtrt_helpers.core.artifacts import take_step
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import check_writable, replacing
from glmtrt_helpers.core.text import shorten, tell
from glmtrt_helpers.export import graph_passes, weights_in_shards
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.inputs.names import PAST, STEP_INPUTS, axis_names, forward_kwargs, input_names, output_names
from glmtrt_helpers.patches import patching

# dynamo's opset 17 comes out broken; TorchScript ends at 20.
OPSETS = {"dynamo": range(18, 25), "torchscript": range(17, 21)}
DEFAULT_OPSET = 18
PACKED_OPSET = 21  # the first that has 4-bit integers and a scale for each group
# dynamo makes a size of 1 static, and could take two equal sizes for one dimension.
EXAMPLE = (2, 5, 3)  # batch, sequence, past
# The TorchScript exporter serializes all weights into one protobuf message, whose limit is 2 GB.
_TORCHSCRIPT_BYTES = 1_500_000_000


@dataclass(frozen=True)
class ExportReport:
    """What was written: bytes of the file, bytes it refers to in the shards, nodes by type, seconds it took."""

    path: Path
    exporter: str
    opset: int
    file_bytes: int
    referred_bytes: int
    nodes: Counter[str]
    seconds: float


def default_opset(checkpoint: Checkpoint) -> int:
    return PACKED_OPSET if checkpoint.packed else DEFAULT_OPSET


def onnx_path(checkpoint: Checkpoint, dtype: str, exporter: str = "dynamo", opset: int | None = None) -> Path:
    """`model.fp16.onnx`; an export that is not the default one carries exporter and opset in its name."""
    default = default_opset(checkpoint)
    opset = opset or default
    middle = "" if (exporter, opset) == ("dynamo", default) else f".{exporter}{opset}"
    return checkpoint.directory / f"model.{dtype}{middle}.onnx"


@contextmanager
def less_garbage_collection() -> Iterator[None]:
    """Collect rarely: an export keeps most of its millions of objects; looking for dead ones took 1/7 of its time."""
    previous = gc.get_threshold()
    gc.set_threshold(100_000, 50, 100)
    try:
        yield
    finally:
        gc.set_threshold(*previous)


@less_garbage_collection()
def export_model(
    checkpoint: Checkpoint,
    dtype: str = "fp16",
    *,
    exporter: str = "dynamo",
    opset: int | None = None,
    example: tuple[int, int, int] = EXAMPLE,
    allow_unpatched: bool = False,
    progress: Callable[[str], None] = lambda phase: None,
) -> ExportReport:
    """Write the ONNX model into the checkpoint's directory and return what was written.

    Inputs and outputs are those of `names.input_names` and `names.output_names`; dimensions are called batch,
    sequence, past and total (= past + sequence). fp32 is a Cast of the stored fp16 weights, in the graph; packed ones
    are dequantised in the graph. opset: 18 by default, 21 for packed weights.
    example: (batch, sequence, past) of the call that is traced. `.bin` shards become safetensors first.
    Raises WorkbookError for an unpatched source (unless `allow_unpatched`),
    an unknown exporter, dtype or opset, and a graph that lost an input or made a dimension static.
    """
    started = time.perf_counter()
    opset = opset or default_opset(checkpoint)
    _check_request(checkpoint, dtype, exporter, opset)
    if not allow_unpatched:
        _check_patched(checkpoint)
    path = onnx_path(checkpoint, dtype, exporter, opset)
    check_writable(path)
    checkpoint = with_linkable_shards(checkpoint, progress)
    progress(f"tracing {checkpoint.num_layers} layers with {exporter}")
    announce(checkpoint.code)  # before quiet(), which would swallow it
    if dtype == "fp16" and (why := fp16_only(checkpoint.code)):
        tell(f"{why}; a later modeling_chatglm.py can be.")
    model = _trace(checkpoint, dtype, exporter, opset, example)
    progress("simplifying the graph")
    with quiet():
        graph_passes.simplify(model, checkpoint, checkpoint.tensors)
    graph_passes.name_dimensions(model)
    weights_in_shards.refer_to_shards(model, checkpoint)
    if not allow_unpatched:
        _check_interface(model, checkpoint)
    progress(f"writing {path.name}")
    return write_graph(model, checkpoint, path, exporter, started)


def _check_request(checkpoint: Checkpoint, dtype: str, exporter: str, opset: int) -> None:
    if dtype not in DTYPES:
        raise WorkbookError(f"dtype {dtype!r} is not exported: choose fp16 or fp32.")
    if exporter not in OPSETS:
        raise WorkbookError(f"there is no exporter {exporter!r}: choose dynamo or torchscript.")
    if opset not in OPSETS[exporter]:
        low, high = OPSETS[exporter][0], OPSETS[exporter][-1]
        raise WorkbookError(f"the {exporter} exporter cannot write a valid opset {opset}: choose {low} to {high}.")
    if checkpoint.packed and opset < PACKED_OPSET:
        raise WorkbookError(
            f"weights of 8 and 4 bits need opset {PACKED_OPSET}, which dynamo writes: leave --exporter and --opset out."
        )


def _check_patched(checkpoint: Checkpoint) -> None:
    for name, blocker in patching.check_checkpoint(checkpoint.directory).items():
        if blocker.state == "unpatched":
            raise WorkbookError(
                f"{checkpoint.code}, line {blocker.sites[0].line}, still contains the export blocker {name}: "
                f"{take_step('patch', checkpoint.directory)} first."
            )


def with_linkable_shards(checkpoint: Checkpoint, progress: Callable[[str], None]) -> Checkpoint:
    """The checkpoint in shards that a graph can point into; `.bin` shards are streamed into safetensors first.

    Raises WorkbookError for shards that are symbolic links: ONNX Runtime follows external data only into regular
    files of the model's own folder.
    """
    if not checkpoint.is_safetensors:
        progress("streaming .bin shards into safetensors")
        shards.to_safetensors(checkpoint.directory, progress, linkable_parts(checkpoint.tensors, checkpoint.packed))
        checkpoint = open_checkpoint(checkpoint.directory)
    for name in linkable_parts(checkpoint.tensors, checkpoint.packed):
        raise WorkbookError(
            f"{checkpoint.tensors[name].file}: {name!r} is packed as the published .bin files have it, and a graph "
            "cannot point at that: take the .bin files themselves, of which the export makes safetensors in ONNX's "
            "layout."
        )
    for file in {tensor.file for tensor in checkpoint.tensors.values()}:
        if file.is_symlink():
            raise WorkbookError(
                f"{file} is a symbolic link, which ONNX Runtime does not follow: run `glmtrt copy "
                f"{checkpoint.directory}`, whose working copy has none, and export there."
            )
    return checkpoint


def _trace(checkpoint: Checkpoint, dtype: str, exporter: str, opset: int, example: tuple[int, int, int]) -> ir.Model:
    """The exporter's graph as it comes. Raises WorkbookError where the exporter fails, with its reason."""
    trace = _trace_dynamo if exporter == "dynamo" else _trace_torchscript
    try:
        with quiet():
            return trace(checkpoint, DTYPES[dtype], opset, example)
    except WorkbookError:
        raise
    except (Exception, SystemExit) as error:  # each has its own, wrapped around the informative one
        where, reason = _reason(error)
        raise WorkbookError(
            f"{where or checkpoint.code}: the {exporter} exporter cannot follow this source ({reason}): see "
            "notebook 02_patch_rotary_flatten, or take modeling_chatglm.py from THUDM/chatglm-6b."
        ) from error


def _reason(error: BaseException) -> tuple[str, str]:
    """Of the innermost cause: the line of remote code where it arose, or "", and its type and first words."""
    while error.__cause__ is not None:
        error = error.__cause__
    return remote_line(error), f"{type(error).__name__}: {shorten(str(error), 320)}"


def _trace_dynamo(checkpoint: Checkpoint, dtype: torch.dtype, opset: int, example: tuple[int, int, int]) -> ir.Model:
    """torch.export on weights that have a shape and no data, so memory does not depend on the model's size."""
    model = loading.load_model(checkpoint, dtype, meta=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    model.load_state_dict(weights, strict=False, assign=True)
    dims: dict[str, Any] = {name: torch.export.Dim(name) for name in ("batch", "sequence", "past")}
    dims["total"] = torch.export.Dim.DYNAMIC  # it follows from past and sequence
    axes = {name: {axis: dims[dim] for axis, dim in axis_names(name).items()} for name in (*STEP_INPUTS, PAST)}
    past = axes.pop(PAST)
    shapes = axes | {"past_key_values": ((past, past),) * checkpoint.num_layers, "use_cache": None, "return_dict": None}
    program = torch.onnx.export(
        model,
        kwargs=forward_kwargs(example_inputs(checkpoint, *example, dtype=dtype)),
        dynamo=True,
        optimize=False,  # the default folds transposed copies of the weights into the graph
        opset_version=opset,
        input_names=input_names(checkpoint.num_layers),
        output_names=output_names(checkpoint.num_layers),
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    return program.model


def _trace_torchscript(
    checkpoint: Checkpoint, dtype: torch.dtype, opset: int, example: tuple[int, int, int]
) -> ir.Model:
    """The exporter of 2023, for comparison: it runs the model once, on real weights, and records what happened."""
    if checkpoint.weight_bytes > _TORCHSCRIPT_BYTES:
        raise WorkbookError(
            f"the torchscript exporter puts all {checkpoint.weight_bytes / 1e9:.1f} GB of weights into one protobuf "
            "message, whose limit is 2 GB: use dynamo for this checkpoint."
        )
    model = loading.load_model(checkpoint, dtype)
    buffer = io.BytesIO()
    torchscript_export(model, checkpoint, dtype, opset, example, buffer)
    return ir.from_proto(onnx.load_from_string(buffer.getvalue()))


def torchscript_export(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    opset: int,
    example: tuple[int, int, int],
    target: Any,
) -> None:
    """Run the model once, on real weights, and record what happened; target: a path or a binary stream."""
    names_in, names_out = input_names(checkpoint.num_layers), output_names(checkpoint.num_layers)
    torch.onnx.export(
        model,
        kwargs=forward_kwargs(example_inputs(checkpoint, *example, dtype=dtype)),
        f=target,
        dynamo=False,
        do_constant_folding=False,  # it would fold transposed copies of the weights
        opset_version=opset,
        input_names=names_in,
        output_names=names_out,
        dynamic_axes={name: axis_names(name) for name in (*names_in, *names_out)},
    )


def _check_interface(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Every input is there and read, and no dimension that changes during a chat is static."""
    names = {value.name: value for value in model.graph.inputs}
    for name in input_names(checkpoint.num_layers):
        if name not in names or not names[name].uses():
            raise WorkbookError(f"the export of {checkpoint.directory} lost the input {name}: check the patches.")
        shape: Any = names[name].shape
        if any(isinstance(shape[axis], int) for axis in axis_names(name)):
            raise WorkbookError(f"the export of {checkpoint.directory} made a dimension static in {name}: {shape}.")


def write_graph(model: ir.Model, checkpoint: Checkpoint, path: Path, exporter: str, started: float) -> ExportReport:
    """Write the file whole or not at all, with what it was exported from in it.

    started: `time.perf_counter()` when the export began.
    """
    model.producer_name = identity.PRODUCER
    reads_weights = any(isinstance(v.const_value, ir.ExternalTensor) for v in model.graph.initializers.values())
    model.metadata_props.update(identity.metadata(identity.origin_of(checkpoint, whole=reads_weights)))
    with replacing(path) as temporary:
        temporary.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    return ExportReport(
        path,
        exporter,
        model.graph.opset_imports[""],
        path.stat().st_size,
        sum(tensor.nbytes for name, tensor in checkpoint.tensors.items() if name in model.graph.initializers),
        Counter(node.op_type for node in model.graph),
        time.perf_counter() - started,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' logs, warnings and standard error; what matters is raised as an error or checked."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
