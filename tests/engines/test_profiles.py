"""Profiles: their shapes against what a chat really feeds to forward, what they cover, and what they cost."""

from pathlib import Path

import pytest
from support.checkpoints import make_random

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.memory_prediction import predict_memory
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
    """The dimensions of an input as the exported graph names them; test_export sees that it does."""
    cache = ["past", "batch", checkpoint.num_heads, checkpoint.head_size]
    inputs = {"input_ids": ["batch", "sequence"], "position_ids": ["batch", 2, "sequence"],
              "attention_mask": ["batch", 1, "sequence", "total"]}  # fmt: skip
    return inputs.get(name, cache)


def test_every_call_of_a_chat_lies_in_a_profile_with_its_own_shapes(checkpoint: Checkpoint) -> None:
    """The shapes a profile gives for a size are those that PyTorch was called with at that size."""
    calls = recorded(checkpoint)
    boxes = chat_profiles(checkpoint)
    used = [find_profile(boxes, 1, call.sequence, call.past) for call in calls]
    assert used == [0] + [1] * (len(calls) - 1)
    for call in (calls[0], calls[1], calls[-1]):
        exact = Profile("exact", Range(1, 1, 1), *(Range(n, n, n) for n in (call.sequence, call.past)))
        for name, shape in call.shapes.items():
            assert [list(s) for s in exact.shapes(named(checkpoint, name))] == [shape] * 3


OUTSIDE = [(2, 8, 0), (1, 1024, 0), (1, 2, 3), (1, 1, 1024), (0, 1, 0), (1, 0, 0)]


@pytest.mark.parametrize(("batch", "sequence", "past"), OUTSIDE)
def test_a_request_outside_names_itself_and_the_profiles(
    checkpoint: Checkpoint, batch: int, sequence: int, past: int
) -> None:
    boxes = chat_profiles(checkpoint)
    with pytest.raises(WorkbookError) as caught:
        find_profile(boxes, batch, sequence, past)
    said = str(caught.value)
    assert f"batch {batch}, sequence {sequence}, past {past} lies outside" in said
    assert "prefill: batch 1, sequence 1 to 1023, past 0" in said and "decode: batch 1, sequence 1, past 1 to" in said


def test_ranges_are_read_and_refused() -> None:
    assert Range.parse("1,64,512", "--prompt") == Range(1, 64, 512)
    for text in ("", "5", "1,2", "0,1,2", "3,2,1", "1,2,x", "1,2,3,4"):
        with pytest.raises(WorkbookError, match=r"--prompt .* is no range"):
            Range.parse(text, "--prompt")


def test_maxima_beyond_the_model_are_refused(checkpoint: Checkpoint) -> None:
    for wish in ({"prompt": Range(1, 2, 1024)}, {"past": Range(1, 2, 1024)}):
        with pytest.raises(WorkbookError, match="leaves no room in the 1024 positions"):
            chat_profiles(checkpoint, **wish)


def test_fitted_to_a_record(checkpoint: Checkpoint) -> None:
    calls = recorded(checkpoint)
    prefill, decode = fit_to_record(checkpoint, calls, room=2)
    pasts = sorted(call.past for call in calls if call.past)
    assert prefill.sequence == Range(1, calls[0].sequence, 2 * calls[0].sequence)
    assert decode.past == Range(1, pasts[len(pasts) // 2], 2 * pasts[-1])
    with pytest.raises(WorkbookError, match="no prefill or no decode"):
        fit_to_record(checkpoint, calls[:1])


def test_a_profile_survives_json(checkpoint: Checkpoint) -> None:
    for profile in chat_profiles(checkpoint, Range(1, 2, 4)):
        assert Profile.from_dict(profile.as_dict()) == profile


def test_predicted_memory_of_the_real_size(tmp_path: Path) -> None:
    """The parts that follow from the model alone, against the public figures of the real checkpoint's shapes."""
    checkpoint = open_checkpoint(make_random(tmp_path / "small"))
    sizes = {"num_layers": 28, "hidden_size": 4096, "num_attention_heads": 32, "inner_hidden_size": 16384}
    real = Checkpoint(checkpoint.directory, {**checkpoint.config, **sizes, "max_sequence_length": 2048}, {})
    whole = predict_memory(real, chat_profiles(real))
    # Two buffers of 2047 tokens, 28 layers, key and value of 4096 fp16 numbers: 458,752 bytes a token and buffer.
    assert whole.cache == 2 * 2048 * 458_752
    short = predict_memory(real, chat_profiles(real, past=Range(1, 64, 511), prompt=Range(1, 64, 256)))
    assert short.cache == whole.cache * 512 // 2048 and short.activations < whole.activations / 4
    # Measured on an H200 with TensorRT-RTX 1.6.1.120 for one row of up to so many prompt tokens, past up to 2047.
    for prompt, past, measured in ((2047, 2047, 170_786_304), (1024, 2047, 86_458_368), (512, 2047, 46_399_488)):
        boxes = chat_profiles(real, prompt=Range(1, 128, prompt), past=Range(1, 512, past))
        assert predict_memory(real, boxes).activations == pytest.approx(measured, rel=0.05)


def test_the_picture_marks_what_falls_outside(checkpoint: Checkpoint) -> None:
    calls = recorded(checkpoint)
    inside = draw_profiles(chat_profiles(checkpoint), calls).axes[0]
    labels = [text.get_text() for text in inside.get_legend().get_texts()]
    assert "asked for" in labels and not any("outside" in label for label in labels) and len(inside.patches) == 2
    narrow = chat_profiles(checkpoint, past=Range(1, 2, calls[-1].past - 1))
    axis = draw_profiles(narrow, calls).axes[0]
    marked = next(line for line in axis.lines if "outside" in str(line.get_label()))
    assert list(marked.get_xdata()) == [calls[-1].past] and list(marked.get_ydata()) == [1]


def test_feeds_and_profiles_agree_on_a_batch(checkpoint: Checkpoint) -> None:
    tokenizer = load_tokenizer(checkpoint)
    call = positions_and_mask.prefill(checkpoint, [tokenizer.encode("a"), tokenizer.encode("the dog")])
    batch, sequence = call["input_ids"].shape
    exact = Profile("exact", Range(batch, batch, batch), Range(sequence, sequence, sequence), Range(0, 0, 0))
    for name, array in call.items():
        assert exact.shapes(named(checkpoint, name))[1] == array.shape
