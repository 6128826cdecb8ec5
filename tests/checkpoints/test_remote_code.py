"""Remote code: the forks that need a shim, and those that are refused."""

import platform
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import FORWARD, replace_once
from support.command_line import InProcess

from glmtrt_helpers.checkpoints import loading, remote_code
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.graphs import reference
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.inputs.names import forward_kwargs
from glmtrt_helpers.patches import patching
from glmtrt_helpers.sessions.pytorch import TorchSession


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


PLAIN = "from .configuration_chatglm import ChatGLMConfig"


@pytest.mark.parametrize(
    ("statement", "says", "advice"),
    [
        ("import no_such_module", "line 1: the import fails (ModuleNotFoundError: No", "`pip install no_such_module`"),
        ("from .helper import f", "named 'helper'", "helper.py, or the folder of that name, is part of the same"),
        ("from .parts.helper import f", "named 'parts'", "parts.py, or the folder of that name, is part of the same"),
        ("import quantization_chatglm", "quantization_chatglm'", "is part of the same remote code: copy it here"),
        ("from ..glm import f", "beyond top-level", "what it names is part of the same remote code"),
        (f"{PLAIN[:-13]}Other", "'Other' from 'configuration_chatglm'", "of one revision"),
        ("from transformers import NoSuchClass", "'NoSuchClass'", "another release of transformers than"),
        ("from transformers.no_such import f", "transformers.no_such'", "another release of transformers than"),
        ("import torch\ntorch.no_such", "line 2: the import fails (AttributeError", "another release of torch than"),
        ("from collections import Mapping", "'Mapping'", f"another release of Python than {platform.python_version()}"),
        ("raise ValueError", "the import fails (ValueError): take", ""),
        ("import sys\nsys.exit(3)", "line 2: the import fails (SystemExit: 3)", ""),
        ("open('/no/such')", "FileNotFoundError", "from one revision of the checkpoint"),
    ],
)
def test_an_import_that_fails_gets_the_advice_that_fits(
    tiny_random: Path, statement: str, says: str, advice: str
) -> None:
    checkpoint = open_checkpoint(tiny_random)
    checkpoint.code.write_text(f"{statement}\n{checkpoint.code.read_text()}")
    with pytest.raises(WorkbookError) as caught:
        loading.load_model(checkpoint)
    message = str(caught.value)
    assert message.startswith(str(checkpoint.code)) and "\n" not in message and "glmtrt_remote" not in message
    assert says in message and advice in message, message


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("x = 1\ny = (\n", "line 2: this is not Python source ('(' was never closed)"),
        ("x = 1\n\0\n", "line 2: this is not Python source (a null byte)"),
        (f"x = {'(' * 300}1{')' * 300}\n", "too many nested parentheses"),
        (f"x = 1\ny = {'not ' * 500}1\n", "line 2: this source is nested more than 100 levels deep"),
        (f"x = {'-' * 20000}1\n", "this source is nested more than 100 levels deep"),
        (f"x = a{'.b' * 20000}\n", "this source is nested more than 100 levels deep"),
    ],
)
def test_a_source_that_cannot_be_parsed_is_refused_not_a_crash(tiny_random: Path, code: str, says: str) -> None:
    checkpoint = open_checkpoint(tiny_random)
    checkpoint.code.write_text(code)
    for read in (loading.load_model, lambda opened: patching.check_checkpoint(opened.directory)):
        with pytest.raises(WorkbookError) as caught:
            read(checkpoint)
        assert str(caught.value).startswith(f"{checkpoint.code}: ") and says in str(caught.value)
    sibling = checkpoint.directory / "configuration_chatglm.py"
    replace_once(checkpoint.code, code, "from .configuration_chatglm import ChatGLMConfig\n")
    sibling.write_text(code)
    with pytest.raises(WorkbookError) as caught:
        loading.load_model(checkpoint)
    assert str(caught.value).startswith(f"{sibling}: ") and says in str(caught.value)
    checkpoint.code.write_bytes("# 你好\n".encode("gbk"))
    with pytest.raises(WorkbookError, match=r"modeling_chatglm.py is not UTF-8 text"):
        loading.load_model(checkpoint)


@pytest.mark.parametrize(
    "statement", ["raise KeyError('x')", "self.no_such", "inputs_embeds @ inputs_embeds", "exit(0)"]
)
def test_a_forward_that_fails_is_one_sentence(tiny_random: Path, glmtrt: InProcess, statement: str) -> None:
    patching.patch_checkpoint(tiny_random)
    (tiny_random / "modeling_chatglm.py.orig").unlink()  # or verify would run that
    code = tiny_random / "modeling_chatglm.py"
    replace_once(code, FORWARD, f"        {statement}\n{FORWARD}")
    line = code.read_text().splitlines().index(f"        {statement}") + 1
    for command in (
        ["inputs", tiny_random],
        ["chat", tiny_random, "--backend", "torch", "--prompt", "a"],
        ["export", tiny_random],
    ):
        status, lines = glmtrt(*command)
        assert status == 1 and len(lines) == 1 and f"{code}, line {line}: " in lines[0], lines
    with pytest.raises(WorkbookError, match=rf"modeling_chatglm.py, line {line}: the remote code fails here"):
        reference.references(open_checkpoint(tiny_random), "fp32", reference.CASES[:1])


def test_a_constructor_that_fails_is_one_sentence(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    config = checkpoint.directory / "configuration_chatglm.py"
    replace_once(config, "        self.num_layers = num_layers\n", "        self.num_layers = num_layers.value\n")
    with pytest.raises(
        WorkbookError, match=r"configuration_chatglm.py, line \d+: .*\(AttributeError: 'int' object has"
    ):
        loading.load_model(checkpoint)


@pytest.mark.parametrize("raised", ["MemoryError()", 'RuntimeError("DefaultCPUAllocator: can\'t allocate memory")'])
def test_want_of_memory_is_not_blamed_on_the_code(tiny_random: Path, raised: str) -> None:
    checkpoint = open_checkpoint(tiny_random)
    replace_once(checkpoint.code, FORWARD, f"        raise {raised}\n{FORWARD}")
    session = TorchSession(loading.load_model(checkpoint))
    with pytest.raises((MemoryError, RuntimeError)):
        session.run(example_inputs(checkpoint, 1, 3, 0))


@pytest.mark.slow
def test_a_cast_to_half_precision_is_said_before_the_export(tiny_random: Path, glmtrt: InProcess) -> None:
    checkpoint = open_checkpoint(tiny_random)
    softmax = "F.softmax(attention_scores, dim=-1)"
    replace_once(checkpoint.code, f"{softmax}.to(dtype)", f"{softmax}.to(dtype=torch.half)")
    patching.patch_checkpoint(tiny_random)
    status, (line,) = glmtrt("export", tiny_random)
    assert status == 0 and "casts to fp16 whatever the model's dtype" in line and "cannot be verified" in line
    status, (line,) = glmtrt("export", tiny_random, "--dtype", "fp32")
    assert status == 1 and f"{checkpoint.code}, line" in line and "runs in fp16 only" in line
    assert not (tiny_random / "model.fp32.onnx").exists()
