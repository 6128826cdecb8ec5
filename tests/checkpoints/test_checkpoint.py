"""A checkpoint is described by its configuration and shard headers; what is missing is named."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.checkpoints import SHARD, refusal

from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint


def test_open_reads_sizes_and_offsets(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    assert (checkpoint.num_layers, checkpoint.hidden_size, checkpoint.num_heads, checkpoint.head_size) == (2, 64, 4, 16)
    stored = checkpoint.tensors["transformer.layers.1.mlp.dense_4h_to_h.bias"]
    with stored.file.open("rb") as stream:
        stream.seek(stored.offset or 0)
        raw = torch.frombuffer(bytearray(stream.read(stored.nbytes)), dtype=torch.float16)
    loaded = load_file(stored.file)["transformer.layers.1.mlp.dense_4h_to_h.bias"]
    assert torch.equal(raw, loaded)


@pytest.mark.parametrize("name", ["config.json", "modeling_chatglm.py", SHARD])
def test_names_the_missing_file(tiny_random: Path, name: str) -> None:
    (tiny_random / name).unlink()
    assert str(tiny_random / name) in refusal(tiny_random)


def test_refuses_what_is_no_directory(tmp_path: Path) -> None:
    assert "not a directory" in refusal(tmp_path / "absent")
