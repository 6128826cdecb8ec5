"""Sessions over the parts of the fast decoder: the interface of `base.Session`, a cache that is written in place."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, shares_vocabulary
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.fast.masks import read_mask
from glmtrt_helpers.sessions.base import Limits, Session
from glmtrt_helpers.sessions.onnxruntime import OrtSession

PARTS = ("first", "middle", "last", "attention")  # of `fast`, each a graph and an engine
BIAS = "transformer.layers.{}.attention.query_key_value.bias"  # which the kernel adds
VOCABULARY = ("transformer.word_embeddings.weight", "lm_head.weight")
STORED: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "BF16": np.dtype("<u2")}


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
    array: np.ndarray = np.memmap(stored.file, STORED[stored.dtype], "r", stored.offset or 0, stored.shape)
    if stored.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(dtype, copy=False)


def weight_sources(checkpoint: Checkpoint, inputs: Iterable[str], dtype: np.dtype) -> dict[str, str]:
    """All weights that the inputs of the parts stand for in one layer or another, each with the one that has its
    numbers: a vocabulary matrix that is stored twice is one.
    """
    inputs = list(inputs)
    layers = range(checkpoint.num_layers + 1)
    names = dict.fromkeys(name for layer in layers for name in weight_names(inputs, layer).values())
    sources = {name: name for name in names if name in checkpoint.tensors}
    if shares_vocabulary(checkpoint):
        first, second = (read_weight(checkpoint, name, dtype) for name in VOCABULARY)
        if np.array_equal(first, second):  # the samples agree, and so does all the rest
            sources[VOCABULARY[1]] = VOCABULARY[0]
    return sources


def input_dims(config: Mapping[str, Any]) -> dict[str, tuple[int | str, ...]]:
    """The dimensions of all that goes into a part and is no weight; "batch" and "sequence" move."""
    hidden, size = config["hidden_size"], config["hidden_size"] // config["num_attention_heads"]
    tokens = ("batch", "sequence")
    return {
        "input_ids": tokens,
        "position_ids": ("batch", 2, "sequence"),
        **dict.fromkeys(("stream", "seen"), (*tokens, hidden)),
        **dict.fromkeys(("cos", "sin"), (*tokens, size)),
        "mixed": (*tokens, 3 * hidden),
    }


def shift_left(call: Mapping[str, np.ndarray], shift: np.ndarray, size: int) -> dict[str, np.ndarray]:
    """Ids (batch, size) and positions (batch, 2, size) without the first `shift` (batch,) tokens, the last repeated."""
    source = np.minimum(shift[:, None] + np.arange(size), call["input_ids"].shape[1] - 1)
    return {
        "input_ids": np.take_along_axis(call["input_ids"], source, axis=1),
        "position_ids": np.take_along_axis(call["position_ids"], source[:, None], axis=2),
    }


class FastSession(Session):
    """What the backends share. last_only: logits come out for the last position alone."""

    last_only = True

    def __init__(self, checkpoint: Checkpoint, dtype: np.dtype):
        self.checkpoint, self.dtype = checkpoint, dtype
        self._names = [f"{layer}.{part}" for layer in range(checkpoint.num_layers) for part in ("key", "value")]
        self._past, self._batch, self._skip = 0, 0, np.zeros(0, np.int64)

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
        past = [call[f"past_key_values.{name}"].swapaxes(0, 1) for name in self._names]
        self.reset()
        batch, length = past[0].shape[:2]
        if length:
            self._begin(batch, read_mask(call, length)[0])
            self._write(past)
            self._past = length
        logits = self._advance(call)
        presents = {
            f"present.{name}": array.swapaxes(0, 1) for name, array in zip(self._names, self._read(), strict=True)
        }
        self.reset()
        return {"logits": logits[:, None], **presents}

    def _advance(self, call: Mapping[str, np.ndarray]) -> np.ndarray:
        batch, length = call["input_ids"].shape
        if self._past and batch != self._batch:
            raise WorkbookError(f"the cache holds {self._batch} rows, the call has {batch}: reset the session first.")
        if self._past + length > self.limits.total:
            raise WorkbookError(
                f"{self._past} tokens in the cache and {length} new ones are more than the {self.limits.total} that "
                "this session holds: drop old rounds, or open a session that holds more."
            )
        return self._execute(call, length)

    def _look(self, call: Mapping[str, np.ndarray]) -> np.ndarray:
        """Read the mask of a call; without a past begin with an empty cache. Returns context of `read_mask`."""
        skip, context = read_mask(call, self._past)
        if not self._past:
            self._begin(len(skip), skip)
        elif (skip != self._skip).any():
            raise WorkbookError("the cache holds other padding than the call's mask hides: reset the session first.")
        return context

    @abstractmethod
    def _begin(self, batch: int, skip: np.ndarray) -> None:
        """An empty cache of so many rows, the first `skip` tokens of each of which are padding."""

    @abstractmethod
    def _write(self, rows: list[np.ndarray]) -> None:
        """Fill the start of the cache: keys and values of each layer, (batch, tokens, heads, d)."""

    @abstractmethod
    def _read(self) -> list[np.ndarray]:
        """What is in the cache, likewise."""

    @abstractmethod
    def _execute(self, call: Mapping[str, np.ndarray], length: int) -> np.ndarray:
        """Run the decoder once, with its rows put into the cache; returns the logits (batch, vocabulary)."""


def turn(
    mixed: np.ndarray, bias: np.ndarray, cos: np.ndarray, sin: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """mixed (.., heads, 3, d) and bias (heads, 3, d) to query, key and value (.., heads, d) in fp32, the first two
    turned. cos, sin: (.., d).
    """
    whole = mixed.astype(np.float32) + bias
    first, second, third, fourth = np.split(whole[..., :2, :], 4, axis=-1)
    swapped = np.concatenate([second, first, fourth, third], axis=-1)
    turned = whole[..., :2, :] * cos[..., None, None, :] + swapped * sin[..., None, None, :]
    return turned[..., 0, :], turned[..., 1, :], whole[..., 2, :]


def attend(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Attention of one token in fp32: query (heads, d), keys and values (tokens, heads, d), all seen, to (heads, d)."""
    scores = np.einsum("hd,thd->ht", query, keys.astype(np.float32)) / np.sqrt(np.float32(query.shape[-1]))
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.asarray(np.einsum("ht,thd->hd", shares / shares.sum(axis=-1, keepdims=True), values.astype(np.float32)))


class FastOrtSession(FastSession):
    """The fast decoder's graphs in ONNX Runtime on the CPU: to try, and to check, what the engines compute.

    Attention of a single token, which is a kernel's work on a GPU, is NumPy's here. outputs: of the last step.
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

    def _begin(self, batch: int, skip: np.ndarray) -> None:
        self._past, self._batch, self._skip = 0, batch, skip
        shape = (batch, self.checkpoint.max_length, self.checkpoint.num_heads, self.checkpoint.head_size)
        # Zeros, whose memory the system hands out when they are first written.
        self._rows = [np.zeros(shape, self.dtype) for _ in self._names]

    def _write(self, rows: list[np.ndarray]) -> None:
        for place, array in zip(self._rows, rows, strict=True):
            place[:, : array.shape[1]] = array

    def _read(self) -> list[np.ndarray]:
        return [place[:, : self._past] for place in self._rows]

    def _run(self, part: str, layer: int, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = weight_names(self.parts[part].inputs, layer)
        weights = {name: read_weight(self.checkpoint, stored, self.dtype) for name, stored in names.items()}
        return self.parts[part].run({**given, **weights})

    def _execute(self, call: Mapping[str, np.ndarray], length: int) -> np.ndarray:
        context = self._look(call)
        state = self._run("first", 0, call)
        for layer in range(self.checkpoint.num_layers):
            state["seen"] = self._attend(layer, state, context)
            if layer + 1 < self.checkpoint.num_layers:
                state |= self._run("middle", layer + 1, state)
                state["stream"] = state["next_stream"]
        self._past += length
        last = {name: state[name][:, -1:] for name in ("stream", "seen")}
        self.outputs = self._run("last", self.checkpoint.num_layers, last)
        return self.outputs["logits"]

    def _attend(self, layer: int, state: Mapping[str, np.ndarray], context: np.ndarray) -> np.ndarray:
        """Attention of all new tokens: those that see one another by the graph, each of the others for itself."""
        heads, size = self.checkpoint.num_heads, self.checkpoint.head_size
        keys, values = self._rows[2 * layer : 2 * layer + 2]
        bias = read_weight(self.checkpoint, BIAS.format(layer), self.dtype).reshape(heads, 3, size)
        seen = np.zeros_like(state["stream"])
        mixed = state["mixed"].reshape(*seen.shape[:2], heads, 3, size)
        for row, skip in enumerate(self._skip):
            alone = self._past or context[row]  # the first that does not see what follows
            if not self._past:
                among = slice(skip, alone)
                given = {name: state[name][row : row + 1, among] for name in ("mixed", "cos", "sin")}
                out = self._run("attention", layer, given)
                seen[row, among], keys[row, among], values[row, among] = out["seen"], out["key"], out["value"]
            for token in range(alone - self._past, seen.shape[1]):
                place = self._past + token
                query, key, value = turn(mixed[row, token], bias, state["cos"][row, token], state["sin"][row, token])
                keys[row, place], values[row, place] = key, value
                whole = slice(skip, place + 1)
                seen[row, token] = attend(query, keys[row, whole], values[row, whole]).reshape(-1)
        return seen
