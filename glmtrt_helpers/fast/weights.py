"""A checkpoint's weights on the GPU: read from the shards by several threads, through page-locked memory."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local
from typing import Any

import numpy as np

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, shares_vocabulary
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import cuda

STORED: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "BF16": np.dtype("<u2")}
EMBEDDING, HEAD = "transformer.word_embeddings.weight", "lm_head.weight"
READERS = 6  # threads, each with a piece of page-locked memory and a stream of its own
PIECE = 32 * 2**20  # bytes


def layer_weights(layer: int) -> dict[str, str]:
    """The weights of a layer by their names in decoder.cu, as in the state dict."""
    linear = {
        "qkv": "attention.query_key_value", "dense": "attention.dense", "up": "mlp.dense_h_to_4h",
        "down": "mlp.dense_4h_to_h", "norm1": "input_layernorm", "norm2": "post_attention_layernorm",
    }  # fmt: skip
    names = {short: f"transformer.layers.{layer}.{long}.weight" for short, long in linear.items()}
    return names | {f"{short}_bias": name.removesuffix("weight") + "bias" for short, name in names.items()}


def rotary_tables(positions: int, head_size: int) -> tuple[np.ndarray, np.ndarray]:
    """cos and sin of the angles of half a head, (positions, head_size / 4) each: fp16 angles, as upstream has them."""
    half = head_size // 2
    inverse = (1 / 10000 ** (np.arange(0, half, 2, dtype=np.float32) / half)).astype(np.float16)
    angles = np.outer(np.arange(positions).astype(np.float16), inverse).astype(np.float32)
    return np.cos(angles).astype(np.float16), np.sin(angles).astype(np.float16)


def weight_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Bytes of every weight in fp16, by name in the state dict.

    A vocabulary matrix that is stored twice, as the embedding and for the scores, is there once.
    """
    names = [name for layer in range(checkpoint.num_layers) for name in layer_weights(layer).values()]
    names += [EMBEDDING, "transformer.final_layernorm.weight", "transformer.final_layernorm.bias"]
    if not shares_vocabulary(checkpoint) or not _equal(checkpoint, EMBEDDING, HEAD):
        names.append(HEAD)
    return {name: 2 * math.prod(checkpoint.tensors[name].shape) for name in names}


class Weights:
    """All weights in fp16 in one piece of the GPU's memory. places: their addresses by name in the state dict."""

    def __init__(self, checkpoint: Checkpoint, sizes: Mapping[str, int]):
        self._memory = cuda.DeviceMemory(sum(map(cuda.aligned, sizes.values())), "the weights")
        buffers = self._memory.divide(sizes)
        try:
            _fill(checkpoint, buffers)
        except BaseException:
            self._memory.free()
            raise
        self.places = {name: buffer.address for name, buffer in buffers.items()}
        self.places.setdefault(HEAD, self.places[EMBEDDING])

    def free(self) -> None:
        self._memory.free()


def _equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    """Whether two tensors that are stored alike have the same bytes."""
    one, other = checkpoint.tensors[first], checkpoint.tensors[second]
    count = math.prod(one.shape) * STORED[one.dtype].itemsize
    views = [np.memmap(tensor.file, np.uint8, "r", tensor.offset or 0, count) for tensor in (one, other)]

    def same(at: int) -> bool:
        return np.array_equal(views[0][at : at + PIECE], views[1][at : at + PIECE])

    with ThreadPoolExecutor(READERS) as pool:
        return all(pool.map(same, range(0, count, PIECE)))


def _fill(checkpoint: Checkpoint, buffers: dict[str, cuda.Buffer]) -> None:
    mine, made = local(), []

    def copy(task: tuple[str, int]) -> None:
        name, at = task
        tensor, buffer = checkpoint.tensors[name], buffers[name]
        if not hasattr(mine, "pinned"):
            mine.pinned, mine.stream = cuda.Pinned((PIECE,), "uint8"), cuda.new_stream()
            made.append((mine.pinned, mine.stream))
        count = min(PIECE, buffer.nbytes - at)  # of fp16
        width = STORED[tensor.dtype].itemsize
        if tensor.dtype == "F16":
            with Path(tensor.file).open("rb", buffering=0) as file:
                target = memoryview(mine.pinned.array)[:count]
                if os.preadv(file.fileno(), [target], (tensor.offset or 0) + at) != count:
                    raise WorkbookError(f"{tensor.file} ends within {name}: download or copy it again.")
        else:
            raw = np.memmap(
                tensor.file, STORED[tensor.dtype], "r", (tensor.offset or 0) + at // 2 * width, (count // 2,)
            )
            wide = (raw.astype(np.uint32) << 16).view(np.float32) if tensor.dtype == "BF16" else raw
            mine.pinned.array[:count].view(np.float16)[:] = wide
        cuda.Buffer(buffer.address + at, count).fill(mine.pinned.array[:count], mine.stream)
        cuda.synchronize(mine.stream)

    tasks = [(name, at) for name, buffer in buffers.items() for at in range(0, buffer.nbytes, PIECE)]
    try:
        with ThreadPoolExecutor(READERS) as pool:
            for _ in pool.map(copy, tasks):
                pass
    finally:
        for pinned, stream in made:
            pinned.free()
            cuda.destroy_stream(stream)
