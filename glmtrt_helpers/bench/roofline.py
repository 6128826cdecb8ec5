"""Notebook 07: the least time a step can take on a card, from the bytes it must read and the operations it must do.

A step reads its weights and its cache through one memory, and computes meanwhile: whichever takes longer at the card's
rates is its bound. The rates come from the same run as the steps (`results.Report`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from glmtrt_helpers.bench.results import Report
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.config import expected_shapes
from glmtrt_helpers.engines.memory_prediction import BYTES, engine_weights

# Rate of matmuls, as a share of the one in fp16. fp32 runs as TF32, at half of it on every card that has TF32.
MATMUL_RATE = {"fp16": 1.0, "fp32": 0.5}


@dataclass(frozen=True)
class Bounds:
    """What a step must do at least: milliseconds for each part; flop and nbytes are totals."""

    weights: float
    cache: float
    matmuls: float
    flop: int
    nbytes: int

    @property
    def least(self) -> float:
        """Weights and cache share one memory, so their times add up; matmuls run meanwhile."""
        return max(self.weights + self.cache, self.matmuls)

    @property
    def bound_by(self) -> str:
        if self.matmuls > self.weights + self.cache:
            return "matmuls"
        return "reading the weights" if self.weights >= self.cache else "reading the cache"


def bounds(checkpoint: Checkpoint, report: Report, phase: str, batch: int, past: int, dtype: str = "fp16") -> Bounds:
    """The bounds of a decode step on a past, or of the prefill of a prompt of `past` tokens.

    Every weight is read once, and so is the cache: 2 * layers * batch * past * hidden numbers, which a prefill writes
    instead. Attention multiplies and adds each of them once for each new token; in a prefill every token attends to the
    whole prompt (the GLM mask hides only the last token from the others, which is not subtracted).
    """
    cache_numbers = 2 * checkpoint.num_layers * batch * past * checkpoint.hidden_size
    attention = 2 * cache_numbers * (past if phase == "prefill" else 1)
    flop = matmul_flops(checkpoint, phase, batch, past) + attention
    weights, cache = engine_weights(checkpoint, dtype), cache_numbers * BYTES[dtype]
    per_ms = report.copy_bandwidth_gb_s * 1e6
    matmuls = flop / (report.matrix_tflop_s * MATMUL_RATE[dtype] * 1e9)
    return Bounds(weights / per_ms, cache / per_ms, matmuls, flop, weights + cache)


def matmul_flops(checkpoint: Checkpoint, phase: str, batch: int, past: int) -> int:
    """Floating-point operations of a step's linear layers; past of a prefill: tokens of the prompt."""
    shapes = expected_shapes(checkpoint.config)
    layers = sum(math.prod(shape) for name, shape in shapes.items() if ".layers." in name and len(shape) == 2)
    head = checkpoint.vocab_size * checkpoint.hidden_size  # only the last token of a sequence needs logits
    tokens = batch * (past if phase == "prefill" else 1)
    return 2 * (layers * tokens + head * batch)


def floor_ms(checkpoint: Checkpoint, report: Report, phase: str, batch: int, past: int) -> float:
    """The least milliseconds a step can take: reading its weights once, or its matmuls, whichever is longer.

    The cache is left out, so with a long past or a large batch the floor is a little lower than what is possible.
    """
    read = report.weights_bytes / report.copy_bandwidth_gb_s / 1e6
    return max(read, matmul_flops(checkpoint, phase, batch, past) / report.matrix_tflop_s / 1e9)
