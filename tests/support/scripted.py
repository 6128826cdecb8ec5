"""A session that gives the tokens of a script, for tests of what happens around a model."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.sessions.base import Session


class Scripted(Session):
    """Gives the tokens of a script, whatever its inputs; each entry is one step, a list for the rows of a batch."""

    backend = "scripted"
    dtype = np.dtype(np.float32)

    def __init__(self, checkpoint: Checkpoint, script: Sequence[int | Sequence[int]]):
        self.vocabulary = checkpoint.vocab_size
        self.script = iter(script)
        self.calls: list[dict[str, np.ndarray]] = []

    def empty_past(self, batch: int) -> dict[str, np.ndarray]:
        return {}

    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        self.calls.append(dict(flat))
        batch, sequence = flat["input_ids"].shape
        logits = np.zeros((batch, sequence, self.vocabulary), np.float32)
        step = next(self.script)
        for row, token in enumerate(step if isinstance(step, Sequence) else [step] * batch):
            logits[row, -1, token] = 1.0
        return {"logits": logits}
