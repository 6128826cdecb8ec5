"""JSON that comes from files: read as data of a known type, within bounds, from regular files in UTF-8."""

import stat
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from glmtrt_helpers.core.errors import WorkbookError

Model = TypeVar("Model")
LARGEST = 64_000_000  # bytes of a JSON file: the largest real one, an index of shards, has 0.03 MB
_LFS = b"version https://git-lfs.github.com/spec/"
_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def check_regular(path: Path) -> None:
    """Raise WorkbookError for what is not a regular file, or is the pointer that Git LFS leaves in its place.

    A pipe would wait for a writer, a device may never end. FileNotFoundError is left to the caller, who knows what the
    file is for.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise WorkbookError(f"{path} is {kind}, not a regular file: put the file there.")
    with path.open("rb") as stream:
        if stream.read(len(_LFS)) == _LFS:
            raise WorkbookError(
                f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in {path.parent}."
            )


def read(path: Path, model: type[Model], again: str) -> Model:
    """The content of a JSON file as `model`, a type that msgspec knows.

    again: what to do about a wrong one, the end of the sentence. Raises WorkbookError for anything but a regular file
    of JSON in UTF-8 that fits the model; FileNotFoundError is left to the caller.
    """
    check_regular(path)
    size = path.stat().st_size
    if size > LARGEST:
        raise WorkbookError(f"{path} has {size:,} bytes, and at most {LARGEST:,} are expected there: {again}.")
    try:
        return decode(path.read_bytes(), model)
    except ValueError as error:
        raise WorkbookError(f"{path} {error}: {again}.") from None


def decode(raw: bytes, model: Any) -> Any:
    """JSON text as `model`. Raises ValueError, whose text says of the file what is wrong with it."""
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        guess = _MARKS.get(raw[:2]) or ("UTF-16" if b"\0" in raw[:4] else "GBK or another encoding")
        at = raw[max(0, error.start - 2) : error.start + 6].hex(" ")
        raise ValueError(f"is not UTF-8 (bytes {at} at {error.start:,}), perhaps {guess}") from None
    if "\0" in text[:4]:
        raise ValueError(f"begins with the bytes {raw[:8].hex(' ')}, perhaps UTF-16, and UTF-8 is expected")
    try:
        return msgspec.json.decode(text, type=model)
    except msgspec.ValidationError as error:
        raise ValueError(f"holds what is not expected there ({error})") from None
    except msgspec.DecodeError as error:
        raise ValueError(f"is not JSON ({error})") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def convert(value: Any, model: Any) -> Any:
    """Data that has been decoded, checked against a model; ValueError as above."""
    try:
        return msgspec.convert(value, model)
    except msgspec.ValidationError as error:
        raise ValueError(f"holds what is not expected there ({error})") from None
