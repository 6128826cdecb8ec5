"""Notebook 05: predictions of what an engine takes on the GPU, and of what its build takes of memory and disk.

All of it follows from the checkpoint's sizes and the profiles' maxima, before anything is allocated.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, shares_vocabulary
from glmtrt_helpers.checkpoints.config import expected_shapes
from glmtrt_helpers.checkpoints.packing import scale_name
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.precisions import PRECISIONS
from glmtrt_helpers.engines.profiles import Profile

BYTES = {name: dtype.itemsize for name, dtype in PRECISIONS.items()}
WORKSPACE = 4 * 2**20  # requested by every measured engine in addition to its tensors


@dataclass(frozen=True)
class EngineMemory:
    """Bytes on the GPU. cache: its two buffers. io: inputs and logits. activations: everything in between."""

    weights: int
    cache: int
    io: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.io + self.activations


def predict_memory(checkpoint: Checkpoint, profiles: Sequence[Profile], dtype: str = "fp16") -> EngineMemory:
    """What an engine and its session will take on the GPU.

    weights: every tensor of the state dict in dtype, equal vocabulary matrices once. cache: past and present, two
    buffers per layer for key and for value, each for the largest total length. io: ids, positions, mask and the logits
    of all positions. activations: fitted to what TensorRT-RTX 1.6.1 requested for hidden sizes of 128 to 4096, up to 8
    rows and 2047 tokens; the profile that needs most counts, since one context serves all.
    """
    width = BYTES[dtype]
    tokens = max(profile.batch.max * (profile.sequence.max + profile.past.max) for profile in profiles)
    cache = 2 * 2 * checkpoint.num_layers * tokens * checkpoint.hidden_size * width
    rows = max(profile.batch.max * profile.sequence.max for profile in profiles)
    masks = max(p.batch.max * p.sequence.max * (p.sequence.max + p.past.max) for p in profiles)
    io = rows * (checkpoint.vocab_size * width + 3 * 8) + masks
    activations = max(_activations(checkpoint, profile, dtype) for profile in profiles)
    return EngineMemory(engine_weights(checkpoint, dtype), cache, io, activations)


def engine_weights(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of weights in an engine; a vocabulary matrix that the checkpoint stores twice counts once.

    Packed weights count as they are stored.
    """
    shapes, packed = expected_shapes(checkpoint.config), checkpoint.packed
    numbers = sum(math.prod(shape) for name, shape in shapes.items() if name not in packed)
    if not packed and (not checkpoint.tensors or shares_vocabulary(checkpoint)):
        numbers -= checkpoint.vocab_size * checkpoint.hidden_size
    stored = (checkpoint.tensors[each].nbytes for name in packed for each in (name, scale_name(name)))
    return numbers * BYTES[dtype] + sum(stored)


def _activations(checkpoint: Checkpoint, profile: Profile, dtype: str) -> int:
    """In fp16, attention is fused and the widest layer counts; in fp32, two copies of its scores are in memory.

    With a past, the keys and values of one layer are also copied into the layout that the matmul reads.
    """
    width, hidden = BYTES[dtype], checkpoint.hidden_size
    inner = int(checkpoint.config.get("inner_hidden_size") or 4 * hidden)
    rows, total = profile.batch.max * profile.sequence.max, profile.sequence.max + profile.past.max
    widest = rows * (inner + 6 * hidden) * width
    scores = 0 if dtype == "fp16" else 2 * rows * total * checkpoint.num_heads * 4 + 4 * rows * hidden * width
    transposed = 2 * profile.batch.max * total * hidden * width if profile.past.max else 0
    return max(widest, scores, transposed) + WORKSPACE


def predict_build(checkpoint: Checkpoint, dtype: str = "fp16") -> tuple[int, int]:
    """Bytes of memory and of disk that a build needs: one copy of the weights, and TensorRT's own share.

    Fitted to builds of 2 MB to 13 GB of weights; their peaks were 0.45 GB plus at most 1.04 times the weights.
    """
    weights = engine_weights(checkpoint, dtype)
    return int(1.06 * weights) + 700_000_000, int(1.01 * weights) + 50_000_000


def check_room(checkpoint: Checkpoint, dtype: str, plan: Path) -> None:
    """Refuse a build for which this machine lacks memory or disk, before it takes any of either."""
    (memory, disk), free = predict_build(checkpoint, dtype), free_memory()
    if memory > free:
        lower = f" `--dtype fp16` needs {predict_build(checkpoint, 'fp16')[0] / 1e9:.1f}." if dtype == "fp32" else ""
        raise WorkbookError(
            f"building {plan.name} needs {memory / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free, swap "
            f"included: close other programs, or add swap.{lower}"
        )
    free = shutil.disk_usage(plan.parent).free
    if disk > free:
        raise WorkbookError(
            f"{plan} will take {disk / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} free: make room, or remove an "
            "older plan; it is replaced only when the new one is complete."
        )


def free_memory() -> int:
    """Bytes that can still be allocated, swap included, and no more than the container's limit leaves."""
    free = int(psutil.virtual_memory().available + psutil.swap_memory().free)
    limit, used = (Path("/sys/fs/cgroup") / name for name in ("memory.max", "memory.current"))
    if limit.exists() and limit.read_text().strip().isdigit():
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free
