"""The prompt of a chat: the raw question, or numbered rounds."""

from pathlib import Path

import pytest
from support.command_line import InProcess
from support.scripted import Scripted

from glmtrt_helpers.chat.conversation import Chat
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.prompts import chat_prompt

NOT_UTF8 = ("a\udcc4\udce3", "a\ud83d", "a\udc00b")  # GBK bytes in an argument, and halves of characters


def test_chat_prompt_numbers_the_rounds(_random_master: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(_random_master))
    assert tokenizer.decode(chat_prompt(tokenizer, "你好")) == "你好"
    prompt = chat_prompt(tokenizer, "c", [("a", "b"), ("d", "e")])
    assert tokenizer.decode(prompt) == "[Round 0]\n问：a\n答：b\n[Round 1]\n问：d\n答：e\n[Round 2]\n问：c\n答："


@pytest.mark.parametrize("text", NOT_UTF8)
def test_text_that_is_not_utf8_is_refused(_random_master: Path, text: str) -> None:
    checkpoint = open_checkpoint(_random_master)
    tokenizer, chat = load_tokenizer(checkpoint), Chat(checkpoint, Scripted(checkpoint, []))
    sentence = r"the text holds '\\ud[8c]\w+', half a character"
    with pytest.raises(WorkbookError, match=sentence):
        chat_prompt(tokenizer, text)
    for ask in (chat.ask, lambda question: chat.ask_together(["a", question])):
        with pytest.raises(WorkbookError, match=sentence):
            ask(text)
    assert chat.history == []


def test_an_argument_that_is_not_utf8_is_one_sentence(tiny_random: Path, glmtrt: InProcess) -> None:
    for command in (["inputs"], ["chat", "--backend", "torch"]):
        code, lines = glmtrt(*command, tiny_random, "--prompt", NOT_UTF8[0])
        assert code == 1 and len(lines) == 1 and "half a character" in lines[0], lines
    assert not (tiny_random / "inputs.json").exists()
