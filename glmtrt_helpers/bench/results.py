"""What `glmtrt bench` measured: its rows, and how they are saved as JSON with the machine they were measured on."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import records, tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tensorrt-rtx", "tensorrt")
_FIELDS = ("copy_bandwidth_gb_s", "matrix_tflop_s", "weights_bytes", "memory", "build")


@dataclass(frozen=True)
class Row:
    """One measurement. past: tokens in the cache of a decode step, or in the prompt of a prefill.

    floor_fraction: `roofline.floor_ms` divided by the median.
    """

    engine: str
    phase: str
    batch: int
    past: int
    dtype: str
    samples_ms: list[float]
    median_ms: float
    tokens_per_s: float
    floor_fraction: float


@dataclass
class Report:
    """One run of `glmtrt bench DIR`.

    copy_bandwidth_gb_s: of a large copy, counting bytes read and bytes written; matrix_tflop_s: of one large matmul.
    memory, build: an entry for each engine; missing: what could not run, or not at a size, and why.
    traces: entries of `kernel_trace.entry`, saved in a file of their own.
    """

    copy_bandwidth_gb_s: float
    matrix_tflop_s: float
    weights_bytes: int
    rows: list[Row] = field(default_factory=list)
    memory: list[dict[str, Any]] = field(default_factory=list)
    build: list[dict[str, Any]] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    traces: list[dict[str, Any]] = field(default_factory=list)


def save(path: Path, checkpoint: Checkpoint, report: Report, command: str) -> None:
    """Write the measurements of a run as JSON."""
    content = asdict(report)
    del content["traces"]
    write(path, command, {"layers": checkpoint.num_layers, **content})


def save_traces(path: Path, report: Report, command: str) -> None:
    """Write the recorded kernels of a run as JSON."""
    write(path, command, {"steps": report.traces})


def write(path: Path, command: str, content: Mapping[str, Any]) -> None:
    """Write what a command measured as JSON, with the commit, the driver and the machine."""
    origin = {"command": command, "commit": _commit(), "driver": tensorrt_package.driver_version()}
    with replacing(path) as temporary:
        text = json.dumps({**origin, **machine(), **content}, indent=1, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> tuple[Report, str]:
    """The run that `glmtrt bench DIR --output` saved, and a line about it.

    Raises WorkbookError where the file is missing or broken.
    """
    again = f"measure it with `glmtrt bench DIR --output {path}`"
    content = read_json(path, again)
    try:
        rows = [Row(**row) for row in content["rows"]]
        report = Report(**{name: content[name] for name in _FIELDS}, rows=rows, missing=content.get("missing", {}))
        if min(report.copy_bandwidth_gb_s, report.matrix_tflop_s, *(row.median_ms for row in rows)) <= 0:
            raise ValueError("a time or a rate that is not above zero")
        return report, about_run(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorkbookError(f"{path} is not a complete measurement ({error}): {again}.") from None


def read_json(path: Path, again: str) -> Any:
    """The content of a saved file. again: how to make it, for the WorkbookError where it is missing or broken."""
    try:
        return records.read(path, Any, again)
    except FileNotFoundError:
        raise WorkbookError(f"{path} is missing: {again}.") from None


def about_run(content: dict[str, Any]) -> str:
    """The GPU, the date and the versions of a saved run, in a line."""
    versions = content["versions"]
    packages = [f"{name} {versions[name]}" for name in ("torch", "tensorrt-rtx") if name in versions]
    return ", ".join([content["gpu"] or "a CPU", content["date"], *packages])


def _commit() -> str | None:
    """The commit of this package's repository, marked "-dirty" if tracked files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def machine() -> dict[str, Any]:
    """The machine and versions of a measurement: date, cores, memory, GPU, Python, packages."""
    cards = tensorrt_package.gpus()
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": cards[0].name if cards else None,
        "python": platform.python_version(),
        "versions": {name: release for name in PACKAGES if (release := tensorrt_package.version(name))},
    }
