"""Notebook 06: the greedy answers of several backends, compared token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glmtrt_helpers.chat.conversation import post_process
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.base import Session
from glmtrt_helpers.sessions.decode_loop import greedy


@dataclass(frozen=True)
class Comparison:
    """One question to several backends.

    first_difference: index of the first token that is not the same in all answers. pieces: each backend's token there.
    """

    question: str
    answers: Mapping[str, str]
    first_difference: int | None
    pieces: Mapping[str, str]


def compare(checkpoint: Checkpoint, sessions: Mapping[str, Session], questions: Sequence[str]) -> list[Comparison]:
    """Ask every session every question; each answer is greedy, and the first of a conversation."""
    tokenizer = load_tokenizer(checkpoint)
    comparisons = []
    for question in questions:
        prompt = chat_prompt(tokenizer, question)
        ids = {name: greedy(session, checkpoint, prompt) for name, session in sessions.items()}
        longest = max(map(len, ids.values()))
        first = next((i for i in range(longest) if len({tuple(a[i : i + 1]) for a in ids.values()}) > 1), None)
        answers = {name: post_process(tokenizer.decode(a)) for name, a in ids.items()}
        pieces = {}
        if first is not None:
            pieces = {name: tokenizer.piece((*a, tokenizer.eop_id)[first]) for name, a in ids.items()}
        comparisons.append(Comparison(question, answers, first, pieces))
    return comparisons


def comparison_rows(comparisons: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Rows (question, first backend's answer, others' answers or "the same", first difference)."""
    rows = []
    for comparison in comparisons:
        answer, *others = comparison.answers.values()
        index = comparison.first_difference
        difference = "none" if index is None else f"{index}: {' / '.join(comparison.pieces.values())}"
        rows.append(
            (comparison.question, answer, *("the same" if other == answer else other for other in others), difference)
        )
    return rows
