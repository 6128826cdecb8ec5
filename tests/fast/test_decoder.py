"""The fast decoder: the same numbers as the checkpoint's own code, from the same weights, in another arrangement."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.checkpoints import TINY
from support.exporting import exported_copy

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.code_hash import CODE_NAME
from glmtrt_helpers.checkpoints.config import expected_shapes
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.checkpoints.working_copy import make_working_copy
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import plan_info
from glmtrt_helpers.engines.profiles import Profile, Range, chat_profiles
from glmtrt_helpers.fast import backends as fast_backends
from glmtrt_helpers.fast.decoder import GIVES, Last, build_fast, export_fast, rotary_tables
from glmtrt_helpers.fast.session import PARTS, FastOrtSession, part_path, weight_names
from glmtrt_helpers.graphs import verification
from glmtrt_helpers.graphs.checks import problems
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.decode_loop import greedy
from glmtrt_helpers.standin import conversations


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The trained checkpoint's working copy with the parts in both precisions."""
    checkpoint = open_checkpoint(make_working_copy(TINY, tmp_path_factory.mktemp("fast")))
    for dtype in loading.DTYPES:
        export_fast(checkpoint, dtype)
    return checkpoint


def load(checkpoint: Checkpoint, part: str) -> onnx.ModelProto:
    return onnx.load(part_path(checkpoint, "fp16", part))


def test_every_weight_is_the_input_of_one_part_and_one_layer(walked: Checkpoint) -> None:
    """Names and shapes are those of the state dict; two layers take none in common."""
    taken = []
    steps = [("first", 0), *(("middle", n) for n in range(1, walked.num_layers)), ("last", walked.num_layers)]
    steps += [("attention", n) for n in range(walked.num_layers)]
    for part, layer in steps:
        shapes = {
            v.name: tuple(d.dim_value for d in v.type.tensor_type.shape.dim) for v in load(walked, part).graph.input
        }
        for own, stored in weight_names(shapes, layer).items():
            assert shapes[own] == expected_shapes(walked.config)[stored]
            taken.append(stored)
    assert sorted(taken) == sorted(expected_shapes(walked.config))


def test_the_graphs_hold_no_weight_and_pin_nothing(walked: Checkpoint) -> None:
    hidden, size = walked.hidden_size, walked.head_size
    wide, last = ["batch", "sequence", hidden], ["batch", 1, hidden]
    wanted = {
        "first": {"input_ids": ["batch", "sequence"], "position_ids": ["batch", 2, "sequence"]},
        "middle": {"stream": wide, "seen": wide},
        "last": {"stream": last, "seen": last},
        "attention": {
            "mixed": [1, "sequence", 3 * hidden],
            "cos": [1, "sequence", size],
            "sin": [1, "sequence", size],
        },
    }
    for part in PARTS:
        model = load(walked, part)
        shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
        assert {name: shape for name, shape in shapes.items() if "." not in name} == wanted[part]
        assert tuple(value.name for value in model.graph.output) == GIVES[part]
        assert part_path(walked, "fp16", part).stat().st_size < 200_000
    # What is constant is the rotary tables and the guard's token, whatever the size of the model.
    held = {max(tensor.dims) for part in PARTS for tensor in load(walked, part).graph.initializer if tensor.dims}
    assert max(held) == max(walked.max_length, walked.vocab_size)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_case_within_the_tolerance_of_the_classical_graph(tmp_path: Path, dtype: str) -> None:
    """Logits and presents: no past, a long one, several tokens on a past, padding, the last positions."""
    checkpoint = exported_copy(tmp_path)
    export_fast(checkpoint, dtype)
    session = fast_backends.open_session(checkpoint, "ort", dtype)
    result = verification.verify(checkpoint, dtype, session=session)
    assert result.ok and not result.skipped, result.rows


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_answer_of_the_corpus_token_for_token(walked: Checkpoint, dtype: str) -> None:
    session = fast_backends.open_session(walked, "ort", dtype)
    tokenizer = load_tokenizer(walked)
    for example in conversations.load_corpus():
        prompt = chat_prompt(tokenizer, example.question, example.history)
        answer = greedy(session, walked, prompt, max_length=len(prompt) + len(example.answer) + 8)
        assert tokenizer.decode(answer) == example.answer


def test_inspect_finds_nothing_in_a_part_but_what_is_there(walked: Checkpoint, tmp_path: Path) -> None:
    for part in PARTS:
        assert not problems(part_path(walked, "fp16", part))
    model = load(walked, "middle")
    model.graph.input.append(onnx.helper.make_tensor_value_info("idle", onnx.TensorProto.FLOAT, [1]))
    path = shutil.copytree(walked.directory, tmp_path / "copy") / "model.fp16.fast.middle.onnx"
    onnx.save(model, path)
    assert problems(path) == ["input idle is declared, but its values reach no output."]
    (path.parent / CODE_NAME).unlink()
    with pytest.raises(WorkbookError, match=f"{CODE_NAME} is missing, and model.fp16.fast.middle.onnx was made from"):
        problems(path)


def test_choices_are_those_of_the_logits(walked: Checkpoint) -> None:
    session = FastOrtSession(walked, "fp32")
    call = {
        "input_ids": np.array([[5, 9, walked.config["gmask_token_id"], walked.config["bos_token_id"]]] * 2),
        "position_ids": np.array([[[0, 1, 2, 2], [0, 0, 0, 1]]] * 2),
        "attention_mask": np.array([[[[False] * 3 + [True]] * 3 + [[False] * 4]]] * 2),
    }
    session.step(call)
    out = session.outputs
    assert (out["next_token"] == out["logits"].argmax(axis=-1, keepdims=True)).all()


def test_a_score_that_is_no_number_gives_the_guards_token(walked: Checkpoint) -> None:
    """As upstream does in generation: one of any row, and all rows get the token that stands for nothing."""
    assert load_tokenizer(walked).blank_id == 5
    session = FastOrtSession(walked, "fp32")
    stream = {name: np.zeros((2, 1, walked.hidden_size), np.float32) for name in ("stream", "seen")}
    right = session._run("last", walked.num_layers, stream)
    assert right["logits"].max() < 1e3
    stream["seen"][1, -1, 0] = np.nan
    out = session._run("last", walked.num_layers, stream)
    assert out["next_token"].flatten().tolist() == [5, 5] and out["logits"].sum() == 1e5
    assert Last(walked.config, torch.float32, blank_id=7).guard.argmax() == 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rotary_tables_are_upstreams(walked: Checkpoint, dtype: torch.dtype) -> None:
    """Both, of the model as it runs in dtype: fp16 angles are part of what it learned."""
    cos, sin = rotary_tables(walked.max_length, walked.head_size, dtype)
    rotary = loading.load_model(walked, dtype).transformer.layers[0].attention.rotary_emb
    wanted = rotary(torch.zeros(1, dtype=dtype), seq_len=walked.max_length)
    half = walked.head_size // 4
    assert torch.equal(cos, wanted[0].squeeze(1).squeeze(-2))
    assert torch.equal(sin[:, half:], wanted[1].squeeze(1)[:, half:]) and torch.equal(sin[:, :half], -sin[:, half:])


def test_engines_of_a_layer_are_built_without_a_gpu(walked: Checkpoint) -> None:
    """Some megabytes each, whatever the weights weigh; a graph that was changed since makes its engine stale."""
    boxes = chat_profiles(walked, Range(1, 2, 8), past=Range(1, 300, 600))
    reports = dict(zip(PARTS, build_fast(walked, "fp16", boxes), strict=True))
    for part, report in reports.items():
        assert report.plan == part_path(walked, "fp16", part, "plan")
        assert plan_info.open_plan(walked, report.plan) == report.info and report.info.plan_bytes < 6e6
    tensors = {tensor.name: tensor for tensor in reports["middle"].info.tensors}
    last, hidden = walked.max_length - 1, walked.hidden_size
    assert tensors["stream"].profiles == [
        [[1, 1, hidden], [2, 128, hidden], [8, last, hidden]], [[1, 1, hidden], [2, 1, hidden], [8, 1, hidden]]
    ]  # fmt: skip
    prompt, one = reports["attention"].info.profiles, reports["last"].info.profiles
    assert prompt == [replace(boxes[0], batch=Range(1, 1, 1))]
    assert one == [Profile("last token", Range(1, 2, 8), Range(1, 1, 1), Range(0, 300, 600))]
    path = part_path(walked, "fp16", "middle")
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(WorkbookError, match=r"another model.fp16.fast.middle.onnx .* --dtype fp16 --fast`"):
        plan_info.open_plan(walked, reports["middle"].plan)


def test_a_missing_graph_and_a_dtype_that_is_none(_random_master: Path) -> None:
    checkpoint = open_checkpoint(_random_master)
    with pytest.raises(WorkbookError, match=r"model.fp16.fast.first.onnx is missing: run .*`glmtrt export .* --fast`"):
        build_fast(checkpoint, "fp16")
    with pytest.raises(WorkbookError, match="dtype 'int4' is not exported"):
        export_fast(checkpoint, "int4")
