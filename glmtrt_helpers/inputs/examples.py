"""Inputs of `forward` as torch tensors: for prompts, and seeded ones of any batch, sequence and past."""

from collections.abc import Sequence

import numpy as np
import torch

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.names import past_names
from glmtrt_helpers.inputs.positions_and_mask import positions_and_mask, prefill

_FIRST_PIECE = 6  # after <unk>, <s>, </s>, <pad>, <n> and "▁"


def empty_past(checkpoint: Checkpoint, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The cache before the first token: 2 * num_layers tensors (0, batch, heads, d)."""
    shape = (0, batch, checkpoint.num_heads, checkpoint.head_size)
    return {name: torch.zeros(shape, dtype=dtype) for name in past_names(checkpoint.num_layers)}


def prompt_inputs(
    checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """`positions_and_mask.prefill` as tensors, with an empty past in dtype."""
    flat = {name: torch.from_numpy(array) for name, array in prefill(checkpoint, prompts).items()}
    return flat | empty_past(checkpoint, len(prompts), dtype)


def example_inputs(
    checkpoint: Checkpoint,
    batch: int,
    sequence: int,
    past: int,
    dtype: torch.dtype = torch.float32,
    *,
    padding: Sequence[int] | None = None,
    sop: int | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Seeded inputs of any shape: random ids, positions and mask as a chat would have them, a random cache.

    The whole of past + sequence is one prompt.
    padding: how many tokens at the left of each row are padding, for batches of unequal prompts.
    sop: where <sop> stands, after [gMASK]; by default the first new token where there is a past, the last token where
    there is none. past + sequence: it would come next.
    Raises WorkbookError for a shape that the model cannot take.
    """
    total = past + sequence
    if batch < 1 or sequence < 1 or past < 0 or total > checkpoint.max_length:
        raise WorkbookError(
            f"batch {batch}, sequence {sequence}, past {past} is no input of {checkpoint.directory}: batch and "
            f"sequence are at least 1, past at least 0, past + sequence at most {checkpoint.max_length}."
        )
    padding = padding or (0,) * batch
    if sop is None:
        sop = past or sequence - 1
    rows = [positions_and_mask(total, sop, max(sop - 1, 0), pad) for pad in padding]
    positions = torch.from_numpy(np.stack([row_positions[:, past:] for row_positions, _ in rows]))
    mask = torch.from_numpy(np.stack([row_mask[None, past:] for _, row_mask in rows]))
    generator = torch.Generator().manual_seed(seed)
    shape = batch, sequence
    ids = torch.randint(_FIRST_PIECE, int(checkpoint.config["mask_token_id"]), shape, generator=generator)
    ids[torch.arange(past, total) < torch.tensor(padding)[:, None]] = int(checkpoint.config["pad_token_id"])
    cache_shape = past, batch, checkpoint.num_heads, checkpoint.head_size
    cache = {
        name: torch.randn(cache_shape, generator=generator).to(dtype) for name in past_names(checkpoint.num_layers)
    }
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask} | cache
