"""Weight shards: where the bytes of each weight are, read from indexes and headers alone; `.bin` made safetensors."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
_BIN_DTYPES = {"torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float32": "F32"}
FLOATS = tuple(_BIN_DTYPES.values())


@dataclass(frozen=True)
class StoredTensor:
    """One weight in its shard. offset: bytes from the start of the file; None in a `.bin`, which is an archive."""

    file: Path
    dtype: str  # "F16", "F32", "BF16", as safetensors writes it
    shape: tuple[int, ...]
    offset: int | None
    nbytes: int


def locate_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every weight of a checkpoint directory; raises WorkbookError for an absent, truncated or damaged shard."""
    for index_name, single_name in _LAYOUTS:
        index_file, single_file = directory / index_name, directory / single_name
        if index_file.exists():
            return _through_index(index_file)
        if single_file.exists():
            return read_header(single_file)
    names = ", ".join(index for index, _ in _LAYOUTS)
    raise WorkbookError(f"{directory} holds no weights ({names} or a single shard): download the checkpoint's weights.")


def _through_index(index_file: Path) -> dict[str, StoredTensor]:
    try:
        weight_map: dict[str, str] = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise WorkbookError(f"{index_file} is not a shard index ({error!r}): download it again.") from None
    headers: dict[str, dict[str, StoredTensor]] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise WorkbookError(f"{index_file} names a shard outside its folder, {shard!r}: download the index again.")
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
        raw = stream.read(length)
    try:
        header: dict[str, Any] = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _stored(file, 8 + length, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise WorkbookError(
            f"{file} has a damaged header ({type(error).__name__}: {error}): download it again."
        ) from None
    end = max((tensor.offset or 0) + tensor.nbytes for tensor in tensors.values()) if tensors else 8 + length
    if end != size:
        raise WorkbookError(
            f"{file} is truncated or damaged: {size:,} bytes where its header calls for {end:,}; download it again."
        )
    return tensors


def _stored(file: Path, data_start: int, entry: dict[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(int(size) for size in entry["shape"])
    if math.prod(shape) * _WIDTHS[entry["dtype"]] != end - begin:
        raise ValueError(f"{end - begin} bytes for {shape} of {entry['dtype']}")
    return StoredTensor(file, entry["dtype"], shape, data_start + begin, end - begin)


def load_bin(file: Path, *, shapes_only: bool = False) -> dict[str, torch.Tensor]:
    """A `.bin` shard, read weights-only (no pickled code runs) and mapped into memory, not copied.

    Raises WorkbookError for a pickle that asks for more than tensors; torch's own text would say how to run it anyway.
    """
    import torch  # safetensors headers are read without it

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
    tensors = load_bin(file, shapes_only=True)
    return {
        name: StoredTensor(
            file, _BIN_DTYPES.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape), None, tensor.nbytes
        )
        for name, tensor in tensors.items()
        if hasattr(tensor, "nbytes")
    }


def to_safetensors(directory: str | Path, progress: Callable[[str], None] = lambda phase: None) -> None:
    """Stream the `.bin` shards of a checkpoint into safetensors beside them, one tensor at a time.

    A shard that is already whole is kept, so a killed run goes on where it stopped; the index is written last, and only
    then is the checkpoint read as safetensors. It takes the size of the weights on the disk again, and no memory.
    """
    directory = Path(directory)
    stored = locate_tensors(directory)
    sources = sorted({tensor.file for tensor in stored.values()})
    weight_map: dict[str, str] = {}
    for number, source in enumerate(sources, 1):
        target = directory / f"model-{number:05}-of-{len(sources):05}.safetensors"
        names = [name for name, tensor in stored.items() if tensor.file == source]
        progress(f"{source.name} -> {target.name} ({number} of {len(sources)})")
        if not _is_whole(target, {name: stored[name] for name in names}):
            _stream_shard(load_bin(source), names, {name: stored[name] for name in names}, target)
        weight_map |= dict.fromkeys(names, target.name)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in stored.values())}, "weight_map": weight_map}
    with replacing(directory / _LAYOUTS[0][0]) as temporary:
        temporary.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _is_whole(target: Path, expected: Mapping[str, StoredTensor]) -> bool:
    if not target.exists():
        return False
    try:
        actual = read_header(target)
    except WorkbookError:
        return False
    return {n: (t.shape, t.dtype) for n, t in actual.items()} == {n: (t.shape, t.dtype) for n, t in expected.items()}


def _stream_shard(
    state: Mapping[str, torch.Tensor], names: list[str], stored: Mapping[str, StoredTensor], target: Path
) -> None:
    """Write one shard tensor by tensor; safetensors itself would hold them all."""
    import torch  # as above

    for name in names:
        if stored[name].dtype not in FLOATS:
            raise WorkbookError(
                f"{stored[name].file}: {name!r} is {stored[name].dtype}, only fp16, bf16 and fp32 are converted."
            )
    header = safetensors_header({name: (stored[name].dtype, stored[name].shape, stored[name].nbytes) for name in names})
    with replacing(target) as temporary, temporary.open("wb") as stream:
        stream.write(header)
        for name in names:
            stream.write(state[name].contiguous().reshape(-1).view(torch.uint8).numpy().data)


def safetensors_header(entries: Mapping[str, tuple[str, Sequence[int], int]]) -> bytes:
    """The header of a shard: 8 bytes of length, then JSON. entries: dtype, shape and bytes of each tensor, in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape, nbytes) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
