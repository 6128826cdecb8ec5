"""The model of a checkpoint: whole, on the meta device, or streamed with one part in memory at a time."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from support.checkpoints import to_bin

from glmtrt_helpers.checkpoints import checkpoint as checkpoint_module
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.code_hash import code_sha256
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.sessions.pytorch import TorchSession


def test_load_announces_the_code_and_its_hash(tiny_random: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(tiny_random)
    checkpoint.code.write_text(checkpoint.code.read_text() + "\n# another revision\n")
    loading.load_model(checkpoint, meta=True)
    sha256 = code_sha256(checkpoint.code)
    said = capsys.readouterr().err
    assert str(checkpoint.code) in said and sha256[:16] in said


def test_bin_and_symbolic_links_load_the_same_model(tiny_random: Path, tmp_path: Path) -> None:
    expected = loading.load_model(open_checkpoint(tiny_random)).state_dict()
    to_bin(tiny_random)
    cache = tmp_path / "hub"  # a hub cache stores blobs elsewhere and links to them
    cache.mkdir()
    for file in tiny_random.iterdir():
        (cache / file.name).symlink_to(file)
    checkpoint = open_checkpoint(cache)
    assert not checkpoint.is_safetensors
    loaded = loading.load_model(checkpoint).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_dtype_layers_and_meta(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    half = loading.load_model(checkpoint.first_layers(1), torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16} and len(half.transformer.layers) == 1
    assert not half.training
    meta = loading.load_model(checkpoint, meta=True)
    assert all(p.is_meta for p in meta.parameters())
    assert not any(b.is_meta for b in meta.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_streamed_equals_whole_and_holds_one_part(tiny_random: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(tiny_random)
    whole = TorchSession(loading.load_model(checkpoint, dtype))
    model = loading.load_streamed(checkpoint, dtype)
    held: list[list[str]] = []

    def look(*_: object) -> None:
        held.append([name for name, tensor in model.named_parameters() if tensor.device.type != "meta"])

    for name, module in model.named_modules():
        if name.endswith(("word_embeddings", "query_key_value", "final_layernorm", "lm_head")):
            module.register_forward_hook(look)
    streamed = TorchSession(model)
    for batch, sequence, past in ((1, 5, 0), (2, 1, 7)):
        flat = example_inputs(checkpoint, batch, sequence, past, dtype)
        expected, actual = whole.run(flat), streamed.run(flat)
        assert all(np.array_equal(expected[name], actual[name]) for name in expected)
    assert len(held) == 2 * (2 + checkpoint.num_layers + 1)
    inside = re.compile(r"(transformer\.layers\.\d+|.*)\..*")  # of a layer, or of a module outside the layers
    assert all(len({inside.fullmatch(name)[1] for name in names}) <= 1 for names in held)  # type: ignore[index]
    assert all(tensor.device.type == "meta" for tensor in model.parameters())


def test_an_error_midway_leaves_nothing_behind(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    model = loading.load_streamed(checkpoint, torch.float32)
    flat = example_inputs(checkpoint, 1, 4, 3)
    flat["past_key_values.1.key"] = flat["past_key_values.1.key"][:, :, :1]  # the last layer cannot join it
    with pytest.raises(WorkbookError, match=r"modeling_chatglm.py, line \d+: the remote code fails here"):
        TorchSession(model).run(flat)
    assert all(tensor.device.type == "meta" for tensor in model.parameters())


def test_only_a_large_fp32_model_is_streamed(tiny_random: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny_random)
    monkeypatch.setattr(checkpoint_module, "LARGE_BYTES", 1000)
    for dtype, device in ((torch.float32, "meta"), (torch.float16, "cpu")):
        assert next(loading.load_bounded(checkpoint, dtype).parameters()).device.type == device
