"""`glmtrt bench memory`: memory, time and disk of each step, measured from outside, each in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from glmtrt_helpers.bench import results
from glmtrt_helpers.bench.phases import Phase
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.code_hash import announce
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.processes import GLMTRT, measure

_OUTPUTS: dict[str, list[str]] = {
    Phase.EXPORT: ["model.fp16.onnx"],
    Phase.BUILD: ["model.fp16.plan", "model.fp16.plan.json"],
}
_RUN_CODE = (Phase.INPUTS, Phase.EXPORT, Phase.VERIFY)
_CONVERT = "import sys; from glmtrt_helpers.checkpoints import shards; shards.to_safetensors(sys.argv[1])"


@dataclass(frozen=True)
class PhaseMemory:
    """One phase; sizes in bytes. added: growth of the working copy's files on disk."""

    phase: str
    seconds: float
    peak_anonymous: int
    peak_mapped: int
    added: int


def measure_memory(
    directory: Path, phases: Sequence[Phase] = tuple(Phase), progress: Callable[[str], None] = lambda phase: None
) -> list[PhaseMemory]:
    """Run the phases in turn on a working copy and measure each. An earlier output stands until its new one is whole.

    `.bin` shards are converted first, as a phase of its own. Raises WorkbookError with the last line that a failing
    phase printed.
    """
    checkpoint = open_checkpoint(directory)
    commands: list[tuple[str, list[str]]] = [(phase.value, [*GLMTRT, phase, str(directory)]) for phase in phases]
    if not checkpoint.is_safetensors:
        commands.insert(0, ("bin to safetensors", [sys.executable, "-c", _CONVERT, str(directory)]))
    rows = []
    for phase, command in commands:
        progress(phase)
        if phase in _RUN_CODE:  # in a process whose standard error is not shown
            announce(checkpoint.code)
            announce(checkpoint.pristine_code)
        replaced = [directory / name for name in _OUTPUTS.get(phase, [])]
        before = sum(file.stat().st_blocks * 512 for file in replaced if file.exists())
        usage = measure(command, directory)
        if usage.returncode != 0:
            lines = (usage.errors.strip() or usage.output.strip() or "it printed nothing").splitlines()
            raise WorkbookError(f"the phase {phase!r} failed: {lines[-1]}")
        rows.append(
            PhaseMemory(phase, usage.seconds, usage.peak_anonymous, usage.peak_mapped, (usage.added or 0) + before)
        )
    return rows


def save_memory(path: Path, directory: Path, rows: Sequence[PhaseMemory]) -> None:
    """Write a measurement as JSON, with the sizes of the model."""
    checkpoint = open_checkpoint(directory)
    sizes = {"layers": checkpoint.num_layers, "weights_bytes": checkpoint.weight_bytes}
    command = f"glmtrt bench memory models/run/{checkpoint.name}"
    results.write(path, command, {**sizes, "rows": [asdict(row) for row in rows]})
