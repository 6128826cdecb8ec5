"""The fast decoder: the same numbers as the checkpoint's own code, from the same weights, in another arrangement."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import TINY
from exporting import exported_copy

from glmtrt_helpers import checkpoints, configs, engines, export, fast, feeds, plans, profiles, runtime, verification
from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.fast_session import FastOrtSession
from glmtrt_helpers.profiles import Range
from glmtrt_helpers.standin import train


@pytest.fixture(scope="module")
def walked(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The trained checkpoint's working copy with both fast graphs."""
    checkpoint = checkpoints.open_checkpoint(checkpoints.working_copy(TINY, tmp_path_factory.mktemp("fast")))
    for dtype in export.DTYPES:
        fast.export_fast(checkpoint, dtype)
    return checkpoint


def open_plain(checkpoint: Checkpoint, dtype: str) -> FastOrtSession:
    path = export.onnx_path(checkpoint, dtype, fast=True)
    return FastOrtSession(checkpoint, runtime.OrtSession(path, optimize=False))


def test_parameters_are_the_state_dict(walked: Checkpoint) -> None:
    with torch.device("meta"):
        model = fast.FastDecoder(walked.config, torch.float16, blank_id=5)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == configs.expected_shapes(walked.config)


def test_the_graph_reads_every_weight_in_place_and_pins_nothing(walked: Checkpoint) -> None:
    path = export.onnx_path(walked, "fp16", fast=True)
    model = onnx.load(path, load_external_data=False)
    outside = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    assert outside == set(configs.expected_shapes(walked.config))
    assert path.stat().st_size < 300_000, "no weight was copied into the graph"
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    heads, size = walked.num_heads, walked.head_size
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "position_ids": ["batch", 2, "sequence"],
        "attention_mask": ["batch", 1, "sequence", "sequence"],
        "visible": ["batch", 2],
        **{name: ["chunks", "batch", heads, 128, size] for name in fast.cache_names(walked.num_layers)},
    }
    assert [value.name for value in model.graph.output] == [*fast.CHOICES, *fast.new_names(walked.num_layers)]


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_case_within_the_tolerance_of_the_classical_graph(tmp_path: Path, dtype: str) -> None:
    """Logits and presents: no past, one over several chunks, several tokens on a past, padding, the last positions."""
    checkpoint = exported_copy(tmp_path)
    fast.export_fast(checkpoint, dtype)
    result = verification.verify(checkpoint, dtype, session=open_plain(checkpoint, dtype))
    assert result.ok and not result.skipped, result.rows
    assert max(row.case.past for row in result.rows) > 4 * profiles.CHUNK


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_every_answer_of_the_corpus_token_for_token(walked: Checkpoint, dtype: str) -> None:
    session = runtime.open_session(walked, "ort", dtype, fast=True)
    tokenizer = checkpoints.load_tokenizer(walked)
    for example in train.load_corpus():
        prompt = feeds.chat_prompt(tokenizer, example.question, example.history)
        answer = runtime.greedy(session, walked, prompt, max_length=len(prompt) + len(example.answer) + 8)
        assert tokenizer.decode(answer) == example.answer


def test_choices_are_those_of_the_logits(walked: Checkpoint) -> None:
    session = open_plain(walked, "fp32")
    call = {
        "input_ids": np.array([[5, 9, walked.config["gmask_token_id"], walked.config["bos_token_id"]]] * 2),
        "position_ids": np.array([[[0, 1, 2, 2], [0, 0, 0, 1]]] * 2),
        "attention_mask": np.zeros((2, 1, 4, 4), np.bool_),
    }
    session.step(call)
    out = session.outputs
    assert out["next_position_ids"].tolist() == [[[2], [2]]] * 2 and out["next_visible"].tolist() == [[0, 4]] * 2
    best = np.argsort(-out["logits"], axis=-1, kind="stable")[:, : fast.CANDIDATES]
    assert (out["next_token"] == best[:, :1]).all() and (out["candidate_ids"] == best).all()
    assert (out["candidate_scores"] == np.take_along_axis(out["logits"], best, -1)).all()


def test_a_score_that_is_no_number_makes_the_guards_token(walked: Checkpoint) -> None:
    """As upstream's processor of invalid scores: the whole batch says the tokenizer's blank, 5 here."""
    model = fast.load_decoder(walked)
    assert checkpoints.load_tokenizer(walked).blank_id == 5
    assert fast.FastDecoder(walked.config, torch.float32, blank_id=7).guard.argmax() == 7
    call = fast.example_inputs(walked.config, 2, 3, 1, torch.float32)
    assert model(**call)[5].max() < 1e3
    call["cache"][0][1][0, 1, 0, 0, 0] = float("nan")  # of one row, and hidden: 0 times NaN is NaN
    token, _, _, ids, scores, logits, *_ = model(**call)
    assert token.flatten().tolist() == [5, 5] == ids[:, 0].tolist() and scores[:, 0].tolist() == [5e4, 5e4]
    assert logits.sum() == 1e5


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rotary_tables_are_upstreams(walked: Checkpoint, dtype: torch.dtype) -> None:
    """Both, of the model as it runs in dtype: fp16 angles are part of what it learned."""
    cos, sin = fast.rotary_tables(walked.max_length, walked.head_size, dtype)
    rotary = checkpoints.load_model(walked, dtype).transformer.layers[0].attention.rotary_emb
    wanted = rotary(torch.zeros(1, dtype=dtype), seq_len=walked.max_length)
    half = walked.head_size // 4
    assert torch.equal(cos, wanted[0].squeeze(1).squeeze(-2))
    assert torch.equal(sin[:, half:], wanted[1].squeeze(1)[:, half:]) and torch.equal(sin[:, :half], -sin[:, half:])


def test_an_engine_with_profiles_in_chunks_is_built_without_a_gpu(walked: Checkpoint) -> None:
    boxes = profiles.chat_profiles(walked, Range(1, 2, 8), past=Range(1, 300, 600))
    path = export.onnx_path(walked, "fp16", fast=True)
    report = engines.build_engine(walked, "fp16", boxes, onnx_path=path)
    assert report.plan.name == "model.fp16.fast.plan" and plans.open_plan(walked, report.plan) == report.info
    tensors = {tensor.name: tensor for tensor in report.info.tensors}
    assert tensors["cache.1.key"].profiles[0] == [[1, 1, 4, 128, 32], [1, 2, 4, 128, 32], [1, 8, 4, 128, 32]]
    assert tensors["cache.1.key"].profiles[1] == [[1, 1, 4, 128, 32], [3, 2, 4, 128, 32], [5, 8, 4, 128, 32]]
    assert tensors["visible"].profiles[1][1:] == [[2, 2], [8, 2]]
    last = walked.max_length - 1
    assert tensors["attention_mask"].profiles[0][2] == [8, 1, last, last]
    path.write_bytes(path.read_bytes() + b"\0\0")
    with pytest.raises(WorkbookError, match=r"another model.fp16.fast.onnx .* --dtype fp16 --fast`"):
        plans.open_plan(walked, report.plan)


def test_a_missing_graph_and_a_dtype_that_is_none(_random_master: Path) -> None:
    checkpoint = checkpoints.open_checkpoint(_random_master)
    with pytest.raises(WorkbookError, match=r"model.fp16.fast.onnx is missing: run .*`glmtrt export .* --fast`"):
        engines.build_engine(checkpoint, "fp16", onnx_path=export.onnx_path(checkpoint, "fp16", fast=True))
    with pytest.raises(WorkbookError, match="dtype 'int4' is not exported"):
        fast.export_fast(checkpoint, "int4")
