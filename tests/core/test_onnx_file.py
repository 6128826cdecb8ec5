"""A file that is missing or no ONNX model is refused with what to do."""

from pathlib import Path

import onnx
import pytest
from onnx import helper

from glmtrt_helpers.core.artifacts import MARKER
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


@pytest.mark.parametrize("text", [b"node_one", b"Identity", b"hidden", b"glmtrt.key", b"glmtrt value", b"elsewhere"])
def test_text_that_is_not_utf8_is_named(text: bytes, tmp_path: Path) -> None:
    """Wherever it stands: the name, the kind or an input of a node, metadata, where a weight is."""
    node = helper.make_node("Identity", ["hidden"], ["out"], "node_one")
    values = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("hidden", "out")]
    weight = onnx.TensorProto(name="w", data_type=1, data_location=onnx.TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="elsewhere")
    model = helper.make_model(helper.make_graph([node], "g", values[:1], values[1:], [weight]))
    model.metadata_props.add(key="glmtrt.key", value="glmtrt value")
    whole = model.SerializeToString()
    path = tmp_path / "model.fp16.onnx"
    path.write_bytes(whole)
    assert load_graph(path).graph.node[0].name == "node_one"
    path.write_bytes(whole.replace(text, text[:-1] + b"\xff"))
    with pytest.raises(WorkbookError, match=r"is damaged, b'.*' in it is not UTF-8: export it again"):
        load_graph(path)


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.fp16.onnx"
    (tmp_path / "config.json").touch()
    with pytest.raises(
        WorkbookError, match=r"missing: make a working copy with `glmtrt copy [^ ]+`, and export that\."
    ):
        load_graph(path)
    (tmp_path / MARKER).touch()
    with pytest.raises(WorkbookError, match=r"missing: run notebook 03_export_onnx or `glmtrt export"):
        load_graph(path)
    for content in (b"", b"PK\x03\x04 not a graph", b"\x08"):
        path.write_bytes(content)
        with pytest.raises(WorkbookError, match="is not an ONNX model"):
            load_graph(path)
