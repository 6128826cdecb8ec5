"""Answers of several backends, compared token by token."""

from support.checkpoints import TINY
from support.scripted import Scripted

from glmtrt_helpers.chat.comparison import compare, comparison_rows
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.decode_loop import greedy
from glmtrt_helpers.sessions.pytorch import TorchSession


def test_backends_are_compared_token_by_token() -> None:
    checkpoint = open_checkpoint(TINY)
    session = TorchSession(loading.load_model(checkpoint))
    tokenizer = load_tokenizer(checkpoint)
    right = greedy(session, checkpoint, chat_prompt(tokenizer, "你好"))
    wrong = [*right[:4], 40, tokenizer.eop_id]
    (row,) = compare(checkpoint, {"torch": session, "ort": Scripted(checkpoint, wrong)}, ["你好"])
    assert row.first_difference == 4 and row.pieces == {"torch": tokenizer.piece(right[4]), "ort": tokenizer.piece(40)}
    short = Scripted(checkpoint, [*right[:6], tokenizer.eop_id])
    (row,) = compare(checkpoint, {"torch": session, "ort": short}, ["你好"])
    assert row.first_difference == 6 and row.pieces["ort"] == "<eop>"
    (row,) = compare(checkpoint, {"torch": session, "ort": Scripted(checkpoint, [*right, tokenizer.eop_id])}, ["你好"])
    assert row.first_difference is None and len(set(row.answers.values())) == 1
    assert comparison_rows([row]) == [("你好", row.answers["torch"], "the same", "none")]
