"""Notebook 06: a chat over any session: rounds, streaming, sampling, stopping, and the end of the context.

Nothing here knows which backend answers, and nothing needs PyTorch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from glmtrt_helpers.chat.sampling import Sampler, Sampling
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.base import Session
from glmtrt_helpers.sessions.decode_loop import generate, greedy

# Upstream writes the training date as a placeholder and fills it in.
DATE_MARK, DATE = "[[训练时间]]", "2023年"
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_HALF_WIDTH = "".join(FULL_WIDTH)
_CJK = "[\u4e00-\u9fff]"
_BESIDE_CJK = re.compile(rf"(?<={_CJK})[{re.escape(_HALF_WIDTH)}]|[{re.escape(_HALF_WIDTH)}](?={_CJK})")
# Rounds are dropped until an answer of so many tokens has room.
ROOM = 64


@dataclass(frozen=True)
class Reply:
    """An answer as far as it has come.

    text: all of it so far. settled: the part at its beginning that will not change any more, for a terminal, which
    cannot take back what it printed. ended: "" while it goes on, then "eop", "length" or "stopped".
    Times in seconds; prompt and tokens are counts; dropped: rounds that had to go to make room.
    """

    text: str
    settled: str
    ids: tuple[int, ...]
    prompt: int
    dropped: int
    to_first: float
    seconds: float
    ended: str = ""

    @property
    def tokens_per_second(self) -> float:
        """Of the decode steps alone: the first token belongs to the prefill."""
        passed = self.seconds - self.to_first
        return (len(self.ids) - 1) / passed if passed > 0 and len(self.ids) > 1 else 0.0


def post_process(text: str) -> str:
    """What upstream's `process_response` makes of an answer: stripped, dated, full-width punctuation beside Chinese."""
    text = text.strip().replace(DATE_MARK, DATE)
    return _BESIDE_CJK.sub(lambda match: FULL_WIDTH[match[0]], text)


def settled_part(text: str) -> str:
    """The beginning of a post-processed, unfinished text that no further token can change.

    Held back are white space (it would be stripped at the end), punctuation that a Chinese character may follow, a
    character of which not all bytes have come, and the beginning of the date's placeholder.
    """
    while True:
        shorter = text.rstrip().rstrip(_HALF_WIDTH + "\ufffd")
        begun = next((k for k in range(len(DATE_MARK) - 1, 0, -1) if shorter.endswith(DATE_MARK[:k])), 0)
        shorter = shorter[: len(shorter) - begun]
        if shorter == text:
            return text
        text = shorter


class Chat:
    """One conversation. history: rounds of (question, answer), which the next prompt tells again."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        session: Session,
        sampling: Sampling | None = None,
        *,
        max_length: int | None = None,
        drop_oldest: bool = False,
    ):
        """max_length: prompt and answer together, the model's whole length by default.

        drop_oldest: at the context limit let the oldest rounds go, instead of raising WorkbookError.
        """
        self.checkpoint = checkpoint
        self.session = session
        self.tokenizer = load_tokenizer(checkpoint)
        self.sampler = Sampler(sampling or Sampling(), self.tokenizer.blank_id)
        self.max_length = max_length
        self.drop_oldest = drop_oldest
        self.history: list[tuple[str, str]] = []
        self._cancelled = False

    @property
    def limit(self) -> int:
        """Tokens of prompt and answer together that model, session and max_length allow."""
        return min(self.max_length or self.checkpoint.max_length, self.checkpoint.max_length, self.session.limits.total)

    def set_sampling(self, sampling: Sampling) -> None:
        """Choose differently from the next answer on; a seed starts anew."""
        if sampling != self.sampler.sampling:
            self.sampler = Sampler(sampling, self.tokenizer.blank_id)

    def cancel(self) -> None:
        """End the running answer after its current token; from another thread or between two replies."""
        self._cancelled = True

    def ask(self, query: str) -> str:
        """The whole answer."""
        *_, last = self.stream(query)
        return last.text

    def stream(self, query: str) -> Iterator[Reply]:
        """The answer as it grows, one Reply per token and a last one that says how it ended.

        The round joins the history when the answer ends, also if it was cancelled, or the caller stopped listening.
        Raises WorkbookError, before anything runs, for an empty question and at the context limit.
        """
        prompt, dropped = self._prompt(query)
        self._cancelled = False
        started = time.perf_counter()
        reply = Reply("", "", (), len(prompt), dropped, 0.0, 0.0)
        steps = generate(self.session, self.checkpoint, [prompt], choose=self.sampler, max_length=self.max_length)
        ended = "stopped"
        try:
            for (token,) in steps:
                assert token is not None
                reply = self._grown(reply, token, time.perf_counter() - started)
                yield reply
                if self._cancelled:
                    break
            else:
                ended = "length" if len(prompt) + len(reply.ids) >= self.limit else "eop"
        except GeneratorExit:  # the caller has heard enough
            self.history.append((query, reply.text))
            raise
        self.history.append((query, reply.text))
        yield replace(reply, settled=reply.text, seconds=time.perf_counter() - started, ended=ended)

    def _grown(self, reply: Reply, token: int, seconds: float) -> Reply:
        ids = (*reply.ids, token)
        text = post_process(self.tokenizer.decode(list(ids)))
        return replace(
            reply, text=text, settled=settled_part(text), ids=ids, seconds=seconds, to_first=reply.to_first or seconds
        )

    def _prompt(self, query: str) -> tuple[list[int], int]:
        """Ids of the next prompt, and how many old rounds had to go for it."""
        if not query.strip():
            raise WorkbookError("the question is empty: write something.")
        longest = min(self.limit - 1, self.session.limits.prompt)
        ids = chat_prompt(self.tokenizer, query, self.history)
        if len(ids) <= longest and not (self.drop_oldest and len(ids) + ROOM > self.limit and self.history):
            return ids, 0
        if not self.drop_oldest or not self.history:
            raise WorkbookError(
                f"the conversation has come to {len(ids)} tokens, at most {longest} leave room for an answer: start "
                "a new one, shorten the question, or let the oldest rounds go (drop_oldest, `--drop-oldest`)."
            )
        for dropped in range(1, len(self.history) + 1):
            ids = chat_prompt(self.tokenizer, query, self.history[dropped:])
            if len(ids) <= longest and len(ids) + ROOM <= self.limit:
                break
        if len(ids) > longest:
            raise WorkbookError(f"the question alone has {len(ids)} tokens, at most {longest} fit: shorten it.")
        del self.history[:dropped]
        return ids, dropped

    def ask_together(self, queries: Sequence[str]) -> list[str]:
        """Answers to several questions at once, in one left-padded batch; the history is neither read nor changed."""
        prompts = [chat_prompt(self.tokenizer, query) for query in queries]
        answers: list[list[int]] = [[] for _ in prompts]
        for tokens in generate(self.session, self.checkpoint, prompts, choose=self.sampler, max_length=self.max_length):
            for answer, token in zip(answers, tokens, strict=True):
                if token is not None:
                    answer.append(token)
        return [post_process(self.tokenizer.decode(answer)) for answer in answers]


@dataclass(frozen=True)
class Comparison:
    """One question put to several backends. first_difference: index of the first token that is not the same in all."""

    question: str
    answers: Mapping[str, str]
    first_difference: int | None
    pieces: Mapping[str, str]


def compare(
    checkpoint: Checkpoint, sessions: Mapping[str, Session], questions: Sequence[str], max_length: int | None = None
) -> list[Comparison]:
    """Greedy answers of every session, and where they part. pieces: the token of each backend at that place."""
    tokenizer = load_tokenizer(checkpoint)
    rows = []
    for question in questions:
        prompt = chat_prompt(tokenizer, question)
        limit = max_length and len(prompt) + max_length
        ids = {name: greedy(s, checkpoint, prompt, max_length=limit) for name, s in sessions.items()}
        length = max(map(len, ids.values()))
        at = next((i for i in range(length) if len({tuple(a[i : i + 1]) for a in ids.values()}) > 1), None)
        answers = {name: post_process(tokenizer.decode(a)) for name, a in ids.items()}
        pieces = {} if at is None else {name: tokenizer.piece((*a, tokenizer.eop_id)[at]) for name, a in ids.items()}
        rows.append(Comparison(question, answers, at, pieces))
    return rows


def comparison_rows(rows: list[Comparison]) -> list[tuple[str, ...]]:
    """Rows (question, answer of each backend or "the same", first token that differs) of `conversation.compare`."""
    table = []
    for row in rows:
        first, *others = row.answers.values()
        same = ("the same" if answer == first else answer for answer in others)
        at = row.first_difference
        where = "none" if at is None else f"{at}: " + " / ".join(row.pieces.values())
        table.append((row.question, first, *same, where))
    return table
