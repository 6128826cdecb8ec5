"""Profiles: their shapes against the inputs of recorded calls, what they cover, and how they are drawn."""

from dataclasses import asdict
from pathlib import Path

import msgspec
import pytest

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.plots import draw_profiles
from glmtrt_helpers.engines.profiles import Profile, Range, chat_profiles, find_profile, fit_to_record
from glmtrt_helpers.inputs import positions_and_mask, recording
from glmtrt_helpers.sessions.decode_loop import greedy
from glmtrt_helpers.sessions.pytorch import TorchSession


@pytest.fixture
def checkpoint(_random_master: Path) -> Checkpoint:
    return open_checkpoint(_random_master)


def recorded(checkpoint: Checkpoint) -> list[recording.Call]:
    session = TorchSession(loading.load_model(checkpoint))
    prompt = load_tokenizer(checkpoint).encode("the good dog")
    with recording.record(session.model) as calls:
        greedy(session, checkpoint, prompt, max_length=len(prompt) + 9)
    return calls


def named(checkpoint: Checkpoint, name: str) -> list[int | str]:
    """The dimensions of an input as the exported graph names them, which tests of the export check."""
    cache = ["past", "batch", checkpoint.num_heads, checkpoint.head_size]
    inputs: dict[str, list[int | str]] = {
        "input_ids": ["batch", "sequence"],
        "position_ids": ["batch", 2, "sequence"],
        "attention_mask": ["batch", 1, "sequence", "total"],
    }
    return inputs.get(name, cache)


def test_every_call_of_a_chat_has_a_profile_with_its_shapes(checkpoint: Checkpoint) -> None:
    """The shapes that a profile gives for a size are those with which PyTorch was called at that size."""
    calls = recorded(checkpoint)
    profiles = chat_profiles(checkpoint)
    used = [find_profile(profiles, 1, call.sequence, call.past) for call in calls]
    assert used == [0] + [1] * (len(calls) - 1)
    for call in (calls[0], calls[1], calls[-1]):
        exact = Profile("exact", Range(1, 1, 1), *(Range(n, n, n) for n in (call.sequence, call.past)))
        for name, shape in call.shapes.items():
            assert [list(s) for s in exact.shapes(named(checkpoint, name))] == [shape] * 3


OUTSIDE = [(2, 8, 0), (1, 1024, 0), (1, 2, 3), (1, 1, 1024), (0, 1, 0), (1, 0, 0)]


@pytest.mark.parametrize(("batch", "sequence", "past"), OUTSIDE)
def test_a_shape_outside_every_profile_is_refused_with_both_named(
    checkpoint: Checkpoint, batch: int, sequence: int, past: int
) -> None:
    profiles = chat_profiles(checkpoint)
    with pytest.raises(WorkbookError) as caught:
        find_profile(profiles, batch, sequence, past)
    said = str(caught.value)
    assert f"batch {batch}, sequence {sequence}, past {past} lies outside" in said
    assert "prefill: batch 1, sequence 1 to 1023, past 0" in said and "decode: batch 1, sequence 1, past 1 to" in said


def test_ranges_are_parsed_or_refused() -> None:
    assert Range.parse("1,64,512") == Range(1, 64, 512)
    for text in ("", "5", "1,2", "0,1,2", "3,2,1", "1,2,x", "1,2,3,4"):
        with pytest.raises(WorkbookError, match=r"is not a range"):
            Range.parse(text)


def test_maxima_beyond_the_model_are_refused(checkpoint: Checkpoint) -> None:
    for ranges in ({"prompt": Range(1, 2, 1024)}, {"past": Range(1, 2, 1024)}):
        with pytest.raises(WorkbookError, match="leaves no room in the 1024 positions"):
            chat_profiles(checkpoint, **ranges)


def test_profiles_fitted_to_a_record(checkpoint: Checkpoint) -> None:
    calls = recorded(checkpoint)
    prefill, decode = fit_to_record(checkpoint, calls)
    pasts = sorted(call.past for call in calls if call.past)
    assert prefill.sequence == Range(1, calls[0].sequence, 2 * calls[0].sequence)
    assert decode.past == Range(1, pasts[len(pasts) // 2], 2 * pasts[-1])
    with pytest.raises(WorkbookError, match="no prefill or no decode"):
        fit_to_record(checkpoint, calls[:1])
    calls[0].shapes["input_ids"][1] = checkpoint.max_length
    with pytest.raises(WorkbookError, match=r"the record holds sizes of 1024 to 1024, and .* takes 1 to 1023"):
        fit_to_record(checkpoint, calls)


def test_a_profile_survives_json(checkpoint: Checkpoint) -> None:
    for profile in chat_profiles(checkpoint, Range(1, 2, 4)):
        assert msgspec.convert(asdict(profile), Profile) == profile


def test_the_plot_marks_calls_outside_every_profile(checkpoint: Checkpoint) -> None:
    calls = recorded(checkpoint)
    inside = draw_profiles(chat_profiles(checkpoint), calls).axes[0]
    labels = [text.get_text() for text in inside.get_legend().get_texts()]
    assert "recorded call" in labels and not any("outside" in label for label in labels) and len(inside.patches) == 2
    narrow = chat_profiles(checkpoint, past=Range(1, 2, calls[-1].past - 1))
    axis = draw_profiles(narrow, calls).axes[0]
    marked = next(line for line in axis.lines if "outside" in str(line.get_label()))
    assert list(marked.get_xdata()) == [calls[-1].past] and list(marked.get_ydata()) == [1]


def test_prefill_inputs_and_profiles_agree_on_a_batch(checkpoint: Checkpoint) -> None:
    tokenizer = load_tokenizer(checkpoint)
    call = positions_and_mask.prefill(checkpoint, [tokenizer.encode("a"), tokenizer.encode("the dog")])
    batch, sequence = call["input_ids"].shape
    exact = Profile("exact", Range(batch, batch, batch), Range(sequence, sequence, sequence), Range(0, 0, 0))
    for name, array in call.items():
        assert exact.shapes(named(checkpoint, name))[1] == array.shape
