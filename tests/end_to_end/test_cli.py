"""The command line from outside: exit codes, one line on bad input, and all steps on the shipped checkpoint."""

import shutil
from pathlib import Path

import onnx
import pytest
from support.checkpoints import TINY
from support.command_line import InProcess, run_glmtrt

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.checkpoints.working_copy import make_working_copy
from glmtrt_helpers.engines import plan_info
from glmtrt_helpers.inputs import recording
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.decode_loop import greedy
from glmtrt_helpers.sessions.onnxruntime import OrtSession
from glmtrt_helpers.sessions.pytorch import TorchSession
from glmtrt_helpers.standin import conversations


@pytest.fixture(scope="session")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """copy, patch and export of the shipped checkpoint, both precisions, through the command line."""
    source = Path(shutil.copytree(TINY, tmp_path_factory.mktemp("walk") / "chatglm_tiny"))
    for arguments in (
        ("copy", source),
        ("patch", source.parent / "run" / "chatglm_tiny"),
        ("export", source.parent / "run" / "chatglm_tiny"),
        ("export", source.parent / "run" / "chatglm_tiny", "--dtype", "fp32"),
    ):
        done = run_glmtrt(*arguments)
        assert done.returncode == 0, done.stderr
    return source.parent / "run" / "chatglm_tiny"


@pytest.mark.slow
def test_the_copy_is_patched_and_the_source_is_not(walked: Path) -> None:
    assert (walked / "modeling_chatglm.py").read_bytes() != (TINY / "modeling_chatglm.py").read_bytes()
    original = walked.parent.parent / "chatglm_tiny"
    assert (original / "modeling_chatglm.py").read_bytes() == (TINY / "modeling_chatglm.py").read_bytes()
    assert sorted(p.name for p in original.iterdir()) == sorted(p.name for p in TINY.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_verify_passes(walked: Path, dtype: str) -> None:
    done = run_glmtrt("verify", walked, "--dtype", dtype)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "600" in done.stdout and "padded" in done.stdout


@pytest.mark.slow
def test_the_graph_is_small_and_passes_inspect(walked: Path) -> None:
    assert (walked / "model.fp16.onnx").stat().st_size < 2_000_000
    done = run_glmtrt("inspect", walked / "model.fp16.onnx")
    assert done.returncode == 0 and "past_key_values.0.key" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_onnx_runtime_and_pytorch_give_the_same_tokens_on_the_whole_corpus(walked: Path, dtype: str) -> None:
    checkpoint = open_checkpoint(walked)
    tokenizer = load_tokenizer(checkpoint)
    model = loading.load_model(checkpoint, loading.DTYPES[dtype], code=checkpoint.pristine_code)
    sessions = OrtSession(walked / f"model.{dtype}.onnx"), TorchSession(model)
    for example in conversations.load_corpus():
        prompt = chat_prompt(tokenizer, example.question, example.history)
        limit = len(prompt) + len(tokenizer.encode_text(example.answer)) + 1
        ort, torch_ = (greedy(session, checkpoint, prompt, max_length=limit) for session in sessions)
        assert ort == torch_
        assert tokenizer.decode(ort) == example.answer


@pytest.mark.slow
def test_build_writes_a_plan_and_its_json_and_chat_answers(walked: Path) -> None:
    done = run_glmtrt("build", walked, "--past", "1,64,255", "--prompt", "1,16,128", "--batch", "1,1,2")
    assert done.returncode == 0, done.stdout + done.stderr
    info = plan_info.read_info(plan_info.plan_path(open_checkpoint(walked), "fp16"))
    assert [(profile.name, profile.past.max, profile.batch.max) for profile in info.profiles] == [
        ("prefill", 0, 2),
        ("decode", 255, 2),
    ]
    assert "255x2x4x32" in done.stdout
    done = run_glmtrt("chat", walked, "--backend", "ort", "--prompt", "你好", "--greedy")
    assert done.returncode == 0 and done.stdout.startswith("你好！"), done.stderr


def test_patch_check_and_restore(glmtrt: InProcess, tiny_random: Path) -> None:
    original = (tiny_random / "modeling_chatglm.py").read_bytes()
    assert glmtrt("patch", tiny_random, "--check") == (1, [])
    assert (tiny_random / "modeling_chatglm.py").read_bytes() == original
    told = f"{tiny_random} is not a working copy: its own source is patched now; --restore brings the original back."
    assert glmtrt("patch", tiny_random) == (0, [told])
    assert glmtrt("patch", tiny_random) == (0, []), "patching a patched file is fine"
    assert glmtrt("patch", tiny_random, "--check") == (0, [])
    assert glmtrt("patch", tiny_random, "--restore") == (0, [])
    assert (tiny_random / "modeling_chatglm.py").read_bytes() == original


@pytest.mark.slow
def test_check_and_restore_together_are_refused_and_an_edit_is_told(tiny_random: Path) -> None:
    code = tiny_random / "modeling_chatglm.py"
    assert run_glmtrt("patch", tiny_random).returncode == 0
    code.write_bytes(code.read_bytes() + b"# by hand\n")
    edited = code.read_bytes()
    done = run_glmtrt("patch", tiny_random, "--check", "--restore")
    assert done.returncode == 2 and "choose one of them" in done.stderr and code.read_bytes() == edited
    done = run_glmtrt("patch", tiny_random, "--check")
    assert done.returncode == 1 and ".orig is not the original" in done.stderr and code.read_bytes() == edited
    done = run_glmtrt("patch", tiny_random, "--restore")
    assert done.returncode == 0 and f"kept as {code}.edited" in done.stderr
    assert Path(f"{code}.edited").read_bytes() == edited


@pytest.mark.slow
def test_verify_beyond_tolerance_fails(walked: Path, tmp_path: Path) -> None:
    """A graph whose mask constant is -1 instead of -10000."""
    private = Path(shutil.copytree(walked, tmp_path / "wrong"))
    model = onnx.load(private / "model.fp16.onnx", load_external_data=False)
    changed = 0
    for tensor in model.graph.initializer:
        if tensor.external_data or len(tensor.raw_data) != 2:
            continue
        value = onnx.numpy_helper.to_array(tensor)
        if float(value.reshape(())) == -10000.0:
            tensor.CopyFrom(onnx.numpy_helper.from_array(value * 0 - 1, name=tensor.name))
            changed += 1
    assert changed
    onnx.save(model, private / "model.fp16.onnx")
    done = run_glmtrt("verify", private)
    assert done.returncode == 1 and "no" in done.stdout


def test_inputs_records_a_chat(glmtrt: InProcess, tmp_path: Path) -> None:
    private = Path(shutil.copytree(TINY, tmp_path / "chatglm_tiny"))
    code, lines = glmtrt("inputs", private, "--prompt", "你好")
    assert code == 0 and lines[0].startswith("你好！我是这套教程的小模型")
    calls = recording.load_record(open_checkpoint(private))
    assert calls[0].kind == "prefill" and calls[1].past == calls[0].sequence


def test_inputs_of_a_few_layers_say_so(glmtrt: InProcess, tmp_path: Path) -> None:
    directory = make_working_copy(TINY, tmp_path)
    code, lines = glmtrt("inputs", directory, "--layers", "2", "--max-new", "3")
    assert code == 0 and "the first 2 of 4 layers" in lines[-1]
    calls = recording.load_record(open_checkpoint(directory))
    assert [(call.sequence, call.past) for call in calls] == [(3, 0), (1, 3), (1, 4)]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("patch", "no/such/folder"), "no/such/folder"),
        (("export", "no/such/folder"), "not a directory"),
        (("verify", TINY), "and export that"),
        (("inspect", "no.onnx"), "no.onnx"),
        (("inspect", TINY / "config.json"), "config.json"),
        (("export", TINY), "make a working copy with `glmtrt copy "),
        (("patch", TINY, "--restore"), "nothing to restore"),
    ],
)
def test_bad_input_gets_one_line(glmtrt: InProcess, arguments: tuple[object, ...], says: str) -> None:
    code, lines = glmtrt(*arguments)
    assert code == 1 and len(lines) == 1
    assert lines[0].startswith("glmtrt: ") and says in lines[0]


def test_in_a_process_of_its_own_bad_input_gets_no_traceback() -> None:
    done = run_glmtrt("inspect", "no.onnx")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("glmtrt: no.onnx ") and len(done.stderr.splitlines()) == 1
