"""Every weight is an address in a shard, or an input; none is copied into the graph."""

import onnx
import pytest

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.export.exporting import onnx_path


@pytest.mark.parametrize("dtype", loading.DTYPES)
def test_every_weight_is_an_address_in_a_shard_and_nothing_is_copied(exported: Checkpoint, dtype: str) -> None:
    path = onnx_path(exported, dtype)
    model = load_graph(path)
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = {name: stored for name, stored in exported.tensors.items() if "inv_freq" not in name}
    for name, stored in weights.items():
        address = {entry.key: entry.value for entry in initializers[name].external_data}
        assert address["location"] == stored.file.name and tuple(initializers[name].dims) == stored.shape
        assert (int(address["offset"]), int(address["length"])) == (stored.offset, stored.nbytes)
        assert initializers[name].data_type == onnx.TensorProto.FLOAT16
    # In fp32 every weight is read by its Cast alone.
    readers = {name: [node.op_type for node in model.graph.node if name in node.input] for name in weights}
    assert all(("Cast" in kinds) == (dtype == "fp32") for kinds in readers.values())
    assert dtype == "fp16" or all(kinds == ["Cast"] for kinds in readers.values())
    inside = sum(len(tensor.raw_data) for tensor in initializers.values() if not tensor.external_data)
    itemsize = 2 if dtype == "fp16" else 4
    assert inside < 2 * exported.max_length * exported.head_size // 2 * itemsize + 2_000  # two tables and scalars
    assert path.stat().st_size < 300_000
