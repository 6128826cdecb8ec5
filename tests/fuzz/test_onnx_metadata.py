"""Whatever an ONNX file says of its origin and of tensors outside of it ends in a refusal or in the right graph."""

import json
from pathlib import Path

import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import SHARD
from support.exporting import exported_copy, path_of

from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.identity import SHARDS_KEY, open_export
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph

WEIGHT = "transformer.layers.0.mlp.dense_h_to_4h.weight"
TEXTS = st.text(max_size=40) | st.sampled_from(["", "0", "-1", "/etc/passwd", "..", ".", SHARD, "1e3", "0x10", "\0"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    path = path_of(exported_copy(tmp_path_factory.mktemp("fuzzed")))
    return path, path.read_bytes()


@given(
    record=JSON.map(json.dumps) | TEXTS | st.none(),
    pairs=st.none() | st.lists(st.tuples(st.sampled_from(["location", "offset", "length", "checksum", "x"]), TEXTS)),
    dims=st.none() | st.lists(st.integers(-(2**63), 2**63 - 1), max_size=3),
    data_type=st.none() | st.integers(-1, 40),
)
def test_any_metadata_ends_in_a_refusal_or_in_the_right_graph(
    fuzzed: tuple[Path, bytes], record: str | None, pairs: list | None, dims: list | None, data_type: int | None
) -> None:
    path, original = fuzzed
    path.write_bytes(original)
    model = load_graph(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == WEIGHT)
    if record is not None:
        next(entry for entry in model.metadata_props if entry.key == SHARDS_KEY).value = record
    if pairs is not None:
        del tensor.external_data[:]
        for key, value in pairs:
            tensor.external_data.add(key=key, value=value)
    if dims is not None:
        tensor.dims[:] = dims
    if data_type is not None:
        tensor.data_type = data_type
    path.write_bytes(model.SerializeToString())
    try:
        export = open_export(path)
    except WorkbookError as error:
        assert "export" in str(error)
    else:
        before = onnx.load_model_from_string(original).graph.initializer
        assert [e.proto for e in export.external] == [t for t in before if t.external_data]


@given(at=st.floats(0, 1, exclude_max=True), new=st.binary(min_size=1, max_size=6))
def test_any_bytes_end_in_a_refusal_or_in_a_graph_of_the_same_weights(
    fuzzed: tuple[Path, bytes], at: float, new: bytes
) -> None:
    path, original = fuzzed
    start = int(at * len(original))
    path.write_bytes(original[:start] + new + original[start + len(new) :])
    try:
        export = open_export(path)
    except WorkbookError:
        return
    checkpoint = open_checkpoint(path.parent)
    for tensor in export.external:
        assert any((tensor.file, tensor.offset) == (t.file, t.offset) for t in checkpoint.tensors.values())
