"""Notebook 05: memory in pages of 2 MB, for a build that takes 13 GB of it.

Linux gives a process its memory when it is first touched, a page of 4 KB at a time: 6.3 million times in a build of the
real size, a quarter of its time. glibc asks for pages of 2 MB where it is told to, and it listens only when a process
starts (The GNU C Library manual, "Memory Allocation Tunables"). Other systems and libraries pass over the variable.

What a command takes: its memory over time, seen from outside, and the bytes it leaves on the disk.

Anonymous memory is what a process really needs; file-backed memory is mapped weights, which the system drops and reads
again as it likes. `ps` and `top` add the two up, which is how 0.6 GB comes to look like 14.
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

from glmtrt_helpers.core.errors import WorkbookError

MALLOC_VARIABLE = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"


def huge_page_environment() -> dict[str, str]:
    """This process's environment for another one that is to have large pages; whoever chose otherwise keeps that."""
    chosen = os.environ.get(MALLOC_VARIABLE, "")
    if HUGE_PAGES in chosen:
        return dict(os.environ)
    return {**os.environ, MALLOC_VARIABLE: ":".join(filter(None, [chosen, f"{HUGE_PAGES}=1"]))}


def restart_with_huge_pages() -> None:
    """Begin this process again, same program, same arguments, same id, where it has no large pages yet."""
    if sys.platform == "linux" and HUGE_PAGES not in os.environ.get(MALLOC_VARIABLE, ""):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], huge_page_environment())


GLMTRT = (sys.executable, "-c", "from glmtrt_helpers.cli.commands import main; main()")
_PHASE = " ..."  # how a line on standard error ends that names what begins now
_INTERVAL = 0.02


@dataclass(frozen=True)
class Sample:
    """Resident bytes at a moment, in seconds since the start."""

    seconds: float
    anonymous: int
    mapped: int


@dataclass
class Usage:
    """What a command took. phases: when each began; added: bytes that its folder's files gained, None if not asked."""

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
    """Run a command to its end and watch it. Lines on its standard error that end with " ..." begin a phase.

    folder: where it writes; hard links to what was there before count once. Raises WorkbookError outside of Linux.
    """
    if not Path("/proc/self/status").exists():
        raise WorkbookError("memory is measured through Linux's /proc, which is not here: run this on Linux.")
    before = disk_bytes(folder) if folder else 0
    started = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8", errors="replace"
    )
    usage = Usage(0, 0.0)
    with ThreadPoolExecutor(2) as readers:  # both ends are read all the time, or a full pipe would stop the command
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
    """None when the process has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    rss = {key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in lines)
           if key.startswith("Rss")}  # fmt: skip
    return Sample(seconds, rss["RssAnon"], rss["RssFile"] + rss["RssShmem"]) if rss else None


def disk_bytes(folder: Path) -> int:
    """Bytes that the files of a folder take on the disk."""
    found = {(stat.st_dev, stat.st_ino): stat.st_blocks * 512 for stat in map(Path.stat, folder.iterdir())}
    return sum(found.values())
