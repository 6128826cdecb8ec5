"""Sessions over the fast decoder: the interface of `runtime.Session`, with a cache that lies in chunks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np

from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.profiles import CHUNK
from glmtrt_helpers.runtime import Limits, OrtSession, Session
from glmtrt_helpers.slicing import plain_session

STEP_INPUTS = ("input_ids", "position_ids", "attention_mask", "visible")  # of the fast decoder, beside its cache


def chunks_of(tokens: int) -> int:
    """Chunks that hold so many tokens; one, all of it hidden, for an empty cache."""
    return max(1, -(-tokens // CHUNK))


def pieces(past: int, length: int) -> list[tuple[int, slice, slice]]:
    """Where rows past .. past + length - 1 go: (chunk, its rows, which of the new ones), one entry for each chunk."""
    parts, done = [], 0
    while done < length:
        chunk, row = divmod(past + done, CHUNK)
        count = min(CHUNK - row, length - done)
        parts.append((chunk, slice(row, row + count), slice(done, done + count)))
        done += count
    return parts


def split_mask(call: Mapping[str, np.ndarray], past: int) -> tuple[np.ndarray, np.ndarray]:
    """The mask of a call of forward, (batch, 1, S, past + S), as the fast decoder takes it.

    Returns attention_mask (batch, 1, S, S) and visible (batch, 2), the first token of the cache that may be seen and
    the one behind the last. New tokens differ in what they see among themselves; of the cache all see what the last one
    sees, all but the padding at its left. Raises WorkbookError for another mask.
    """
    mask = np.asarray(call["attention_mask"])
    hidden = mask[:, 0, -1]
    first = hidden.argmin(axis=-1)  # of a prompt, too, for what is padding in it will be padding in the cache
    if (hidden[:, :past] != (np.arange(past) < first[:, None])).any():
        raise WorkbookError(
            "the fast decoder hides nothing of the cache but padding at its left: take the classical one."
        )
    visible = np.stack([first, np.full_like(first, past)], axis=1).astype(np.int64)
    return np.ascontiguousarray(mask[..., past:]), visible


class FastSession(Session):
    """What the backends share. last_only: logits come out for the last position alone."""

    last_only = True

    def __init__(self, checkpoint: Checkpoint, dtype: np.dtype):
        self.checkpoint, self.dtype = checkpoint, dtype
        self._names = [f"{layer}.{part}" for layer in range(checkpoint.num_layers) for part in ("key", "value")]
        self._past, self._batch = 0, 0

    @property
    def past(self) -> int:
        """Tokens in the cache."""
        return self._past

    def reset(self) -> None:
        self._past = 0

    def empty_past(self, batch: int) -> dict[str, np.ndarray]:
        shape = (0, batch, self.checkpoint.num_heads, self.checkpoint.head_size)
        return {f"past_key_values.{name}": np.zeros(shape, self.dtype) for name in self._names}

    def step(self, call: Mapping[str, np.ndarray]) -> np.ndarray:
        return self._advance(call).astype(np.float32)

    def run(self, flat: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """One call of forward with its past from the host; logits (batch, 1, vocabulary) of the last position."""
        call = {name: np.asarray(value) for name, value in flat.items()}
        past = {name: call[f"past_key_values.{name}"] for name in self._names}
        self.reset()
        first = past[self._names[0]]
        self._begin(first.shape[1])
        self._place({name: array.transpose(1, 2, 0, 3) for name, array in past.items()}, len(first))
        logits = self._advance(call)
        self.reset()
        rows = self._new_rows(call["input_ids"].shape[1])
        presents = {
            f"present.{name}": np.concatenate([past[name], rows[name].transpose(2, 0, 1, 3)]) for name in self._names
        }
        return {"logits": logits[:, None], **presents}

    def _advance(self, call: Mapping[str, np.ndarray]) -> np.ndarray:
        batch, length = call["input_ids"].shape
        if not self._past:
            self._begin(batch)
        elif batch != self._batch:
            raise WorkbookError(f"the cache holds {self._batch} rows, the call has {batch}: reset the session first.")
        if self._past + length > self.limits.total:
            raise WorkbookError(
                f"{self._past} tokens in the cache and {length} new ones are more than the {self.limits.total} that "
                "this session holds: drop old rounds, or build with a larger --past."
            )
        return self._execute(call, length)

    @abstractmethod
    def _begin(self, batch: int) -> None:
        """An empty cache of so many rows."""

    @abstractmethod
    def _place(self, rows: Mapping[str, np.ndarray], length: int) -> None:
        """Put rows (batch, heads, length, d) behind those in the cache."""

    @abstractmethod
    def _execute(self, call: Mapping[str, np.ndarray], length: int) -> np.ndarray:
        """Run the decoder once and put the new rows into the cache; returns the logits (batch, vocabulary)."""

    @abstractmethod
    def _new_rows(self, length: int) -> dict[str, np.ndarray]:
        """The rows (batch, heads, length, d) that the last run of the decoder made."""


class FastOrtSession(FastSession):
    """The fast decoder in ONNX Runtime on the CPU: to try, and to check, what the engine computes.

    outputs: all that came out of the last step.
    """

    backend = "ort"

    def __init__(self, checkpoint: Checkpoint, runner: OrtSession):
        half = runner.inputs["cache.0.key"].type == "tensor(float16)"
        super().__init__(checkpoint, np.dtype(np.float16 if half else np.float32))
        self.runner = runner
        self.limits = Limits(total=checkpoint.max_length)
        self._chunks: dict[str, np.ndarray] = {}
        self.outputs: dict[str, np.ndarray] = {}

    def _begin(self, batch: int) -> None:
        self._past, self._batch = 0, batch
        checkpoint = self.checkpoint
        shape = (chunks_of(checkpoint.max_length), batch, checkpoint.num_heads, CHUNK, checkpoint.head_size)
        # Zeros, for a hidden row must be finite; the system hands out their memory when they are first written.
        self._chunks = {name: np.zeros(shape, self.dtype) for name in self._names}

    def _place(self, rows: Mapping[str, np.ndarray], length: int) -> None:
        for chunk, there, here in pieces(self._past, length):
            for name in self._names:
                self._chunks[name][chunk, :, :, there] = rows[name][:, :, here]
        self._past += length

    def _execute(self, call: Mapping[str, np.ndarray], length: int) -> np.ndarray:
        among_new, visible = split_mask(call, self._past)
        used = chunks_of(self._past)
        self.outputs = self.runner.run(
            {
                "input_ids": call["input_ids"],
                "position_ids": call["position_ids"],
                "attention_mask": among_new,
                "visible": visible,
                **{f"cache.{name}": self._chunks[name][:used] for name in self._names},
            }
        )
        self._place(self._new_rows(length), length)
        return self.outputs["logits"]

    def _new_rows(self, length: int) -> dict[str, np.ndarray]:
        return {name: self.outputs[f"new.{name}"] for name in self._names}


def open_fast(checkpoint: Checkpoint, backend: str, dtype: str = "fp16") -> FastSession:
    """The session of a backend over the fast graph of the working copy, or over its engine."""
    if backend == "tensorrt":
        from glmtrt_helpers.fast_tensorrt import FastTensorRTSession

        return FastTensorRTSession.open(checkpoint, dtype)
    if backend != "ort":
        raise WorkbookError(f"the fast decoder does not run on {backend}: leave --fast out, or take tensorrt or ort.")
    path = checkpoint.directory / f"model.{dtype}.fast.onnx"
    return FastOrtSession(checkpoint, plain_session(checkpoint, path) if checkpoint.is_large else OrtSession(path))
