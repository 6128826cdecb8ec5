"""Write a file whole or not at all: under a temporary name first, renamed when every byte is on the disk."""

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from glmtrt_helpers.core.errors import WorkbookError

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed to `path` when the block ends, and removed when it fails.

    The name holds the process id, so two processes never share a file; those of killed processes are removed here.
    Raises WorkbookError where the disk is full.
    """
    remove_stale(path)
    temporary = temporary_path(path)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise WorkbookError(
            f"{path} could not be written ({error.strerror}): free room in {path.parent} and run this again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """Whether the file is one that `replacing` writes, now or in a process that was killed."""
    return bool(_TEMPORARY.fullmatch(path.name))


def temporary_path(path: Path) -> Path:
    """The name beside `path` under which this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def remove_stale(path: Path) -> None:
    """Remove what killed processes left under temporary names of `path`, files and folders."""
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        match = _TEMPORARY.fullmatch(stale.name)
        if match and not psutil.pid_exists(int(match["pid"])):
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink(missing_ok=True)
