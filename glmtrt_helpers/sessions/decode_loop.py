"""Notebook 06: sessions, one interface over three backends that run `forward`, and decoding on top of it.

`run` is one call of forward: flat named inputs (`names.input_names`) in, flat named outputs out, everything as NumPy
arrays on the host; comparisons use it. `step` is what a chat uses: the session keeps the cache, each call adds to it,
and only the scores of the next token come back. `tensorrt` is in `tensorrt_session`; it and `ort` need no PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence

import numpy as np

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.sessions.base import Session


def take_best(scores: np.ndarray) -> np.ndarray:
    """Greedy choice: (batch, vocabulary) scores to (batch,) ids."""
    return scores.argmax(axis=-1)


def generate(
    session: Session,
    checkpoint: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    choose: Callable[[np.ndarray], np.ndarray] = take_best,
    max_length: int | None = None,
) -> Iterator[list[int | None]]:
    """Decode prompts of ids as one left-padded batch; yields the new id of every row, step by step.

    A row that has come to <eop> yields None from then on; the end of all rows, or max_length, ends the iteration.
    max_length: prompt and answer together, padding included; at most what model and session can take.
    choose: picks ids (batch,) from scores (batch, vocabulary). To stop midway, stop iterating.
    """
    limit = min(max_length or checkpoint.max_length, checkpoint.max_length, session.limits.total)
    check_prompts(session, prompts, limit)
    eop, pad = int(checkpoint.config["eos_token_id"]), int(checkpoint.config["pad_token_id"])
    call = positions_and_mask.prefill(checkpoint, prompts)
    open_rows = np.ones(len(prompts), dtype=np.bool_)
    session.reset()
    is_greedy = choose is take_best or getattr(choose, "is_greedy", False)
    following: Generator[np.ndarray] | None = None
    try:
        for _ in range(max(len(prompt) for prompt in prompts), limit):
            if following is None:
                chosen = choose(session.step(call))
                following = session.follow() if is_greedy else None  # if it can, it feeds itself from here on
            if following is not None:
                chosen = next(following)
            tokens = np.where(open_rows, chosen, pad)
            open_rows &= tokens != eop
            if not open_rows.any():
                return
            yield [int(token) if is_open else None for token, is_open in zip(tokens, open_rows, strict=True)]
            call = positions_and_mask.decode(call, tokens)
    finally:
        if following is not None:
            following.close()


def check_prompts(session: Session, prompts: Sequence[Sequence[int]], limit: int) -> None:
    """Refuse what does not fit, before anything runs."""
    longest = max((len(prompt) for prompt in prompts), default=0)
    if not longest:
        raise WorkbookError("there is no prompt to decode: give at least one.")
    if longest >= limit:
        raise WorkbookError(f"the prompt has {longest} tokens, the limit is {limit}: shorten it or drop old rounds.")
    if longest > session.limits.prompt or len(prompts) > session.limits.batch:
        raise WorkbookError(
            f"{len(prompts)} prompts of up to {longest} tokens lie outside the engine's profiles (at most "
            f"{session.limits.batch} of {session.limits.prompt}): shorten them, or build the engine with larger maxima."
        )


def greedy(
    session: Session,
    checkpoint: Checkpoint,
    prompt: Sequence[int],
    *,
    max_length: int | None = None,
    on_token: Callable[[int], None] | None = None,
) -> list[int]:
    """Decode one prompt of ids greedily; returns the new ids, <eop> left out.

    max_length: prompt and answer together, `checkpoint.max_length` by default.
    on_token is called with each id as it comes.
    """
    answer: list[int] = []
    for (token,) in generate(session, checkpoint, [prompt], max_length=max_length):
        assert token is not None  # the only row is open, or generate had ended
        answer.append(token)
        if on_token:
            on_token(token)
    return answer
