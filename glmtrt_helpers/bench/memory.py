"""`glmtrt bench`: what the steps take on this machine, each measured from outside, in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from glmtrt_helpers.bench.results import machine
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import replacing
from glmtrt_helpers.core.processes import GLMTRT, measure

# Phase, arguments of glmtrt; all of them work on the working copy.
PHASES = ("inputs", "patch", "export", "build", "verify")
_CONVERT = "import sys; from glmtrt_helpers.checkpoints import shards; shards.to_safetensors(sys.argv[1])"


@dataclass(frozen=True)
class PhaseMemory:
    """One phase. Bytes; added: what the working copy's folder gained, an earlier output replaced counts nothing."""

    phase: str
    seconds: float
    peak_anonymous: int
    peak_mapped: int
    added: int


def measure_memory(
    directory: Path, phases: Sequence[str] = PHASES, progress: Callable[[str], None] = lambda phase: None
) -> list[PhaseMemory]:
    """Run the phases one after the other on a working copy and measure each. Earlier outputs are made anew.

    `.bin` shards are converted first, as a phase of its own. Raises WorkbookError with a phase's own last words.
    """
    checkpoint = open_checkpoint(directory)
    commands: list[tuple[str, list[str]]] = [(phase, [*GLMTRT, phase, str(directory)]) for phase in phases]
    if not checkpoint.is_safetensors:
        commands.insert(0, ("bin to safetensors", [sys.executable, "-c", _CONVERT, str(directory)]))
    made = {"export": ["model.fp16.onnx"], "build": ["model.fp16.plan", "model.fp16.plan.json"]}
    for name in (name for phase in phases for name in made.get(phase, [])):
        (directory / name).unlink(missing_ok=True)
    rows = []
    for phase, command in commands:
        progress(phase)
        usage = measure(command, directory)
        if usage.returncode != 0:
            said = (usage.errors.strip() or usage.output.strip()).splitlines()
            raise WorkbookError(f"the phase {phase!r} failed: {said[-1] if said else 'it said nothing'}")
        rows.append(PhaseMemory(phase, usage.seconds, usage.peak_anonymous, usage.peak_mapped, usage.added or 0))
    return rows


def save_memory(path: Path, directory: Path, rows: Sequence[PhaseMemory]) -> None:
    """Keep a measurement, with what it was made on."""
    checkpoint = open_checkpoint(directory)
    entry = {
        "command": f"glmtrt bench memory models/run/{checkpoint.name}",
        **machine(),
        "layers": checkpoint.num_layers,
        "weights_bytes": checkpoint.weight_bytes,
        "rows": [asdict(row) for row in rows],
    }
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(entry, indent=1) + "\n", encoding="utf-8")
