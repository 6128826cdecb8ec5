"""An engine on a fake GPU: profiles, shapes, streams, limits; and what a plan says of itself on a real one."""

from pathlib import Path

import pytest
from support import fake_gpu
from support.exporting import exported_copy

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import plan_info
from glmtrt_helpers.engines.builder import build_engine
from glmtrt_helpers.engines.profiles import Range, chat_profiles
from glmtrt_helpers.engines.runner import Engine, limits, read_engine
from glmtrt_helpers.sessions.base import Limits


def test_an_engine_switches_profiles_and_checks_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = exported_copy(tmp_path)
    build_engine(checkpoint, "fp16", chat_profiles(checkpoint, Range(1, 2, 4), Range(1, 8, 64), Range(1, 8, 100)))
    fake_gpu.install(monkeypatch)
    plan, info, package = plan_info.check_plan(checkpoint, plan_info.plan_path(checkpoint, "fp16"))
    assert limits(info) == Limits(batch=4, prompt=64, total=101)
    engine = Engine(plan, info, package)
    assert engine.profile == "prefill" and engine.itemsize("input_ids") == 8 and engine.itemsize("logits") == 2
    engine.select(4, 1, 100)
    assert engine.profile == "decode"
    engine.bind("input_ids", 256, (4, 1))
    with pytest.raises(WorkbookError, match=r"TensorRT could not take input_ids of shape \(4, 2\)"):
        engine.bind("input_ids", 256, (4, 2))
    with pytest.raises(WorkbookError, match="batch 4, sequence 2, past 1 lies outside every profile"):
        engine.select(4, 2, 1)
    second = Engine(plan, info, package, stream=engine.stream)
    assert second.stream is engine.stream
    second.close()
    engine.close()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_the_plan_says_what_its_json_says(trained: Checkpoint, dtype: str) -> None:
    plan = plan_info.plan_path(trained, dtype)
    by_name = {tensor.name: tensor for tensor in read_engine(plan, tensorrt_package.choose())}
    assert by_name == {tensor.name: tensor for tensor in plan_info.read_info(plan).tensors}
