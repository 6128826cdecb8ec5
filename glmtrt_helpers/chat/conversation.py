"""Notebook 06: a chat over any session: rounds, streaming, stopping, the context limit, and how answers are finished.

Nothing here depends on the backend, and nothing needs PyTorch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from glmtrt_helpers.chat.sampling import Sampler, Sampling
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.base import Session
from glmtrt_helpers.sessions.decode_loop import generate

ROOM = 64  # tokens of an answer for which old rounds are dropped
# Upstream's training data has this placeholder for the date, and its code fills it in.
DATE_MARK, DATE = "[[训练时间]]", "2023年"
FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}
_HALF_WIDTH = "".join(FULL_WIDTH)
_CJK = "[\u4e00-\u9fff]"
_NEXT_TO_CJK = re.compile(rf"(?<={_CJK})[{re.escape(_HALF_WIDTH)}]|[{re.escape(_HALF_WIDTH)}](?={_CJK})")


@dataclass(frozen=True)
class Reply:
    """An answer so far.

    text: all of it. settled: the part at its start that will not change any more, for a terminal, which cannot take
    back what it printed. ids: its tokens. prompt: tokens of the prompt. dropped: old rounds that were dropped for it.
    to_first, seconds: time to the first token, and so far. ended: "" while it grows, then "eop", "length" or "stopped".
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
        """Of the decode steps alone: the first token comes from the prefill."""
        decoding = self.seconds - self.to_first
        return (len(self.ids) - 1) / decoding if decoding > 0 and len(self.ids) > 1 else 0.0


class Chat:
    """One conversation. history: rounds of (question, answer), which the next prompt repeats."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        session: Session,
        sampling: Sampling | None = None,
        *,
        max_length: int | None = None,
        drop_oldest: bool = False,
    ):
        """max_length: tokens of prompt and answer together, as many as the model allows by default.

        drop_oldest: at the context limit, drop the oldest rounds instead of raising WorkbookError.
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
        """Tokens that model, session and max_length allow for prompt and answer together."""
        return min(self.max_length or self.checkpoint.max_length, self.checkpoint.max_length, self.session.limits.total)

    def set_sampling(self, sampling: Sampling) -> None:
        """Change the sampling from the next answer on; a seed starts again."""
        if sampling != self.sampler.sampling:
            self.sampler = Sampler(sampling, self.tokenizer.blank_id)

    def cancel(self) -> None:
        """End the running answer after its current token; called from another thread or between two replies."""
        self._cancelled = True

    def ask(self, query: str) -> str:
        """The whole answer."""
        *_, last = self.stream(query)
        return last.text

    def stream(self, query: str) -> Iterator[Reply]:
        """The answer as it grows: one Reply per token, and a last one that says how it ended.

        The round joins the history when the answer ends, even if it was cancelled or the caller stopped iterating.
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
                reply = self._extended(reply, token, time.perf_counter() - started)
                yield reply
                if self._cancelled:
                    break
            else:
                ended = "length" if len(prompt) + len(reply.ids) >= self.limit else "eop"
        except GeneratorExit:  # the caller stopped iterating
            self.history.append((query, reply.text))
            raise
        self.history.append((query, reply.text))
        yield replace(reply, settled=reply.text, seconds=time.perf_counter() - started, ended=ended)

    def _extended(self, reply: Reply, token: int, seconds: float) -> Reply:
        ids = (*reply.ids, token)
        text = post_process(self.tokenizer.decode(list(ids)))
        return replace(
            reply, text=text, settled=settled_part(text), ids=ids, seconds=seconds, to_first=reply.to_first or seconds
        )

    def _prompt(self, query: str) -> tuple[list[int], int]:
        """Ids of the next prompt, and how many old rounds were dropped for it."""
        if not query.strip():
            raise WorkbookError("the question is empty: write something.")
        longest = min(self.limit - 1, self.session.limits.prompt)
        for dropped in range(len(self.history) + 1 if self.drop_oldest else 1):
            ids = chat_prompt(self.tokenizer, query, self.history[dropped:])
            if len(ids) <= longest and (len(ids) + ROOM <= self.limit or not self.drop_oldest):
                break
        if len(ids) > longest and dropped == len(self.history):
            raise WorkbookError(
                f"the question alone is {len(ids)} tokens long; at most {longest} leave room for an answer: shorten it."
            )
        if len(ids) > longest:
            raise WorkbookError(
                f"the conversation is {len(ids)} tokens long; at most {longest} leave room for an answer: start a new "
                "one, shorten the question, or drop the oldest rounds (drop_oldest, `--drop-oldest`)."
            )
        del self.history[:dropped]
        return ids, dropped

    def ask_together(self, queries: Sequence[str]) -> list[str]:
        """Answers to several questions, in one left-padded batch; the history is neither read nor changed."""
        prompts = [chat_prompt(self.tokenizer, query) for query in queries]
        answers: list[list[int]] = [[] for _ in prompts]
        for tokens in generate(self.session, self.checkpoint, prompts, choose=self.sampler, max_length=self.max_length):
            for answer, token in zip(answers, tokens, strict=True):
                if token is not None:
                    answer.append(token)
        return [post_process(self.tokenizer.decode(answer)) for answer in answers]


def post_process(text: str) -> str:
    """An answer as upstream's `process_response` returns it.

    It is stripped, its date is filled in, and punctuation next to Chinese characters becomes full-width.
    """
    text = text.strip().replace(DATE_MARK, DATE)
    return _NEXT_TO_CJK.sub(lambda match: FULL_WIDTH[match[0]], text)


def settled_part(text: str) -> str:
    """The start of a post-processed, unfinished text that no further token can change.

    Not settled are trailing white space, which would be stripped at the end, punctuation that a Chinese character may
    follow, a character whose last bytes are still to come, and the start of the date's placeholder.
    """
    while True:
        shorter = text.rstrip().rstrip(_HALF_WIDTH + "\ufffd")
        begun = next((k for k in range(len(DATE_MARK) - 1, 0, -1) if shorter.endswith(DATE_MARK[:k])), 0)
        shorter = shorter[: len(shorter) - begun]
        if shorter == text:
            return text
        text = shorter
