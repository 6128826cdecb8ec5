"""TODO."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

UNBOUNDED = 2**31


@dataclass(frozen=True)
class Limits:
    """The largest shapes that a session takes: rows, tokens of a prompt, prompt and answer together."""

    batch: int = UNBOUNDED
    prompt: int = UNBOUNDED
    total: int = UNBOUNDED


class Session(ABC):
    """A backend that runs forward. dtype: that of the past, the presents and the logits.

    arithmetic: "tf32" where products of fp32 numbers are rounded, None where dtype says all. last_only: `run` gives the
    logits of the last position alone.
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

        call: input_ids, position_ids and attention_mask of one prefill or decode (`feeds`).
        """
        past = self.empty_past(len(call["input_ids"])) if self._cache is None else self._cache
        outputs = self.run({**call, **past})
        logits = outputs.pop("logits")
        self._cache = {name.replace("present", "past_key_values"): array for name, array in outputs.items()}
        return logits[:, -1].astype(np.float32)

    def follow(self) -> Generator[np.ndarray] | None:
        """The best tokens (batch,) from the last step on, where the session can feed itself; None where it cannot."""
        return None

    def close(self) -> None:
        """Give back what the session holds; it cannot be used afterwards."""
        self.reset()
