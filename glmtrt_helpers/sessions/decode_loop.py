"""Notebook 06: the decode loop over any session, for a batch of prompts; it needs no PyTorch itself."""

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
    choose: selects ids (batch,) by scores (batch, vocabulary). To stop midway, stop iterating.
    Raises WorkbookError, before anything runs, for prompts that do not fit, and where something else uses the session
    before the end.
    """
    limit = min(max_length or checkpoint.max_length, checkpoint.max_length, session.limits.total)
    _check_prompts(session, prompts, limit)
    eop, pad = int(checkpoint.config["eos_token_id"]), int(checkpoint.config["pad_token_id"])
    call = positions_and_mask.prefill(checkpoint, prompts)
    open_rows = np.ones(len(prompts), dtype=np.bool_)
    with session.alone():
        session.reset()
        seen = session.changes
    is_greedy = choose is take_best or getattr(choose, "is_greedy", False)
    device_loop: Generator[np.ndarray] | None = None
    try:
        for _ in range(max(len(prompt) for prompt in prompts), limit):
            with session.alone():
                if session.changes != seen:
                    raise WorkbookError(
                        "another conversation has used this session since the last token, so its cache is not this "
                        "one's any more: finish one answer before the next, or open a session for each."
                    )
                if device_loop is None:
                    selected = choose(session.step(call))
                    device_loop = session.follow() if is_greedy else None
                if device_loop is not None:
                    selected = next(device_loop)
                seen = session.changes
            tokens = np.where(open_rows, selected, pad)
            open_rows &= tokens != eop
            if not open_rows.any():
                return
            yield [int(token) if is_open else None for token, is_open in zip(tokens, open_rows, strict=True)]
            call = positions_and_mask.decode(call, tokens)
    finally:
        if device_loop is not None:
            device_loop.close()


def _check_prompts(session: Session, prompts: Sequence[Sequence[int]], limit: int) -> None:
    """Refuse prompts that do not fit before anything runs."""
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
    session: Session, checkpoint: Checkpoint, prompt: Sequence[int], *, max_length: int | None = None
) -> list[int]:
    """Decode one prompt of ids greedily; returns the new ids, without <eop>.

    max_length: prompt and answer together, `checkpoint.max_length` by default.
    """
    steps = generate(session, checkpoint, [prompt], max_length=max_length)
    return [token for (token,) in steps if token is not None]
