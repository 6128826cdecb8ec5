"""Weights of 8 and 4 bits beside their scales: how they are stored, and what they stand for.

A weight is an integer times the scale of its group. For the matrix (n, k) of a linear layer there are two layouts:

- as published: `weight` I8 (n, k), in 4 bits (n, k / 2) with the even column in the high four; `weight_scale` fp16
  (n,).
- as it is multiplied, which a graph can point at: `weight` U8 (k, n), signed all the same, in 4 bits (k, n / 2) with
  the even row of the matrix in the low four, as ONNX packs them; `weight_scale` fp16 (k / group, n), or (n,).

ONNX Runtime would turn each matrix of the first kind when it opens a graph: 8.5 s for 100 million weights of 8 bits.

Sources: the DequantizeLinear and INT4 of the ONNX operators; the published int4 and int8 files of THUDM/chatglm-6b.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from glmtrt_helpers.checkpoints.shards import Part, StoredTensor
from glmtrt_helpers.core.errors import WorkbookError

PACKED = ("I8", "U8")  # dtypes of weights that have a scale
EMBEDDING = "transformer.word_embeddings.weight"


def scale_name(weight: str) -> str:
    return f"{weight}_scale"


@dataclass(frozen=True)
class Packing:
    """How a matrix is packed. bits: 8 or 4. group: neighbours in a row that share a scale; 0: the whole row does.

    published: in the layout of the published files.
    """

    bits: int
    group: int = 0
    published: bool = False


def packings(tensors: Mapping[str, StoredTensor], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Packing]:
    """The packed weights by state-dict name. shapes: of all weights, as the model has them.

    Raises WorkbookError for a weight whose stored shape is that of no layout, and a scale that is missing or not one
    for each group.
    """
    return {
        name: _packing(tensors[name], tensors.get(scale_name(name)), shape)
        for name, shape in shapes.items()
        if name in tensors and tensors[name].dtype in PACKED and len(shape) == 2
    }


def _packing(weight: StoredTensor, scale: StoredTensor | None, shape: tuple[int, ...]) -> Packing:
    n, k = shape
    what = f"{weight.file}: {weight.name!r}"
    layouts: dict[tuple[str, tuple[int, ...]], tuple[int, bool]] = {
        ("I8", (n, k)): (8, True),
    }
    if k % 2 == 0:
        layouts["I8", (n, k // 2)] = (4, True)
    if weight.name != EMBEDDING:  # whose rows are picked out, and nothing is multiplied
        layouts["U8", (k, n)] = (8, False)
        if n % 2 == 0:
            layouts["U8", (k, n // 2)] = (4, False)
    if (weight.dtype, weight.shape) not in layouts:
        odd = f", and {k} columns, an odd number, cannot be packed two a byte" * (k % 2)
        raise WorkbookError(
            f"{what} is {weight.dtype} {weight.shape}, which packs no matrix of {shape} in 8 or 4 bits{odd}: take "
            "configuration and weights from one checkpoint."
        )
    if scale is None:
        raise WorkbookError(
            f"{what} is packed and {scale_name(weight.name)!r} is stored nowhere, perhaps because a shard is missing: "
            "download the checkpoint again."
        )
    bits, published = layouts[weight.dtype, weight.shape]
    by_row = scale.shape == (n,)
    by_group = bits == 4 and not published and len(scale.shape) == 2 and scale.shape[1] == n
    if by_group and (not scale.shape[0] or k % scale.shape[0]):
        by_group = False
    if scale.dtype != "F16" or not (by_row or by_group):
        raise WorkbookError(
            f"{scale.file}: {scale.name!r} is {scale.dtype} {scale.shape}, and {bits}-bit weights of {shape} have one "
            f"fp16 scale a row, ({n},){', or one a group' * (bits == 4 and not published)}: take configuration and "
            "weights from one checkpoint."
        )
    return Packing(bits, 0 if by_row else k // scale.shape[0], published)


def unpack(stored: np.ndarray, packing: Packing) -> np.ndarray:
    """The integers of a packed matrix, int8 (n, k)."""
    values = stored.view(np.int8)
    if packing.bits == 4:
        raw = stored.view(np.uint8)
        low, high = raw & 15, raw >> 4
        pairs = (high, low) if packing.published else (low, high)
        values = (np.stack(pairs, axis=-1).reshape(raw.shape[0], -1).view(np.int8) ^ 8) - 8
    return values if packing.published else np.ascontiguousarray(values.T)


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers of a matrix, int8 (n, k), as it is multiplied: uint8 (k, n), or of -8 to 7 in 4 bits (k, n / 2)."""
    turned = np.ascontiguousarray(values.T).view(np.uint8)
    if bits == 8:
        return turned
    return (turned[:, 0::2] & 15) | (turned[:, 1::2] << 4)


def dequantize(stored: np.ndarray, scale: np.ndarray, packing: Packing, dtype: type[np.floating[Any]]) -> np.ndarray:
    """The weights (n, k) in dtype: each product is rounded once, as DequantizeLinear does."""
    values, wide = unpack(stored, packing), scale.astype(np.float32)
    wide = np.repeat(wide.T, packing.group, axis=1) if packing.group else wide[:, None]
    return (values * wide).astype(dtype, copy=False)


def linkable_parts(tensors: Mapping[str, StoredTensor], packed: Mapping[str, Packing]) -> dict[str, Part | None]:
    """What has to be stored otherwise for a graph to point at it, for `shards.to_safetensors`.

    Published weights are turned; a packed embedding becomes fp16.
    """
    parts: dict[str, Part | None] = {}
    for name, packing in packed.items():
        weight = tensors[name]
        if not packing.published or name != weight.name:  # lm_head may be the embedding, under its name
            continue
        n, k = weight.shape[0], weight.shape[1] * 8 // packing.bits
        if name == EMBEDDING:
            parts[name] = Part("F16", (n, k), _dequantized(name, packing))
            parts[scale_name(name)] = None
        else:
            parts[name] = Part("U8", (k, n * packing.bits // 8), _repacked(name, packing))
    return parts


def _dequantized(name: str, packing: Packing) -> Any:
    return lambda read: dequantize(read(name), read(scale_name(name)), packing, np.float16)


def _repacked(name: str, packing: Packing) -> Any:
    return lambda read: pack(unpack(read(name), packing), packing.bits)
