"""A streamed model computes what the whole one does and holds one part at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch

from glmtrt_helpers.checkpoints import checkpoint as checkpoint_module
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.sessions.pytorch import TorchSession


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
        wanted, got = whole.run(flat), streamed.run(flat)
        assert all(np.array_equal(wanted[name], got[name]) for name in wanted)
    assert len(held) == 2 * (2 + checkpoint.num_layers + 1)
    parts = [{name.rpartition(".")[0].split(".attention")[0].split(".mlp")[0] for name in names} for names in held]
    assert all(len({part.removesuffix(".input_layernorm").removesuffix(".post_attention_layernorm")
                    for part in names}) <= 1 for names in parts)  # fmt: skip
    assert all(tensor.device.type == "meta" for tensor in model.parameters())


def test_an_error_midway_leaves_nothing_behind(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    model = loading.load_streamed(checkpoint, torch.float32)
    flat = example_inputs(checkpoint, 1, 4, 3)
    flat["past_key_values.1.key"] = flat["past_key_values.1.key"][:, :, :1]  # the last layer cannot join it
    with pytest.raises(RuntimeError):
        TorchSession(model).run(flat)
    assert all(tensor.device.type == "meta" for tensor in model.parameters())


def test_only_a_large_fp32_model_is_streamed(tiny_random: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny_random)
    monkeypatch.setattr(checkpoint_module, "LARGE_BYTES", 1000)
    kinds = {dtype: next(loading.load_bounded(checkpoint, dtype).parameters()).device.type
             for dtype in (torch.float32, torch.float16)}  # fmt: skip
    assert kinds == {torch.float32: "meta", torch.float16: "cpu"}
