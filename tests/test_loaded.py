"""The classical session over a GPU that is none: addresses, shapes, profiles, and that all memory comes back."""

from pathlib import Path

import fake_gpu
import pytest
import torch
from exporting import exported_copy

from glmtrt_helpers import checkpoints, engines, inputs, profiles, runtime, verification
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.profiles import Profile, Range
from glmtrt_helpers.tensorrt_session import TensorRTSession

ANYTHING = [Profile("anything", Range(1, 2, 4), Range(1, 8, 64), Range(0, 64, 700))]


def test_every_case_through_raw_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = exported_copy(tmp_path)
    engines.build_engine(checkpoint, "fp16", ANYTHING)
    gpu = fake_gpu.install(monkeypatch)
    session = TensorRTSession.open(checkpoint)
    result = verification.verify(checkpoint, "fp16", session=session)
    assert result.ok and not result.skipped, result.rows
    with pytest.raises(WorkbookError, match="batch 5, sequence 1, past 0 lies outside every profile"):
        session.run(inputs.example_inputs(checkpoint, 5, 1, 0, torch.float16))
    session.close()
    assert not gpu.blocks, "all memory was given back"


def test_a_padded_chat_that_changes_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = exported_copy(tmp_path)
    engines.build_engine(checkpoint, "fp16", profiles.chat_profiles(checkpoint, Range(1, 2, 4)))
    fake_gpu.install(monkeypatch)
    tokenizer = checkpoints.load_tokenizer(checkpoint)
    prompts = [tokenizer.encode("the good dog"), tokenizer.encode("a")]
    session, wanted = TensorRTSession.open(checkpoint), runtime.open_session(checkpoint, "ort")
    for _ in range(2):
        got = list(runtime.generate(session, checkpoint, prompts, max_length=40))
        assert got == list(runtime.generate(wanted, checkpoint, prompts, max_length=40))
    assert session.profile == "decode" and session.past == 39
    session.close()
