"""The TensorRT session on a fake GPU: addresses, shapes, profiles, and that all memory is freed."""

from pathlib import Path

import pytest
import torch
from support import fake_gpu
from support.exporting import exported_copy

from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.builder import build_engine
from glmtrt_helpers.engines.profiles import Profile, Range, chat_profiles
from glmtrt_helpers.engines.session import TensorRTSession
from glmtrt_helpers.graphs import verification
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.sessions.decode_loop import generate
from glmtrt_helpers.sessions.onnxruntime import OrtSession

ANY_SHAPE = [Profile("any shape", Range(1, 2, 4), Range(1, 8, 64), Range(0, 64, 700))]


def test_every_case_through_raw_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = exported_copy(tmp_path)
    build_engine(checkpoint, "fp16", ANY_SHAPE)
    gpu = fake_gpu.install(monkeypatch)
    session = TensorRTSession.open(checkpoint)
    result = verification.verify(checkpoint, "fp16", session=session)
    assert result.ok and not result.skipped, result.rows
    with pytest.raises(WorkbookError, match="batch 5, sequence 1, past 0 lies outside every profile"):
        session.run(example_inputs(checkpoint, 5, 1, 0, torch.float16))
    session.close()
    assert not gpu.blocks, "all memory is freed"


def test_a_padded_chat_that_switches_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = exported_copy(tmp_path)
    build_engine(checkpoint, "fp16", chat_profiles(checkpoint, Range(1, 2, 4)))
    fake_gpu.install(monkeypatch)
    tokenizer = load_tokenizer(checkpoint)
    prompts = [tokenizer.encode("the good dog"), tokenizer.encode("a")]
    session, reference = TensorRTSession.open(checkpoint), OrtSession(checkpoint.directory / "model.fp16.onnx")
    for _ in range(2):
        actual = list(generate(session, checkpoint, prompts, max_length=40))
        assert actual == list(generate(reference, checkpoint, prompts, max_length=40))
    assert session.profile == "decode" and session.past == 39
    session.close()
