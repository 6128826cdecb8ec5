"""Write a file whole or not at all: under a temporary name first, renamed when every byte is on the disk."""

import contextlib
import itertools
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from glmtrt_helpers.core.errors import WorkbookError, explain

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)\.tmp")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; it is renamed to `path` when the block ends, and removed when it fails.

    The name holds the process id, so two processes never share a file; those of killed processes are removed here.
    Raises WorkbookError where the system refuses to write.
    """
    temporary = temporary_path(path)
    try:
        remove_stale(path)
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        named = {str(name) for name in (error.filename, error.filename2) if name}
        if named and str(temporary) not in named:
            raise  # of another file that the block works on
        raise WorkbookError(explain(error, path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raise WorkbookError where `replacing(path)` would, before the work whose result it is to hold."""
    if path.is_dir():
        raise WorkbookError(f"{path} is a folder: a file is to be written there.")
    try:
        with tempfile.TemporaryFile(dir=path.parent) as stream:
            stream.write(b"\0" * 4096)  # one block, so that a full disk is noticed, too
    except OSError as error:
        raise WorkbookError(explain(error, path)) from error


def free_name(path: Path) -> Path:
    """The path, or with a number where there is such a file."""
    names = (path if number == 1 else path.with_name(f"{path.name}{number}") for number in itertools.count(1))
    return next(name for name in names if not name.exists())


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
