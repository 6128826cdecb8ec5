"""Write a file whole or not at all: under a temporary name first, renamed when every byte is on the disk."""

import contextlib
import errno
import os
import re
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
    _remove_stale(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
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


def _remove_stale(path: Path) -> None:
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        match = _TEMPORARY.fullmatch(stale.name)
        if match and not psutil.pid_exists(int(match["pid"])):
            stale.unlink(missing_ok=True)
