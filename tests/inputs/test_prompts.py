"""The prompt of a chat: the raw question, or numbered rounds."""

from pathlib import Path

from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.inputs.prompts import chat_prompt


def test_chat_prompt_numbers_the_rounds(_random_master: Path) -> None:
    tokenizer = load_tokenizer(open_checkpoint(_random_master))
    assert tokenizer.decode(chat_prompt(tokenizer, "你好")) == "你好"
    prompt = chat_prompt(tokenizer, "c", [("a", "b"), ("d", "e")])
    assert tokenizer.decode(prompt) == "[Round 0]\n问：a\n答：b\n[Round 1]\n问：d\n答：e\n[Round 2]\n问：c\n答："
