"""Notebook 03: export the patched model to ONNX, with its weights left where they lie.

The exporter is given weights without data. What it writes is the graph; every parameter is an initializer under its
state-dict name whose external data points into the checkpoint's own safetensors shard, at the tensor's byte offset.
"""

import io
import logging
import re
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnxscript import optimizer
from torch._subclasses.fake_tensor import FakeTensorMode

from glmtrt_helpers import checkpoints, inputs, patches, shards
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.files import replacing

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
# dynamo's opset 17 comes out broken; TorchScript ends at 20.
OPSETS = {"dynamo": range(18, 25), "torchscript": range(17, 21)}
DEFAULT_OPSET = 18
# Sizes of 1 would be pinned by dynamo, equal sizes could be taken for one dimension.
EXAMPLE = (2, 5, 3)  # batch, sequence, past
# The TorchScript exporter serializes the weights into one message before they can be taken out again.
_TORCHSCRIPT_BYTES = 1_500_000_000
_STORED = {"F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16, "F32": ir.DataType.FLOAT}
_WANTED = {"fp16": ir.DataType.FLOAT16, "fp32": ir.DataType.FLOAT}
CODE_KEY = "glmtrt.code_sha256"


@dataclass(frozen=True)
class ExportReport:
    """What was written: bytes of the file, bytes it refers to in the shards, nodes by type, seconds it took."""

    path: Path
    exporter: str
    opset: int
    dtype: str
    file_bytes: int
    referred_bytes: int
    nodes: Counter[str]
    seconds: float


def onnx_path(checkpoint: Checkpoint, dtype: str, exporter: str = "dynamo", opset: int = DEFAULT_OPSET) -> Path:
    """`model.fp16.onnx`; an export that is not the default one carries exporter and opset in its name."""
    middle = "" if (exporter, opset) == ("dynamo", DEFAULT_OPSET) else f".{exporter}{opset}"
    return checkpoint.directory / f"model.{dtype}{middle}.onnx"


def export_model(
    checkpoint: Checkpoint,
    dtype: str = "fp16",
    *,
    exporter: str = "dynamo",
    opset: int = DEFAULT_OPSET,
    example: tuple[int, int, int] = EXAMPLE,
    allow_unpatched: bool = False,
    progress: Callable[[str], None] = lambda phase: None,
) -> ExportReport:
    """Write the ONNX model into the checkpoint's directory and return what was written.

    Inputs and outputs are those of `inputs.input_names` and `inputs.output_names`; dimensions are called batch,
    sequence, past and total (= past + sequence). fp32 is a Cast of the stored fp16 weights, in the graph.
    example: (batch, sequence, past) of the call that is traced. `.bin` shards become safetensors first.
    Raises WorkbookError for an unpatched source (unless `allow_unpatched`),
    an unknown exporter, dtype or opset, and a graph that lost an input or pinned a dimension.
    """
    started = time.perf_counter()
    _check_request(dtype, exporter, opset)
    if not allow_unpatched:
        _check_patched(checkpoint)
    if not checkpoint.is_safetensors:
        progress("streaming .bin shards into safetensors")
        shards.to_safetensors(checkpoint.directory, progress)
        checkpoint = checkpoints.open_checkpoint(checkpoint.directory)
    _check_shards(checkpoint)
    progress(f"tracing {checkpoint.num_layers} layers with {exporter}")
    trace = _trace_dynamo if exporter == "dynamo" else _trace_torchscript
    checkpoints.announce(checkpoint.code)
    with quiet():
        model = trace(checkpoint, DTYPES[dtype], opset, example)
        progress("tidying the graph")
        _tidy(model, checkpoint)
        _name_dimensions(model)
        _refer_to_shards(model, checkpoint, _WANTED[dtype])
        if not allow_unpatched:
            _check_interface(model, checkpoint)
    model.producer_name = "glmtrt"
    model.metadata_props[CODE_KEY] = checkpoints.code_sha256(checkpoint.code)
    path = onnx_path(checkpoint, dtype, exporter, opset)
    progress(f"writing {path.name}")
    with replacing(path) as temporary:
        temporary.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    return ExportReport(
        path,
        exporter,
        opset,
        dtype,
        path.stat().st_size,
        sum(t.nbytes for name, t in checkpoint.tensors.items() if name in model.graph.initializers),
        Counter(node.op_type for node in model.graph),
        time.perf_counter() - started,
    )


def _check_request(dtype: str, exporter: str, opset: int) -> None:
    if dtype not in DTYPES:
        raise WorkbookError(f"dtype {dtype!r} is not exported: choose fp16 or fp32.")
    if exporter not in OPSETS:
        raise WorkbookError(f"there is no exporter {exporter!r}: choose dynamo or torchscript.")
    if opset not in OPSETS[exporter]:
        low, high = OPSETS[exporter][0], OPSETS[exporter][-1]
        raise WorkbookError(f"the {exporter} exporter does not write a good opset {opset}: choose {low} to {high}.")


def _check_patched(checkpoint: Checkpoint) -> None:
    for name, trap in patches.check_checkpoint(checkpoint.directory).items():
        if trap.state == "unpatched":
            raise WorkbookError(
                f"{checkpoint.code}, line {trap.sites[0].line}, still has the trap {name}: run notebook "
                f"02_patch_rotary_flatten or `glmtrt patch {checkpoint.directory}` first."
            )


def _check_shards(checkpoint: Checkpoint) -> None:
    """ONNX Runtime follows external data only into regular files of the model's own folder."""
    for file in {tensor.file for tensor in checkpoint.tensors.values()}:
        if file.is_symlink():
            raise WorkbookError(
                f"{file} is a symbolic link, which ONNX Runtime does not follow: run `glmtrt copy "
                f"{checkpoint.directory}`, whose working copy has hard links, and export there."
            )


def _trace_dynamo(checkpoint: Checkpoint, dtype: torch.dtype, opset: int, example: tuple[int, int, int]) -> ir.Model:
    """torch.export on weights that have a shape and no data, so memory does not depend on the model's size."""
    model = checkpoints.load_model(checkpoint, dtype, meta=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        weights = {name: torch.empty(p.shape, dtype=p.dtype) for name, p in model.named_parameters()}
    model.load_state_dict(weights, strict=False, assign=True)
    axes = torch.export.Dim
    batch, sequence, past = axes("batch"), axes("sequence"), axes("past")
    dynamic = {
        "input_ids": {0: batch, 1: sequence},
        "position_ids": {0: batch, 2: sequence},
        "attention_mask": {0: batch, 2: sequence, 3: axes.DYNAMIC},
        "past_key_values": tuple(({0: past, 1: batch}, {0: past, 1: batch}) for _ in range(checkpoint.num_layers)),
        "use_cache": None,
        "return_dict": None,
    }
    program = torch.onnx.export(
        model,
        kwargs=inputs.forward_kwargs(inputs.example_inputs(checkpoint, *example, dtype=dtype)),
        dynamo=True,
        optimize=False,  # the default folds transposed copies of the weights into the graph
        opset_version=opset,
        input_names=inputs.input_names(checkpoint.num_layers),
        output_names=inputs.output_names(checkpoint.num_layers),
        dynamic_shapes=dynamic,
        verbose=False,
    )
    assert program is not None
    return program.model


def _trace_torchscript(
    checkpoint: Checkpoint, dtype: torch.dtype, opset: int, example: tuple[int, int, int]
) -> ir.Model:
    """The exporter of 2023, for comparison: it runs the model once on real weights and writes down what happened."""
    if checkpoint.weight_bytes > _TORCHSCRIPT_BYTES:
        raise WorkbookError(
            f"the torchscript exporter holds all {checkpoint.weight_bytes / 1e9:.1f} GB of weights in one message, "
            "whose limit is 2 GB: use dynamo for this checkpoint."
        )
    model = checkpoints.load_model(checkpoint, dtype)
    names_in, names_out = inputs.input_names(checkpoint.num_layers), inputs.output_names(checkpoint.num_layers)
    axes: dict[str, dict[int, str]] = {
        "input_ids": {0: "batch", 1: "sequence"},
        "position_ids": {0: "batch", 2: "sequence"},
        "attention_mask": {0: "batch", 2: "sequence", 3: "total"},
        "logits": {0: "batch", 1: "sequence"},
    }
    axes |= {name: {0: "past", 1: "batch"} for name in names_in[3:]}
    axes |= {name: {0: "total", 1: "batch"} for name in names_out[1:]}
    buffer = io.BytesIO()
    torch.onnx.export(
        model,
        kwargs=inputs.forward_kwargs(inputs.example_inputs(checkpoint, *example, dtype=dtype)),
        f=buffer,  # type: ignore[arg-type]
        dynamo=False,
        do_constant_folding=False,  # it would fold transposed copies of the weights
        opset_version=opset,
        input_names=names_in,
        output_names=names_out,
        dynamic_axes=axes,
    )
    return ir.from_proto(onnx.load_from_string(buffer.getvalue()))


def _tidy(model: ir.Model, checkpoint: Checkpoint) -> None:
    """Fold what is constant, the rotary tables above all, but nothing that touches a weight; keep one of each table.

    The tables must be constants: a fused kernel would leave out the rounding of the fp16 angle between product and
    cosine, and late positions would turn by another angle than PyTorch's.
    """
    weights = set(checkpoint.tensors)
    for name, initializer in model.graph.initializers.items():
        if name in weights and "inv_freq" not in name:
            initializer.const_value = None

    def should_fold(node: ir.Node) -> bool | None:
        touches_weight = any(value is not None and value.name in weights for value in node.inputs)
        return False if touches_weight and "inv_freq" not in str(node.inputs) else None

    table_bytes = 64 * checkpoint.max_length * checkpoint.head_size
    optimizer.optimize_ir(model, should_fold=should_fold, input_size_limit=table_bytes, output_size_limit=table_bytes)
    ir.passes.Sequential(
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(size_limit=table_bytes),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
    )(model)
    for node in model.graph:
        # Which layer a node came from is worth keeping; stack traces name the folders of one machine.
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        node.doc_string = None
        if scopes:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph:
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.name = "chatglm"


def _name_dimensions(model: ir.Model) -> None:
    """Give the symbols of dynamo (s18, s17 + s22, ...) the names a reader expects, everywhere in the graph."""
    shapes = {value.name: value.shape for value in model.graph.inputs}
    ids, mask = shapes.get("input_ids"), shapes.get("attention_mask")
    past = shapes.get("past_key_values.0.key")
    if ids is None or past is None:
        return
    names = {str(ids[0]): "batch", str(ids[1]): "sequence", str(past[0]): "past"}
    if mask is not None:
        names[str(mask[3])] = "total"
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([_renamed(dim, names) for dim in value.shape])


def _renamed(dim: int | ir.SymbolicDim, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:
        return dim if isinstance(dim, int) else None
    text = re.sub(r"\w+", lambda symbol: names.get(symbol[0], symbol[0]), str(dim))
    return re.sub(r"past \+ sequence|sequence \+ past", "total", text)


def _refer_to_shards(model: ir.Model, checkpoint: Checkpoint, wanted: ir.DataType) -> None:
    """Point every weight into its shard; where it is stored in another dtype, a Cast in the graph converts it."""
    graph = model.graph
    for name in [name for name in graph.initializers if name in checkpoint.tensors]:
        stored = checkpoint.tensors[name]
        value = graph.initializers.pop(name)
        data = ir.ExternalTensor(
            stored.file.name, stored.offset, stored.nbytes, _STORED[stored.dtype], shape=ir.Shape(stored.shape),
            name=name, base_dir=str(checkpoint.directory),
        )  # fmt: skip
        weight = ir.Value(name=name, shape=ir.Shape(stored.shape), type=ir.TensorType(data.dtype), const_value=data)
        if data.dtype == wanted:
            value.replace_all_uses_with(weight)
        else:
            cast = ir.node("Cast", [weight], {"to": wanted}, name=f"{name}.cast")
            cast.outputs[0].name = f"{name}.{wanted.name.lower()}"
            cast.outputs[0].shape, cast.outputs[0].type = weight.shape, ir.TensorType(wanted)
            value.replace_all_uses_with(cast.outputs[0])
            graph.insert_before(graph[0], cast)
        graph.register_initializer(weight)


def _check_interface(model: ir.Model, checkpoint: Checkpoint) -> None:
    """No input may be lost or unread, no dimension pinned that a chat moves."""
    names = {value.name: value for value in model.graph.inputs}
    for name in inputs.input_names(checkpoint.num_layers):
        if name not in names or not names[name].uses():
            raise WorkbookError(f"the export of {checkpoint.directory} lost the input {name}: check the patches.")
        free = {"input_ids": (0, 1), "position_ids": (0, 2), "attention_mask": (0, 2, 3)}.get(name, (0, 1))
        shape: Any = names[name].shape
        if any(isinstance(shape[axis], int) for axis in free):
            raise WorkbookError(f"the export of {checkpoint.directory} pinned a dimension of {name}: {shape}.")


@contextmanager
def quiet() -> Any:
    """The exporters print at length (torchvision, deprecations, whole graphs); what matters is raised or checked."""
    previous = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
