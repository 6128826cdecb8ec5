"""Where an exported graph goes wrong: the first layer over its tolerance, and the first node in it that PyTorch lacks.

What a layer's node writes is looked up among everything that PyTorch computes in that layer, in any order of its axes.
A node whose result PyTorch has as well is right. Of the others, exporters write many that are right, too (PyTorch's
GELU is one call and several nodes), so the node at fault is the first that nothing right depends on. Where a step was
left out, the node before writes what PyTorch has, too, and the one that reads it is named.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import helper
from rich.table import Table
from torch.overrides import TorchFunctionMode

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.loading import DTYPES
from glmtrt_helpers.core.files import check_writable, temporary_path
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.graphs.layer_errors import LayerError, compare_layers, first_difference
from glmtrt_helpers.graphs.reference import LAYER_CASE, Case, case_inputs, fit, run_tensors, source_session
from glmtrt_helpers.graphs.scopes import DATA, GraphIndex
from glmtrt_helpers.graphs.verification import check_exported
from glmtrt_helpers.sessions.onnxruntime import plain_session

# As a part of a value and of a small one in its tensor: rounding within a layer stays far below it.
_SAME = {"fp16": 2e-2, "fp32": 1e-4}
_LARGEST_AXES = 4  # of tensors that are compared in every order of their axes


@dataclass(frozen=True)
class Fault:
    """A node whose result PyTorch does not compute, and its module."""

    node: onnx.NodeProto
    module: str

    def __str__(self) -> str:
        return f"{self.node.op_type} {self.node.name} in {self.module}, which reads {', '.join(self.node.input)}"


@dataclass(frozen=True)
class Location:
    """The errors of all points, the first over its tolerance and the node at fault; both None in a sound graph."""

    onnx_path: Path
    errors: list[LayerError]
    first: LayerError | None
    fault: Fault | None

    def __rich__(self) -> Table:
        """The points up to the first over its tolerance, and the two after it."""
        until = len(self.errors) if self.first is None else self.errors.index(self.first) + 3
        table = Table(title=f"{self.onnx_path.name} against PyTorch, in the order of computation", title_justify="left")
        table.add_column("point")
        for column in ("error", "tolerance"):
            table.add_column(column, justify="right")
        table.add_column("ok")
        for error in self.errors[:until]:
            table.add_row(error.name, f"{error.error:.1e}", f"{error.tolerance:.1e}", "yes" if error.ok else "NO")
        return table


def locate(
    checkpoint: Checkpoint,
    dtype: str = "fp16",
    onnx_path: str | Path | None = None,
    case: Case = LAYER_CASE,
    progress: Callable[[str], None] = lambda phase: None,
) -> Location:
    """Find the first layer of a graph whose error exceeds its tolerance, and the node at fault in it.

    onnx_path: `model.DTYPE.onnx` of the checkpoint by default. Raises WorkbookError as `compare_layers` does.
    """
    path, _ = check_exported(checkpoint, dtype, onnx_path)
    check_writable(path)  # marked copies of the graph have to be in its folder
    progress("comparing layer by layer")
    errors = compare_layers(checkpoint, dtype, case, path)
    first = first_difference(errors)
    if first is None:
        return Location(path, errors, None, None)
    progress(f"comparing node by node before {first.name}")
    right = {error.point.tensor for error in errors[: errors.index(first)]}
    return Location(path, errors, first, _fault(checkpoint, dtype, path, case, first, right))


def _fault(
    checkpoint: Checkpoint, dtype: str, path: Path, case: Case, first: LayerError, right: set[str]
) -> Fault | None:
    """The first node on the way to a point, from points that are right, that no right node depends on."""
    model = load_graph(path)
    index = GraphIndex(model)
    members = _between(index, first.point.tensor, right)
    fitted, _ = fit(case, checkpoint.max_length)
    assert fitted is not None, "the layers were compared with it"
    session = source_session(checkpoint, torch.float32, rotary=DTYPES[dtype], points=[])
    flat = case_inputs(checkpoint, fitted, session, DTYPES[dtype])
    module = "" if first.point.layer is None else f"transformer.layers.{first.point.layer}"
    wide = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in flat.items()}
    with _recording(session.model.get_submodule(module)) as computed:
        session.run(wide)
    written = _run_nodes(checkpoint, model, path, [index.nodes[i].output[0] for i in members], flat)
    known = {i for i in members if _is_among(written.get(index.nodes[i].output[0]), computed, _SAME[dtype])}
    leads_to_right = set(known)
    for i in reversed(members):
        readers = {j for name in index.nodes[i].output for j in index.readers.get(name, ())}
        if readers & leads_to_right:
            leads_to_right.add(i)
    wrong = next((i for i in members if i not in leads_to_right), None)
    return None if wrong is None else Fault(index.nodes[wrong], index.scopes[wrong] or "no module")


def _between(index: GraphIndex, tensor: str, right: set[str]) -> list[int]:
    """Nodes that a tensor depends on and that compute data, as far back as tensors that are right."""
    members, pending = set(), [tensor]
    while pending:
        i = index.producer.get(pending.pop())
        if i is not None and i not in members and index.kinds.get(index.nodes[i].output[0]) == DATA:
            members.add(i)
            pending += [name for name in index.nodes[i].input if name not in right]
    return sorted(members)


def _run_nodes(
    checkpoint: Checkpoint, model: onnx.ModelProto, path: Path, tensors: list[str], flat: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The values of tensors inside a graph."""
    present = {value.name for value in model.graph.output}
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in tensors if name not in present)
    marked = temporary_path(path.with_suffix(".nodes.onnx"))
    try:
        onnx.save(model, str(marked))
        session = plain_session(checkpoint, marked)
    finally:
        marked.unlink(missing_ok=True)
    return run_tensors(session, flat)


@contextmanager
def _recording(module: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Everything that is computed inside a module while the block runs."""
    recorder = _Recorder()
    handles = [
        module.register_forward_pre_hook(lambda *_: recorder.__enter__() and None),
        module.register_forward_hook(lambda *_: recorder.__exit__(None, None, None)),
    ]
    try:
        yield recorder.computed
    finally:
        for handle in handles:
            handle.remove()


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.computed: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else [output]:
            if isinstance(tensor, torch.Tensor):
                self.computed.append(tensor.detach().clone())
        return output


def _is_among(tensor: torch.Tensor | None, computed: list[torch.Tensor], part: float) -> bool:
    """Whether one of the tensors has these values, in some order of its axes."""
    if tensor is None:
        return False
    tensor = tensor.float()

    def same(one: torch.Tensor, other: torch.Tensor) -> bool:
        # Not the largest value sets the scale: next to the mask's -10,000 all scores would be the same.
        small = other.abs().flatten().kthvalue(1 + other.numel() // 4).values
        scale = other.abs() + small
        return bool(((one - other).abs() <= part * scale).all())

    for other in (each.float() for each in computed if each.numel() == tensor.numel() > 0):
        # Sorted values are compared first: they do not depend on the order.
        if not same(tensor.flatten().sort()[0], other.flatten().sort()[0]):
            continue
        orders = permutations(range(other.dim())) if other.dim() <= _LARGEST_AXES else [tuple(range(other.dim()))]
        if any(same(tensor, other.permute(order).reshape(tensor.shape)) for order in orders):
            return True
    return False
