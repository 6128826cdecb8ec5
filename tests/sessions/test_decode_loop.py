"""The decode loop on a random model and on a scripted session; the trained model is tried end to end."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support.scripted import Scripted

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.examples import prompt_inputs
from glmtrt_helpers.sessions.base import Limits
from glmtrt_helpers.sessions.decode_loop import generate, greedy
from glmtrt_helpers.sessions.pytorch import TorchSession


def test_greedy_equals_one_forward_over_the_whole_text(_random_master: Path) -> None:
    """Cached decoding gives the tokens that the model gives when it reads prompt and answer at once."""
    checkpoint = open_checkpoint(_random_master)
    session = TorchSession(loading.load_model(checkpoint))
    prompt = load_tokenizer(checkpoint).encode("the good dog")
    answer = greedy(session, checkpoint, prompt, max_length=len(prompt) + 12)
    assert len(answer) == 12
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


def test_rows_end_one_after_the_other(_random_master: Path) -> None:
    """A row that has come to <eop> yields None and is fed padding; the other rows are not affected."""
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


def test_conversations_that_share_a_session_are_noticed(_random_master: Path) -> None:
    """The one that comes later goes on, and the one whose cache it took ends with a sentence; after it, all is well."""
    checkpoint = open_checkpoint(_random_master)
    prompt = load_tokenizer(checkpoint).encode("a")
    session = Scripted(checkpoint, [7, 8, 9, 10, 11])
    first, second = (generate(session, checkpoint, [prompt], max_length=len(prompt) + 2) for _ in range(2))
    assert next(first) == [7]
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(next, second).result() == [8]
    with pytest.raises(WorkbookError, match="another conversation has used this session"):
        next(first)
    assert list(second) == [[9]]
    assert greedy(session, checkpoint, prompt, max_length=len(prompt) + 2) == [10, 11]
