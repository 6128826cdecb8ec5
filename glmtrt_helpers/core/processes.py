"""What a command takes, measured from outside: its memory over time and the bytes it leaves on the disk; large pages.

Anonymous memory is what a process needs; file-backed memory is mapped weights, which the system drops and reads again
as it likes. `ps` and `top` show the sum of both, which is why a process that needs 0.6 GB can look like 14.

Notebook 05 builds with pages of 2 MB. Linux gives a process its memory when it is first touched, a page of 4 KB at a
time: 6.3 million times in a build of the real size, a quarter of its time. glibc asks for pages of 2 MB where a
variable says so, which it reads only when a process starts (The GNU C Library manual, "Memory Allocation Tunables").
Other systems and libraries ignore the variable.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from glmtrt_helpers.core.errors import WorkbookError

GLMTRT = (sys.executable, "-c", "from glmtrt_helpers.cli.boundary import main; main()")
MALLOC_VARIABLE = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
_PHASE = " ..."  # the end of a line on standard error that names what begins now
_INTERVAL = 0.02


@dataclass(frozen=True)
class Sample:
    """Resident bytes at one moment, in seconds since the start."""

    seconds: float
    anonymous: int
    mapped: int


@dataclass
class Usage:
    """What a command took. phases: when each began. added: bytes that its folder grew by, None without a folder."""

    returncode: int
    seconds: float
    samples: list[Sample] = field(default_factory=list)
    phases: list[tuple[float, str]] = field(default_factory=list)
    added: int | None = None
    output: str = ""
    errors: str = ""

    @property
    def peak_anonymous(self) -> int:
        return max((sample.anonymous for sample in self.samples), default=0)

    @property
    def peak_mapped(self) -> int:
        return max((sample.mapped for sample in self.samples), default=0)


def measure(command: Sequence[str | Path], folder: Path | None = None) -> Usage:
    """Run a command to its end and sample its memory. A line on its standard error that ends in " ..." begins a phase.

    folder: where it writes. Raises WorkbookError on other systems than Linux.
    """
    if not psutil.LINUX:
        raise WorkbookError("memory is measured on Linux only, which tells anonymous from file-backed: run this there.")
    before = disk_bytes(folder) if folder else 0
    started = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    usage = Usage(0, 0.0)
    with ThreadPoolExecutor(2) as readers:  # both pipes are read all the time: a full one would stop the command
        output = readers.submit(process.stdout.read)  # type: ignore[union-attr]
        errors = readers.submit(_read_errors, process, started, usage.phases)
        while process.poll() is None:
            sample = _sample(process.pid, time.perf_counter() - started)
            if sample:
                usage.samples.append(sample)
            time.sleep(_INTERVAL)
        usage.seconds, usage.returncode = time.perf_counter() - started, process.returncode
    usage.output, usage.errors = output.result(), errors.result()
    usage.added = disk_bytes(folder) - before if folder else None
    return usage


def _read_errors(process: subprocess.Popen[str], started: float, phases: list[tuple[float, str]]) -> str:
    lines = []
    for line in process.stderr or ():
        lines.append(line)
        if line.rstrip().endswith(_PHASE):
            phases.append((time.perf_counter() - started, line.rstrip().removesuffix(_PHASE)))
    return "".join(lines)


def _sample(pid: int, seconds: float) -> Sample | None:
    """None where the process has just ended."""
    try:
        memory = psutil.Process(pid).memory_info()  # on Linux, `shared` is what is mapped from files or shared memory
    except psutil.NoSuchProcess:
        return None
    return Sample(seconds, memory.rss - memory.shared, memory.shared)


def disk_bytes(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk; hard links to one file count once."""
    sizes = {(stat.st_dev, stat.st_ino): stat.st_blocks * 512 for stat in map(Path.stat, folder.iterdir())}
    return sum(sizes.values())


def huge_page_environment() -> dict[str, str]:
    """This process's environment with large pages asked for, for a child process; an explicit choice is kept."""
    tunables = os.environ.get(MALLOC_VARIABLE, "")
    if HUGE_PAGES not in tunables:
        tunables = ":".join(filter(None, [tunables, f"{HUGE_PAGES}=1"]))
    return {**os.environ, MALLOC_VARIABLE: tunables}


def restart_with_huge_pages() -> None:
    """Start this process again with large pages, same program, arguments and process id, unless it has been told."""
    if sys.platform == "linux" and HUGE_PAGES not in os.environ.get(MALLOC_VARIABLE, ""):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], huge_page_environment())
