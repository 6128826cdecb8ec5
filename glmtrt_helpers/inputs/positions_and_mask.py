"""What a chat feeds to `forward`, as NumPy arrays: ids, two rows of positions and the mask, for prefill and decode.

Stands between the tokenizer and the sessions and needs no PyTorch; `inputs` makes torch tensors of the same arrays.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError

Arrays = dict[str, np.ndarray]


def prefill(checkpoint: Checkpoint, prompts: Sequence[Sequence[int]]) -> Arrays:
    """Inputs, but for the past, of prompts of ids that end in [gMASK], <sop>; shorter ones are padded on the left.

    input_ids (batch, S) int64, position_ids (batch, 2, S) int64, attention_mask (batch, 1, S, S) bool with True =
    hidden. Padding: id 3, positions 0, hidden from every row that is not padding itself.
    """
    gmask, sop, pad = (int(checkpoint.config[key]) for key in ("gmask_token_id", "bos_token_id", "pad_token_id"))
    length = max(len(prompt) for prompt in prompts)
    ids = np.full((len(prompts), length), pad, dtype=np.int64)
    positions = np.zeros((len(prompts), 2, length), dtype=np.int64)
    mask = np.ones((len(prompts), 1, length, length), dtype=np.bool_)
    for row, prompt in enumerate(prompts):
        if sop not in prompt or gmask not in prompt:
            raise WorkbookError(
                f"prompt {row} has no [gMASK] ({gmask}) and <sop> ({sop}): make it with Tokenizer.encode."
            )
        start = length - len(prompt)
        context = list(prompt).index(sop)  # tokens before <sop> see each other
        ids[row, start:] = prompt
        index = np.arange(len(prompt))
        positions[row, 0, start:] = np.where(index < context, index, list(prompt).index(gmask))
        positions[row, 1, start:] = (index - context + 1).clip(min=0)
        visible = (index[None, :] <= index[:, None]) | (index[None, :] < context)
        mask[row, 0, start:, start:] = ~visible
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask}


def decode(previous: Mapping[str, np.ndarray], tokens: np.ndarray) -> Arrays:
    """Inputs, but for the past, of one more token per row, from those of the call before; tokens (batch,) int64.

    The position stays that of [gMASK], the block position counts on, and the new row sees what the last saw
    and itself.
    """
    positions = previous["position_ids"][:, :, -1:].copy()
    positions[:, 1] += 1
    last_row = previous["attention_mask"][:, :, -1:, :]
    mask = np.concatenate([last_row, np.zeros_like(last_row[..., :1])], axis=-1)
    return {"input_ids": np.asarray(tokens)[:, None], "position_ids": positions, "attention_mask": mask}
