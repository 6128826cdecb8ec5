"""The working copy of a checkpoint, `models/run/NAME`, where every later step reads and writes."""

from __future__ import annotations

import shutil
from pathlib import Path

from glmtrt_helpers.checkpoints.checkpoint import BACKUP_NAME, CODE_NAME, open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing

# From this size on, files are linked instead of copied.
LINK_BYTES = 64 * 2**20


def make_working_copy(source: str | Path, runs: str | Path | None = None) -> Path:
    """Make or refresh `run/NAME` beside the checkpoint and return its path; the original is never written to.

    Small files are copied, large ones hard-linked; symbolic links are resolved first. A source that was patched in the
    copy stays patched, unless the checkpoint's own source has changed since. A working copy is returned as it is.
    runs: another folder than `run`. Raises WorkbookError as `open_checkpoint` does, and where no hard link can be made.
    """
    source = Path(source)
    target = Path(runs) / source.name if runs else source.parent / "run" / source.name
    if source.resolve().parent.name == "run":
        return source
    open_checkpoint(source)
    target.mkdir(parents=True, exist_ok=True)
    files = sorted(path for path in source.iterdir() if path.is_file())
    if any(file.suffix == ".bin" and not _is_current(file.resolve(), target / file.name) for file in files):
        _forget_streamed(source, target)
    for file in files:
        real, copy = file.resolve(), target / file.name
        if real.stat().st_size >= LINK_BYTES:
            _link(real, copy)
        elif file.name == CODE_NAME and (target / BACKUP_NAME).exists():
            if (target / BACKUP_NAME).read_bytes() != real.read_bytes():
                (target / BACKUP_NAME).unlink()
                _copy(real, copy)
        elif not copy.exists() or copy.read_bytes() != real.read_bytes():
            _copy(real, copy)
    return target


def _is_current(real: Path, copy: Path) -> bool:
    if not copy.exists() or copy.samefile(real):
        return copy.exists()
    return real.stat().st_size < LINK_BYTES and copy.read_bytes() == real.read_bytes()


def _forget_streamed(source: Path, target: Path) -> None:
    """Remove the shards that were made of older `.bin` ones; the index first, which says that they are there."""
    for file in sorted(target.glob("model*.safetensors*"), reverse=True):
        if not (source / file.name).exists():
            file.unlink()


def _copy(file: Path, copy: Path) -> None:
    with replacing(copy) as temporary:
        shutil.copyfile(file, temporary)


def _link(file: Path, copy: Path) -> None:
    if copy.exists() and copy.samefile(file):
        return
    copy.unlink(missing_ok=True)
    try:
        copy.hardlink_to(file)
    except OSError as error:
        raise WorkbookError(
            f"{copy} cannot be a hard link to {file} ({error.strerror}): keep the checkpoint and its working "
            "copy on one file system, for instance by moving the checkpoint into models/."
        ) from None
