"""`glmtrt bench DIR`: a run on this machine, and the JSON that it writes."""

import json
from pathlib import Path

import pytest
from support.exporting import exported_copy

from glmtrt_helpers.bench import results, speed
from glmtrt_helpers.bench.roofline import floor_ms
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError


def test_sizes_stay_within_the_models_positions(_random_master: Path) -> None:
    checkpoint = open_checkpoint(_random_master)  # 1024 positions
    sizes = speed.default_sizes(checkpoint)
    assert ("decode", 1, 512) in sizes and ("decode", 64, 512) in sizes and ("prefill", 1, 512) in sizes
    assert max(past for _, _, past in sizes) == 512
    assert speed.default_sizes(checkpoint, [9], [], [2]) == [("decode", 1, 9), ("decode", 2, 512)]


def test_a_run_on_this_machine(tmp_path: Path) -> None:
    checkpoint = exported_copy(tmp_path)
    phases: list[str] = []
    sizes = [("decode", 1, 16), ("prefill", 2, 32)]
    report = speed.measure(checkpoint, "fp32", sizes, samples=4, progress=phases.append)
    assert [(row.engine, row.phase, row.batch, row.past) for row in report.rows] == [
        (engine, *size) for engine in ("torch-eager", "ort-cpu") for size in sizes
    ]
    for row in report.rows:
        assert len(row.samples_ms) == 4 and min(row.samples_ms) <= row.median_ms <= max(row.samples_ms)
        tokens = row.batch * (row.past if row.phase == "prefill" else 1)
        assert row.tokens_per_s == pytest.approx(1000 * tokens / row.median_ms)
        floor = floor_ms(checkpoint, report, row.phase, row.batch, row.past)
        assert row.floor_fraction == pytest.approx(floor / row.median_ms)
    assert set(report.missing) == {"torch-graph", "torch-compile", "classical", "cuda"}
    assert 0.1 < report.copy_bandwidth_gb_s < 10_000 and 0.001 < report.matrix_tflop_s < 10_000
    assert "ort-cpu: prefill, batch 2, 32 tokens" in phases
    results.save(tmp_path / "run.json", checkpoint, report, "glmtrt bench somewhere")
    saved = json.loads((tmp_path / "run.json").read_text())
    assert {"gpu", "driver", "versions", "commit", "command", "date", "copy_bandwidth_gb_s", "matrix_tflop_s",
            "weights_bytes", "rows", "memory", "build"} <= set(saved)  # fmt: skip
    assert set(saved["rows"][0]) == {"engine", "phase", "batch", "past", "dtype", "samples_ms", "median_ms",
                                    "tokens_per_s", "floor_fraction"}  # fmt: skip
    assert saved["build"][0]["engine"] == "torch-eager" and saved["command"] == "glmtrt bench somewhere"


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path) -> None:
    checkpoint, kept = exported_copy(tmp_path), []

    def keep(report: results.Report) -> None:
        kept.append(len(report.rows))
        if len(kept) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        speed.measure(
            checkpoint, "fp16", [("decode", 1, 8), ("decode", 1, 9), ("decode", 1, 10)],
            only=["ort-cpu"], samples=1, keep=keep,
        )  # fmt: skip
    assert kept == [1, 2]


def test_an_unknown_engine_is_refused(_random_master: Path) -> None:
    with pytest.raises(WorkbookError, match="there is no engine 'abacus' to measure here: choose torch-eager"):
        speed.measure(open_checkpoint(_random_master), only=["abacus"])
