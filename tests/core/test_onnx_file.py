"""A file that is missing or no ONNX model is refused with what to do."""

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
