"""Verification passes a correct graph and fails a wrong one."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from support.checkpoints import FORWARD, replace_once
from support.command_line import InProcess
from support.exporting import (
    QKV,
    Changed,
    Damage,
    damaged,
    editing,
    nudge,
    replace_weight,
    set_scalar,
    set_tables,
    swap_past,
)

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import onnx_file
from glmtrt_helpers.core.display import print_rich
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.export import exporting
from glmtrt_helpers.graphs import reference, verification
from glmtrt_helpers.graphs.layer_errors import compare_layers
from glmtrt_helpers.graphs.reference import CASES, Case, Reference
from glmtrt_helpers.graphs.verification import Verification
from glmtrt_helpers.sessions.onnxruntime import OrtSession

# Enough to see each of the faults below, quicker than all of them.
SOME = tuple(case for case in CASES if case.name in ("chunk on a past", "left-padded prompts", "last positions"))
SHORT = (Case("chunk on a past", 1, 6, 4),)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_correct_graph_passes_every_case(checkpoint: Checkpoint, dtype: str) -> None:
    result = verification.verify(checkpoint, dtype)
    assert result.ok and [row.case for row in result.rows] == list(CASES)
    assert not result.skipped and not result.problems
    for row in result.rows:
        # In fp16 zero would mean that something was compared with itself; in fp32 both libraries may agree.
        assert row.error > 0 or dtype == "fp32"
        assert row.error <= row.tolerance and (row.own_error is None) == (dtype == "fp32")
        # Far enough within to be no matter of luck, tight enough to mean something (logits and caches reach 1 to 2).
        assert row.error < 0.7 * row.tolerance and row.tolerance < {"fp16": 6e-3, "fp32": 3e-4}[dtype]


def angles_in_fp32(table: np.ndarray) -> np.ndarray:
    inverse = (1 / 10000 ** (np.arange(0, 8, 2) / 8)).astype(np.float16).astype(np.float64)
    angles = np.concatenate([np.outer(np.arange(len(table)), inverse)] * 2, axis=-1).reshape(table.shape)
    return (np.cos(angles) if table.flat[0] == 1 else np.sin(angles)).astype(table.dtype)


FAULTS: dict[str, Damage] = {
    "mask of -1": set_scalar(-10000, -1),
    "alpha of 7": set_scalar(56**0.5, 7),
    "past key and value swapped": swap_past(1),
    "table one row off": set_tables(lambda table: np.roll(table, -1, axis=0)),
    "another weight": replace_weight(QKV),
}


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_graph_fails(checkpoint: Checkpoint, dtype: str, fault: str) -> None:
    path = damaged(checkpoint, dtype, FAULTS[fault])
    result = verification.verify(checkpoint, dtype, SOME, onnx_path=path)
    assert not result.ok and not all(row.ok for row in result.rows)


def test_fp16_angles_are_part_of_the_model(checkpoint: Checkpoint) -> None:
    """A table computed in fp32 and then rounded is more exact than the model, and wrong from position 512 on."""
    path = damaged(checkpoint, "fp16", set_tables(angles_in_fp32))
    result = verification.verify(checkpoint, "fp16", SOME, onnx_path=path)
    assert {row.case.name: row.ok for row in result.rows} == {
        "chunk on a past": True, "left-padded prompts": True, "last positions": False
    }  # fmt: skip


def test_a_table_of_the_examples_length_fails_where_it_ends(checkpoint: Checkpoint) -> None:
    path = damaged(checkpoint, "fp32", set_tables(lambda table: table[:64]))
    result = verification.verify(checkpoint, "fp32", (*SHORT, Case("decode", 1, 1, 65)), onnx_path=path)
    assert [row.ok for row in result.rows] == [True, False]
    assert "out of data bounds" in result.rows[1].note and not result.ok
    # The file still says that the tables have 1024 rows.
    assert ["contradict" in problem for problem in result.problems] == [True]


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_nan_never_passes(checkpoint: Checkpoint, dtype: str) -> None:
    """A mask of -inf is right for real tokens; a padded row that attends to nothing becomes NaN, and spreads."""
    path = damaged(checkpoint, dtype, set_scalar(-10000, float("-inf")))
    result = verification.verify(checkpoint, dtype, SOME, onnx_path=path)
    rows = {row.case.name: row for row in result.rows}
    assert rows["chunk on a past"].ok
    padded = rows["left-padded prompts"]
    assert not padded.ok and padded.error != padded.error and padded.note == "not finite" and not result.ok


@pytest.mark.parametrize("own", [float("nan"), float("inf")])
@pytest.mark.parametrize("wrong", [False, True])
def test_a_case_whose_own_fp16_is_not_finite_is_undecided(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, own: float, wrong: bool
) -> None:
    """Unless the graph is wrong where PyTorch's fp16 can tell."""

    def overflowing(*arguments: Any, **options: Any) -> list[Reference]:
        ready = reference.references(*arguments, **options)
        return [replace(one, own_errors=one.own_errors | {"present.0.key": own}) for one in ready]

    monkeypatch.setattr(verification, "references", overflowing)
    plain = OrtSession(checkpoint.directory / "model.fp16.onnx")
    change = nudge("logits", 100.0) if wrong else lambda outputs: None
    result = verification.verify(checkpoint, "fp16", SHORT, session=Changed(plain, change))
    row = result.rows[0]
    assert not result.ok and not row.ok
    assert (row.tensor, row.verdict) == (("logits", "NO") if wrong else ("present.0.key", "undecided"))
    assert wrong or "undecided: PyTorch's own fp16 is not finite" in row.note


@pytest.mark.parametrize("statement", ["raise KeyError('x')", "self.no_such"])
def test_an_original_source_whose_forward_fails_is_one_sentence(
    checkpoint: Checkpoint, glmtrt: InProcess, statement: str
) -> None:
    original = checkpoint.pristine_code
    replace_once(original, FORWARD, f"        {statement}\n{FORWARD}")
    line = original.read_text().splitlines().index(f"        {statement}") + 1
    status, lines = glmtrt("verify", checkpoint.directory, "--case", "prompt")
    assert status == 1 and f"{original}, line {line}: the remote code fails here" in lines[-1], lines
    assert not any("Traceback" in each for each in lines)


def test_a_problem_of_the_graph_is_not_ok(checkpoint: Checkpoint) -> None:
    with editing(checkpoint.directory / "model.fp32.onnx") as model:
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 6
    result = verification.verify(checkpoint, "fp32", SHORT)
    assert result.rows[0].ok and not result.ok and "is static (6)" in result.problems[0]
    assert not Verification(Path("model.fp32.onnx"), "fp32").ok


def test_another_session_takes_the_place_of_onnx_runtime(checkpoint: Checkpoint) -> None:
    """Every output is compared, to its last element; what a session omits or reshapes is named."""
    plain = OrtSession(checkpoint.directory / "model.fp32.onnx")

    def verify(change: Callable[[dict[str, torch.Tensor]], None]) -> verification.CaseResult:
        return verification.verify(checkpoint, "fp32", SHORT, session=Changed(plain, change)).rows[0]

    assert verify(lambda outputs: None).ok
    for name in ("logits", "present.0.key", "present.1.value"):
        row = verify(nudge(name, 1e-3))
        assert (row.ok, row.tensor) == (False, name) and row.error == pytest.approx(1e-3, rel=0.01)
        assert verify(nudge(name, 2e-5)).ok
    row = verify(lambda outputs: outputs.__delitem__("present.1.key"))
    assert not row.ok and row.tensor == "present.1.key" and "missing" in row.note
    row = verify(lambda outputs: outputs.update(logits=outputs["logits"][:, :1]))
    assert not row.ok and "shape (1, 1, 480) instead of (1, 6, 480)" in row.note


def test_a_model_that_is_too_short_says_so(checkpoint: Checkpoint) -> None:
    short = replace(checkpoint, config={**checkpoint.config, "max_sequence_length": 16})
    result = verification.verify(short, "fp32", [CASES[1], CASES[3]])
    assert [case.name for case, _ in result.skipped] == ["prompt"] and "16 positions" in result.skipped[0][1]
    (row,) = result.rows
    assert row.ok and row.case.past == 15 and "cut to 15" in row.note and result.ok
    assert not verification.verify(short, "fp32", [CASES[1]]).ok


def test_the_table_says_what_failed(
    checkpoint: Checkpoint, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = damaged(checkpoint, "fp32", FAULTS["mask of -1"])
    result = verification.verify(checkpoint, "fp32", SOME, onnx_path=path)
    result.skipped.append((CASES[3], "too long"))
    result.rows.append(replace(result.rows[0], note="it said [gMASK]"))
    monkeypatch.setenv("COLUMNS", "80")
    capsys.readouterr()
    print_rich(result)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.rstrip().endswith("NO")]) == sum(not row.ok for row in result.rows) > 0
    row = result.rows[0]
    line = next(line for line in lines if row.case.name in line)
    assert f"{row.error:.1e}" in line and f"{row.tolerance:.1e}" in line and row.tensor in line
    assert "skipped decode after 600: too long" in [line.strip() for line in lines]
    assert f"{row.case.name}: it said [gMASK]" in [line.strip() for line in lines]


@pytest.mark.parametrize("look", [verification.verify, compare_layers])
def test_what_cannot_be_compared_is_refused_by_name(checkpoint: Checkpoint, look: Callable[..., object]) -> None:
    path = checkpoint.directory / "model.fp16.onnx"
    with pytest.raises(WorkbookError, match="'bf16' is not a precision"):
        look(checkpoint, "bf16")
    fewer = replace(checkpoint, config={**checkpoint.config, "num_layers": 1})
    with pytest.raises(WorkbookError, match=r"from another checkpoint \(2 layers instead of 1\)"):
        look(fewer, "fp16")
    smaller = replace(checkpoint, config={**checkpoint.config, "vocab_size": 32})
    with pytest.raises(WorkbookError, match=r"from another checkpoint \(the shape of"):
        look(smaller, "fp16")
    checkpoint.code.write_text(checkpoint.code.read_text() + "\n")
    with pytest.raises(WorkbookError, match="patched or replaced since: run notebook 03_export_onnx"):
        look(checkpoint, "fp16")
    path.unlink()
    with pytest.raises(WorkbookError, match="run notebook 03_export_onnx or `glmtrt export"):
        look(checkpoint, "fp16")


def test_the_graph_is_not_changed_by_looking(checkpoint: Checkpoint) -> None:
    path = checkpoint.directory / "model.fp32.onnx"
    before = path.read_bytes()
    compare_layers(checkpoint, "fp32")
    assert path.read_bytes() == before and exporting.onnx_path(checkpoint, "fp32") == path
    assert re.search(rb"glmtrt\.shards", before) and onnx.load(str(path), load_external_data=False).metadata_props


def test_a_graph_of_another_exporter_is_compared_by_what_it_computes(checkpoint: Checkpoint) -> None:
    """It may fold weights, and says nothing of its origin, which the result says."""
    foreign = exporting.onnx_path(checkpoint, "fp16").with_name("foreign.onnx")
    model = onnx_file.load_graph(exporting.onnx_path(checkpoint, "fp16"))
    del model.metadata_props[:]
    model.producer_name = "pytorch"
    for tensor in model.graph.initializer:
        if tensor.name == "transformer.layers.0.mlp.dense_h_to_4h.weight":
            tensor.name = "folded"
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = {"transformer.layers.0.mlp.dense_h_to_4h.weight": "folded"}.get(name, name)
    foreign.write_bytes(model.SerializeToString())
    result = verification.verify(checkpoint, "fp16", CASES[1:2], foreign)
    assert result.ok and result.foreign and not verification.verify(checkpoint, "fp16", CASES[1:2]).foreign
