"""A plan that must not be used is refused by the JSON next to it, which needs no GPU; without a GPU every plan is."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.exporting import exported_copy

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import plan_info
from glmtrt_helpers.engines.builder import build_engine


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = exported_copy(tmp_path_factory.mktemp("plans"))
    build_engine(checkpoint, "fp16")
    return checkpoint.directory


@pytest.fixture
def checkpoint(built: Path, tmp_path: Path) -> Checkpoint:
    return open_checkpoint(shutil.copytree(built, tmp_path / built.name))


@pytest.fixture(autouse=True)
def no_gpu_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> None:
        raise AssertionError("a GPU was looked for")

    monkeypatch.setattr(tensorrt_package, "gpus", ask)


def plan_of(checkpoint: Checkpoint) -> Path:
    return plan_info.plan_path(checkpoint, "fp16")


def edit(checkpoint: Checkpoint, **changes: object) -> None:
    path = plan_info.info_path(plan_of(checkpoint))
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(checkpoint: Checkpoint) -> None:
    plan = plan_of(checkpoint)
    plan.write_bytes(plan.read_bytes()[:-1000])


def flip_a_bit(checkpoint: Checkpoint) -> None:
    plan = plan_of(checkpoint)
    data = bytearray(plan.read_bytes())
    data[len(data) // 2] ^= 1
    plan.write_bytes(data)


def retrain(checkpoint: Checkpoint) -> None:
    """One number of one weight, in place: header, size and ONNX stay as they were."""
    tensor = checkpoint.tensors["transformer.layers.1.mlp.dense_h_to_4h.weight"]
    data = bytearray(tensor.file.read_bytes())
    assert tensor.offset is not None
    data[tensor.offset] ^= 1
    tensor.file.unlink()
    tensor.file.write_bytes(data)


def change_onnx(checkpoint: Checkpoint) -> None:
    path = checkpoint.directory / "model.fp16.onnx"
    path.write_bytes(path.read_bytes() + b"\n")


def delete_json(checkpoint: Checkpoint) -> None:
    plan_info.info_path(plan_of(checkpoint)).unlink()


def halve_json(checkpoint: Checkpoint) -> None:
    path = plan_info.info_path(plan_of(checkpoint))
    path.write_text(path.read_text()[:100])


FAULTS: dict[str, tuple[Callable[[Checkpoint], object], str]] = {
    "truncated": (truncate, r"model.fp16.plan is truncated: [\d,]+ of [\d,]+ bytes; build it again"),
    "one bit": (flip_a_bit, r"damaged or replaced since it was built \(its hash differs\)"),
    "another release": (
        lambda c: edit(c, version="1.4.0.76"),
        "tensorrt-rtx 1.4.0.76; the installed .* cannot load",
    ),
    "another package": (lambda c: edit(c, package="tensorrt"), "built by tensorrt, which is not installed"),
    "another ONNX": (change_onnx, "built from another model.fp16.onnx than the one next to it"),
    "no ONNX": (lambda c: (c.directory / "model.fp16.onnx").unlink(), "built from another model.fp16.onnx"),
    "another source": (lambda c: c.code.write_text(c.code.read_text() + "\n"), "another version of modeling_chatglm"),
    "other weights": (retrain, "its content differs: export with"),
    "no JSON": (delete_json, r"plan.json is missing, so nothing is"),
    "another format": (lambda c: edit(c, format=99), r"plan.json holds what is not expected there .*format"),
    "half a JSON": (halve_json, "plan.json is not JSON"),
    "a wrong type": (lambda c: edit(c, seconds="long"), r"\$\.seconds"),
    "ranges that contradict": (lambda c: edit(c, profiles=[]), "contradict"),
    "a graph elsewhere": (lambda c: edit(c, onnx="../model.fp16.onnx"), "contradict"),
    "no plan": (lambda c: plan_of(c).unlink(), "05_build_profiles or `glmtrt build"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_refused_with_one_sentence_that_says_what_to_do(checkpoint: Checkpoint, fault: str) -> None:
    damage, message = FAULTS[fault]
    damage(checkpoint)
    with pytest.raises(WorkbookError, match=message) as caught:
        plan_info.open_plan(checkpoint, plan_of(checkpoint))
    assert "glmtrt build" in str(caught.value) and "\n" not in str(caught.value)


def test_an_intact_plan_is_opened_with_how_it_was_built(checkpoint: Checkpoint) -> None:
    info = plan_info.open_plan(checkpoint, plan_of(checkpoint))
    package = tensorrt_package.choose(cards=[], building=True)
    assert (info.package, info.version, info.dtype) == (package.name, package.version, "fp16")
    assert [profile.name for profile in info.profiles] == ["prefill", "decode"] and info.tf32
    assert info.plan_bytes == plan_of(checkpoint).stat().st_size


def test_a_version_compatible_plan_may_be_older_not_newer(checkpoint: Checkpoint) -> None:
    edit(checkpoint, options=["version-compatible"], version="1.0.0")
    plan_info.open_plan(checkpoint, plan_of(checkpoint))
    edit(checkpoint, version="99.0.0")
    with pytest.raises(WorkbookError, match="built by tensorrt-rtx 99"):
        plan_info.open_plan(checkpoint, plan_of(checkpoint))


def test_without_a_gpu_other_backends_are_suggested(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_package, "gpus", lambda: [])
    with pytest.raises(WorkbookError, match=r"no GPU, or its driver does not answer.*use the backend ort or torch"):
        plan_info.check_plan(checkpoint, plan_of(checkpoint))
    plan_of(checkpoint).unlink()  # a plan would not help, so nobody is sent to build one
    with pytest.raises(WorkbookError, match="no GPU, or its driver does not answer"):
        plan_info.check_plan(checkpoint, plan_of(checkpoint))


def test_an_unsupported_gpu_is_refused(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tensorrt_package.Gpu("NVIDIA GeForce GTX 1080", (6, 1), 8 * 10**9)
    monkeypatch.setattr(tensorrt_package, "gpus", lambda: [old])
    with pytest.raises(WorkbookError, match=r"on the NVIDIA GeForce GTX 1080 .*compute capability 6.1"):
        plan_info.check_plan(checkpoint, plan_of(checkpoint))
    ada = tensorrt_package.Gpu("NVIDIA GeForce RTX 4090", (8, 9), 25 * 10**9)
    monkeypatch.setattr(tensorrt_package, "gpus", lambda: [ada])
    edit(checkpoint, compute_capabilities=["12.0"])
    with pytest.raises(WorkbookError, match=r"only for compute capability 12.0, the NVIDIA GeForce RTX 4090 has 8.9"):
        plan_info.check_plan(checkpoint, plan_of(checkpoint))
    plan_of(checkpoint).unlink()
    with pytest.raises(WorkbookError, match=r"model.fp16.plan is missing: run notebook 05"):
        plan_info.check_plan(checkpoint, plan_of(checkpoint))


def test_rows_of_a_profile(checkpoint: Checkpoint) -> None:
    info = plan_info.read_info(plan_of(checkpoint))
    rows = {row[0]: row[1:] for row in plan_info.tensor_rows(info.tensors, 1)}
    assert rows["input_ids"] == ("input", "int64", "?x?", "1x1", "1x1", "1x1")
    assert rows["past_key_values.1.value"][1:] == ("float16", "?x?x4x16", "1x1x4x16", "512x1x4x16", "1023x1x4x16")
    assert rows["logits"][:2] == ("output", "float16") and rows["logits"][3:] == ("", "", "")
    assert len(rows) == 3 + 2 * 2 + 1 + 2 * 2
