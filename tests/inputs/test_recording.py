"""Recording: every call of forward during a chat, and only during it; the record comes back from its file."""

import re
from pathlib import Path

import pytest

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs import recording
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.inputs.names import axis_names
from glmtrt_helpers.sessions.decode_loop import greedy
from glmtrt_helpers.sessions.pytorch import TorchSession


def test_every_call_is_recorded_until_the_block_ends(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    session = TorchSession(loading.load_model(checkpoint))
    ids = load_tokenizer(checkpoint).encode("the good dog")
    with pytest.raises(RuntimeError, match="a chat that broke"), recording.record(session.model) as calls:
        greedy(session, checkpoint, ids, max_length=len(ids) + 4)
        raise RuntimeError("a chat that broke")
    assert [call.kind for call in calls] == ["prefill", "decode", "decode", "decode"]
    assert [call.past for call in calls] == [0, len(ids), len(ids) + 1, len(ids) + 2]
    assert calls[2].position_ids == [[[len(ids) - 2], [3]]]
    session.run(example_inputs(checkpoint, 1, 2, 0))
    assert len(calls) == 4

    recording.save_record(checkpoint, calls)
    assert recording.load_record(checkpoint) == calls
    for name, axes in recording.dynamic_axes(calls).items():  # of one prompt, so every dynamic axis but the batch
        assert axes == [axis for axis, axis_name in axis_names(name).items() if axis_name != "batch"], name


def test_a_missing_record_names_the_notebook(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    with pytest.raises(WorkbookError, match="01_debug_forward_inputs"):
        recording.load_record(checkpoint)
    with pytest.raises(WorkbookError, match="no call"):
        recording.save_record(checkpoint, [])


@pytest.mark.parametrize(
    ("shapes", "said"),
    [
        ([{"past_key_values.0.key": [1, 1, 4, 16]}], "a call without input_ids: record it again"),
        ([{"input_ids": [4]}], "input_ids has 1 axes, not 2"),
        ([{"input_ids": [1, 4], "past_key_values.0.key": []}], "past_key_values.0.key has 0 axes, not 4"),
        ([{"input_ids": [1, 4], "a": [1]}, {"input_ids": [1, 4], "a": [1, 1]}], "a has 2 axes, not 1"),
        ([{"input_ids": [1, -4]}], ">= 0"),
    ],
)
def test_a_record_that_contradicts_itself_is_refused(tiny_random: Path, shapes: list[dict], said: str) -> None:
    checkpoint = open_checkpoint(tiny_random)
    recording.save_record(checkpoint, [recording.Call("prefill", each, {}) for each in shapes])
    with pytest.raises(WorkbookError, match=re.escape(said)):
        recording.load_record(checkpoint)
