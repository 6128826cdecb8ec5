"""A file that is missing or no ONNX model is refused with what to do."""

from pathlib import Path

import pytest

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph


@pytest.mark.parametrize("place", ["/dev/zero", "."])
def test_what_is_there_and_no_file_is_not_called_missing(place: str, tmp_path: Path) -> None:
    with pytest.raises(WorkbookError, match="not a regular file"):
        load_graph(place)
    pointer = tmp_path / "model.fp16.onnx"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", encoding="utf-8")
    with pytest.raises(WorkbookError, match="run `git lfs pull`"):
        load_graph(pointer)


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.fp16.onnx"
    with pytest.raises(WorkbookError, match=r"missing: run notebook 03_export_onnx or `glmtrt export"):
        load_graph(path)
    for content in (b"", b"PK\x03\x04 not a graph", b"\x08"):
        path.write_bytes(content)
        with pytest.raises(WorkbookError, match="is not an ONNX model"):
            load_graph(path)
