"""What the commands load: `glmtrt --help` next to nothing, inspect and doctor no PyTorch."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import TINY
from support.command_line import InProcess
from support.exporting import exported_copy

from glmtrt_helpers.export import exporting
from glmtrt_helpers.workbook import run_notebooks

HEAVY = {"torch", "numpy", "onnx", "onnxruntime", "matplotlib", "psutil", "rich.markdown", "rich.traceback"}


def run(*arguments: str, before: str = "", after: str = "") -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with statements before and after it."""
    program = "\n".join([
        "import json, sys", before, "from glmtrt_helpers.cli.boundary import main",
        "try:", "    main()", "except SystemExit as ended:", "    assert not ended.code", after,
    ])  # fmt: skip
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_help_loads_little() -> None:
    """Which is why it starts quickly; `glmtrt bench startup` measures that."""
    done = run("--help", after="print(json.dumps(sorted(sys.modules)), file=sys.stderr)")
    assert "Usage:" in done.stdout and "workbook" in done.stdout
    assert not HEAVY & set(json.loads(done.stderr))


def test_workbook_executes_all_notebooks_or_those_named(
    glmtrt: InProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    executed: list[str] = []
    monkeypatch.setattr(run_notebooks, "execute", lambda path, output, **_: executed.append(output.stem[:2]))
    for only, numbers in (((), range(9)), (("--only", "06", "--only", "02"), (2, 6))):
        assert glmtrt("workbook", "--model", TINY, "--output", tmp_path, *only)[0] == 0
        assert executed == [f"{number:02}" for number in numbers]
        executed.clear()


def test_help_doctor_and_inspect_run_without_pytorch(tmp_path: Path) -> None:
    graph = exporting.onnx_path(exported_copy(tmp_path), "fp16")
    for arguments, prints in (
        (["--help"], "inspect"),
        (["doctor"], "ONNX Runtime"),
        (["doctor", "--model", str(TINY)], "total on the GPU"),
        (["inspect", str(graph)], "past_key_values.0.key"),
    ):
        done = run(*arguments, before="sys.modules['torch'] = None")
        assert done.returncode == 0 and prints in done.stdout, done.stderr
