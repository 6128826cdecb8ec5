"""The table of notebook 06 that tells what passed on a GPU."""

from pathlib import Path

import pytest
from support.checkpoints import ROOT

from glmtrt_helpers.bench.gpu_tests import CHECKS, load_gpu_tests
from glmtrt_helpers.core.errors import WorkbookError


def test_each_check_passed_in_the_committed_run() -> None:
    about, rows = load_gpu_tests(ROOT / "benchmarks" / "gpu_tests.txt")
    assert "NVIDIA" in about and "tensorrt" in about
    assert [sentence for sentence, *_ in rows] == list(CHECKS.values())
    assert all(runs == 4 and verdict == "passed" for _, runs, verdict in rows)


def test_each_check_is_a_test_of_the_session() -> None:
    source = (ROOT / "tests" / "engines" / "test_session_on_gpu.py").read_text(encoding="utf-8")
    for part in CHECKS:
        assert sum(part in line for line in source.splitlines() if line.startswith("def test_")) == 1, part


def test_one_failure_among_the_runs_of_a_test_shows(tmp_path: Path) -> None:
    saved = tmp_path / "saved.txt"
    saved.write_text(
        "2026-11-26, a card\n\nPASSED tests/a.py::test_the_longest_past[fp16]\n"
        "FAILED tests/a.py::test_the_longest_past[fp16 fast] - assert False\n"
        "ERROR tests/a.py::test_zero_past_is_a_prefill[fp16]\n"
    )
    about, rows = load_gpu_tests(saved)
    verdicts = {sentence: (runs, verdict) for sentence, runs, verdict in rows}
    assert about == "2026-11-26, a card"
    assert verdicts[CHECKS["longest_past"]] == (2, "1 FAILED")
    assert verdicts[CHECKS["zero_past"]] == (1, "1 FAILED")
    assert verdicts[CHECKS["fifty_rounds"]] == (0, "was not run")


def test_a_file_without_a_summary(tmp_path: Path) -> None:
    with pytest.raises(WorkbookError, match="is missing: run"):
        load_gpu_tests(tmp_path / "saved.txt")
    (tmp_path / "saved.txt").write_text("57 passed\n")
    with pytest.raises(WorkbookError, match="lists no test"):
        load_gpu_tests(tmp_path / "saved.txt")
