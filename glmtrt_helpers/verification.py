"""Notebook 04: does the exported graph compute what the model computes, and if not, where does it begin to differ?

`verify` compares outputs at shapes that the export has not seen; `layer_errors` compares what every layer hands to the
next. What is right, and how far from it is still right, is said in `glmtrt_helpers/references.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import onnx
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from onnx import helper
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from glmtrt_helpers import checkpoints, export, graphs, pictures, runtime
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.references import (
    CASES,
    DTYPES,
    LAYER_CASE,
    LAYER_MARGIN,
    Case,
    Point,
    Reference,
    fit,
    largest_error,
    references,
    tolerance,
)
from glmtrt_helpers.scopes import GraphIndex, load_graph


@dataclass(frozen=True)
class Row:
    """One case: the worst tensor, its largest error, what was allowed, and PyTorch fp16's own error (None in fp32)."""

    case: Case
    tensor: str
    error: float
    tolerance: float
    own_error: float | None
    ok: bool
    note: str = ""


@dataclass
class Verification:
    """What `verify` found. skipped: cases that the model is too short for; problems: those of `graphs.problems`."""

    onnx_path: Path
    dtype: str
    rows: list[Row] = field(default_factory=list)
    skipped: list[tuple[Case, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows) and not self.problems

    def __rich__(self) -> Table:
        notes = [f"{row.case.name}: {row.note}" for row in self.rows if row.note]
        notes += [f"skipped {case.name}: {why}" for case, why in self.skipped] + self.problems
        table = Table(title=f"{self.onnx_path.name} against PyTorch", title_justify="left")
        table.caption, table.caption_justify = escape("\n".join(notes)) or None, "left"
        # Tight enough for a terminal of 80 characters.
        table.box, table.padding, table.pad_edge = SIMPLE_HEAD, 0, False
        table.add_column("case", min_width=11, overflow="fold")
        for column in ("batch", "new", "past", "error", "allowed", "PyTorch\nfp16"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("worst tensor", no_wrap=True)
        table.add_column("ok")
        for row in self.rows:
            case, own = row.case, "" if row.own_error is None else f"{row.own_error:.1e}"
            shape = (str(case.batch), str(case.sequence), str(case.past))
            numbers = (*shape, f"{row.error:.1e}", f"{row.tolerance:.1e}", own)
            table.add_row(case.name, *numbers, row.tensor, "yes" if row.ok else "NO")
        return table


def verify(
    checkpoint: Checkpoint,
    dtype: str = "fp16",
    cases: Sequence[Case] = CASES,
    onnx_path: str | Path | None = None,
    session: runtime.Session | None = None,
) -> Verification:
    """Compare the exported graph with PyTorch at every case: logits and all presents.

    onnx_path: `model.DTYPE.onnx` of the checkpoint by default. session: what runs the graph, ONNX Runtime by default;
    an engine that was built from the graph can take its place.
    Raises WorkbookError where the graph is missing, older than the source, or another checkpoint's.
    """
    path = _exported(checkpoint, dtype, onnx_path)
    result = Verification(path, dtype, problems=graphs.problems(path, checkpoint))
    fitting = []
    for case in cases:
        fitted, why = fit(case, checkpoint.max_length)
        if fitted is None:
            result.skipped.append((case, why))
        else:
            fitting.append((fitted, why))
    ready = references(checkpoint, dtype, [case for case, _ in fitting])
    session = session or runtime.OrtSession(path, optimize=False)  # weights stay mapped, the graph as it is written
    for one, (_, why) in zip(ready, fitting, strict=True):
        row = _compare(one, session, dtype)
        result.rows.append(replace(row, note="; ".join(filter(None, (row.note, why)))))
    return result


def _exported(checkpoint: Checkpoint, dtype: str, onnx_path: str | Path | None) -> Path:
    """The graph's path, once it is clear that it is this checkpoint's and not out of date."""
    if dtype not in DTYPES:
        raise WorkbookError(f"{dtype!r} is no precision of this workbook: take one of {', '.join(DTYPES)}.")
    path = Path(onnx_path) if onnx_path else export.onnx_path(checkpoint, dtype)
    model = load_graph(path)
    graphs.check_weights(path, model)
    noted = {entry.key: entry.value for entry in model.metadata_props}.get(export.CODE_KEY)
    # A file that does not say from which source it came can only be told by its age.
    newer = path.stat().st_mtime >= checkpoint.code.stat().st_mtime
    if not (noted == checkpoints.code_sha256(checkpoint.code) if noted else newer):
        raise WorkbookError(
            f"{path} was exported from another state of {checkpoint.code.name} than the one beside it, which was "
            f"patched or replaced since: run notebook 03_export_onnx or `glmtrt export {checkpoint.directory}` again."
        )
    layers = sum(value.name.startswith("present.") for value in model.graph.output) // 2
    shapes = checkpoints.expected_shapes(checkpoint.config)
    other = [t.name for t in model.graph.initializer if t.name in shapes and tuple(t.dims) != shapes[t.name]]
    if layers != checkpoint.num_layers or other:
        what = f"the shape of {other[0]} differs" if other else f"{layers} layers for {checkpoint.num_layers}"
        raise WorkbookError(
            f"{path} was exported from another checkpoint ({what}): export {checkpoint.directory} again."
        )
    return path


def _compare(one: Reference, session: runtime.Session, dtype: str) -> Row:
    """Run one case and keep the tensor that is worst for what it is allowed. A run that fails is a row that fails."""
    try:
        got = session.run(one.flat)
    except Exception as failure:  # each backend raises its own kinds
        return Row(one.case, "-", float("inf"), 0.0, None, False, str(failure).strip().splitlines()[0])
    rows = []
    for name, wanted in one.wanted.items():
        if name not in got or got[name].shape != wanted.shape:
            shape = tuple(got[name].shape) if name in got else "missing"
            return Row(one.case, name, float("inf"), 0.0, None, False, f"shape {shape} for {tuple(wanted.shape)}")
        error, scale = largest_error(name, one.flat, wanted, got[name])
        own_error = one.own_errors.get(name)
        allowed = tolerance(dtype, scale, own_error)
        note = "" if error == error else "not finite"
        rows.append(Row(one.case, name, error, allowed, own_error, error <= allowed, note))
    return max(rows, key=lambda row: row.error / row.tolerance if row.error == row.error else float("inf"))


@dataclass(frozen=True)
class LayerError:
    """How far a graph is from the reference at one point. scale: the reference's largest value there."""

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
    """The points at which a graph can be compared with PyTorch, in the order of the computation, and their tensors.

    Raises WorkbookError for a graph whose nodes do not say which module they came from.
    """
    index = GraphIndex(model)
    places: list[tuple[int | None, str, str, str]] = [
        (None, "embeddings", "transformer.layers.0.input_layernorm", "in")
    ]
    for i in range(num_layers):
        base = f"transformer.layers.{i}"
        behind = "transformer.final_layernorm" if i + 1 == num_layers else f"transformer.layers.{i + 1}.input_layernorm"
        places += [
            (i, "input_layernorm", f"{base}.input_layernorm", "out"),
            (i, "attention", f"{base}.attention.dense", "in"),  # softmax times values, all heads side by side
            (i, "attention.dense", f"{base}.attention.dense", "out"),
            (i, "attention residual", f"{base}.post_attention_layernorm", "in"),
            (i, "post_attention_layernorm", f"{base}.post_attention_layernorm", "out"),
            (i, "mlp", f"{base}.mlp", "out"),
            (i, "output", behind, "in"),
        ]
    places.append((None, "final_layernorm", "transformer.final_layernorm", "out"))
    points = [Point(*place, tensor=_tensor_at(index, place[2], place[3])) for place in places]
    return [*points, Point(None, "logits", "", "out", "logits")]


def _tensor_at(index: GraphIndex, module: str, side: str) -> str:
    members = index.inside(module)
    tensors = list(index.entering(members) if side == "in" else index.leaving(members))
    if len(tensors) != 1:
        raise WorkbookError(
            f"the graph has {len(tensors)} tensors that go {side} at {module}, not one: its nodes do not tell which "
            "module they came from, export it with notebook 03_export_onnx."
        )
    return tensors[0]


def mark_layers(onnx_path: str | Path, target: str | Path, num_layers: int) -> list[Point]:
    """Write a copy of the graph whose outputs include the tensors of `layer_points`, and return the points.

    target must lie beside the graph, for its weights are found from there. An engine built from the copy can be handed
    to `layer_errors`.
    """
    model = load_graph(onnx_path)
    points = layer_points(model, num_layers)
    kind = next(value.type.tensor_type.elem_type for value in model.graph.output if value.name == "logits")
    known = {value.name for value in model.graph.output}
    for name in dict.fromkeys(point.tensor for point in points):
        if name not in known:
            model.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    onnx.save(model, str(target))
    return points


def layer_errors(
    checkpoint: Checkpoint,
    dtype: str = "fp16",
    case: Case = LAYER_CASE,
    onnx_path: str | Path | None = None,
    session: runtime.Session | None = None,
) -> list[LayerError]:
    """Compare the graph with PyTorch at every point, in the order of the computation.

    session: what runs the graph with the outputs of `mark_layers`; ONNX Runtime by default. Raises as `verify` does.
    """
    path = _exported(checkpoint, dtype, onnx_path)
    marked = path.with_name(path.stem + ".layers.onnx")
    try:
        points = mark_layers(path, marked, checkpoint.num_layers)
        session = session or runtime.OrtSession(marked, optimize=False)
    finally:
        marked.unlink(missing_ok=True)
    fitted, why = fit(case, checkpoint.max_length)
    if fitted is None:
        raise WorkbookError(f"the case {case.name!r} does not fit: {why}.")
    one = references(checkpoint, dtype, [fitted], points)[0]
    got = session.run(one.flat)
    errors = []
    for point in points:
        if point.tensor not in got:
            raise WorkbookError(f"the session gives no {point.tensor!r}: build it from the graph of `mark_layers`.")
        error, scale = largest_error(point.tensor, one.flat, one.wanted[point.tensor], got[point.tensor])
        own_error = one.own_errors.get(point.tensor)
        allowed = tolerance(dtype, scale, own_error, LAYER_MARGIN)
        errors.append(LayerError(point, error, scale, allowed, own_error))
    return errors


def first_difference(errors: Sequence[LayerError]) -> LayerError | None:
    """The first point beyond its tolerance, as in "layer 1 attention"; None where all are within."""
    return next((error for error in errors if not error.ok), None)


def plot_layer_errors(errors: Sequence[LayerError], title: str = "") -> Figure:
    """Error at every point over the largest value there, beside what is allowed; the first one beyond is marked."""
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    x = range(len(errors))
    # Equal numbers have no place on a log axis: they lie on a floor below all others.
    floor = min((e.error / e.scale for e in errors if e.error > 0), default=1e-8) / 3

    def curve(values: Sequence[float]) -> list[float]:
        return [max(value / error.scale, floor) for value, error in zip(values, errors, strict=True)]

    axis.plot(x, curve([e.tolerance for e in errors]), color="#777777", linestyle="--", label="allowed")
    if all(e.own_error is not None for e in errors):
        axis.plot(
            x, curve([e.own_error or 0.0 for e in errors]), color=pictures.DECODE, marker=".", label="PyTorch fp16"
        )
    axis.plot(x, curve([e.error for e in errors]), color=pictures.PREFILL, marker="o", markersize=4, label="the graph")
    first = first_difference(errors)
    if first:
        at = list(errors).index(first)
        axis.axvline(at, color=pictures.ALARM, linewidth=1)
        axis.annotate(f"first beyond: {first.name}", (at, 1), xycoords=("data", "axes fraction"), xytext=(4, -4),
                      textcoords="offset points", color=pictures.ALARM, va="top")  # fmt: skip
    axis.set_yscale("log")
    axis.set_ylim(top=10 * axis.get_ylim()[1])  # room for the mark's text above the curves
    axis.set_ylabel("largest error / largest value")
    axis.set_xticks(*_ticks(errors), rotation=90, fontsize=8)
    axis.set_title(title or "Where the graph begins to differ from PyTorch", loc="left")
    axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.2)
    plt.close(figure)
    return figure


def _ticks(errors: Sequence[LayerError]) -> tuple[list[int], list[str]]:
    """Every point where there is room for its name, else the input of every layer."""
    if len(errors) <= 40:
        return list(range(len(errors))), [error.name for error in errors]
    chosen = [i for i, error in enumerate(errors) if error.point.part in ("embeddings", "input_layernorm", "logits")]
    return chosen, [errors[i].name.replace(" input_layernorm", "") for i in chosen]
