"""Sessions and greedy decoding on a random model; the trained one is tried in test_standin and test_cli."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.exporting import exported_copy

from glmtrt_helpers.chat import backends
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.inputs.examples import prompt_inputs
from glmtrt_helpers.sessions.base import Limits, Session
from glmtrt_helpers.sessions.decode_loop import generate, greedy
from glmtrt_helpers.sessions.onnxruntime import OrtSession
from glmtrt_helpers.sessions.pytorch import TorchSession


def test_greedy_equals_one_forward_over_the_whole_text(_random_master: Path) -> None:
    """Cached decoding gives the tokens that the model gives when it reads prompt and answer at once."""
    checkpoint = open_checkpoint(_random_master)
    session = TorchSession(loading.load_model(checkpoint))
    prompt = load_tokenizer(checkpoint).encode("the good dog")
    seen: list[int] = []
    answer = greedy(session, checkpoint, prompt, max_length=len(prompt) + 12, on_token=seen.append)
    assert answer == seen and len(answer) == 12
    logits = session.run(prompt_inputs(checkpoint, [prompt + answer]))["logits"][0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_greedy_stops_at_eop_and_at_the_limit(_random_master: Path) -> None:
    checkpoint = open_checkpoint(_random_master)
    eop = checkpoint.config["eos_token_id"]

    prompt = load_tokenizer(checkpoint).encode("a")
    assert greedy(Scripted(checkpoint, [7, 8, eop, 9]), checkpoint, prompt) == [7, 8]
    assert greedy(Scripted(checkpoint, [7] * 20), checkpoint, prompt, max_length=len(prompt) + 5) == [7] * 5
    with pytest.raises(WorkbookError, match="the limit is 4"):
        greedy(Scripted(checkpoint, []), checkpoint, prompt[:1] + prompt, max_length=4)


class Scripted(Session):
    """Says what the script says, whatever it is asked; each entry is one step, a list for the rows of a batch."""

    backend = "scripted"
    dtype = np.dtype(np.float32)

    def __init__(self, checkpoint: Checkpoint, script: Sequence[int | Sequence[int]]):
        self.vocabulary = checkpoint.vocab_size
        self.script = iter(script)
        self.calls: list[dict[str, np.ndarray]] = []

    def empty_past(self, batch: int) -> dict[str, np.ndarray]:
        return {}

    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        self.calls.append(dict(flat))
        batch, sequence = flat["input_ids"].shape
        logits = np.zeros((batch, sequence, self.vocabulary), np.float32)
        said = next(self.script)
        for row, token in enumerate(said if isinstance(said, Sequence) else [said] * batch):
            logits[row, -1, token] = 1.0
        return {"logits": logits}


def test_rows_end_one_after_the_other(_random_master: Path) -> None:
    """A row that has come to <eop> yields None and is fed padding; the others go on undisturbed."""
    checkpoint = open_checkpoint(_random_master)
    eop, pad = checkpoint.config["eos_token_id"], checkpoint.config["pad_token_id"]
    tokenizer = load_tokenizer(checkpoint)
    session = Scripted(checkpoint, [[7, 8], [eop, 9], [11, 10], [12, eop]])
    steps = list(generate(session, checkpoint, [tokenizer.encode("a"), tokenizer.encode("the dog")]))
    assert steps == [[7, 8], [None, 9], [None, 10]]
    assert [call["input_ids"].tolist() for call in session.calls[1:]] == [[[7], [8]], [[eop], [9]], [[pad], [10]]]


def test_limits_of_a_session_are_checked_before_it_runs(_random_master: Path) -> None:
    checkpoint = open_checkpoint(_random_master)
    prompt = load_tokenizer(checkpoint).encode("the good dog")
    session = Scripted(checkpoint, [])
    session.limits = Limits(batch=2, prompt=len(prompt) - 1, total=64)
    with pytest.raises(WorkbookError, match=r"1 prompts of up to \d+ tokens lie outside the engine's profiles"):
        greedy(session, checkpoint, prompt)
    with pytest.raises(WorkbookError, match="3 prompts of up to"):
        next(generate(session, checkpoint, [prompt[-3:]] * 3))
    session.limits = Limits(total=len(prompt))
    with pytest.raises(WorkbookError, match=f"the limit is {len(prompt)}"):
        greedy(session, checkpoint, prompt)
    with pytest.raises(WorkbookError, match="there is no prompt"):
        next(generate(session, checkpoint, []))
    assert not session.calls


def test_stepping_equals_running(tmp_path: Path) -> None:
    """The cache that a session keeps is the one that comes out of run: torch and ort, prefill and two decodes."""
    checkpoint = exported_copy(tmp_path)
    prompts = [load_tokenizer(checkpoint).encode(text) for text in ("the good dog", "a")]
    for backend in ("torch", "ort"):
        session = backends.open_session(checkpoint, backend, "fp32")
        assert session.backend == backend and session.dtype == np.float32
        call, past = positions_and_mask.prefill(checkpoint, prompts), session.empty_past(2)
        for tokens in ([20, 21], [22, 23]):
            outputs = session.run({**call, **past})
            np.testing.assert_array_equal(session.step(call), outputs.pop("logits")[:, -1])
            past = {name.replace("present", "past_key_values"): array for name, array in outputs.items()}
            call = positions_and_mask.decode(call, np.array(tokens))
        session.reset()
        again = positions_and_mask.prefill(checkpoint, prompts)
        np.testing.assert_array_equal(
            session.step(again), session.run({**again, **session.empty_past(2)})["logits"][:, -1]
        )


def test_backends_by_name(tmp_path: Path) -> None:
    checkpoint = exported_copy(tmp_path)
    with pytest.raises(WorkbookError, match="'gpu' is no backend of this workbook: choose torch, ort, tensorrt"):
        backends.open_session(checkpoint, "gpu")
    assert "05_build_profiles" in backends.unavailable(checkpoint)["tensorrt"]
    assert backends.best_backend(checkpoint)[0] == "ort"
    (checkpoint.directory / "model.fp16.onnx").unlink()
    assert backends.best_backend(checkpoint)[0] == "torch" and "03_export" in backends.unavailable(checkpoint)["ort"]


def test_missing_and_broken_onnx_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkbookError, match="03_export_onnx"):
        OrtSession(tmp_path / "model.fp16.onnx")
    (tmp_path / "model.fp16.onnx").write_bytes(b"garbage")
    with pytest.raises(WorkbookError, match="does not load"):
        OrtSession(tmp_path / "model.fp16.onnx")
