"""A file is replaced whole or not at all, and temporary files do not pile up."""

import subprocess
from pathlib import Path

import pytest

from glmtrt_helpers.core.files import replacing


def test_a_block_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:
        temporary.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_only_the_temporary_files_of_ended_processes_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    other = subprocess.Popen(["sleep", "30"])
    try:
        (tmp_path / f".model.onnx.{other.pid}.tmp").write_text("theirs")
        with replacing(path) as temporary:
            temporary.write_text("ours")
        assert (tmp_path / f".model.onnx.{other.pid}.tmp").read_text() == "theirs" and path.read_text() == "ours"
    finally:
        other.kill()
        other.wait()
    with replacing(path) as temporary:
        temporary.write_text("again")
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
