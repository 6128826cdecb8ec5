"""Weight shards: where the bytes of each weight are, read from indexes and headers alone; `.bin` made safetensors."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from glmtrt_helpers.core import records
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing

if TYPE_CHECKING:
    import torch

# An index, the single file that may stand in its place, in the order they are looked for.
_LAYOUTS = (
    ("model.safetensors.index.json", "model.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin"),
)
# Bytes of an element, for every dtype of safetensors that has whole bytes.
_WIDTHS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
FLOATS = ("F16", "BF16", "F32")
_BIN_DTYPES = dict(zip(("torch.float16", "torch.bfloat16", "torch.float32"), FLOATS, strict=True)) | {
    "torch.int8": "I8",
    "torch.uint8": "U8",
}


_Count = Annotated[int, msgspec.Meta(ge=0, le=2**48)]
_LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the magic number of torch.save before release 1.6, which wrote no archive
_LARGEST_HEADER = 100_000_000  # bytes, as safetensors itself has it
_EMBEDDING, _HEAD = "transformer.word_embeddings.weight", "lm_head.weight"


class _Index(msgspec.Struct):
    """A shard index. Its `metadata` is of no use: writers disagree about what total_size counts."""

    weight_map: dict[str, str]


class _Entry(msgspec.Struct):
    """One tensor in the header of a `.safetensors`. data_offsets: first byte and the one after the last."""

    dtype: str
    shape: Annotated[list[_Count], msgspec.Meta(max_length=8)]
    data_offsets: tuple[_Count, _Count]


@dataclass(frozen=True)
class StoredTensor:
    """One weight in its shard. offset: bytes from the start of the file; None in a `.bin`, which is an archive.

    name: in that shard.
    """

    file: Path
    name: str
    dtype: str  # "F16", "F32", "BF16", as safetensors writes it
    shape: tuple[int, ...]
    offset: int | None
    nbytes: int


@dataclass(frozen=True)
class Part:
    """A tensor to be written into a shard: its dtype as safetensors writes it, its shape, and what makes its content.

    make: takes a function that reads a stored tensor by name as an array, and returns an array of as many bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    make: Callable[[Callable[[str], np.ndarray]], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * _WIDTHS[self.dtype]


def locate_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every weight of a checkpoint directory; raises WorkbookError for an absent, truncated or damaged shard.

    An lm_head that is not stored is the embedding: safetensors stores tensors that share memory once.
    """
    tensors = _stored_tensors(directory)
    if _EMBEDDING in tensors and _HEAD not in tensors:
        tensors |= {_HEAD + part: tensors[_EMBEDDING + part] for part in ("", "_scale") if _EMBEDDING + part in tensors}
    return tensors


def _stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    for index_name, single_name in _LAYOUTS:
        index_file, single_file = directory / index_name, directory / single_name
        if index_file.exists():
            return _through_index(index_file)
        if single_file.exists():
            return read_header(single_file)
    names = ", ".join(index for index, _ in _LAYOUTS)
    raise WorkbookError(f"{directory} holds no weights ({names} or a single shard): download the checkpoint's weights.")


def _through_index(index_file: Path) -> dict[str, StoredTensor]:
    weight_map = records.read(index_file, _Index, "it is to be a shard index, download it again").weight_map
    suffix = Path(index_file.name.removesuffix(".index.json")).suffix
    headers: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(weight_map.values())):
        if "/" in shard or "\0" in shard or not shard.endswith(suffix) or len(shard) > 255:
            raise WorkbookError(
                f"{index_file} names {shard[:80]!r}, which is no {suffix} file of its folder: download the index again."
            )
        file = index_file.parent / shard
        if not file.exists():
            raise WorkbookError(f"{file} is missing, but {index_file.name} names it: download that shard.")
        headers[shard] = read_header(file)
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            raise WorkbookError(
                f"{index_file.parent / shard} does not hold {name!r}, which {index_file.name} says it does: "
                "download that shard again."
            )
    return {name: headers[shard][name] for name, shard in weight_map.items()}


def read_header(file: Path) -> dict[str, StoredTensor]:
    """What one shard holds. Reads the header of a `.safetensors`, maps a `.bin` without its data."""
    records.check_regular(file)
    return _safetensors_header(file) if file.suffix == ".safetensors" else _bin_header(file)


def _safetensors_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length + 8 > size:
            raise WorkbookError(
                f"{file} is truncated or damaged: its header would end at byte {length + 8:,} of {size:,}; "
                "download it again."
            )
        if length > _LARGEST_HEADER:
            raise WorkbookError(f"{file} is damaged: its header would have {length:,} bytes; download it again.")
        raw = stream.read(length)
    try:
        entries = records.decode(raw, dict[str, msgspec.Raw])
        entries.pop("__metadata__", None)
        tensors = {name: _stored(file, name, 8 + length, entry) for name, entry in entries.items()}
        _check_places(tensors.values(), 8 + length)
    except ValueError as error:
        raise WorkbookError(f"{file} has a damaged header ({error}): download it again.") from None
    end = max((tensor.offset or 0) + tensor.nbytes for tensor in tensors.values()) if tensors else 8 + length
    if end != size:
        raise WorkbookError(
            f"{file} is truncated or damaged: {size:,} bytes where its header calls for {end:,}; download it again."
        )
    return tensors


def _stored(file: Path, name: str, data_start: int, raw: msgspec.Raw) -> StoredTensor:
    entry = records.decode(bytes(raw), _Entry)
    begin, end = entry.data_offsets
    if entry.dtype not in _WIDTHS:
        raise ValueError(f"{name!r} has the dtype {entry.dtype!r}, which is not known here")
    if math.prod(entry.shape) * _WIDTHS[entry.dtype] != end - begin:
        raise ValueError(f"{name!r} has {end - begin} bytes for {tuple(entry.shape)} of {entry.dtype}")
    return StoredTensor(file, name, entry.dtype, tuple(entry.shape), data_start + begin, end - begin)


def _check_places(tensors: Collection[StoredTensor], start: int) -> None:
    """Tensors fill a shard from the header to its end: a gap or an overlap means that offsets were moved."""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset or 0, tensor.nbytes)):
        if tensor.offset != start:
            raise ValueError(f"{tensor.name!r} begins at byte {tensor.offset or 0:,} and not at {start:,}")
        start += tensor.nbytes


def load_bin(file: Path, *, shapes_only: bool = False) -> dict[str, torch.Tensor]:
    """A `.bin` shard, read weights-only (no pickled code runs) and mapped into memory, not copied.

    Raises WorkbookError for a pickle that asks for more than tensors; torch's own text would say how to run it anyway.
    """
    import torch  # safetensors headers are read without it

    with file.open("rb") as stream:
        if _LEGACY in stream.read(32):
            raise WorkbookError(
                f"{file} has the format of PyTorch before 1.6, which cannot be mapped into memory: save it again, with "
                "torch.save(torch.load(file, weights_only=True), file)."
            )
    try:
        if shapes_only:
            return torch.load(file, map_location="meta", weights_only=True)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        refused = re.search(r"\bGLOBAL (\S+)|unrecognized (?:function|class) (\S+)", str(error))
        if refused:
            raise WorkbookError(
                f"{file} holds more than weights ({refused[1] or refused[2]}), which could be code and was not run: "
                "take the shard from where the checkpoint was published, as safetensors if there is one."
            ) from None
        lines = [line for line in str(error).splitlines() if line.strip() and "weights_only" not in line]
        first = lines[0].strip() if lines else type(error).__name__
        raise WorkbookError(
            f"{file} cannot be read as weights, it is truncated or damaged ({first}): download it again."
        ) from None


def _bin_header(file: Path) -> dict[str, StoredTensor]:
    state: Any = load_bin(file, shapes_only=True)
    if not isinstance(state, dict) or not any(hasattr(tensor, "nbytes") for tensor in state.values()):
        inner = [key for key, value in state.items() if isinstance(value, dict)] if isinstance(state, dict) else []
        where = f"; they may be under {inner[0]!r}: save that part alone, with torch.save" if inner else ""
        raise WorkbookError(f"{file} holds no weights by name{where}.")
    return {
        str(name): StoredTensor(
            file,
            str(name),
            _BIN_DTYPES.get(str(tensor.dtype), str(tensor.dtype)),
            tuple(tensor.shape),
            None,
            tensor.nbytes,
        )
        for name, tensor in state.items()
        if hasattr(tensor, "nbytes")
    }


def to_safetensors(
    directory: str | Path,
    progress: Callable[[str], None] = lambda phase: None,
    changed: Mapping[str, Part | None] | None = None,
) -> None:
    """Stream the `.bin` shards of a checkpoint into safetensors beside them, one tensor at a time.

    changed: what is to be stored otherwise than it is, or not at all (None).
    A shard that is already whole is kept, so a killed run goes on where it stopped; the index is written last, and only
    then is the checkpoint read as safetensors. It takes the size of the weights on the disk again, and no memory.
    """
    directory, changed = Path(directory), changed or {}
    stored = _stored_tensors(directory)
    sources = sorted({tensor.file for tensor in stored.values()})
    weight_map: dict[str, str] = {}
    total = 0
    for number, source in enumerate(sources, 1):
        target = directory / f"model-{number:05}-of-{len(sources):05}.safetensors"
        parts = {
            name: part
            for name, tensor in stored.items()
            if tensor.file == source and (part := changed.get(name, _as_it_is(tensor)))
        }
        progress(f"{source.name} -> {target.name} ({number} of {len(sources)})")
        if not is_whole(target, parts):
            write_shard(target, parts, _bin_reader(source))
        weight_map |= dict.fromkeys(parts, target.name)
        total += sum(part.nbytes for part in parts.values())
    write_index(directory, weight_map, total)


def write_index(directory: Path, weight_map: Mapping[str, str], total: int) -> None:
    """The index of a folder's shards. weight_map: the shard of each tensor. total: bytes of all tensors."""
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    with replacing(directory / _LAYOUTS[0][0]) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _as_it_is(tensor: StoredTensor) -> Part:
    return Part(tensor.dtype, tensor.shape, lambda read: read(tensor.name))


def _bin_reader(source: Path) -> Callable[[str], np.ndarray]:
    """Reads the tensors of a `.bin` as arrays of bytes, which NumPy has for every dtype; fp16 and int8 as they are."""
    import torch  # as above

    state = load_bin(source)

    def read(name: str) -> np.ndarray:
        tensor = state[name].contiguous()
        plain = tensor.dtype in (torch.float16, torch.int8, torch.uint8)
        return (tensor if plain else tensor.reshape(-1).view(torch.uint8)).numpy()

    return read


def is_whole(target: Path, parts: Mapping[str, Part], note: str = "") -> bool:
    """Whether a shard holds these parts already, and was written with this note."""
    if not target.exists():
        return False
    try:
        actual = read_header(target)
    except WorkbookError:
        return False
    if note and note != _note(target):
        return False
    return {n: (t.shape, t.dtype) for n, t in actual.items()} == {n: (p.shape, p.dtype) for n, p in parts.items()}


def _note(file: Path) -> str:
    with file.open("rb") as stream:
        raw = stream.read(struct.unpack("<Q", stream.read(8))[0])
    return str(records.decode(raw, dict[str, Any]).get("__metadata__", {}).get("note", ""))


def write_shard(
    target: Path,
    parts: Mapping[str, Part],
    read: Callable[[str], np.ndarray],
    note: str = "",
) -> None:
    """Write one shard tensor by tensor; safetensors itself would hold them all.

    read: reads a stored tensor by name as an array. note: kept in the header.
    """
    for name, part in parts.items():
        if part.dtype not in (*FLOATS, "I8", "U8"):
            raise WorkbookError(
                f"{target}: {name!r} is {part.dtype}, only fp16, bf16, fp32, int8 and uint8 are written."
            )
    header = safetensors_header({name: (part.dtype, part.shape, part.nbytes) for name, part in parts.items()}, note)
    with replacing(target) as temporary, temporary.open("wb") as stream:
        stream.write(header)
        for part in parts.values():
            content = np.ascontiguousarray(part.make(read))
            assert content.nbytes == part.nbytes
            stream.write(content.reshape(-1).view(np.uint8).data)


def safetensors_header(entries: Mapping[str, tuple[str, Sequence[int], int]], note: str = "") -> bytes:
    """The header of a shard: 8 bytes of length, then JSON. entries: dtype, shape and bytes of each tensor, in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"} | ({"note": note} if note else {})}
    offset = 0
    for name, (dtype, shape, nbytes) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
