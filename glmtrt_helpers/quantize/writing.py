"""Write a checkpoint whose matrices are of 8 or 4 bits, layer by layer, as another working copy.

The four matrices of every layer are quantised, and lm_head to 8 bits: it is multiplied with for every token, and in 4
bits its errors go into the scores directly. The embedding stays as it is: one row of it is read for each token.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from blake3 import blake3

from glmtrt_helpers.checkpoints import identity, loading, packing, shards
from glmtrt_helpers.checkpoints.checkpoint import BACKUP_NAME, Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.code_hash import code_files
from glmtrt_helpers.checkpoints.config import QUANTIZED_KEY, expected_shapes
from glmtrt_helpers.checkpoints.shards import Part
from glmtrt_helpers.checkpoints.working_copy import claim_quantized, working_copy_path
from glmtrt_helpers.core import records
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing
from glmtrt_helpers.quantize.calibrating import MATRICES, Matrices, calibrate
from glmtrt_helpers.quantize.rounding import round_to_nearest

GROUPS = (32, 64, 128)
HEAD = "lm_head.weight"
_INDEX = "model.safetensors.index.json"
_OTHERS = ("*.model", "*_config.json", "*LICENSE*")  # that a checkpoint has beside config.json, source and weights
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def quantized_path(source: str | Path, bits: int) -> Path:
    """Where `quantize_checkpoint` writes: `run/NAME-int4` beside the checkpoint, or beside its working copy."""
    copy = working_copy_path(source)
    return copy.with_name(f"{copy.name}-int{bits}")


def quantize_checkpoint(
    source: str | Path,
    bits: int,
    group: int = 32,
    *,
    sequences: Sequence[Sequence[int]] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write `quantized_path` and return it; the source is read only.

    bits: 4, with a scale for each group of that many neighbours in a row, or 8, with a scale a row. sequences: ids of
    conversations to calibrate with, by GPTQ; without any, each weight is rounded to the nearest. progress: called with
    bytes written and in all.
    There is a shard a layer, and one of the rest. One that is there, made the same way of the same weights, is kept, so
    a killed run goes on where it stopped. The index is written last, and only then is the folder a checkpoint.
    Memory: that of one matrix in fp32; with sequences that of one layer, and of three matrices (k, k).
    Raises WorkbookError for a checkpoint that is quantised already, a group that does not divide the rows, a weight
    that is not finite, a conversation that is too long, a folder of something else at that place, and a disk that is
    too small.
    """
    checkpoint = open_checkpoint(source)
    group = group if bits == 4 else 0
    _check_request(checkpoint, bits, group)
    target = quantized_path(source, bits)
    claim_quantized(target)
    made: Matrices = {}
    plan = {
        target / f"model-{number:05}-of-{checkpoint.num_layers + 1:05}.safetensors": _parts(
            checkpoint, names, bits, group, made
        )
        for number, names in enumerate(_names(checkpoint), 1)
    }
    note = _note(checkpoint, bits, group, sequences)
    sizes = {path: sum(part.nbytes for part in parts.values()) for path, parts in plan.items()}
    todo = [path for path, parts in plan.items() if not shards.is_whole(path, parts, note)]
    total = sum(sizes.values())
    done = total - sum(sizes[path] for path in todo)
    _check_disk(target, total - done)
    if todo:  # or an index of before would make a checkpoint of shards that do not belong together
        (target / _INDEX).unlink(missing_ok=True)
    _write_others(checkpoint, target, bits, group, "gptq" if sequences else "rtn")

    def write(path: Path) -> None:
        nonlocal done
        shards.write_shard(path, plan[path], _no_reader, note)
        done += sizes[path]
        progress(done, total)

    *layers, rest = plan

    def stored(number: int) -> dict[str, torch.Tensor] | None:
        return None if layers[number] in todo else _read_back(checkpoint, layers[number], number)

    def finished(number: int, matrices: Matrices) -> None:
        made.update({_full(number, name): each for name, each in matrices.items()})
        write(layers[number])

    if sequences and todo and todo != [rest]:
        calibrate(checkpoint, sequences, bits, group, stored, finished)
        todo = [path for path in todo if path == rest]
    for path in todo:
        write(path)
    for path in target.glob("model-*.safetensors"):
        if path not in sizes:
            path.unlink()
    weight_map = {name: path.name for path, parts in plan.items() for name in parts}
    shards.write_index(target, weight_map, total)
    open_checkpoint(target)
    return target


def _check_request(checkpoint: Checkpoint, bits: int, group: int) -> None:
    if checkpoint.packed:
        raise WorkbookError(f"{checkpoint.directory} is quantised already: quantise the fp16 checkpoint.")
    if bits not in (4, 8):
        raise WorkbookError(f"weights are quantised to 8 or 4 bits, not {bits}.")
    if group and group not in GROUPS:
        raise WorkbookError(f"a group has {', '.join(map(str, GROUPS))} weights, not {group}.")
    for name, shape in expected_shapes(checkpoint.config).items():
        if group and _bits_of(name, shape, 4) == 4 and (shape[1] % group or shape[0] % 2):
            raise WorkbookError(
                f"{checkpoint.directory}: {name!r} is {shape}, whose rows are not made of groups of {group}: choose "
                "another group, or 8 bits."
            )


def _bits_of(name: str, shape: tuple[int, ...], bits: int) -> int:
    """The bits of a weight in a checkpoint that is quantised to `bits`; 0: it stays as it is."""
    if name == HEAD:
        return 8
    return bits if name.startswith("transformer.layers.") and len(shape) == 2 else 0


def _check_disk(target: Path, needed: int) -> None:
    free = shutil.disk_usage(target).free
    if free < needed:
        raise WorkbookError(f"{target} needs {needed / 1e9:.1f} GB more and has {free / 1e9:.1f}: free some.")


def _no_reader(name: str) -> np.ndarray:
    raise AssertionError("each part reads the checkpoint itself")


def _names(checkpoint: Checkpoint) -> list[list[str]]:
    """The tensors of each layer, and of the rest, in the order in which they are stored."""
    prefixes = [f"transformer.layers.{number}." for number in range(checkpoint.num_layers)]
    layers = [[name for name in checkpoint.tensors if name.startswith(prefix)] for prefix in prefixes]
    inside = {name for layer in layers for name in layer}
    return [*layers, [name for name in checkpoint.tensors if name not in inside]]


def _full(layer: int, name: str) -> str:
    return f"transformer.layers.{layer}.{name}.weight"


def _note(checkpoint: Checkpoint, bits: int, group: int, sequences: Sequence[Sequence[int]]) -> str:
    """What a shard was made of, and how."""
    origin = identity.origin_of(checkpoint, whole=False)
    weights = blake3(
        msgspec.json.encode({name: asdict(shard) for name, shard in origin.shards.items()}, order="sorted")
    )
    method = f"gptq with {blake3(msgspec.json.encode(sequences)).hexdigest()}" if sequences else "rtn"
    return f"{bits} bits, groups of {group}, {method}, of {weights.hexdigest()}"


def _parts(checkpoint: Checkpoint, names: Sequence[str], bits: int, group: int, made: Matrices) -> dict[str, Part]:
    """What is written of some tensors: each as it is, or its integers, followed by their scales.

    made: integers and scales by weight; one that is not there when it is written is rounded to the nearest.
    """
    shapes, parts = expected_shapes(checkpoint.config), {}
    for name in names:
        tensor = checkpoint.tensors[name]
        packed = _bits_of(name, shapes[name], bits) if name in shapes else 0
        if not packed:
            parts[name] = Part(tensor.dtype, tensor.shape, functools.partial(_as_it_is, checkpoint, name))
            continue
        (n, k), width = tensor.shape, group if packed == 4 else 0
        integers = functools.partial(_integers, checkpoint, name, packed, width, made)
        parts[name] = Part("U8", (k, n * packed // 8), integers)
        scales = functools.partial(_scales, name, made)
        parts[packing.scale_name(name)] = Part("F16", (k // width, n) if width else (n,), scales)
    return parts


def _integers(checkpoint: Checkpoint, name: str, bits: int, group: int, made: Matrices, _: object) -> np.ndarray:
    if name not in made:
        try:
            made[name] = round_to_nearest(_stored(checkpoint, name), bits, group)
        except ValueError as error:
            raise WorkbookError(
                f"{checkpoint.tensors[name].file}: {name!r} cannot be quantised, {error}: download that shard again."
            ) from None
    return packing.pack(made[name][0], bits)


def _scales(name: str, made: Matrices, _: object) -> np.ndarray:
    return made.pop(name)[1]


def _stored(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    dtype = _STORED[checkpoint.tensors[name].dtype]
    return loading.read_tensors(checkpoint, [name], dtype)[name]


def _as_it_is(checkpoint: Checkpoint, name: str, _: object) -> np.ndarray:
    return _stored(checkpoint, name).contiguous().reshape(-1).view(torch.uint8).numpy()


def _read_back(checkpoint: Checkpoint, path: Path, layer: int) -> dict[str, torch.Tensor]:
    """The dequantised matrices of a layer that an earlier run wrote, by name within the layer."""
    tensors = shards.read_header(path)
    packed = packing.packings(tensors, expected_shapes(checkpoint.config))
    written = Checkpoint(path.parent, checkpoint.config, tensors, packed)
    read = loading.read_tensors(written, [_full(layer, name) for name in MATRICES], torch.float32)
    return {name: read[_full(layer, name)] for name in MATRICES}


def _write_others(checkpoint: Checkpoint, target: Path, bits: int, group: int, method: str) -> None:
    """The configuration, by which the folder is known again, then source and tokenizer."""
    source = checkpoint.directory
    config = records.read(source / "config.json", dict[str, Any], "download it again")
    described = {"method": method, "group": group, "head": 8} if group else {"method": method}
    with replacing(target / "config.json") as temporary:
        text = json.dumps({**config, "quantization_bit": bits, QUANTIZED_KEY: described}, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
    files = {*code_files(source), *(path for pattern in _OTHERS for path in source.glob(pattern))}
    backup = source / BACKUP_NAME
    for file in sorted(files | ({backup} if backup.exists() else set())):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing(copy) as temporary:
            shutil.copyfile(file, temporary)
    if not backup.exists():
        (target / BACKUP_NAME).unlink(missing_ok=True)
