"""What a command takes: its memory over time, seen from outside, and the bytes it leaves on the disk.

Anonymous memory is what a process really needs; file-backed memory is mapped weights, which the system drops and reads
again as it likes. `ps` and `top` add the two up, which is how 0.6 GB comes to look like 14.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from glmtrt_helpers import pictures
from glmtrt_helpers.errors import WorkbookError

GLMTRT = (sys.executable, "-c", "from glmtrt_helpers.cli import main; main()")
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


def plot_usage(usages: Mapping[str, Usage], weights: int, title: str = "") -> Figure:
    """Memory over time of several commands, one below the other; the dotted line is the size of the weights (bytes)."""
    figure, axes = plt.subplots(
        len(usages), 1, figsize=(9, 0.4 + 2.1 * len(usages)), sharex=True, sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (name, usage) in zip(axes[:, 0], usages.items(), strict=True):
        seconds = [sample.seconds for sample in usage.samples]
        parts = [
            [sample.anonymous / 1e9 for sample in usage.samples],
            [sample.mapped / 1e9 for sample in usage.samples],
        ]
        axis.stackplot(seconds, parts, colors=[pictures.PREFILL, pictures.SEEN], labels=["anonymous", "file-backed"])
        axis.axhline(weights / 1e9, color="#555555", linestyle=":", linewidth=1, label="the weights")
        axis.set_title(f"{name}: at most {usage.peak_anonymous / 1e9:.2f} GB anonymous", loc="left")
        for number, (begin, phase) in enumerate(usage.phases):
            axis.axvline(begin, color=pictures.DECODE, linewidth=0.8)
            axis.annotate(phase, (begin, 0.97 - 0.11 * (number % 4)), xycoords=("data", "axes fraction"), fontsize=8,
                          xytext=(3, 0), textcoords="offset points", va="top", color="#8a4b08")  # fmt: skip
    axes[0, 0].set_ylim(0, 1.35 * axes[0, 0].get_ylim()[1])  # room for the names of the phases
    axes[0, 0].set_xlim(0, 1.25 * max(usage.seconds for usage in usages.values()))
    axes[0, 0].legend(frameon=False, fontsize=8, loc="upper right")
    axes[-1, 0].set_xlabel("seconds")
    figure.supylabel("GB", fontsize=10)
    if title:
        figure.suptitle(title, fontsize=11)
    plt.close(figure)
    return figure
