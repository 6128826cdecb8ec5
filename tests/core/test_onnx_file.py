"""A file that is missing or no ONNX model is refused with what to do."""

import os
from pathlib import Path

import pytest

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.fp16.onnx"
    with pytest.raises(WorkbookError, match=r"missing: run notebook 03_export_onnx or `glmtrt export"):
        load_graph(path)
    for content in (b"", b"PK\x03\x04 not a graph", b"\x08"):
        path.write_bytes(content)
        with pytest.raises(WorkbookError, match="is not an ONNX model"):
            load_graph(path)


def test_what_is_no_regular_file_is_not_called_missing(tmp_path: Path) -> None:
    """A pipe would wait for a writer, and /dev/zero never ends."""
    pipe, pointer = tmp_path / "pipe.onnx", tmp_path / "pointer.onnx"
    os.mkfifo(pipe)
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    for path, says in (
        (tmp_path, "is a folder"),
        (pipe, "is a pipe, a socket or a device"),
        (Path("/dev/zero"), "is a pipe, a socket or a device"),
        (pointer, "is a pointer of Git LFS"),
    ):
        with pytest.raises(WorkbookError, match=f"{path} {says}"):
            load_graph(path)
