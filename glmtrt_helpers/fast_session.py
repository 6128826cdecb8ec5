"""Sessions over the parts of the fast decoder: the interface of `runtime.Session`, a cache that is written in place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glmtrt_helpers.checkpoints import Checkpoint
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.runtime import Limits, OrtSession, Session

PARTS = ("first", "middle", "last", "attention")  # of `fast`, each a graph and an engine
HIDDEN = -10000.0  # what upstream puts for a score that is masked
_STORED: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "BF16": np.dtype("<u2")}


def part_path(checkpoint: Checkpoint, dtype: str, part: str, suffix: str = "onnx") -> Path:
    """As in model.fp16.fast.middle.onnx, or .plan"""
    return checkpoint.directory / f"model.{dtype}.fast.{part}.{suffix}"


def weight_names(inputs: Iterable[str], layer: int) -> dict[str, str]:
    """For the inputs of a part that are weights, their names in the state dict.

    layer: the one that the part enters; the one it leaves is the one before.
    """
    layers = {"enter.": f"transformer.layers.{layer}.", "leave.": f"transformer.layers.{layer - 1}."}
    names = {}
    for name in inputs:
        if "." in name:
            side = next((side for side in layers if name.startswith(side)), "")
            names[name] = layers.get(side, "") + name.removeprefix(side)
    return names


def read_weight(checkpoint: Checkpoint, name: str, dtype: np.dtype) -> np.ndarray:
    """A weight as dtype; one that is stored so is a view of the mapped shard, not a copy."""
    stored = checkpoint.tensors[name]
    array: np.ndarray = np.memmap(stored.file, _STORED[stored.dtype], "r", stored.offset or 0, stored.shape)
    if stored.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype, copy=False)


def split_mask(call: Mapping[str, np.ndarray], past: int) -> tuple[np.ndarray, np.ndarray]:
    """The mask of a call of forward, (batch, 1, S, past + S), as the fast decoder takes it.

    Returns attention_mask (batch, 1, S, S) and visible (batch, 2), the first token of the cache that may be seen and
    the one behind the last. New tokens differ in what they see among themselves; of the cache all see what the last one
    sees, all but the padding at its left. A token that sees nothing, which is padding, is let see all: its result is
    not used, but must be a number. Raises WorkbookError for another mask.
    """
    mask = np.asarray(call["attention_mask"])
    hidden = mask[:, 0, -1]
    first = hidden.argmin(axis=-1)  # of a prompt, too, for what is padding in it will be padding in the cache
    if (hidden[:, :past] != (np.arange(past) < first[:, None])).any():
        raise WorkbookError(
            "the fast decoder hides nothing of the cache but padding at its left: take the classical one."
        )
    visible = np.stack([first, np.full_like(first, past)], axis=1).astype(np.int64)
    among_new = mask[..., past:] & ~mask.all(axis=-1, keepdims=True)
    return np.ascontiguousarray(among_new), visible


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
        past = [call[f"past_key_values.{name}"].transpose(1, 2, 0, 3) for name in self._names]
        self.reset()
        batch, _, length, _ = past[0].shape
        self._begin(batch)
        if length:
            self._write(past)
        self._past = length
        logits = self._advance(call)
        presents = {
            f"present.{name}": array.transpose(2, 0, 1, 3)
            for name, array in zip(self._names, self._read(), strict=True)
        }
        self.reset()
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
    def _write(self, rows: list[np.ndarray]) -> None:
        """Fill the start of the cache: keys and values of each layer, (batch, heads, tokens, d)."""

    @abstractmethod
    def _read(self) -> list[np.ndarray]:
        """What is in the cache, likewise."""

    @abstractmethod
    def _execute(self, call: Mapping[str, np.ndarray], length: int) -> np.ndarray:
        """Run the decoder once, with its rows put into the cache; returns the logits (batch, vocabulary)."""


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray, hidden: np.ndarray) -> np.ndarray:
    """Attention in fp32: query (batch, heads, S, d), keys and values (batch, heads, T, d), hidden (batch, 1, S, T).

    Returns (batch, S, heads * d) in query's dtype.
    """
    batch, heads, length, size = query.shape
    scores = query.astype(np.float32) @ keys.astype(np.float32).swapaxes(-1, -2) / np.sqrt(np.float32(size))
    scores = np.where(hidden, np.float32(HIDDEN), scores)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    seen = shares @ values.astype(np.float32) / shares.sum(axis=-1, keepdims=True)
    return seen.swapaxes(1, 2).reshape(batch, length, heads * size).astype(query.dtype)


class FastOrtSession(FastSession):
    """The fast decoder's graphs in ONNX Runtime on the CPU: to try, and to check, what the engines compute.

    Attention on a past, which is a kernel's work on a GPU, is NumPy's here. outputs: of the last step.
    """

    backend = "ort"

    def __init__(self, checkpoint: Checkpoint, dtype: str):
        self.parts = {
            part: OrtSession(part_path(checkpoint, dtype, part), optimize=not checkpoint.is_large) for part in PARTS
        }
        super().__init__(checkpoint, np.dtype(np.float16 if dtype == "fp16" else np.float32))
        self.limits = Limits(total=checkpoint.max_length)
        self._rows: list[np.ndarray] = []
        self.outputs: dict[str, np.ndarray] = {}

    def _begin(self, batch: int) -> None:
        self._past, self._batch = 0, batch
        shape = (batch, self.checkpoint.num_heads, self.checkpoint.max_length, self.checkpoint.head_size)
        # Zeros, whose memory the system hands out when they are first written.
        self._rows = [np.zeros(shape, self.dtype) for _ in self._names]

    def _write(self, rows: list[np.ndarray]) -> None:
        for place, array in zip(self._rows, rows, strict=True):
            place[:, :, : array.shape[2]] = array

    def _read(self) -> list[np.ndarray]:
        return [place[:, :, : self._past] for place in self._rows]

    def _run(self, part: str, layer: int, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = weight_names(self.parts[part].inputs, layer)
        weights = {name: read_weight(self.checkpoint, stored, self.dtype) for name, stored in names.items()}
        return self.parts[part].run({**given, **weights})

    def _execute(self, call: Mapping[str, np.ndarray], length: int) -> np.ndarray:
        among_new, visible = split_mask(call, self._past)
        end = self._past + length
        in_cache = np.arange(self._past) < visible[:, :1]
        hidden = np.concatenate(
            [np.broadcast_to(in_cache[:, None, None], (self._batch, 1, length, self._past)), among_new], axis=-1
        )
        state = self._run("first", 0, call)
        for layer in range(self.checkpoint.num_layers):
            keys, values = self._rows[2 * layer : 2 * layer + 2]
            keys[:, :, self._past : end], values[:, :, self._past : end] = state["key"], state["value"]
            if self._past:
                state["seen"] = attend(state["query"], keys[:, :, :end], values[:, :, :end], hidden)
            else:
                state |= self._run("attention", 0, {**state, "attention_mask": among_new})
            if layer + 1 < self.checkpoint.num_layers:
                state |= self._run("middle", layer + 1, state)
                state["stream"] = state["next_stream"]
        self._past = end
        self.outputs = self._run("last", self.checkpoint.num_layers, state)
        return self.outputs["logits"]


def open_fast(checkpoint: Checkpoint, backend: str, dtype: str = "fp16") -> FastSession:
    """The session of a backend over the fast graphs of the working copy, or over their engines."""
    if backend == "tensorrt":
        from glmtrt_helpers.fast_tensorrt import FastTensorRTSession

        return FastTensorRTSession.open(checkpoint, dtype)
    if backend != "ort":
        raise WorkbookError(f"the fast decoder does not run on {backend}: leave --fast out, or take tensorrt or ort.")
    return FastOrtSession(checkpoint, dtype)
