"""TODO."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, shares_vocabulary
from glmtrt_helpers.checkpoints.config import expected_shapes
from glmtrt_helpers.core.precisions import PRECISIONS
from glmtrt_helpers.engines.profiles import Profile

BYTES = {name: dtype.itemsize for name, dtype in PRECISIONS.items()}
WORKSPACE = 4 * 2**20  # what every engine asked for beside the tensors


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on the GPU: weights, the two buffers of the cache, inputs and logits, and what is in between."""

    weights: int
    cache: int
    io: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.io + self.activations


def engine_weights(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of weights in an engine: a vocabulary matrix that is stored twice is held once."""
    numbers = sum(map(math.prod, expected_shapes(checkpoint.config).values()))
    if not checkpoint.tensors or shares_vocabulary(checkpoint):
        numbers -= checkpoint.vocab_size * checkpoint.hidden_size
    return numbers * BYTES[dtype]


def predict_build(checkpoint: Checkpoint, dtype: str = "fp16") -> tuple[int, int]:
    """Bytes of memory and of disk that a build needs: one copy of the weights, and what TensorRT itself takes.

    Fitted to builds of 2 MB to 13 GB, whose peaks lay 0.45 GB and up to 1.04 times the weights high.
    """
    weights = engine_weights(checkpoint, dtype)
    return int(1.06 * weights) + 700_000_000, int(1.01 * weights) + 50_000_000


def predict_memory(checkpoint: Checkpoint, profiles: Sequence[Profile], dtype: str = "fp16") -> EngineMemory:
    """What the engine and its session will take.

    weights: every tensor of the state dict in dtype, equal vocabulary matrices once. cache: past and present, two
    buffers per layer for key and for value, each as long as the largest total. io: ids, positions, mask and the logits
    of all positions. activations: fitted to what TensorRT-RTX 1.6.1 asked for over hidden sizes of 128 to 4096, up to 8
    rows and 2047 tokens; the larger of the profiles counts, since one context serves both.
    """
    width = BYTES[dtype]
    tokens = max(profile.batch.max * (profile.sequence.max + profile.past.max) for profile in profiles)
    cache = 2 * 2 * checkpoint.num_layers * tokens * checkpoint.hidden_size * width
    rows = max(profile.batch.max * profile.sequence.max for profile in profiles)
    masks = max(p.batch.max * p.sequence.max * (p.sequence.max + p.past.max) for p in profiles)
    io = rows * (checkpoint.vocab_size * width + 3 * 8) + masks
    return EngineMemory(
        engine_weights(checkpoint, dtype),
        cache,
        io,
        max(_activations(checkpoint, profile, dtype) for profile in profiles),
    )


def _activations(checkpoint: Checkpoint, profile: Profile, dtype: str) -> int:
    """In fp16 attention is fused and the widest layer counts; in fp32 two copies of its scores stand in memory.

    With a past, keys and values of one layer are copied into the order that the product wants.
    """
    width, hidden = BYTES[dtype], checkpoint.hidden_size
    inner = int(checkpoint.config.get("inner_hidden_size") or 4 * hidden)
    rows, total = profile.batch.max * profile.sequence.max, profile.sequence.max + profile.past.max
    wide = rows * (inner + 6 * hidden) * width
    scores = 0 if dtype == "fp16" else 2 * rows * total * checkpoint.num_heads * 4 + 4 * rows * hidden * width
    turned = 2 * profile.batch.max * total * hidden * width if profile.past.max else 0
    return max(wide, scores, turned) + WORKSPACE
