"""Notebook 04: where a graph begins to differ from PyTorch, layer by layer.

"The error is too large to use" becomes the name of a place: the tensors between the modules, and every softmax, become
outputs of the graph, PyTorch is hooked at the same places, and the errors are listed in the order of the computation.
An engine built from the marked graph is compared the same way.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
from onnx import helper

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing, temporary_path
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.graphs.reference import LAYER_CASE, Case, Point, fit, references, run_tensors
from glmtrt_helpers.graphs.scopes import GraphIndex
from glmtrt_helpers.graphs.tolerances import LAYER_MARGIN, largest_error, tolerance
from glmtrt_helpers.graphs.verification import check_exported
from glmtrt_helpers.sessions.base import Session
from glmtrt_helpers.sessions.onnxruntime import plain_session


@dataclass(frozen=True)
class LayerError:
    """The largest error of a graph at one point.

    scale: the reference's largest value there. own_error: the error of PyTorch's own fp16; None in fp32.
    """

    point: Point
    error: float
    scale: float
    tolerance: float
    own_error: float | None

    @property
    def name(self) -> str:
        return self.point.name

    @property
    def ok(self) -> bool:
        return self.error <= self.tolerance


def layer_points(model: onnx.ModelProto, num_layers: int) -> list[Point]:
    """The points where a graph can be compared with PyTorch, in the order of the computation.

    Raises WorkbookError for a graph whose nodes do not say which module they came from.
    """
    index = GraphIndex(model)
    places: list[tuple[int | None, str, str, str]] = [
        (None, "embeddings", "transformer.layers.0.input_layernorm", "in")
    ]
    for i in range(num_layers):
        base = f"transformer.layers.{i}"
        after = "transformer.final_layernorm" if i + 1 == num_layers else f"transformer.layers.{i + 1}.input_layernorm"
        places += [
            (i, "input_layernorm", f"{base}.input_layernorm", "out"),
            (i, "softmax", f"{base}.attention", "softmax"),
            (i, "attention", f"{base}.attention.dense", "in"),  # softmax @ value, the heads concatenated
            (i, "attention.dense", f"{base}.attention.dense", "out"),
            (i, "attention residual", f"{base}.post_attention_layernorm", "in"),
            (i, "post_attention_layernorm", f"{base}.post_attention_layernorm", "out"),
            (i, "mlp", f"{base}.mlp", "out"),
            (i, "output", after, "in"),
        ]
    places.append((None, "final_layernorm", "transformer.final_layernorm", "out"))
    points = [Point(*place, tensor=_tensor_at(index, place[2], place[3])) for place in places]
    return [*points, Point(None, "logits", "", "out", "logits")]


def _tensor_at(index: GraphIndex, module: str, side: str) -> str:
    members = index.inside(module)
    if side == "softmax":
        tensors = [index.nodes[i].output[0] for i in sorted(members) if index.nodes[i].op_type == "Softmax"]
    else:
        tensors = list(index.entering(members) if side == "in" else index.leaving(members))
    if len(tensors) != 1:
        raise WorkbookError(
            f"the graph has {len(tensors)} tensors for {side!r} of {module}, not one: its nodes do not say "
            "which module they came from; export it with notebook 03_export_onnx."
        )
    return tensors[0]


def mark_layers(onnx_path: str | Path, target: str | Path, num_layers: int) -> list[Point]:
    """Write a copy of the graph whose outputs include the tensors of `layer_points`, and return the points.

    target must be in the graph's folder, where its weights are found. A session of the copy, or of an engine built from
    it, can be passed to `compare_layers`.
    """
    model = load_graph(onnx_path)
    points = layer_points(model, num_layers)
    kind = next(value.type.tensor_type.elem_type for value in model.graph.output if value.name == "logits")
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.value_info}
    known = {value.name for value in model.graph.output}
    for name in dict.fromkeys(point.tensor for point in points):
        if name not in known:
            model.graph.output.append(helper.make_tensor_value_info(name, kinds.get(name, kind), None))
    onnx.save(model, str(target))
    return points


def compare_layers(
    checkpoint: Checkpoint,
    dtype: str = "fp16",
    case: Case = LAYER_CASE,
    onnx_path: str | Path | None = None,
    session: Session | None = None,
) -> list[LayerError]:
    """Compare the graph with PyTorch at every point, in the order of the computation.

    session: runs the graph that `mark_layers` writes; ONNX Runtime by default. Raises as `verify` does.
    """
    path, _ = check_exported(checkpoint, dtype, onnx_path)
    marked = temporary_path(path.with_suffix(".layers.onnx"))
    try:
        points = mark_layers(path, marked, checkpoint.num_layers)
        session = session or plain_session(checkpoint, marked)
    finally:
        marked.unlink(missing_ok=True)
    fitted, why = fit(case, checkpoint.max_length)
    if fitted is None:
        raise WorkbookError(f"the case {case.name!r} does not fit: {why}.")
    one = references(checkpoint, dtype, [fitted], points)[0]
    actual = run_tensors(session, one.flat)
    errors = []
    for point in points:
        if point.tensor not in actual:
            raise WorkbookError(
                f"the session has no output {point.tensor!r}: build it from the graph that `mark_layers` writes."
            )
        error, scale = largest_error(point.tensor, one.flat, one.expected[point.tensor], actual[point.tensor])
        own_error = one.own_errors.get(point.tensor)
        allowed = tolerance(session.arithmetic or dtype, scale, own_error, LAYER_MARGIN)
        errors.append(LayerError(point, error, scale, allowed, own_error))
    return errors


def save_errors(errors: Sequence[LayerError], path: Path, about: str) -> None:
    """Write a comparison as JSON, to be shown on machines that cannot make it. about: the hardware and the runtime."""
    entry = {"about": about, "errors": [asdict(error) for error in errors]}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")


def load_errors(path: Path) -> tuple[list[LayerError], str]:
    """The errors and `about` that `save_errors` wrote."""
    entry = json.loads(path.read_text(encoding="utf-8"))
    return [LayerError(**{**error, "point": Point(**error["point"])}) for error in entry["errors"]], entry["about"]


def first_difference(errors: Sequence[LayerError]) -> LayerError | None:
    """The first point over its tolerance; None if all are within."""
    return next((error for error in errors if not error.ok), None)
