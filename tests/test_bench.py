"""`glmtrt bench memory` and the limits that it is there to show: export and build against the size of the weights."""

from pathlib import Path

import pytest

from glmtrt_helpers import bench, checkpoints, engines, patches, plans
from glmtrt_helpers.errors import WorkbookError
from glmtrt_helpers.standin import sized

MB = 10**6


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of about 300 MB, patched."""
    directory = sized.write_random(tmp_path_factory.mktemp("middle") / "chatglm_300m", "300m")
    patches.patch_checkpoint(directory)
    return directory


def test_memory_of_export_and_build_follows_from_the_weights(middle: Path) -> None:
    weights = checkpoints.open_checkpoint(middle).weight_bytes
    assert 250 * MB < weights < 350 * MB
    export, build = bench.memory(middle, ("export", "build"))
    assert export.peak_anonymous < 0.3 * weights + 600 * MB
    assert build.peak_anonymous < 1.3 * weights + 600 * MB
    assert export.added < 5 * MB and 0.8 * weights < build.added < 1.1 * weights
    needed, disk = engines.predict_build(checkpoints.open_checkpoint(middle), "fp16")
    assert build.peak_anonymous < needed < 1.4 * build.peak_anonymous
    assert build.added < disk < 1.3 * build.added
    checkpoint = checkpoints.open_checkpoint(middle)
    assert plans.open_plan(checkpoint, plans.plan_path(checkpoint, "fp16")), "hashed in pieces, opened as a whole"
    (again,) = bench.memory(middle, ("build",))
    assert again.added == pytest.approx(build.added, rel=0.01), "from the export that is there, anew"


def test_a_failing_phase_is_named(tiny_random: Path) -> None:
    with pytest.raises(WorkbookError, match=r"phase 'export' failed: glmtrt: .* still has the trap"):
        bench.memory(tiny_random, ("export",))


def test_a_build_without_room_is_refused(middle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = checkpoints.open_checkpoint(middle)
    monkeypatch.setattr(engines, "free_memory", lambda: 100 * MB)
    with pytest.raises(WorkbookError, match=r"needs 1\.\d GB of memory, and 0\.1 are free.*`--dtype fp16` needs"):
        engines.check_room(checkpoint, "fp32", middle / "model.fp32.plan")
    with pytest.raises(WorkbookError, match="add swap"):
        engines.check_room(checkpoint, "fp16", middle / "model.fp16.plan")
    monkeypatch.undo()
    engines.check_room(checkpoint, "fp16", middle / "model.fp16.plan")
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10 * MB})())
    with pytest.raises(WorkbookError, match=r"will take 0\.\d GB, and its disk has 0\.0 free"):
        engines.check_room(checkpoint, "fp16", middle / "model.fp16.plan")
