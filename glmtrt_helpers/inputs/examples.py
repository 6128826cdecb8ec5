"""TODO."""

from collections.abc import Mapping, Sequence

import torch

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.inputs.names import input_names


def empty_past(checkpoint: Checkpoint, batch: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The cache before the first token: 2 * num_layers tensors (0, batch, heads, d)."""
    shape = (0, batch, checkpoint.num_heads, checkpoint.head_size)
    return {name: torch.zeros(shape, dtype=dtype) for name in input_names(checkpoint.num_layers)[3:]}


def prompt_inputs(
    checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """`positions_and_mask.prefill` as tensors, with an empty past in dtype."""
    arrays = positions_and_mask.prefill(checkpoint, prompts)
    flat = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return flat | empty_past(checkpoint, len(prompts), dtype)


def next_inputs(
    previous: Mapping[str, torch.Tensor], outputs: Mapping[str, torch.Tensor], tokens: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`decode` as tensors: one more token per row, tokens (batch,) int64, and present becomes past."""
    before = {name: previous[name].numpy() for name in ("position_ids", "attention_mask")}
    flat = {name: torch.from_numpy(array) for name, array in positions_and_mask.decode(before, tokens.numpy()).items()}
    past = {name.replace("present", "past_key_values"): t for name, t in outputs.items() if name != "logits"}
    return flat | past


def example_inputs(
    checkpoint: Checkpoint,
    batch: int,
    sequence: int,
    past: int,
    dtype: torch.dtype = torch.float32,
    *,
    padding: Sequence[int] | None = None,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Seeded inputs of any shape: random ids, positions and mask as a chat would have them, a random cache.

    The whole of past + sequence is one prompt whose <sop> is the first new token where there is a past, the last token
    where there is none. padding: how many tokens at the left of each row are padding (for batches of unequal prompts).
    Raises WorkbookError for a shape the model cannot take.
    """
    total = past + sequence
    if batch < 1 or sequence < 1 or past < 0 or total > checkpoint.max_length:
        raise WorkbookError(
            f"batch {batch}, sequence {sequence}, past {past} is no input of {checkpoint.directory}: batch and "
            f"sequence are at least 1, past at least 0, past + sequence at most {checkpoint.max_length}."
        )
    generator = torch.Generator().manual_seed(seed)
    sop = max(past, 0) if past else sequence - 1
    gmask = max(sop - 1, 0)
    index = torch.arange(total)
    visible = (index[None, :] <= index[:, None]) | (index[None, :] < sop)
    mask = (~visible[past:]).repeat(batch, 1, 1, 1)
    rows = torch.stack([torch.where(index < sop, index, gmask), (index - sop + 1).clamp(min=0)])[:, past:]
    positions = rows.repeat(batch, 1, 1)
    first_piece = 6  # behind <unk>, <s>, </s>, <pad>, <n> and "▁"
    ids = torch.randint(first_piece, int(checkpoint.config["mask_token_id"]), (batch, sequence), generator=generator)
    for row, pad in enumerate(padding or ()):
        mask[row, :, :, :pad] = True
        shifted = (positions[row, 0] - pad).clamp(min=0)
        positions[row, 0] = shifted
        ids[row, : max(pad - past, 0)] = int(checkpoint.config["pad_token_id"])
    shape = (past, batch, checkpoint.num_heads, checkpoint.head_size)
    cache = {name: torch.randn(shape, generator=generator).to(dtype) for name in input_names(checkpoint.num_layers)[3:]}
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask} | cache
