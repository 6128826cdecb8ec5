"""What the one-kernel engine takes on the GPU, from the checkpoint's sizes alone."""

from __future__ import annotations

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.engines.memory_prediction import EngineMemory, engine_weights

ROWS = 8  # that one launch of decoder.cu takes at most
WORKSPACE = 32 * 2**20  # bytes for cuBLASLt, as NVIDIA advises for Hopper


def cache_bytes(checkpoint: Checkpoint, rows: int) -> int:
    """Keys and values in fp16 of all positions that the checkpoint has, written in place."""
    return 2 * checkpoint.num_layers * rows * checkpoint.max_length * checkpoint.hidden_size * 2


def predict_memory(checkpoint: Checkpoint, rows: int = 1, prompt: int = 1) -> EngineMemory:
    """Bytes on the GPU for `rows` chats whose longest prompt, all rows together, has `prompt` tokens.

    io: logits of the last position of each row, in fp32. activations: of a prompt, residuals in fp32 and the rest in
    fp16, and what cuBLASLt uses.
    """
    hidden = checkpoint.hidden_size
    inner = int(checkpoint.config.get("inner_hidden_size") or 4 * hidden)
    large = prompt > ROWS or rows > ROWS
    io = 4 * checkpoint.vocab_size * (ROWS + rows * large)
    activations = (prompt * (14 * hidden + 2 * inner) + WORKSPACE) * large
    return EngineMemory(engine_weights(checkpoint, "fp16"), cache_bytes(checkpoint, rows), io, activations)
