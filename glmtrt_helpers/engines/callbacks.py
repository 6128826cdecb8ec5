"""What TensorRT calls back into: a logger, a progress monitor, and a stream writer for the plan.

The classes derive from those of the selected module, so they are made once that is known. No exception may pass from
them into TensorRT: it is kept, and raised by whoever called TensorRT.
"""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

from blake3 import blake3

from glmtrt_helpers.core.text import shorten


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
            """The first error, the closest to the cause, on one line."""
            return shorten(self.errors[0], 400) if self.errors else "it gave no reason"

    return Log()


def make_monitor(trt: Any, progress: Callable[[str, int, int], None]) -> Any:
    """A progress monitor that reports and times every phase; once `interrupted`, the build ends at its next step.

    progress is called with a phase, its steps done and all its steps. phases: seconds and steps of each phase, without
    the seconds of the phases inside it.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.interrupted = False
            self._started: dict[str, tuple[float, int]] = {}
            self._parents: dict[str, str | None] = {}
            self.phases: dict[str, tuple[float, int]] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._started[phase], self._parents[phase] = (time.perf_counter(), steps), parent
            self._report(phase, 0)

        def step_complete(self, phase: str, step: int) -> bool:
            self._report(phase, step + 1)
            return not self.interrupted

        def phase_finish(self, phase: str) -> None:
            started, steps = self._started[phase]
            seconds = time.perf_counter() - started
            self._add(phase, seconds, steps)  # to what it took before: a phase may run again
            parent = self._parents[phase]
            if parent is not None:
                self._add(parent, -seconds, 0)
            self._report(phase, steps)

        def _add(self, phase: str, seconds: float, steps: int) -> None:
            before = self.phases.get(phase, (0.0, 0))
            self.phases[phase] = (before[0] + seconds, before[1] + steps)

        def _report(self, phase: str, done: int) -> None:
            progress(phase, done, self._started[phase][1])

    return Monitor()


@contextlib.contextmanager
def interruptible(monitor: Any) -> Iterator[None]:
    """Within the block, Ctrl-C and SIGTERM set `monitor.interrupted` instead of raising inside one of the callbacks.

    At the block's end they take their usual effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        monitor.interrupted = True
        arrived.append(number)

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if arrived:
            signal.raise_signal(arrived[0])


@contextlib.contextmanager
def plan_writer(trt: Any, path: Path, progress: Callable[[int], None]) -> Iterator[Any]:
    """A stream writer into a new file, which is closed at the end of the block. progress is called with its bytes."""
    with path.open("wb", buffering=0) as stream:  # a buffer would tell of a full disk only when it is flushed
        writer = _make_writer(trt, stream, progress)
        try:
            yield writer
        finally:
            writer.finish()


def _make_writer(trt: Any, stream: IO[bytes], progress: Callable[[int], None]) -> Any:
    """written: bytes so far. error: the first failure of a write, on which the build ends.

    Pieces, of at most 64 MB, are hashed as they come. A thread syncs them to the disk while the builder makes more,
    rather than all at once at the end.
    """

    class Writer(trt.IStreamWriter):
        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self.written = 0
            self.error: OSError | None = None
            self._hash = blake3(max_threads=blake3.AUTO)
            self._thread = ThreadPoolExecutor(1)
            self._syncing = self._thread.submit(self._sync)

        def write(self, data: bytes) -> int:
            if not self.written:
                progress(0)
            self._hash.update(data)
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[stream.write(rest) :]
            except OSError as error:
                self.error = self.error or error
                return 0
            self.written += len(data)
            if self._syncing.done():
                self._syncing = self._thread.submit(self._sync)
            progress(self.written)
            return 0 if self.error else len(data)

        def _sync(self) -> None:
            # The system reports a write that failed on its way to the disk only once, to the next sync.
            try:
                os.fdatasync(stream.fileno())
            except OSError as error:
                self.error = self.error or error

        def finish(self) -> None:
            """Wait for the sync that still runs: before the file is closed."""
            self._thread.shutdown()

        def hexdigest(self) -> str:
            return self._hash.hexdigest()

    return Writer()
