"""`glmtrt bench memory`: what export and build take, compared with the size of the weights."""

import subprocess
from pathlib import Path

import pytest

from glmtrt_helpers.bench import memory
from glmtrt_helpers.bench.phases import Phase
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.code_hash import code_sha256
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.processes import GLMTRT
from glmtrt_helpers.engines import plan_info
from glmtrt_helpers.engines.memory_prediction import predict_build
from glmtrt_helpers.patches import patching
from glmtrt_helpers.standin import random_weights

MB = 10**6


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of about 300 MB, patched."""
    directory = random_weights.write_random(tmp_path_factory.mktemp("middle") / "chatglm_300m", "300m")
    patching.patch_checkpoint(directory)
    return directory


@pytest.mark.slow
def test_memory_of_export_and_build_follows_the_weights(middle: Path) -> None:
    weights = open_checkpoint(middle).weight_bytes
    assert 250 * MB < weights < 350 * MB
    export, build = memory.measure_memory(middle, (Phase.EXPORT, Phase.BUILD))
    assert export.peak_anonymous < 0.3 * weights + 600 * MB
    assert build.peak_anonymous < 1.3 * weights + 600 * MB
    assert export.added < 5 * MB and 0.8 * weights < build.added < 1.1 * weights
    needed, disk = predict_build(open_checkpoint(middle), "fp16")
    assert build.peak_anonymous < needed < 1.4 * build.peak_anonymous
    assert build.added < disk < 1.3 * build.added
    checkpoint = open_checkpoint(middle)
    assert plan_info.open_plan(checkpoint, plan_info.plan_path(checkpoint, "fp16")), (
        "hashed in pieces, opened as a whole"
    )
    (again,) = memory.measure_memory(middle, (Phase.BUILD,))
    assert again.added == pytest.approx(build.added, rel=0.01), "built again from the same export"


@pytest.mark.slow
def test_a_failing_phase_is_named(tiny_random: Path) -> None:
    with pytest.raises(WorkbookError, match=r"phase 'export' failed: glmtrt: .* still contains the export blocker"):
        memory.measure_memory(tiny_random, (Phase.EXPORT,))


@pytest.mark.slow
def test_a_phase_that_fails_leaves_the_earlier_export(tiny_random: Path) -> None:
    (tiny_random / "model.fp16.onnx").write_bytes(b"a good export")
    with pytest.raises(WorkbookError, match="still contains the export blocker"):
        memory.measure_memory(tiny_random, (Phase.EXPORT,))
    assert (tiny_random / "model.fp16.onnx").read_bytes() == b"a good export"


@pytest.mark.parametrize("command", ["standin", "copy", "chat", "bench", "--help", ""])
def test_only_a_measured_phase_is_run(tiny_random: Path, command: str) -> None:
    before = {path.name: path.read_bytes() for path in tiny_random.iterdir()}
    done = subprocess.run(
        [*GLMTRT, "bench", "memory", str(tiny_random), "--phase", command], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and "'verify'" in done.stderr
    assert {path.name: path.read_bytes() for path in tiny_random.iterdir()} == before


@pytest.mark.slow
def test_code_that_runs_in_other_processes_is_announced(tiny_random: Path, capsys: pytest.CaptureFixture[str]) -> None:
    patching.patch_checkpoint(tiny_random)
    memory.measure_memory(tiny_random, (Phase.PATCH,))
    assert "Running remote code" not in capsys.readouterr().err
    (tiny_random / "configuration_chatglm.py").write_text("raise ValueError\n")
    with pytest.raises(WorkbookError, match="'inputs' failed"):
        memory.measure_memory(tiny_random, (Phase.INPUTS,))
    said, opened = capsys.readouterr().err, open_checkpoint(tiny_random)
    assert code_sha256(opened.code)[:16] in said and code_sha256(opened.pristine_code)[:16] in said
