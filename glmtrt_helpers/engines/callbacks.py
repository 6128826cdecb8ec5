"""What TensorRT calls back into: its log, the progress of a build, the stream that a plan is written to.

The classes derive from the chosen module's own, so they are made once the module is known. No exception may pass from
them into TensorRT: it is kept, and raised by whoever called TensorRT.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any

from blake3 import blake3


def make_log(trt: Any) -> Any:
    """A logger that keeps errors instead of printing."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity == trt.ILogger.Severity.ERROR:
                self.errors.append(message)

        def first_error(self) -> str:
            """The first error, which is nearest to the cause, on one line."""
            return " ".join(self.errors[0].split())[:400] if self.errors else "it gave no reason"

    return Log()


def make_monitor(trt: Any, progress: Callable[[str, int, int], None]) -> Any:
    """A progress monitor that passes steps on and keeps time; once `interrupted`, the build ends at its next step.

    Its `phases` maps each phase to its seconds and steps.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._started: dict[str, tuple[float, int]] = {}
            self.phases: dict[str, tuple[float, int]] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._started[phase] = (time.perf_counter(), steps)
            self._tell(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self._tell(phase, step + 1)
            return not self.interrupted

        def phase_finish(self, phase: str) -> None:
            started, steps = self._started[phase]
            seconds, before = self.phases.get(phase, (0.0, 0))  # a phase may come again
            self.phases[phase] = (seconds + time.perf_counter() - started, before + steps)
            self._tell(phase, steps)

        def _tell(self, phase: str, done: int) -> None:
            progress(phase, done, self._started[phase][1])

    return Monitor()


@contextlib.contextmanager
def interruptible(monitor: Any) -> Iterator[None]:
    """While the block runs, Ctrl-C sets `monitor.interrupted` instead of raising inside one of TensorRT's callbacks."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(*_: Any) -> None:
        monitor.interrupted = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def make_writer(trt: Any, stream: IO[bytes], progress: Callable[[int], None]) -> Any:
    """A stream writer over an open file that tells how many bytes it has; keeps the error of a write that failed.

    Pieces, of at most 64 MB, are hashed as they come. What is written goes on to the disk while the builder makes more,
    not all at once when it is done.
    """

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.written = 0
            self.error: OSError | None = None
            self._digest = blake3(max_threads=blake3.AUTO)
            self._disk = ThreadPoolExecutor(1)
            self._synced = self._disk.submit(self._sync)

        def write(self, data: bytes) -> int:
            if not self.written:
                progress(0)
            self._digest.update(data)
            try:
                stream.write(data)
                stream.flush()  # or a full disk would show only when the file is closed
            except OSError as error:
                self.error = self.error or error
                return 0
            self.written += len(data)
            if self._synced.done():
                self._synced = self._disk.submit(self._sync)
            progress(self.written)
            return 0 if self.error else len(data)

        def _sync(self) -> None:
            # The system tells of a write that failed on its way to the disk once: nobody would hear of it later.
            try:
                os.fdatasync(stream.fileno())
            except OSError as error:
                self.error = self.error or error

        def settle(self) -> None:
            """Wait for what still works on the file: to be called before it is closed."""
            self._disk.shutdown()

        def hexdigest(self) -> str:
            return self._digest.hexdigest()

    return Writer()
