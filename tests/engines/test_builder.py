"""Building an engine without a GPU: what the build reads and writes, and how it fails."""

import errno
import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from support.exporting import editing, exported_copy

from glmtrt_helpers.checkpoints import identity
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.core import tensorrt_package
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines import builder, plan_info
from glmtrt_helpers.engines.builder import BuildOptions, build_engine, check_options
from glmtrt_helpers.engines.profiles import Range, chat_profiles


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return exported_copy(tmp_path)


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_a_real_engine_with_two_profiles(checkpoint: Checkpoint, dtype: str) -> None:
    steps: list[tuple[str, int, int]] = []
    before = {path.name for path in checkpoint.directory.iterdir()}
    profiles = chat_profiles(checkpoint, Range(1, 2, 4))
    report = build_engine(checkpoint, dtype, profiles, progress=lambda *step: steps.append(step))
    assert report.plan == checkpoint.directory / f"model.{dtype}.plan"
    assert report.plan.stat().st_size == report.info.plan_bytes > checkpoint.weight_bytes
    assert identity.file_blake3(report.plan) == report.info.plan_blake3
    assert plan_info.open_plan(checkpoint, report.plan) == report.info and report.info.profiles == profiles
    assert {p.name for p in checkpoint.directory.iterdir()} - before == {report.plan.name, report.plan.name + ".json"}
    # Progress comes from TensorRT: phases with their steps, each in order and to its end.
    phases = {phase for phase, _, _ in steps}
    own = {f"Parsing model.{dtype}.onnx", f"Writing model.{dtype}.plan, KB"}
    assert "Building engine" in phases and phases - own == set(report.phases) and own < phases and len(steps) > 100
    assert steps[-1][1] == steps[-1][2] == report.plan.stat().st_size // 1000
    for phase in phases:
        runs: list[list[int]] = []  # a phase may run again
        for _, n, _ in (step for step in steps if step[0] == phase):
            runs.append([]) if n == 0 else None
            runs[-1].append(n)
        assert all(run == sorted(run) for run in runs) and runs[-1][-1] == next(
            step[2] for step in reversed(steps) if step[0] == phase
        )
    inputs = {tensor.name: tensor for tensor in report.info.tensors if tensor.mode == "input"}
    past = inputs["past_key_values.0.key"]
    assert past.dtype == {"fp16": "float16", "fp32": "float32"}[dtype]
    assert past.profiles[0] == [[0, 1, 4, 16], [0, 2, 4, 16], [0, 4, 4, 16]]
    assert past.profiles[1] == [[1, 1, 4, 16], [512, 2, 4, 16], [1023, 4, 4, 16]]
    assert inputs["attention_mask"].profiles[1][2] == [4, 1, 1, 1024]


def test_weights_are_really_read_from_the_shards(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan contains the bytes of a weight as they are in the shard."""
    report = build_engine(checkpoint, "fp16")
    tensor = checkpoint.tensors["transformer.word_embeddings.weight"]
    assert tensor.offset is not None
    data = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
    assert data in report.plan.read_bytes()
    export = identity.open_export(checkpoint.directory / "model.fp16.onnx")
    tensor.file.rename(tensor.file.with_suffix(".away"))
    with pytest.raises(WorkbookError, match=r"safetensors is missing, and model.fp16.onnx was made from it"):
        build_engine(checkpoint, "fp16")
    # Removed after the checks, which read the shards before TensorRT does.
    monkeypatch.setattr(builder, "open_export", lambda *_, **__: export)
    with pytest.raises(WorkbookError, match="safetensors was removed while it was being read"):
        build_engine(checkpoint, "fp16")
    for name in ("engine_weights", "check_room"):
        monkeypatch.setattr(builder, name, lambda *_: 1)
    with pytest.raises(WorkbookError, match="cannot be parsed by TensorRT"):
        build_engine(checkpoint, "fp16")


def test_options_are_set_or_refused(checkpoint: Checkpoint) -> None:
    report = build_engine(checkpoint, "fp32", options=BuildOptions(["8.9", "12.0"], weight_streaming=True))
    assert report.info.compute_capabilities == ["8.9", "12.0"]
    assert report.info.options == ["weight-streaming"] and report.info.tf32
    for options, message in (
        (BuildOptions(version_compatible=True), "tensorrt-rtx has no --version-compatible: it comes without"),
        (BuildOptions(hardware_compatible=True), "tensorrt-rtx has no --hardware-compatible: its plans run on"),
        (BuildOptions(targets=["9.0"]), "does not build for compute capability 9.0: choose one of 7.5, 8.0"),
    ):
        with pytest.raises(WorkbookError, match=message):
            build_engine(checkpoint, "fp16", options=options)
    full = tensorrt_package.Package("tensorrt", "10.14.1", None, "")
    with pytest.raises(WorkbookError, match="leave --target out"):
        check_options(BuildOptions(targets=["8.9"]), full)
    check_options(BuildOptions(version_compatible=True, hardware_compatible=True), full)


@pytest.mark.slow
def test_exact_fp32_matmuls_are_noted_in_the_plan(checkpoint: Checkpoint) -> None:
    """TensorRT reads the setting once per process, so each build has its own."""
    for flags, notes in (
        ((), (b"tf32=1", b"nvidia_tf32_override=-1")),
        (("--no-tf32",), (b"tf32=0", b"nvidia_tf32_override=0")),
    ):
        code = "from glmtrt_helpers.cli import boundary; boundary.main()"
        command = [sys.executable, "-c", code, "build", str(checkpoint.directory), "--dtype", "fp32", *flags]
        subprocess.run(command, check=True, capture_output=True)
        plan = plan_info.plan_path(checkpoint, "fp32").read_bytes()
        assert all(note in plan for note in notes)
        assert plan_info.read_info(plan_info.plan_path(checkpoint, "fp32")).tf32 is (not flags)


def test_a_graph_that_tensorrt_cannot_parse_is_one_sentence(checkpoint: Checkpoint) -> None:
    path = checkpoint.directory / "model.fp16.onnx"
    with editing(path) as model:
        next(node for node in model.graph.node if node.op_type == "Softmax").op_type = "Softmax_of_mine"
    with pytest.raises(WorkbookError, match=r"model.fp16.onnx cannot be parsed by TensorRT \(Softmax_of_mine"):
        build_engine(checkpoint, "fp16")
    path.write_bytes(b"garbage")
    with pytest.raises(WorkbookError, match="is not an ONNX model"):
        build_engine(checkpoint, "fp16")
    path.unlink()
    with pytest.raises(WorkbookError, match="03_export_onnx or `glmtrt export"):
        build_engine(checkpoint, "fp16")
    assert not list(checkpoint.directory.glob("*.plan*")) and not list(checkpoint.directory.glob(".*"))


def test_a_graph_that_parses_but_does_not_build(checkpoint: Checkpoint) -> None:
    """Contradicting profiles: the mask is not as wide as past and sequence together."""
    path = checkpoint.directory / "model.fp16.onnx"
    with editing(path) as model:
        mask = next(value for value in model.graph.input if value.name == "attention_mask")
        mask.type.tensor_type.shape.dim[3].dim_value = 7
    with pytest.raises(WorkbookError, match=r"TensorRT (could not build model.fp16.plan|rejects the profile)"):
        build_engine(checkpoint, "fp16")
    assert not list(checkpoint.directory.glob("*.plan*"))


@pytest.fixture
def small_disk(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """The exported checkpoint on a file system with little more room than it takes."""
    needed = sum(file.stat().st_size for file in checkpoint.directory.iterdir())
    mount = tmp_path / "disk"
    mount.mkdir()
    size = f"size={needed // 1024 + 200}k"
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "none", str(mount)], capture_output=True, check=False)
    if made.returncode:
        pytest.skip(f"mounting a small disk needs root: {made.stderr.decode().strip()}")
    yield Path(shutil.copytree(checkpoint.directory, mount / checkpoint.name))
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


def test_a_disk_that_fills_during_the_build(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_checkpoint(small_disk)
    before = sorted(path.name for path in small_disk.iterdir())
    with pytest.raises(WorkbookError, match=r"model.fp16.plan will take 0.1 GB, and its disk has 0.0 free: make room"):
        build_engine(opened, "fp16")
    monkeypatch.setattr(builder, "check_room", lambda *_: None)  # as if the disk had filled since
    with pytest.raises(WorkbookError, match=r"model.fp16.plan could not be written \(No space left on device\)"):
        build_engine(opened, "fp16")
    assert sorted(path.name for path in small_disk.iterdir()) == before
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk.parent)], check=True)
    assert plan_info.open_plan(opened, build_engine(opened, "fp16").plan), "with room, a rerun succeeds"


def test_a_disk_that_reports_its_failure_once(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is synced to the disk during the build; an error there is reported once, and ends the build."""
    before = sorted(path.name for path in checkpoint.directory.iterdir())
    real, calls = os.fdatasync, itertools.count()

    def fail_once(file: int) -> None:
        if next(calls) == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(file)

    monkeypatch.setattr(os, "fdatasync", fail_once)
    with pytest.raises(WorkbookError, match=r"model.fp16.plan could not be written \(Input/output error\)"):
        build_engine(checkpoint, "fp16")
    assert next(calls) > 1 and sorted(path.name for path in checkpoint.directory.iterdir()) == before
    assert plan_info.open_plan(checkpoint, build_engine(checkpoint, "fp16").plan), "a rerun succeeds"


def test_a_build_does_not_need_pytorch(checkpoint: Checkpoint) -> None:
    """Its import would take longer than all the others."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        f"from glmtrt_helpers.cli import boundary\n"
        f"sys.argv = ['glmtrt', 'build', {str(checkpoint.directory)!r}]; boundary.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and plan_info.plan_path(checkpoint, "fp16").exists(), done.stderr


def run_build(directory: Path, body: str) -> subprocess.Popen[bytes]:
    """A build in a separate process; `body` is its progress callback, with (phase, done, total)."""
    program = (
        "import os, signal, sys, time\n"
        "from glmtrt_helpers import checkpoints, engines\n"
        "from glmtrt_helpers.cli import boundary\n"
        "def progress(phase, done, total):\n"
        f"    {body}\n"
        "def main():\n"
        f"    engines.build_engine(checkpoints.open_checkpoint({str(directory)!r}), 'fp16', progress=progress)\n"
        "boundary._run = lambda _: main()\n"
        "boundary.main()\n"
    )
    return subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_killed_build_leaves_the_old_plan(checkpoint: Checkpoint) -> None:
    report = build_engine(checkpoint, "fp16")
    old = report.plan.read_bytes()
    with run_build(checkpoint.directory, "os.kill(os.getpid(), signal.SIGKILL) if done > 3 else None") as process:
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert report.plan.read_bytes() == old and plan_info.open_plan(checkpoint, report.plan) == report.info
    left = list(checkpoint.directory.glob(".model.fp16.plan.*.tmp"))
    assert len(left) == 1
    build_engine(checkpoint, "fp16")
    assert not list(checkpoint.directory.glob(".*.tmp")), "the next build cleans up"


def test_an_interrupted_build_ends_with_one_line(checkpoint: Checkpoint) -> None:
    body = "os.kill(os.getpid(), signal.SIGINT) if done == 3 else None"
    with run_build(checkpoint.directory, body) as process:
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and errors.decode().splitlines()[-1].startswith("glmtrt: interrupted")
    assert not list(checkpoint.directory.glob("*.plan*")) and not list(checkpoint.directory.glob(".*.tmp"))


def test_a_plan_without_its_json_is_refused(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    build_engine(checkpoint, "fp16")

    def die(*_: object) -> None:
        raise RuntimeError("killed here")

    monkeypatch.setattr(plan_info, "write_info", die)
    with pytest.raises(RuntimeError):
        build_engine(checkpoint, "fp16", chat_profiles(checkpoint, Range(1, 1, 2)))
    with pytest.raises(WorkbookError, match="nothing is known of"):
        plan_info.open_plan(checkpoint, plan_info.plan_path(checkpoint, "fp16"))


def test_another_graph_next_to_the_shards(checkpoint: Checkpoint) -> None:
    """A graph of another name, with fewer outputs, becomes an engine of that name."""
    target = checkpoint.directory / "logits_only.onnx"
    model = onnx.load(checkpoint.directory / "model.fp16.onnx", load_external_data=False)
    del model.graph.output[1:]
    onnx.save(model, target)
    report = build_engine(checkpoint, "fp16", onnx_path=target)
    assert report.plan == checkpoint.directory / "logits_only.plan" and plan_info.info_path(report.plan).exists()
    assert [tensor.name for tensor in report.info.tensors if tensor.mode == "output"] == ["logits"]
