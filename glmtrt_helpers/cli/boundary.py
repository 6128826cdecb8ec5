"""Where every command of `glmtrt` ends: with 0, with one sentence and 1, with its usage and 2, or interrupted.

Interrupted by Ctrl-C it ends with 130, by SIGTERM with 143, as shells have it. All files of this project are written
under temporary names (`core.files`), which are removed on the way out, so an interrupted command leaves no half of one.
"""

import errno
import os
import signal
import sys
import tempfile
import traceback
import warnings
from types import FrameType
from typing import NoReturn

from glmtrt_helpers.core.errors import WorkbookError, explain
from glmtrt_helpers.core.text import shorten, tell

TERMINATED = 128 + signal.SIGTERM
_STOPPED = "what was complete by then stays, no half-written file does."


def main() -> NoReturn:
    """Entry point of `glmtrt`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the shell: the next file that is opened would take its place
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    try:
        code = _run(sys.argv[1:])
        sys.stdout.flush()  # here a full disk or a closed pipe can still be told
    except BaseException as error:
        # What was interrupted while it was made, such as an event loop, complains when it is deleted: that is no news.
        sys.unraisablehook = lambda _: None
        warnings.simplefilter("ignore")
        code = _end(error)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)  # it has ended
    sys.exit(code)


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise what a signal means, or do so a little later where an exception would be lost or end in a crash.

    In `__del__` Python drops it, and a C++ extension that is being imported may end the process.
    """
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_globals.get("__name__") == "importlib._bootstrap":
            signal.signal(signal.SIGALRM, lambda _, later: _stop(number, later))
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            return
        frame = frame.f_back
    raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(TERMINATED)


def _run(arguments: list[str]) -> int:
    import typer

    from glmtrt_helpers.cli.commands import app

    usage_error = typer.BadParameter.__base__  # typer exports the subclass alone
    command = typer.main.get_command(app)
    try:
        # What typer's own main does, except that it would answer some errors itself.
        with command.make_context("glmtrt", arguments) as context:
            command.invoke(context)
    except typer.Exit as ended:
        return int(ended.exit_code)
    except usage_error as error:  # type: ignore[misc]
        error.message = error.message.removeprefix("Value error, ")  # of pydantic, with which typer checks options
        error.show()
        return 2
    return 0


def _end(error: BaseException) -> int:
    """Say how a command ended and return its exit code."""
    causes = _causes(error)
    if any(isinstance(each, KeyboardInterrupt) for each in causes):
        tell(f"glmtrt: interrupted; {_STOPPED}")
        return 128 + signal.SIGINT
    if any(isinstance(each, SystemExit) and each.code == TERMINATED for each in causes):
        tell(f"glmtrt: terminated; {_STOPPED}")
        return TERMINATED
    if isinstance(error, OSError) and error.errno == errno.EPIPE and not error.filename:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or it is tried again, and told, at the end
        tell("glmtrt: the output was closed before all of it was written.")
    elif isinstance(error, WorkbookError):
        _say(str(error))
    elif isinstance(error, OSError | MemoryError):
        _say(explain(error))
    else:
        _say(_unforeseen(error))
    return 1


def _say(sentence: str) -> None:
    tell(f"glmtrt: {sentence}".replace("\n", r"\n"))  # a name may hold a line break


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it came from."""
    causes: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in causes:
        causes.append(following)
        following = following.__cause__ or following.__context__
    return causes


def _unforeseen(error: BaseException) -> str:
    text = shorten(str(error), 300)
    what = f"{type(error).__name__}: {text}" if text else type(error).__name__
    try:
        with tempfile.NamedTemporaryFile("w", prefix="glmtrt-", suffix=".txt", delete=False, encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace").decode())
    except OSError:
        return f"an error that this program did not foresee ({what}); its traceback could not be written."
    return f"an error that this program did not foresee ({what}); its traceback is in {file.name}, please report it."
