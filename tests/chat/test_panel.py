"""The chat panel without a browser: it answers in its thread, streams, stops, and shows which backend answers."""

import time
from dataclasses import replace
from pathlib import Path

import pytest

from glmtrt_helpers.chat.panel import ChatPanel
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.sessions.onnxruntime import OrtSession
from glmtrt_helpers.standin import conversations

ANSWERS = {example.question: example.answer for example in conversations.load_corpus() if not example.history}


@pytest.fixture
def checkpoint(exported_standin: Path) -> Checkpoint:
    return open_checkpoint(exported_standin)


def test_it_streams_the_trained_answer_and_shows_figures(checkpoint: Checkpoint) -> None:
    panel = ChatPanel(checkpoint, backend="ort")
    texts: list[str] = []
    panel.log.observe(lambda change: texts.append(change["new"]), "value")
    panel.ask("你好")
    panel.wait(30)
    assert ANSWERS["你好"] in panel.log.value and len(set(texts)) > 10
    assert "tokens/s" in panel.status.value and "first token after" in panel.status.value
    assert panel.status.value.endswith("done") and "ONNX Runtime" in panel.status.value
    assert panel.context.value > len(ANSWERS["你好"]) // 3
    assert panel.context_text.value == f"context: {panel.context.value} of {checkpoint.max_length:,} tokens"
    assert panel.stop.disabled and not panel.send.disabled and panel.question.value == ""


def test_without_tensorrt_it_says_so(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_package, "gpus", list)
    panel = ChatPanel(checkpoint)
    assert "Not from TensorRT: no GPU" in panel.status.value
    assert [name for _, name in panel.backend.options] == ["torch", "ort"] and panel.backend.value == "ort"


def test_stop_continue_and_start_over(checkpoint: Checkpoint) -> None:
    panel = ChatPanel(checkpoint, backend="ort")
    panel.pace.value = 100
    panel.ask("你好")
    while not panel._rounds or not panel._rounds[-1][1]:
        time.sleep(0.02)
    panel.ask("a second question at the same time does nothing")
    panel.stop.click()
    panel.wait(10)
    stopped = panel._rounds[-1][1]
    assert panel.status.value.endswith("stopped") and 0 < len(stopped) < len(ANSWERS["你好"])
    assert ANSWERS["你好"].startswith(stopped) and len(panel._rounds) == 1
    panel.new.click()
    assert "No question yet" in panel.log.value and panel.context.value == 0
    panel.pace.value = 0
    panel.ask("What is a profile?")
    panel.wait(30)
    assert ANSWERS["What is a profile?"] in panel.log.value


def test_a_conversation_continues_on_another_backend(checkpoint: Checkpoint) -> None:
    example = next(e for e in conversations.load_corpus() if len(e.history) == 1)
    panel = ChatPanel(checkpoint, backend="ort")
    panel.ask(example.history[0][0])
    panel.wait(30)
    tokens = panel.context.value
    panel.backend.value = "torch"
    assert panel.context.value == tokens > 0 and panel.context_text.value.startswith(f"context: {tokens} of ")
    panel.ask(example.question)
    panel.wait(60)
    assert panel.context.value > tokens
    assert panel._rounds == [*example.history, (example.question, example.answer)]
    assert "PyTorch" in panel.status.value


def test_text_is_never_markup(checkpoint: Checkpoint) -> None:
    panel = ChatPanel(checkpoint, backend="ort")
    panel.ask("<script>alert(1)</script> & <b> \x1b[2J\u202e")
    panel.wait(30)
    assert "&lt;script&gt;" in panel.log.value and "<script>" not in panel.log.value
    assert r"\x1b[2J\u202e" in panel.log.value and not {"\x1b", "\u202e"} & set(panel.log.value)
    panel.ask("\ud83d")
    panel.wait(10)
    assert "half a character" in panel.status.value
    panel._set_status("<i>\x1b")
    assert panel.status.value == r"&lt;i&gt;\x1b"


def test_an_error_is_shown_and_the_panel_goes_on(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    panel = ChatPanel(checkpoint, backend="ort")

    def fail(*_: object) -> None:
        raise RuntimeError("the card is gone")

    with monkeypatch.context() as patch:
        patch.setattr(OrtSession, "run", fail)
        panel.ask("你好")
        panel.wait(10)
    assert "the card is gone" in panel.status.value and not panel.send.disabled
    assert panel.question.value == "你好" and "No question yet" in panel.log.value
    panel.ask("你好")
    panel.wait(30)
    assert ANSWERS["你好"] in panel.log.value


def test_a_question_that_is_too_long_stays_in_the_box(checkpoint: Checkpoint) -> None:
    panel = ChatPanel(checkpoint, backend="ort")
    question = "很长的问题。" * checkpoint.max_length
    panel.question.value = question
    panel.send.click()
    panel.wait(30)
    assert panel.question.value == question and not panel._rounds and panel.status.value.endswith("shorten it.")
    assert "--drop-oldest" not in panel.status.value and question not in panel.log.value
    panel.question.value = "Hello"
    panel.send.click()
    panel.wait(30)
    assert panel.question.value == "" and panel._rounds[-1] == ("Hello", ANSWERS["Hello"])


def test_what_was_typed_meanwhile_is_not_overwritten(checkpoint: Checkpoint) -> None:
    panel = ChatPanel(checkpoint, backend="ort")
    panel.question.value = "the next question"
    panel._give_back("the last question", "an error")
    assert panel.question.value == "the next question" and panel.status.value == "an error"


def test_the_context_is_that_of_the_selected_backend(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's profiles may end earlier than the model; going back to another backend goes back to its limit."""
    panel = ChatPanel(checkpoint, backend="ort")
    session = panel.session("ort")
    monkeypatch.setattr(session, "limits", replace(session.limits, total=500))
    panel.ask("你好")
    panel.wait(30)
    assert panel.context.max == 500 and "of 500 tokens" in panel.context_text.value
    panel.backend.value = "torch"
    assert panel.context.max == checkpoint.max_length and panel.context.value > 0


def test_greedy_decoding_greys_out_the_sampling(checkpoint: Checkpoint) -> None:
    panel = ChatPanel(checkpoint, backend="ort")
    sliders = (panel.temperature, panel.top_p, panel.top_k)
    assert panel.greedy.value and all(slider.disabled for slider in sliders) and not panel.pace.disabled
    panel.greedy.value = False
    assert not any(slider.disabled for slider in sliders)


def test_the_message_of_the_box_sends_its_text(checkpoint: Checkpoint) -> None:
    """That Enter sends it, and when it does not, is for the browser's tests."""
    panel = ChatPanel(checkpoint, backend="ort")
    panel.question.value = "Hello"
    panel.question._handle_custom_msg("send", [])
    panel.wait(30)
    assert panel._rounds == [("Hello", ANSWERS["Hello"])] and panel.question.value == ""


def test_nothing_is_written(checkpoint: Checkpoint) -> None:
    before = sorted(Path(checkpoint.directory).iterdir())
    ChatPanel(checkpoint)
    assert sorted(Path(checkpoint.directory).iterdir()) == before


def test_four_questions_in_a_row_are_answered(checkpoint: Checkpoint) -> None:
    panel = ChatPanel(checkpoint, backend="ort")
    for question in ("What is a profile?", "缓存是什么布局？", "你好", "Why flatten?"):
        panel.ask(question)
        panel.wait(30)
        assert panel._rounds[-1] == (question, ANSWERS[question])


def test_the_questions_that_it_knows_can_be_selected(checkpoint: Checkpoint, tiny_random: Path) -> None:
    panel = ChatPanel(checkpoint, backend="ort")
    assert {value for _, value in panel.known.options[1:]} == set(ANSWERS) and panel.known.layout.display is None
    for question in ("What is a profile?", "什么是优化配置？", "What is a profile?"):
        panel.known.value = question
        assert panel.question.value == question and panel.known.value == ""
    assert ChatPanel(open_checkpoint(tiny_random)).known.layout.display == "none"
