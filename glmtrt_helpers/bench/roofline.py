"""TODO."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glmtrt_helpers.bench.results import Report
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.config import expected_shapes
from glmtrt_helpers.engines.memory_prediction import BYTES, engine_weights

# Of the rate in fp16. fp32 is multiplied as TF32, at half of it on every card that has TF32.
PRODUCT_RATE = {"fp16": 1.0, "fp32": 0.5}


@dataclass(frozen=True)
class Bounds:
    """What a step has to do at least: milliseconds of each part, and flop and nbytes in all."""

    weights: float
    cache: float
    products: float
    flop: int
    nbytes: int

    @property
    def least(self) -> float:
        """Weights and cache come through one memory, one after the other; products are made meanwhile."""
        return max(self.weights + self.cache, self.products)

    @property
    def bound_by(self) -> str:
        if self.products > self.weights + self.cache:
            return "multiplying"
        return "reading the weights" if self.weights >= self.cache else "reading the cache"


def bounds(checkpoint: Checkpoint, report: Report, phase: str, batch: int, past: int, dtype: str = "fp16") -> Bounds:
    """The bounds of a decode step on a past, or of the prefill of a prompt of `past` tokens.

    Every weight is read once, and each key and value of the cache: 2 * layers * batch * past * hidden numbers, which a
    prefill writes instead. Attention makes two products with each of them for each new token; all tokens of a prompt
    see each other, but for a handful.
    """
    cells = 2 * checkpoint.num_layers * batch * past * checkpoint.hidden_size
    attention = 2 * cells * (past if phase == "prefill" else 1)
    flop = matmul_flops(checkpoint, phase, batch, past) + attention
    weights, cache = engine_weights(checkpoint, dtype), cells * BYTES[dtype]
    per_ms = report.copy_bandwidth_gb_s * 1e6
    products = flop / (report.matrix_tflop_s * PRODUCT_RATE[dtype] * 1e9)
    return Bounds(weights / per_ms, cache / per_ms, products, flop, weights + cache)


def matmul_flops(checkpoint: Checkpoint, phase: str, batch: int, past: int) -> int:
    """Floating-point operations of a step's products with weights; past of a prefill: tokens of the prompt."""
    shapes = expected_shapes(checkpoint.config)
    layers = sum(int(np.prod(shape)) for name, shape in shapes.items() if ".layers." in name and len(shape) == 2)
    head = checkpoint.vocab_size * checkpoint.hidden_size  # wanted for one token of a sequence
    tokens = batch * (past if phase == "prefill" else 1)
    return 2 * (layers * tokens + head * batch)


def floor_ms(checkpoint: Checkpoint, report: Report, phase: str, batch: int, past: int) -> float:
    """The least that a step can take: its weights read once, or its products made, whichever is longer.

    The cache is left out, so that the floor of a long past or a large batch is a little lower than what is possible.
    """
    read = report.weights_bytes / report.copy_bandwidth_gb_s / 1e6
    return max(read, matmul_flops(checkpoint, phase, batch, past) / report.matrix_tflop_s / 1e9)
