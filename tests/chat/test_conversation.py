"""Chat: streaming, rounds, stopping, the context limit, batches; on the trained checkpoint, with PyTorch."""

import re

import pytest
from support.checkpoints import TINY
from support.scripted import Scripted

from glmtrt_helpers.chat.conversation import ROOM, Chat, post_process, settled_part
from glmtrt_helpers.chat.sampling import Sampling
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.pytorch import TorchSession
from glmtrt_helpers.standin import conversations

GREEDY = Sampling(greedy=True)


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    return open_checkpoint(TINY)


@pytest.fixture(scope="module")
def session(checkpoint: Checkpoint) -> TorchSession:
    return TorchSession(loading.load_model(checkpoint))


# Texts whose last characters depend on what follows.
UNSETTLED = [
    "你好,world",
    "a , 你",
    "多少?! 多",
    "[[训练时间]]了",
    "x[[训练",
    "😀,好:",
    "  两  空格  ",
    "end ",
    "a:b;c",
]
UNSETTLED += ["问\n\n答 "]
CONVERSATION = next(e for e in conversations.load_corpus() if len(e.history) >= 1)


def test_a_conversation_remembers_its_rounds(checkpoint: Checkpoint, session: TorchSession) -> None:
    chat = Chat(checkpoint, session, GREEDY)
    for question, answer in (*CONVERSATION.history, (CONVERSATION.question, CONVERSATION.answer)):
        assert chat.ask(question) == answer
    assert chat.history == [*CONVERSATION.history, (CONVERSATION.question, CONVERSATION.answer)]


def test_replies_grow_and_say_how_it_ended(checkpoint: Checkpoint, session: TorchSession) -> None:
    replies = list(Chat(checkpoint, session, GREEDY).stream("你好"))
    assert [len(reply.ids) for reply in replies] == [*range(1, len(replies)), len(replies) - 1]
    assert {reply.ended for reply in replies[:-1]} == {""} and replies[-1].ended == "eop"
    assert len({reply.text for reply in replies}) > 10 and replies[0].text != replies[-1].text
    assert replies[-1].prompt == len(chat_prompt(load_tokenizer(checkpoint), "你好"))
    assert 0 < replies[-1].to_first <= replies[-1].seconds and replies[-1].tokens_per_second > 0


@pytest.mark.parametrize("start", range(0, 60, 20))
def test_settled_text_is_never_taken_back(checkpoint: Checkpoint, start: int) -> None:
    """Cut at every token, the settled part of a text only grows, and is always the start of the final text."""
    tokenizer = load_tokenizer(checkpoint)
    answers = [example.answer for example in conversations.load_corpus()[start : start + 20]] + UNSETTLED
    for answer in answers:
        ids = tokenizer.encode_text(answer)
        final = post_process(tokenizer.decode(ids))
        previous = ""
        for end in range(1, len(ids) + 1):
            settled = settled_part(post_process(tokenizer.decode(ids[:end])))
            assert settled.startswith(previous) and final.startswith(settled), (answer, end, settled, final)
            previous = settled


@pytest.mark.parametrize(
    ("raw", "processed"),
    [
        (" 你好 ", "你好"),
        ("现在是[[训练时间]]。", "现在是2023年。"),
        ("你好,世界!", "你好，世界！"),
        ("注:a;b", "注：a;b"),
        ("why?因为", "why？因为"),
        ("a,b!c:d;e?f", "a,b!c:d;e?f"),
        ("好?!", "好？!"),
    ],
)
def test_post_processing(raw: str, processed: str) -> None:
    assert post_process(raw) == processed
    # Upstream's own formulation: for each mark two substitutions, after and before a character from 4e00 to 9fff.
    text = raw.strip().replace("[[训练时间]]", "2023年")
    for half, full in ((",", "，"), ("!", "！"), (":", "："), (";", "；"), (r"\?", "？")):
        text = re.sub(rf"([一-鿿]){half}", rf"\1{full}", text)
        text = re.sub(rf"{half}([一-鿿])", rf"{full}\1", text)
    assert processed == text


def test_a_cancelled_answer_keeps_what_there_is(checkpoint: Checkpoint) -> None:
    chat = Chat(checkpoint, Scripted(checkpoint, [30] * 100), GREEDY)
    replies = []
    for reply in chat.stream("你好"):
        replies.append(reply)
        if len(reply.ids) == 5:
            chat.cancel()
    assert replies[-1].ended == "stopped" and len(replies[-1].ids) == 5 and len(replies) == 6
    assert chat.history == [("你好", replies[-1].text)] and replies[-1].text
    # To stop iterating is the same.
    answer = chat.stream("还在吗")
    next(answer)
    answer.close()
    assert [question for question, _ in chat.history] == ["你好", "还在吗"]


def test_an_error_midway_is_not_a_round(checkpoint: Checkpoint) -> None:
    chat = Chat(checkpoint, Scripted(checkpoint, [30, 31]), GREEDY)  # the script's end raises
    with pytest.raises(RuntimeError):
        chat.ask("你好")
    assert chat.history == []


def test_the_limit_cuts_an_answer(checkpoint: Checkpoint) -> None:
    chat = Chat(checkpoint, Scripted(checkpoint, [30] * 100), GREEDY, max_length=20)
    *_, last = chat.stream("你好")
    assert last.ended == "length" and last.prompt + len(last.ids) == 20


def test_the_context_limit_is_an_error_or_drops_rounds(checkpoint: Checkpoint) -> None:
    """By default it is one clear sentence; with drop_oldest, as many of the oldest rounds are dropped as necessary."""
    chat = Chat(checkpoint, Scripted(checkpoint, [30] * 500), GREEDY, max_length=200)
    chat.history = [(f"问题{i}", "回答" * 5) for i in range(12)]
    tokens = len(chat_prompt(chat.tokenizer, "还有呢", chat.history))
    assert tokens > 200
    with pytest.raises(WorkbookError, match=rf"is {tokens} tokens long; at most 199 .* or drop the oldest rounds"):
        chat.ask("还有呢")
    assert len(chat.history) == 12, "nothing was lost"
    chat.drop_oldest = True
    *_, last = chat.stream("还有呢")
    assert 0 < last.dropped < 12 and last.prompt + ROOM <= 200
    kept = [(f"问题{i}", "回答" * 5) for i in range(last.dropped, 12)]
    assert chat.history[:-1] == kept
    one_more = [(f"问题{i}", "回答" * 5) for i in range(last.dropped - 1, 12)]
    assert len(chat_prompt(chat.tokenizer, "还有呢", one_more)) + ROOM > 200
    chat.history = []
    with pytest.raises(WorkbookError, match=r"the question alone is \d+ tokens long; at most 199"):
        chat.ask("很长" * 300)


def test_an_empty_question_is_refused(checkpoint: Checkpoint, session: TorchSession) -> None:
    with pytest.raises(WorkbookError, match="the question is empty"):
        Chat(checkpoint, session, GREEDY).ask("  \n")


def test_a_batch_answers_as_one_by_one(checkpoint: Checkpoint, session: TorchSession) -> None:
    examples = [example for example in conversations.load_corpus() if not example.history]
    selected = sorted(examples[:40], key=lambda example: len(example.question))[::10]
    together = Chat(checkpoint, session, GREEDY).ask_together([example.question for example in selected])
    assert together == [example.answer for example in selected]


def test_sampling_with_a_seed_is_reproducible(checkpoint: Checkpoint, session: TorchSession) -> None:
    def ask(seed: int) -> str:
        wild = Sampling(temperature=4.0, top_k=0, top_p=1.0, seed=seed)
        return Chat(checkpoint, session, wild, max_length=40).ask("你好")

    assert ask(1) == ask(1) != ask(2)
