"""TODO."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing

PACKAGES = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "tensorrt-rtx", "tensorrt")


def machine() -> dict[str, Any]:
    """What a measurement was made on and with: cores, memory, GPU, versions, date."""
    cards = tensorrt_package.gpus()
    return {
        "date": datetime.date.today().isoformat(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": cards[0].name if cards else None,
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := tensorrt_package.version(name))},
    }


_KEPT = ("copy_bandwidth_gb_s", "matrix_tflop_s", "weights_bytes", "memory", "build")


def load(path: Path) -> tuple[Report, str]:
    """A run that `glmtrt bench DIR --output` kept, and on what it was made. WorkbookError: missing or broken."""
    again = f"measure it with `glmtrt bench DIR --output {path}`"
    entry = read_json(path, again)
    try:
        rows = [Row(**row) for row in entry["rows"]]
        rest = {name: entry[name] for name in _KEPT}
        report = Report(**rest, rows=rows, missing=entry.get("missing", {}))
        if min(report.copy_bandwidth_gb_s, report.matrix_tflop_s, *(row.median_ms for row in rows)) <= 0:
            raise ValueError("a time or a rate that is not above zero")
        return report, about_run(entry)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WorkbookError(f"{path} is no whole measurement ({error}): {again}.") from None


def read_json(path: Path, again: str) -> Any:
    """A kept file. WorkbookError: missing or broken; again: how one comes by it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise WorkbookError(f"{path} is missing: {again}.") from None
    except ValueError as error:
        raise WorkbookError(f"{path} is not JSON ({error}): {again}.") from None


def about_run(entry: dict[str, Any]) -> str:
    """The card, the day and the versions of a kept run, in a line."""
    packages = [f"{name} {entry['versions'][name]}" for name in ("torch", "tensorrt-rtx") if name in entry["versions"]]
    return ", ".join([entry["gpu"] or "a CPU", entry["date"], *packages])


@dataclass(frozen=True)
class Row:
    """One measurement. past: tokens in the cache of a decode, tokens of the prompt of a prefill."""

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
    """A run. bandwidth: GB a second, read and written bytes of a copy both counted; matrix rate: of a large product.

    missing: what could not run, or not at a size, and why. traces: as `kernel_trace.entry` makes them; kept apart.
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
    """Keep a run as JSON, with what it was made on."""
    content = asdict(report)
    del content["traces"]
    _write(path, command, {"layers": checkpoint.num_layers, **content})


def save_traces(path: Path, report: Report, command: str) -> None:
    """Keep the recorded kernels of a run as JSON."""
    _write(path, command, {"steps": report.traces})


def _write(path: Path, command: str, content: dict[str, Any]) -> None:
    here = machine()
    about = {"gpu": here.pop("gpu"), "driver": tensorrt_package.driver_version(), "versions": here.pop("versions")}
    entry = {**about, "commit": _commit(), "command": command, **here, **content}
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(entry, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _commit() -> str | None:
    """Of this package's own repository, with a mark where its files were changed since."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None
