"""`Session`, the interface of every backend that runs `forward`: PyTorch, ONNX Runtime, TensorRT.

`run` is one call of forward: flat named inputs (`names.input_names`) in, flat named outputs out, everything as NumPy
arrays on the host; comparisons use it. `step` is what a chat uses: the session keeps the cache, each call adds to it,
and only the scores of the next token come back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from glmtrt_helpers.inputs.names import past_from

UNBOUNDED = 2**31


@dataclass(frozen=True)
class Limits:
    """The largest shapes that a session takes: rows, tokens of a prompt, prompt and answer together."""

    batch: int = UNBOUNDED
    prompt: int = UNBOUNDED
    total: int = UNBOUNDED


class Session(ABC):
    """A backend that runs forward. dtype: that of the past, the presents and the logits.

    arithmetic: "tf32" where fp32 matmuls round their inputs, None where dtype says all. last_only: `run` returns the
    logits of the last position only.
    """

    backend: str
    dtype: np.dtype
    arithmetic: str | None = None
    last_only = False
    limits = Limits()
    _cache: dict[str, np.ndarray] | None = None

    @abstractmethod
    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One call of forward, past and presents included. flat: anything that NumPy reads as arrays."""

    @abstractmethod
    def empty_past(self, batch: int) -> dict[str, np.ndarray]:
        """The cache before the first token: 2 * num_layers arrays (0, batch, heads, d)."""

    def reset(self) -> None:
        """Forget the cache: the next `step` is a prefill."""
        self._cache = None

    def step(self, call: Mapping[str, np.ndarray]) -> np.ndarray:
        """Scores of the next token, (batch, vocabulary) float32; the presents become the past of the next step.

        call: input_ids, position_ids and attention_mask, as `positions_and_mask.prefill` and `decode` make them.
        """
        past = self.empty_past(len(call["input_ids"])) if self._cache is None else self._cache
        outputs = self.run({**call, **past})
        self._cache = past_from(outputs)
        return outputs["logits"][:, -1].astype(np.float32)

    def follow(self) -> Generator[np.ndarray] | None:
        """A device-side decode loop: the likeliest tokens (batch,), one step after another; None where there is none.

        The first tokens are those of the last `step`. Close it before the session is used otherwise.
        """
        return None

    def close(self) -> None:
        """Free what the session holds; it cannot be used afterwards."""
        self.reset()
