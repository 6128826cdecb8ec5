"""Read an ONNX file without its weights: the graph, and where the bytes are that lie outside of it."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import onnx
from google.protobuf.message import DecodeError, Message
from onnx import helper

from glmtrt_helpers.core.artifacts import missing_graph
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.records import check_regular

_LARGEST = 2**31  # bytes of a protobuf message
HALF_BYTES = (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)  # data types of which a byte holds two
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class _Entries(msgspec.Struct, forbid_unknown_fields=True):
    """The key-value pairs of a tensor's `external_data`, as onnx.proto names them."""

    location: Annotated[str, msgspec.Meta(min_length=1)]
    offset: _Bytes = 0
    length: _Bytes | None = None
    checksum: str = ""


class Location(NamedTuple):
    """Where a tensor's bytes lie: a file, relative to the graph's folder, and a range of it."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose bytes are known to lie inside a file of the graph's folder."""

    proto: onnx.TensorProto
    file: Path
    offset: int
    nbytes: int


def load_graph(onnx_path: str | Path) -> onnx.ModelProto:
    """The graph without its weights. Raises WorkbookError for what is missing, no regular file or no ONNX model."""
    path = Path(onnx_path)
    try:
        check_regular(path)
    except (FileNotFoundError, NotADirectoryError):
        raise WorkbookError(missing_graph(path)) from None
    try:
        model = onnx.load_model_from_string(path.read_bytes() if path.stat().st_size < _LARGEST else b"")
    except DecodeError:
        model = onnx.ModelProto()
    # An empty file is a valid message as well, without any node.
    if not model.graph.node:
        raise WorkbookError(f"{path} is not an ONNX model, or was not written to its end: export it again.")
    if (broken := next(_broken_texts(model), None)) is not None:
        raise WorkbookError(f"{path} is damaged, {broken[:40]!r} in it is not UTF-8: export it again.")
    return model


def _broken_texts(message: Message) -> Iterator[bytes]:
    """The names and texts of a graph that are not UTF-8, which protobuf gives as bytes."""
    for field, value in message.ListFields():
        values = [value] if isinstance(value, str | bytes | Message) else value
        if field.type == field.TYPE_STRING:
            yield from (text for text in values if isinstance(text, bytes))
        elif field.type == field.TYPE_MESSAGE:
            for inner in values:
                yield from _broken_texts(inner)


def location(tensor: onnx.TensorProto) -> Location:
    """Where a tensor outside the graph says that its bytes are. Raises ValueError where that makes no sense."""
    pairs = {entry.key: entry.value for entry in tensor.external_data}
    if len(pairs) != len(tensor.external_data):
        raise ValueError("a key is given twice")
    entries = msgspec.convert(pairs, _Entries, strict=False)
    try:
        width = 0.5 if tensor.data_type in HALF_BYTES else helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:
        raise ValueError(f"there is no data type {tensor.data_type}") from None
    nbytes = math.ceil(math.prod(tensor.dims) * width)
    if any(size < 0 for size in tensor.dims) or entries.length not in (None, nbytes):
        raise ValueError(f"{entries.length} bytes for {tuple(tensor.dims)} with {width} bytes each")
    return Location(entries.location, entries.offset, nbytes)


def external_tensors(path: Path, model: onnx.ModelProto) -> list[ExternalTensor]:
    """Every tensor whose bytes are outside the file, in subgraphs, attributes and functions as well.

    Raises WorkbookError, naming tensor and file, unless each lies within a regular file inside the graph's folder.
    """
    return [
        _inside_the_folder(path, tensor)
        for tensor in _tensors(model)
        if tensor.external_data or tensor.data_location == onnx.TensorProto.EXTERNAL
    ]


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    graphs = [model.graph]
    nodes = [node for function in model.functions for node in function.node]
    while graphs or nodes:
        if graphs:
            graph = graphs.pop()
            yield from graph.initializer
            for sparse in graph.sparse_initializer:
                yield from (sparse.values, sparse.indices)
            nodes += graph.node
        for attribute in (attribute for node in nodes for attribute in node.attribute):
            yield from (attribute.t, *attribute.tensors)
            for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
                yield from (sparse.values, sparse.indices)
            graphs += [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs
        nodes = []


def _inside_the_folder(path: Path, tensor: onnx.TensorProto) -> ExternalTensor:
    try:
        where, offset, nbytes = location(tensor)
    except ValueError as error:  # of which msgspec's is a kind
        raise WorkbookError(
            f"{path} says of {tensor.name!r} that its bytes are in another file, but not where ({error}): export it "
            "again."
        ) from None
    folder = os.path.realpath(path.parent)
    # realpath and isfile answer for any text; Path would raise for some.
    target = os.path.join(folder, where.replace("\0", "?"))
    if os.path.isabs(where) or os.path.commonpath([folder, os.path.realpath(target)]) != folder:
        raise WorkbookError(f"{path} keeps {tensor.name!r} in {where!r}, which is not in its folder: export it again.")
    file = path.parent / os.path.relpath(target, folder)  # the folder as it was given, which may hold ".."
    if not os.path.exists(target):
        raise WorkbookError(
            f"{file} is missing, but {path.name} keeps {tensor.name!r} in it: put the graph back "
            "into its checkpoint's folder, or export it again."
        )
    if not os.path.isfile(target):
        raise WorkbookError(
            f"{path} keeps {tensor.name!r} in {where!r}, which is not a regular file: put the file there, or export it "
            "again."
        )
    size = os.path.getsize(target)
    if offset + nbytes > size:
        raise WorkbookError(
            f"{file} ends at byte {size:,}, but {path.name} expects {tensor.name!r} up to byte "
            f"{offset + nbytes:,}: the shard was truncated or replaced since the export, export again."
        )
    return ExternalTensor(tensor, file, offset, nbytes)
