"""What the attention mask of a chat says, in two numbers a row."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from glmtrt_helpers.core.errors import WorkbookError


def read_mask(call: Mapping[str, np.ndarray], past: int) -> tuple[np.ndarray, np.ndarray]:
    """What the mask of a call of forward, (batch, 1, S, past + S), says, for each row and counted from the first token.

    Returns skip (batch,), how many tokens at the left are padding, and context (batch,): the tokens before it see one
    another, each from it on sees what comes before it, and itself. Raises WorkbookError for a mask that says more.
    """
    seen = ~np.asarray(call["attention_mask"])[:, 0]
    if seen.shape[2] != past + seen.shape[1]:
        raise WorkbookError(
            f"the mask covers {seen.shape[2]} tokens, where {past} lie in the cache and {seen.shape[1]} are new: give "
            "it a column for each of both."
        )
    # What a row sees is one piece; where it begins and ends and its size say that, quicker than a second mask would.
    begin, end = seen.argmax(axis=-1), seen.shape[-1] - seen[..., ::-1].argmax(axis=-1)
    skip = begin[:, -1]  # the last token sees all but padding
    first = np.maximum(skip - past, 0)  # the first new token that is none, and how far it sees
    context = np.take_along_axis(end, first[:, None], axis=1)[:, 0]
    rows = np.arange(past, seen.shape[-1])
    ends = np.maximum(context[:, None], rows + 1)
    right = (begin == skip[:, None]) & (end == ends) & (np.count_nonzero(seen, axis=-1) == ends - skip[:, None])
    right |= rows < skip[:, None]  # what padding sees means nothing
    if not right.all() or (past and ((skip > past) | (context > past + 1)).any()):
        raise WorkbookError(
            "this engine takes masks of a chat: padding at the left, tokens of a prompt that see one another, "
            "then tokens that see what came before them. This mask is another: take another backend."
        )
    return skip, context
