"""The one error of the workbook: a sentence that says what is wrong, where, and what to do."""

import errno
from pathlib import Path

_ADVICE = {
    errno.ENOENT: "check the path",
    errno.EISDIR: "a file is needed there, not a folder",
    errno.ENOTDIR: "a folder is needed there, not a file",
    errno.EROFS: "choose a folder on a file system that can be written",
    errno.EACCES: "choose another folder, or change its permissions",
    errno.EPERM: "choose another folder, or change its permissions",
    errno.EMFILE: "raise the limit of open files, `ulimit -n`",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs, or take a machine with more memory",
}
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class WorkbookError(Exception):
    """Raised for bad input. The command line prints its text as one line and exits with 1."""


def explain(error: OSError | MemoryError, path: Path | str | None = None) -> str:
    """One sentence for what the system refused. path: what was being written, where the error does not name it."""
    if isinstance(error, MemoryError):
        return "there is not enough memory for this: close other programs, or take a machine with more."
    reason = error.strerror or str(error) or type(error).__name__
    if error.errno in NO_ROOM:
        where = path or error.filename2 or error.filename  # of a copy, its target is the second
        room = f"free room in {Path(where).parent}" if where else "free room on that disk"
        return f"{where or 'the output'} could not be written ({reason}): {room} and run this again."
    where = path or error.filename or "a file"
    what = f"{where} could not be written" if path else f"{where} cannot be used"
    return f"{what} ({reason}): {_ADVICE.get(error.errno or 0, 'see what it is and where it lies')}."
