"""What an export was made from, recorded in it, so that files that do not belong together are found.

An ONNX file refers to ranges of bytes in the checkpoint's shards. If a shard is replaced, or only saved again with
another header, the same ranges hold something else, and nothing in ONNX notices.

Every use compares each shard's size, header and samples: 4,096 bytes at the start and in the middle of every
tensor, 0.06 s for a checkpoint of 13.4 GB of which nothing is in memory. `verify` and `build`, which read all weights
anyway, compare the whole content: at 2 to 3 GB/s from the disk and 7 GB/s from memory, that is 2 to 6 s.
"""

import functools
import math
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import msgspec
import onnx
from blake3 import blake3
from onnx import helper

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.checkpoints.code_hash import CODE_NAME, code_sha256
from glmtrt_helpers.checkpoints.config import read_config
from glmtrt_helpers.checkpoints.shards import StoredTensor, locate_tensors, read_header
from glmtrt_helpers.core.artifacts import cli_options
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import ExternalTensor, external_tensors, load_graph
from glmtrt_helpers.core.records import check_regular

# Entries of the model's metadata.
CODE_KEY, CONFIG_KEY, SHARDS_KEY = "glmtrt.code_sha256", "glmtrt.config_blake3", "glmtrt.shards"
PRODUCER = "glmtrt"
SAMPLE = 4096  # bytes, read twice from every tensor
_LARGE = 10**9  # bytes; a larger file is hashed once per process
_NUMPY = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "BOOL": "bool", "U8": "uint8"} | {
    f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)
}
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_FileName = Annotated[str, msgspec.Meta(pattern=r"^[^/\x00]+$")]


@dataclass(frozen=True)
class ShardIdentity:
    """BLAKE3 of a shard's header, of samples of it, and of all of it; None where the graph reads no weight."""

    size: Annotated[int, msgspec.Meta(ge=0)]
    header: _Digest
    samples: _Digest
    content: _Digest | None


@dataclass(frozen=True)
class Origin:
    """What a graph or an engine was made from: the hashes of source and configuration, and the shards by file name."""

    code_sha256: _Digest
    config_blake3: _Digest
    shards: Annotated[dict[_FileName, ShardIdentity], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class Export:
    """A graph, the tensors outside of it, and its origin; None for a graph that is not of `glmtrt export`."""

    model: onnx.ModelProto
    external: list[ExternalTensor]
    origin: Origin | None


def file_blake3(path: Path) -> str:
    """BLAKE3 of a file, in hex, as `b3sum` prints it; SHA-256 would take twelve seconds for a plan of 12 GB.

    A large file is read once per process, and again if it has changed.
    """
    stat = path.stat()
    if stat.st_size < _LARGE:
        return _read_blake3(path)
    return _large_blake3(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@functools.lru_cache
def _large_blake3(path: Path, size: int, mtime_ns: int, inode: int) -> str:
    return _read_blake3(path)


def _read_blake3(path: Path) -> str:
    return blake3(max_threads=blake3.AUTO).update_mmap(path).hexdigest()


def origin_of(checkpoint: Checkpoint, *, whole: bool) -> Origin:
    """The origin of what is made from this checkpoint now. whole: with the digest of every byte."""
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    shards = {
        file.name: ShardIdentity(
            file.stat().st_size, _header_blake3(file), _samples_blake3(file), file_blake3(file) if whole else None
        )
        for file in files
    }
    return Origin(code_sha256(checkpoint.code), _config_blake3(checkpoint.directory), shards)


def _config_blake3(directory: Path) -> str:
    """Of the fields of config.json, in whatever order and layout they are written."""
    return blake3(msgspec.json.encode(read_config(directory / "config.json"), order="sorted")).hexdigest()


def _header_blake3(file: Path) -> str:
    """Of all bytes before the first tensor's; of the first bytes of a file that has no such header."""
    with file.open("rb") as stream:
        start = stream.read(8)
        return blake3(start + stream.read(min(int.from_bytes(start, "little"), 100_000_000))).hexdigest()


def _samples_blake3(file: Path) -> str:
    """Reading all 13 GB at every start would take seconds, and retrained or merged weights differ everywhere."""
    digest = blake3()
    with file.open("rb") as stream:
        for tensor in sorted(read_header(file).values(), key=lambda tensor: tensor.offset or 0):
            for start in (0, tensor.nbytes // 2):
                stream.seek((tensor.offset or 0) + start)
                digest.update(stream.read(min(SAMPLE, tensor.nbytes - start)))
    return digest.hexdigest()


def check_origin(origin: Origin, made: Path, directory: Path, again: str, *, whole: bool = False) -> None:
    """Raise WorkbookError, naming the file and what differs, unless a directory still holds what `made` was made from.

    again: what to do then, "export again with `...`". whole: compare every byte of the shards that has been recorded.
    """
    for file in (directory / name for name in (CODE_NAME, *origin.shards)):
        if not os.path.exists(file):  # Path.exists raises for a name that is too long
            raise WorkbookError(f"{file} is missing, and {made.name} was made from it: put it back, or {again}.")
        check_regular(file)
    if code_sha256(directory / CODE_NAME) != origin.code_sha256:
        raise WorkbookError(
            f"{made} was made from another version of {CODE_NAME} or of the code beside it than {directory} holds, "
            f"which was patched or replaced since: {again}."
        )
    if _config_blake3(directory) != origin.config_blake3:
        raise WorkbookError(
            f"{made} was made with another config.json than {directory} holds, which was edited or replaced since: "
            f"{again}."
        )
    for name, expected in origin.shards.items():
        file = directory / name
        if difference := _difference(file, expected, whole):
            raise WorkbookError(f"{file} is not the file that {made.name} was made from, {difference}: {again}.")


def _difference(file: Path, expected: ShardIdentity, whole: bool) -> str:
    size = file.stat().st_size
    sizes = f"{size:,} bytes instead of {expected.size:,}"
    if _header_blake3(file) != expected.header:
        return f"its header differs ({sizes}), as when another program saved it again"
    if size != expected.size:
        return f"its size differs ({sizes})"
    if _samples_blake3(file) != expected.samples:
        return "its content differs"
    if whole and expected.content and file_blake3(file) != expected.content:
        return "its content differs"
    return ""


def metadata(origin: Origin) -> dict[str, str]:
    """The entries of an ONNX model's metadata that record its origin."""
    shards = {name: asdict(shard) for name, shard in origin.shards.items()}
    record = msgspec.json.encode(shards).decode()
    return {CODE_KEY: origin.code_sha256, CONFIG_KEY: origin.config_blake3, SHARDS_KEY: record}


def _read_origin(path: Path, model: onnx.ModelProto, again: str) -> Origin | None:
    entries = {entry.key: entry.value for entry in model.metadata_props}
    keys = (CODE_KEY, CONFIG_KEY, SHARDS_KEY)
    if not set(keys) & entries.keys() and model.producer_name != PRODUCER:
        return None
    missing = [key for key in keys if key not in entries]
    if missing:
        raise WorkbookError(
            f"{path} does not say what it was exported from ({missing[0]} is missing), so it is of an older version of "
            f"this workbook: {again}."
        )
    try:
        shards = msgspec.json.decode(entries[SHARDS_KEY].encode("utf-8", "surrogatepass"))
        values = {"code_sha256": entries[CODE_KEY], "config_blake3": entries[CONFIG_KEY], "shards": shards}
        return msgspec.convert(values, Origin)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise WorkbookError(f"{path} has damaged metadata (one of {', '.join(keys)}: {error}): {again}.") from None


def open_export(path: str | Path, *, whole: bool = False) -> Export:
    """A graph and what it points at, once they are known to belong together.

    Raises WorkbookError for a file that is no ONNX model; a source or a shard that is not the one exported; and a
    tensor whose bytes are outside the folder, beyond the end of a file, or not exactly those of its tensor in a shard.
    whole: compare every byte of the shards, where the graph reads them; otherwise sizes, headers and samples.
    """
    path = Path(path)
    again = f"run notebook 03_export_onnx or `glmtrt export {path.parent}{cli_options(path)}` again"
    model = load_graph(path)
    origin = _read_origin(path, model, again)
    if origin:
        check_origin(origin, path, path.parent, again, whole=whole)
    external = external_tensors(path, model)
    files = {tensor.file for tensor in external}
    stored = locate_tensors(path.parent) if origin else _headers(files)
    names = {tensor.file.name for tensor in stored.values()}
    if origin and names != origin.shards.keys():
        raise WorkbookError(
            f"{path} was exported from {', '.join(sorted(origin.shards))}, and the weights of {path.parent} are in "
            f"{', '.join(sorted(names))} now: {again}."
        )
    _check_places(path, external, stored, again, strict=origin is not None)
    return Export(model, external, origin)


def _headers(files: Collection[Path]) -> dict[str, StoredTensor]:
    shards = [read_header(file) for file in sorted(files) if file.suffix == ".safetensors"]
    return {name: tensor for shard in shards for name, tensor in shard.items()}


def _check_places(
    path: Path, external: list[ExternalTensor], stored: Mapping[str, StoredTensor], again: str, *, strict: bool
) -> None:
    """Every tensor in a shard is exactly one that its header lists, and where the name is the same, that one.

    strict: there is nothing but shards to point into.
    """
    places = {(tensor.file, tensor.offset, tensor.nbytes): name for name, tensor in stored.items()}
    for tensor in external:
        if not strict and tensor.file.suffix != ".safetensors":
            continue
        name, place = tensor.proto.name, (tensor.file, tensor.offset, tensor.nbytes)
        source = stored.get(name) or stored.get(places.get(place, ""))
        where = f"{path} reads {name!r} from {tensor.file.name}, bytes {tensor.offset:,} to {place[1] + place[2]:,}"
        if source is None:
            raise WorkbookError(f"{where}, where its header lists no tensor: {again}.")
        if (source.file, source.offset, source.nbytes) != place:
            raise WorkbookError(
                f"{where}; that tensor is in {source.file.name}, from byte {source.offset or 0:,} on: {again}."
            )
        dtype, dims = helper.tensor_dtype_to_np_dtype(tensor.proto.data_type).name, tuple(tensor.proto.dims)
        in_shard = _NUMPY.get(source.dtype), source.shape
        packed = {"int8": ("uint8", dims), "int4": ("uint8", (*dims[:-1], math.prod(dims[-1:]) // 2))}
        if in_shard not in ((dtype, dims), packed.get(dtype)):
            raise WorkbookError(f"{where}, as {dtype} {dims}; its header says {source.dtype} {source.shape}: {again}.")
