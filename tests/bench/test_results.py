"""Saved runs: written, loaded, and refused where they are broken."""

import json
from pathlib import Path
from typing import Any

import pytest

from glmtrt_helpers.bench import results
from glmtrt_helpers.bench.results import Report, Row
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError

WHOLE: dict[str, Any] = {
    "gpu": None, "date": "2026-11-23", "versions": {"torch": "2.11.0", "onnx": "1.23.1"},
    "copy_bandwidth_gb_s": 10.0, "matrix_tflop_s": 1.0, "weights_bytes": 5, "memory": [], "build": [],
    "rows": [{"engine": "cuda", "phase": "decode", "batch": 1, "past": 8, "dtype": "fp16", "samples_ms": [1.0],
              "median_ms": 1.0, "tokens_per_s": 1000.0, "floor_fraction": 0.5}],
}  # fmt: skip


def test_a_saved_run_is_loaded(_random_master: Path, tmp_path: Path) -> None:
    row = Row("cuda", "decode", 1, 512, "fp16", [4.0], 4.0, 250.0, 0.5)
    report = Report(4000.0, 800.0, 5, [row])
    report.memory, report.build = [{"engine": "cuda", "bytes": 5}], [{"engine": "cuda", "load_seconds": 1.0}]
    report.missing = {"classical": "no GPU"}
    path = tmp_path / "run.json"
    results.save(path, open_checkpoint(_random_master), report, "glmtrt bench somewhere")
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"gpu": "a card"}))
    loaded, about = results.load(path)
    assert loaded == report and about.startswith(f"a card, {entry['date']}, torch ")


def test_a_run_without_a_gpu_and_with_nothing_missing(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(WHOLE))
    loaded, about = results.load(tmp_path / "run.json")
    assert about == "a CPU, 2026-11-23, torch 2.11.0" and loaded.missing == {}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (None, "is missing: measure it with `glmtrt bench DIR --output"),
        ('{"rows": [', "is not JSON"),
        ("[]", "is not a complete measurement"),
        (
            json.dumps({k: v for k, v in WHOLE.items() if k != "weights_bytes"}),
            "complete measurement .'weights_bytes'.",
        ),
        (json.dumps(WHOLE | {"rows": [{"engine": "cuda"}]}), "is not a complete measurement"),
        (json.dumps(WHOLE | {"copy_bandwidth_gb_s": 0}), "not above zero"),
        (json.dumps(WHOLE | {"rows": [WHOLE["rows"][0] | {"median_ms": 0.0}]}), "not above zero"),
    ],
)
def test_a_missing_or_broken_file_is_one_sentence(tmp_path: Path, text: str | None, says: str) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(WorkbookError, match=says):
        results.load(path)
