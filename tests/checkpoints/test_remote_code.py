"""Remote code: the forks that need a shim, and those that are refused."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import replace_once

from glmtrt_helpers.checkpoints import loading, remote_code
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.inputs.names import forward_kwargs


def test_inv_freq_is_computed_not_read(tiny_random: Path) -> None:
    name = "transformer.layers.0.attention.rotary_emb.inv_freq"
    shard = open_checkpoint(tiny_random).tensors[name].file
    state = load_file(shard)
    state[name] = torch.full_like(state[name], 7.0)
    save_file(state, shard)
    model = loading.load_model(open_checkpoint(tiny_random))
    expected = torch.tensor([10000 ** (-2 * j / 8) for j in range(4)]).half().float()
    assert torch.equal(model.get_buffer(name), expected)


def test_code_that_does_not_fit_is_refused(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    checkpoint.code.write_text("import no_such_module_of_2023\n")
    with pytest.raises(WorkbookError, match="no_such_module_of_2023"):
        loading.load_model(checkpoint)
    checkpoint.code.write_text("class ChatGLMConfig: pass\n")
    with pytest.raises(WorkbookError, match="ChatGLMForConditionalGeneration"):
        loading.load_model(checkpoint)


def test_a_fork_with_an_inverted_mask_is_refused_by_name(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    signature = "attention_mask=None, past_key_values=None"
    source = checkpoint.code.read_text()
    assert signature in source
    checkpoint.code.write_text(source.replace(signature, f"full_attention_mask=None, {signature}", 1))
    with pytest.raises(WorkbookError, match="full_attention_mask"):
        loading.load_model(checkpoint)


def test_the_first_upload_runs_in_fp16_only_and_says_so(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    softmax = "F.softmax(attention_scores, dim=-1)"
    replace_once(checkpoint.code, f"{softmax}.to(dtype)", f"{softmax}.half()")
    loading.load_model(checkpoint, torch.float16)
    with pytest.raises(WorkbookError, match=r"\.half\(\)"):
        loading.load_model(checkpoint, torch.float32)


def test_a_fork_may_import_its_siblings_without_a_dot(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    replace_once(checkpoint.code, "from .configuration_chatglm import", "from configuration_chatglm import")
    before = set(sys.path), set(sys.modules)
    _, applied = remote_code.build_model(checkpoint.directory, checkpoint.code, checkpoint.config, torch.float32)
    assert "absolute imports" in [shim.name for shim in applied]
    assert set(sys.path) == before[0] and "configuration_chatglm" not in sys.modules


def test_a_fork_that_synchronizes_runs_without_a_gpu(tiny_random: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint = open_checkpoint(tiny_random)
    statement = "        hidden_states = inputs_embeds.transpose(0, 1)"
    replace_once(checkpoint.code, statement, "        torch.cuda.synchronize()\n" + statement)
    _, applied = remote_code.build_model(checkpoint.directory, checkpoint.code, checkpoint.config, torch.float32)
    assert "cuda.synchronize" in [shim.name for shim in applied]
    model = loading.load_model(checkpoint)
    flat = example_inputs(checkpoint, 1, 3, 0)
    with torch.no_grad():
        assert model(**forward_kwargs(flat))[0].shape == (1, 3, checkpoint.vocab_size)


def test_loading_leaves_no_bytecode(tiny_random: Path) -> None:
    before = sorted(path.name for path in tiny_random.iterdir())
    loading.load_model(open_checkpoint(tiny_random))
    assert sorted(path.name for path in tiny_random.iterdir()) == before
