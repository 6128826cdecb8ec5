"""The working copy of a checkpoint, `models/run/NAME`, where every later step reads and writes."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from blake3 import blake3

from glmtrt_helpers.checkpoints.checkpoint import BACKUP_NAME, Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.code_hash import CODE_NAME, code_files
from glmtrt_helpers.checkpoints.config import QUANTIZED_KEY
from glmtrt_helpers.core import records
from glmtrt_helpers.core.artifacts import MARKER
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import free_name, is_temporary, replacing
from glmtrt_helpers.core.text import tell

# From this size on, files are cloned or linked instead of copied.
LINK_BYTES = 64 * 2**20
_FICLONE = 0x40049409  # ioctl of Linux: share the blocks of another file until either is written to


def working_copy_path(source: str | Path, runs: str | Path | None = None) -> Path:
    """`run/NAME` beside a checkpoint, or the folder itself if it is a working copy. runs: another folder than `run`."""
    source = _named(source)
    if is_working_copy(source):
        return source
    return (Path(runs) if runs else source.parent / "run") / source.name


def is_working_copy(directory: Path) -> bool:
    return (directory / MARKER).is_file()


def make_working_copy(source: str | Path, runs: str | Path | None = None, *, full: bool = False) -> Path:
    """Make or refresh `run/NAME` beside the checkpoint and return its path; the original is never written to.

    Small files are copied; large ones share their blocks with the original where the file system can, and are hard
    links elsewhere, unless `full` asks for copies. Symbolic links are resolved first. What has gone from the checkpoint
    goes from the copy; what the later steps made there stays, also a patched source, unless the checkpoint's own source
    has changed since. What else was changed there by hand is kept beside, as `.edited`, and told. A working copy is
    returned as it is. runs: another folder than `run`.
    Raises WorkbookError as `open_checkpoint` does, where no hard link can be made, and for a folder at that place that
    is not a working copy.
    """
    source, target = _named(source), working_copy_path(source, runs)
    if target == source:
        return source
    open_checkpoint(source)
    code = [file.relative_to(source).as_posix() for file in code_files(source)]
    files = sorted({path.name for path in source.iterdir() if path.is_file() and not is_temporary(path)} | set(code))
    before = _claim(source, target, files)
    digests = {name: _digest(source / name) for name in files}
    _write_marker(target, digests | before)  # what is still the old one has the old digest
    gone = before.keys() - set(files)
    stale = [name for name in files if name.endswith(".bin") and not _is_current(source / name, target / name)]
    if stale or any(name.endswith(".bin") for name in gone):
        _forget_streamed(target, files)
    for name in sorted(gone, key=lambda name: not name.endswith(".index.json")):  # an index before its shards
        _keep_edit(target / name, before[name])
        (target / name).unlink(missing_ok=True)
    for name in files:
        _refresh(source / name, target / name, before.get(name, ""), full)
    _write_marker(target, digests)
    return target


def hard_links_note(checkpoint: Checkpoint) -> str:
    """What to know of shards that have another hard link, empty if none has: the onnx package does not open them."""
    linked = sorted({tensor.file for tensor in checkpoint.tensors.values() if tensor.file.stat().st_nlink > 1})
    if not linked:
        return ""
    return (
        f'{linked[0]} is a hard link, for which tools built on the onnx package refuse the export ("multiple hard '
        'links"): ONNX Runtime and TensorRT read it; for the others make the working copy with `glmtrt copy --full`, '
        f"which takes {checkpoint.weight_bytes / 1e9:.1f} GB, or read the graph alone with "
        "onnx.load(path, load_external_data=False)."
    )


def _named(source: str | Path) -> Path:
    """The path as it was given, unless it has no name of its own, as `.` and `..` have none."""
    source = Path(source)
    return source.resolve() if source.name in ("", "..") else source


def _claim(source: Path, target: Path, files: Collection[str]) -> dict[str, str]:
    """Make the folder and return its `_read_marker`. Raises WorkbookError for a folder of somebody else's.

    Working copies had no marker once: a folder that holds the whole checkpoint unchanged, apart from patches and with
    large files linked, is taken for one, and any other must be moved away by hand.
    """
    if source.resolve() in target.resolve().parents:
        raise WorkbookError(f"{source}: its working copy would lie inside it, in {target}: rename the checkpoint.")
    try:
        target.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise WorkbookError(f"{target} cannot be a folder, a file is in its way: move the file away.") from None
    if is_quantized(target) and not is_quantized(source):
        raise WorkbookError(
            f"{target} is what `glmtrt quantize` wrote, not a copy of {source}: move it away, or rename the checkpoint."
        )
    if is_working_copy(target):
        return _read_marker(target)
    if all(is_temporary(path) for path in target.iterdir()):
        return {}
    if all(_is_current(source / name, target / name) for name in files):
        return dict.fromkeys(files, "")
    raise WorkbookError(
        f"{target} holds files and no {MARKER}, so it is not a working copy of `glmtrt copy`, or an old one of another "
        "state of the checkpoint: move it away, or delete it if you do not need it."
    )


def claim_quantized(directory: Path) -> None:
    """Make a folder the working copy that `glmtrt quantize` writes, which mirrors no checkpoint's files.

    Raises WorkbookError where it holds anything else, such as the working copy of a checkpoint of that name.
    """
    if directory.exists() and not is_quantized(directory):
        mirrored = _read_marker(directory) if is_working_copy(directory) else {}
        if mirrored or any(not is_temporary(path) and path.name != MARKER for path in directory.iterdir()):
            raise WorkbookError(
                f"{directory} holds something that `glmtrt quantize` did not write: move it away, or rename the "
                "checkpoint."
            )
    directory.mkdir(parents=True, exist_ok=True)
    if not is_working_copy(directory):
        _write_marker(directory, {})


def is_quantized(directory: Path) -> bool:
    """Whether `glmtrt quantize` wrote a folder, or began to."""
    try:
        return QUANTIZED_KEY in records.read(directory / "config.json", dict[str, Any], "")
    except (FileNotFoundError, WorkbookError):
        return False


def _read_marker(target: Path) -> dict[str, str]:
    """The mirrored names and digests; a marker that somebody damaged names none, so nothing is removed."""
    try:
        names = records.read(target / MARKER, dict[str, dict[str, str]], "copy again").get("files", {})
    except WorkbookError:
        return {}
    return {
        name: digest for name, digest in names.items() if not Path(name).is_absolute() and ".." not in Path(name).parts
    }


def _write_marker(target: Path, files: Mapping[str, str]) -> None:
    text = json.dumps({"files": dict(sorted(files.items()))}, indent=1, ensure_ascii=False) + "\n"
    if not is_working_copy(target) or (target / MARKER).read_bytes() != text.encode():
        with replacing(target / MARKER) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _is_current(file: Path, copy: Path) -> bool:
    """Whether a copy holds its file's bytes; those of large files are not read."""
    if file.name == CODE_NAME and copy.with_name(BACKUP_NAME).exists():
        copy = copy.with_name(BACKUP_NAME)
    if not copy.exists():
        return False
    one, other = file.stat(), copy.stat()
    if one.st_size != other.st_size or one.st_size < LINK_BYTES:
        return one.st_size == other.st_size and file.read_bytes() == copy.read_bytes()
    return copy.samefile(file) or one.st_mtime_ns == other.st_mtime_ns


def _forget_streamed(target: Path, files: Collection[str]) -> None:
    """Remove the shards that were made of older `.bin` ones; the index first, which says that they are there."""
    for file in sorted(target.glob("model*.safetensors*"), reverse=True):
        if file.name not in files:
            file.unlink()


def _digest(file: Path) -> str:
    """BLAKE3 of a small file, "" of a large one."""
    return blake3(file.read_bytes()).hexdigest() if file.stat().st_size < LINK_BYTES else ""


def _keep_edit(copy: Path, digest: str) -> None:
    """Move a small file that is about to go out of the way, unless it has the digest that it was copied with."""
    if copy.is_file() and _digest(copy) != digest and copy.stat().st_size < LINK_BYTES:
        edited = free_name(copy.with_name(f"{copy.name}.edited"))
        copy.replace(edited)
        tell(f"{copy} was not as the checkpoint had it; that file is kept as {edited}.")


def _refresh(file: Path, copy: Path, digest: str, full: bool) -> None:
    linked = copy.exists() and copy.samefile(file)
    if not linked and _is_current(file, copy):
        return
    if file.name == CODE_NAME:
        copy.with_name(BACKUP_NAME).unlink(missing_ok=True)
    _keep_edit(copy, digest)
    real = file.resolve()
    copy.parent.mkdir(parents=True, exist_ok=True)
    with replacing(copy) as temporary:
        if real.stat().st_size < LINK_BYTES or full:
            shutil.copyfile(real, temporary)
        elif not _clone(real, temporary):
            return _link(real, temporary, copy)
        os.utime(temporary, ns=(real.stat().st_atime_ns, real.stat().st_mtime_ns))


def _clone(file: Path, copy: Path) -> bool:
    """Share the blocks of a file, as `cp --reflink` does; False where the file system cannot."""
    with file.open("rb") as source, copy.open("wb") as target:
        try:
            fcntl.ioctl(target.fileno(), _FICLONE, source.fileno())
            return True
        except OSError:
            return False


def _link(file: Path, temporary: Path, copy: Path) -> None:
    try:
        temporary.unlink(missing_ok=True)
        temporary.hardlink_to(file)
    except OSError as error:
        raise WorkbookError(
            f"{copy} cannot be a hard link to {file} ({error.strerror}): keep the checkpoint and its working "
            "copy on one file system, for instance by moving the checkpoint into models/, or use `glmtrt copy --full`."
        ) from None
