"""Ids, two rows of positions and the mask of each call of `forward` in a chat, as NumPy arrays; needs no PyTorch.

`examples` makes torch tensors of the same arrays.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError

Arrays = dict[str, np.ndarray]


def prefill(checkpoint: Checkpoint, prompts: Sequence[Sequence[int]]) -> Arrays:
    """Inputs, without the past, for prompts of ids that end in [gMASK], <sop>; shorter ones are padded on the left.

    input_ids (batch, S) int64, position_ids (batch, 2, S) int64, attention_mask (batch, 1, S, S) bool with True =
    hidden. Raises WorkbookError for a prompt without [gMASK] or <sop>.
    """
    gmask, sop, pad = (int(checkpoint.config[key]) for key in ("gmask_token_id", "bos_token_id", "pad_token_id"))
    length = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), length), pad, dtype=np.int64)
    rows = []
    for row, prompt in enumerate(prompts):
        if sop not in prompt or gmask not in prompt:
            raise WorkbookError(
                f"prompt {row} has no [gMASK] ({gmask}) and <sop> ({sop}): make it with Tokenizer.encode."
            )
        padding = length - len(prompt)
        ids[row, padding:] = prompt
        columns = padding + prompt.index(sop), padding + prompt.index(gmask)
        rows.append(positions_and_mask(length, *columns, padding))
    positions, mask = (np.stack(parts) for parts in zip(*rows, strict=True))
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None]}


def positions_and_mask(length: int, sop: int, gmask: int, padding: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """position_ids (2, length) int64 and attention_mask (length, length) bool, True = hidden, of one row of a batch.

    Tokens before <sop> see each other; <sop> and the tokens after it see themselves and what stands before them. The
    first row of positions counts up to <sop> and is that of [gMASK] from there on; the second, the block position, is 0
    before <sop> and counts from 1 there. Padding has positions 0, sees nothing and is seen by nothing.
    sop, gmask: columns of <sop> and [gMASK]. padding: how many columns at the left are padding.
    """
    column = np.arange(length)
    positions = np.stack([np.where(column < sop, column, gmask) - padding, column - sop + 1]).clip(min=0)
    query, key = column[:, None], column[None, :]
    visible = ((key <= query) | (key < sop)) & (key >= padding) & (query >= padding)
    return positions, ~visible


def decode(previous: Mapping[str, np.ndarray], tokens: np.ndarray) -> Arrays:
    """Inputs, without the past, for one more token per row, from those of the call before; tokens (batch,) int64.

    The position stays that of [gMASK], the block position counts on, and the new token sees what the last one saw and
    itself.
    """
    positions = previous["position_ids"][:, :, -1:].copy()
    positions[:, 1] += 1
    last_row = previous["attention_mask"][:, :, -1:, :]
    mask = np.concatenate([last_row, np.zeros_like(last_row[..., :1])], axis=-1)
    return {"input_ids": np.asarray(tokens)[:, None], "position_ids": positions, "attention_mask": mask}
