"""Write a checkpoint whose matrices are of 8 or 4 bits, layer by layer, as another working copy.

The four matrices of every layer are quantised, and lm_head to 8 bits: it is multiplied with for every token, and in 4
bits its errors go into the scores directly. The embedding stays as it is: one row of it is read for each token.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from blake3 import blake3

from glmtrt_helpers.checkpoints import identity, loading, packing, shards
from glmtrt_helpers.checkpoints.checkpoint import BACKUP_NAME, Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.code_hash import code_files
from glmtrt_helpers.checkpoints.config import expected_shapes
from glmtrt_helpers.checkpoints.shards import Part
from glmtrt_helpers.checkpoints.working_copy import is_working_copy, mark_working_copy, working_copy_path
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import is_temporary, replacing
from glmtrt_helpers.quantize.calibrating import MATRICES, Matrices, calibrate
from glmtrt_helpers.quantize.rounding import round_to_nearest

GROUPS = (32, 64, 128)
HEAD = "lm_head.weight"
METHOD_KEY = "glmtrt_quantization"  # in the config.json that is written
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
    that is not finite, a folder of something else at that place, and a disk that is too small.
    """
    checkpoint = open_checkpoint(source)
    group = group if bits == 4 else 0
    _check_request(checkpoint, bits, group)
    target = quantized_path(source, bits)
    _claim(checkpoint, target)
    shapes = {
        target / f"model-{number:05}-of-{checkpoint.num_layers + 1:05}.safetensors": _shapes(
            checkpoint, names, bits, group
        )
        for number, names in enumerate(_names(checkpoint), 1)
    }
    note = _note(checkpoint, bits, group, sequences)
    sizes = {path: sum(part.nbytes for part in parts.values()) for path, parts in shapes.items()}
    todo = [path for path, parts in shapes.items() if not shards.is_whole(path, parts, note)]
    total = sum(sizes.values())
    done = total - sum(sizes[path] for path in todo)
    _check_disk(target, total - done)
    if todo:  # or an index of before would make a checkpoint of shards that do not belong together
        (target / _INDEX).unlink(missing_ok=True)

    def write(path: Path, made: Matrices) -> None:
        """A shard, its integers and scales from `made`, or rounded to the nearest."""
        nonlocal done
        parts = {
            name: replace(part, make=_maker(checkpoint, name, bits, group, made)) for name, part in shapes[path].items()
        }
        shards.write_shard(path, parts, _no_reader, note)
        done += sizes[path]
        progress(done, total)

    paths = list(shapes)
    try:
        if sequences and any(path in todo for path in paths[:-1]):
            layers = {number: path for number, path in enumerate(paths[:-1]) if path in todo}
            calibrate(
                checkpoint,
                sequences,
                bits,
                group,
                lambda number: None if number in layers else _read_back(checkpoint, paths[number], number),
                lambda number, made: write(layers[number], {_full(number, name): each for name, each in made.items()}),
            )
            todo = [path for path in todo if path == paths[-1]]
        for path in todo:
            write(path, {})
    except ValueError as error:
        raise WorkbookError(f"{checkpoint.directory} cannot be quantised, {error}: download it again.") from None
    for path in target.glob("model-*.safetensors"):
        if path not in sizes:
            path.unlink()
    _write_others(checkpoint, target, bits, group, "gptq" if sequences else "rtn")
    weight_map = {name: path.name for path, parts in shapes.items() for name in parts}
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


def _claim(checkpoint: Checkpoint, target: Path) -> None:
    if target.exists() and not is_working_copy(target) and any(not is_temporary(path) for path in target.iterdir()):
        raise WorkbookError(f"{target} holds files of something else: move them away.")
    target.mkdir(parents=True, exist_ok=True)
    mark_working_copy(target)


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


def _shapes(checkpoint: Checkpoint, names: Sequence[str], bits: int, group: int) -> dict[str, Part]:
    """What is written of some tensors: each as it is, or its integers and behind them their scales."""
    shapes, parts = expected_shapes(checkpoint.config), {}
    for name in names:
        tensor = checkpoint.tensors[name]
        packed = _bits_of(name, shapes[name], bits) if name in shapes else 0
        if not packed:
            parts[name] = Part(tensor.dtype, tensor.shape, _no_maker)
            continue
        (n, k), width = tensor.shape, group if packed == 4 else 0
        parts[name] = Part("U8", (k, n * packed // 8), _no_maker)
        parts[packing.scale_name(name)] = Part("F16", (k // width, n) if width else (n,), _no_maker)
    return parts


def _no_maker(read: object) -> np.ndarray:
    raise AssertionError("only the shape is known yet")


def _maker(checkpoint: Checkpoint, name: str, bits: int, group: int, made: Matrices) -> Callable[..., np.ndarray]:
    """What makes the content of a part; the scales of a matrix are asked for after its integers."""

    def make(_: object) -> np.ndarray:
        if name not in shapes:
            if name in made:  # the scales of the part before
                return made.pop(name)[1]
            return _as_it_is(checkpoint, name)
        packed = _bits_of(name, shapes[name], bits)
        if not packed:
            return _as_it_is(checkpoint, name)
        if name not in made:
            try:
                made[name] = round_to_nearest(_stored(checkpoint, name), packed, group if packed == 4 else 0)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        values, scale = made.pop(name)
        made[packing.scale_name(name)] = values, scale
        return packing.pack(values, packed)

    shapes = expected_shapes(checkpoint.config)
    return make


def _stored(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    dtype = _STORED[checkpoint.tensors[name].dtype]
    return loading.read_tensors(checkpoint, [name], dtype)[name]


def _as_it_is(checkpoint: Checkpoint, name: str) -> np.ndarray:
    return _stored(checkpoint, name).contiguous().reshape(-1).view(torch.uint8).numpy()


def _read_back(checkpoint: Checkpoint, path: Path, layer: int) -> dict[str, torch.Tensor]:
    """The dequantised matrices of a layer that an earlier run wrote, by name within the layer."""
    tensors = shards.read_header(path)
    packed = packing.packings(tensors, expected_shapes(checkpoint.config))
    written = Checkpoint(path.parent, checkpoint.config, tensors, packed)
    read = loading.read_tensors(written, [_full(layer, name) for name in MATRICES], torch.float32)
    return {name: read[_full(layer, name)] for name in MATRICES}


def _write_others(checkpoint: Checkpoint, target: Path, bits: int, group: int, method: str) -> None:
    """Source, tokenizer and configuration."""
    source = checkpoint.directory
    files = {*code_files(source), *(path for pattern in _OTHERS for path in source.glob(pattern))}
    backup = source / BACKUP_NAME
    for file in sorted(files | ({backup} if backup.exists() else set())):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        with replacing(copy) as temporary:
            shutil.copyfile(file, temporary)
    if not backup.exists():
        (target / BACKUP_NAME).unlink(missing_ok=True)
    config: Mapping[str, object] = json.loads((source / "config.json").read_text(encoding="utf-8"))
    described = {"method": method, "group": group, "head": 8} if group else {"method": method}
    with replacing(target / "config.json") as temporary:
        text = json.dumps({**config, "quantization_bit": bits, METHOD_KEY: described}, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")
