"""Notebook 04: does the exported graph compute what the model computes, at shapes that the export has not traced?

The expected outputs come from `reference`, the errors allowed from `tolerances`; `layer_errors` finds where a graph
begins to differ.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.identity import Export, open_export
from glmtrt_helpers.checkpoints.loading import DTYPES
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.export import exporting
from glmtrt_helpers.graphs.checks import problems
from glmtrt_helpers.graphs.reference import CASES, Case, Reference, fit, references, run_tensors
from glmtrt_helpers.graphs.tolerances import largest_error, tolerance
from glmtrt_helpers.sessions.base import Session
from glmtrt_helpers.sessions.onnxruntime import plain_session


@dataclass(frozen=True)
class CaseResult:
    """The worst tensor of one case: its largest error, its tolerance, and PyTorch's own fp16 error (None in fp32).

    undecided: PyTorch's own fp16 is not finite there, so there is nothing to compare with; such a case is not ok.
    """

    case: Case
    tensor: str
    error: float
    tolerance: float
    own_error: float | None
    ok: bool
    note: str = ""
    undecided: bool = False

    @property
    def verdict(self) -> str:
        return "undecided" if self.undecided else "yes" if self.ok else "NO"


@dataclass
class Verification:
    """What `verify` found. skipped: cases that the model has too few positions for, and why; problems: of `checks`.

    foreign: the graph is not of `glmtrt export`, so what it was made from is not recorded in it.
    """

    onnx_path: Path
    dtype: str
    foreign: bool = False
    rows: list[CaseResult] = field(default_factory=list)
    skipped: list[tuple[Case, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and all(row.ok for row in self.rows) and not self.problems

    def __rich__(self) -> Table:
        notes = [f"{row.case.name}: {row.note}" for row in self.rows if row.note]
        if self.foreign:
            notes.append("not written by glmtrt export: source and weights are compared by what they compute alone")
        notes += [f"skipped {case.name}: {why}" for case, why in self.skipped] + self.problems
        table = Table(title=f"{self.onnx_path.name} against PyTorch", title_justify="left")
        table.caption, table.caption_justify = "\n".join(notes) or None, "left"
        # Narrow enough for a terminal of 80 characters.
        table.box, table.padding, table.pad_edge = SIMPLE_HEAD, 0, False
        table.add_column("case", min_width=11, overflow="fold")
        for column in ("batch", "new\ntokens", "past", "error", "tolerance", "PyTorch\nfp16"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("worst tensor", no_wrap=True)
        table.add_column("ok")
        for row in self.rows:
            case, own = row.case, "" if row.own_error is None else f"{row.own_error:.1e}"
            shape = (str(case.batch), str(case.sequence), str(case.past))
            numbers = (*shape, f"{row.error:.1e}", f"{row.tolerance:.1e}", own)
            table.add_row(case.name, *numbers, row.tensor, row.verdict)
        return table


def verify(
    checkpoint: Checkpoint,
    dtype: str = "fp16",
    cases: Sequence[Case] = CASES,
    onnx_path: str | Path | None = None,
    session: Session | None = None,
    progress: Callable[[str], None] = lambda phase: None,
) -> Verification:
    """Compare the exported graph with PyTorch at every case: logits and all presents.

    onnx_path: `model.DTYPE.onnx` of the checkpoint by default. session: what runs the graph, such as an engine that
    was built from it; ONNX Runtime by default.
    Raises WorkbookError where the graph is missing, older than the source, or another checkpoint's.
    """
    path, export = check_exported(checkpoint, dtype, onnx_path)
    result = Verification(path, dtype, export.origin is None, problems=problems(path, checkpoint))
    fitting = []
    for case in cases:
        fitted, why = fit(case, checkpoint.max_length)
        if fitted is None:
            result.skipped.append((case, why))
        else:
            fitting.append((fitted, why))
    ready = references(checkpoint, dtype, [case for case, _ in fitting], progress=progress)
    session = session or plain_session(checkpoint, path)
    for one, (_, why) in zip(ready, fitting, strict=True):
        progress(f"{path.name}: {one.case.name}")
        row = _compare(one, session, session.arithmetic or dtype)
        result.rows.append(replace(row, note="; ".join(filter(None, (row.note, why)))))
    return result


def check_exported(checkpoint: Checkpoint, dtype: str, onnx_path: str | Path | None) -> tuple[Path, Export]:
    """The graph and its path, after checking that it is this checkpoint's and was exported from its present source."""
    if dtype not in DTYPES:
        raise WorkbookError(f"{dtype!r} is not a precision of this workbook: choose one of {', '.join(DTYPES)}.")
    path = Path(onnx_path) if onnx_path else exporting.onnx_path(checkpoint, dtype)
    export = open_export(path, whole=True)
    model = export.model
    layers = sum(value.name.startswith("present.") for value in model.graph.output) // 2
    shapes = checkpoint.graph_shapes
    other = [t.name for t in model.graph.initializer if t.name in shapes and tuple(t.dims) != shapes[t.name]]
    if layers != checkpoint.num_layers or other:
        what = f"the shape of {other[0]} differs" if other else f"{layers} layers instead of {checkpoint.num_layers}"
        raise WorkbookError(
            f"{path} was exported from another checkpoint ({what}): export {checkpoint.directory} again."
        )
    return path, export


def _compare(one: Reference, session: Session, dtype: str) -> CaseResult:
    """Run one case and return the tensor that comes closest to its tolerance. A run that fails is a case that fails."""
    try:
        actual = run_tensors(session, one.flat)
    except Exception as failure:  # each backend raises its own kinds
        return CaseResult(one.case, "-", float("inf"), 0.0, None, False, str(failure).strip().splitlines()[0])
    rows = []
    for name, expected in one.expected.items():
        if name == "logits" and session.last_only:
            expected = expected[:, -1:]
        if name not in actual or actual[name].shape != expected.shape:
            shape = tuple(actual[name].shape) if name in actual else "missing"
            return CaseResult(
                one.case, name, float("inf"), 0.0, None, False, f"shape {shape} instead of {tuple(expected.shape)}"
            )
        error, scale = largest_error(name, one.flat, expected, actual[name])
        own_error = one.own_errors.get(name)
        allowed = tolerance(dtype, scale, own_error)
        note = "" if error == error else "not finite"
        undecided = own_error is not None and not math.isfinite(own_error)
        if undecided:
            note = "undecided: PyTorch's own fp16 is not finite here; compare the fp32 export (--dtype fp32)"
        ok = error <= allowed and not undecided
        rows.append(CaseResult(one.case, name, error, allowed, own_error, ok, note, undecided))
    return max(rows, key=_badness)


def _badness(row: CaseResult) -> tuple[bool, bool, float]:
    """Orders tensors: those that fail, then undecided ones, then by how close they come to their tolerance."""
    ratio = row.error / row.tolerance if row.error == row.error else float("inf")
    return not row.ok and not row.undecided, row.undecided, ratio
