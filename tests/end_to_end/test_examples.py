"""The files of examples/ stand in the notebooks word for word, and give what the helpers give."""

import ast
import runpy
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cuda.bindings
import nbformat
import onnx
import pytest
import tensorrt_rtx
from support.checkpoints import ROOT
from support.exporting import damaged, swap_past
from support.fake_gpu import FakeContext, FakeCuda

from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.engines.builder import BuildOptions, build_engine
from glmtrt_helpers.engines.fp32_accumulation import accumulation_types
from glmtrt_helpers.engines.plan_info import plan_path, read_info
from glmtrt_helpers.engines.profiles import Range, chat_profiles
from glmtrt_helpers.export.exporting import onnx_path, quiet
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.decode_loop import greedy
from glmtrt_helpers.sessions.onnxruntime import OrtSession

pytestmark = pytest.mark.slow  # each exports or builds

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
QUESTIONS = ("你好", "What is a profile?")
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example as from the command line; what it prints."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))

    def run_example(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        with quiet():
            runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


@pytest.fixture
def exported(exported_standin: Path, tmp_path: Path) -> Checkpoint:
    return open_checkpoint(Path(shutil.copytree(exported_standin, tmp_path / "chatglm_tiny")))


def helpers_answer(checkpoint: Checkpoint, question: str) -> str:
    tokenizer, session = load_tokenizer(checkpoint), OrtSession(onnx_path(checkpoint, "fp16"))
    return tokenizer.decode(greedy(session, checkpoint, chat_prompt(tokenizer, question)))


def test_they_need_none_of_the_helpers() -> None:
    assert len(EXAMPLES) == 5
    for path in EXAMPLES:
        assert "glmtrt_helpers" not in path.read_text(encoding="utf-8"), path


def test_every_function_stands_in_a_notebook_as_it_is_here() -> None:
    cells = [
        cell.source
        for path in (ROOT / "notebooks").glob("*.ipynb")
        for cell in nbformat.read(path, as_version=4).cells
        if cell.cell_type == "code"
    ]
    for path in EXAMPLES:
        text = path.read_text(encoding="utf-8")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.Assign):
                source = ast.get_source_segment(text, node)
                assert source and any(source in cell for cell in cells), f"{path.name}: {source}"


@pytest.mark.slow
def test_the_export_is_the_helpers_model_and_answers_with_it(exported: Checkpoint, run: Run, tmp_path: Path) -> None:
    bare = tmp_path / "bare.onnx"
    run("export_onnx.py", exported.directory, bare)
    graphs = [onnx.load(path, load_external_data=False).graph for path in (bare, onnx_path(exported, "fp16"))]
    for side in ("input", "output"):
        assert [v.name for v in getattr(graphs[0], side)] == [v.name for v in getattr(graphs[1], side)]
    for question in QUESTIONS:
        expected = helpers_answer(exported, question)
        assert run("run_onnx.py", exported.directory, bare, question).strip() == expected
        assert run("run_onnx.py", exported.directory, onnx_path(exported, "fp16"), question).strip() == expected
    assert all(error < 2e-2 for error in errors(run("compare_onnx.py", exported.directory, bare)))


def errors(printed: str) -> list[float]:
    return [float(line.split(": ")[1].split()[0]) for line in printed.splitlines()]


def test_the_comparison_finds_a_wrong_graph(exported: Checkpoint, run: Run) -> None:
    wrong = damaged(exported, "fp16", swap_past(1))
    assert max(errors(run("compare_onnx.py", exported.directory, wrong))) > 0.1


def test_the_engine_is_the_helpers(exported: Checkpoint, run: Run, tmp_path: Path) -> None:
    bare = tmp_path / "bare.plan"
    run("build_engine.py", onnx_path(exported, "fp16"), bare)
    built = build_engine(exported, "fp16", chat_profiles(exported), options=BuildOptions(fp16_sums=True))
    assert accumulation_types(bare) == accumulation_types(built.plan)
    assert bare.stat().st_size == pytest.approx(built.plan.stat().st_size, rel=0.01)
    narrow = chat_profiles(exported, Range(1, 1, 1), Range(1, 8, 16), Range(1, 8, 16))
    other = build_engine(exported, "fp16", narrow, options=BuildOptions(fp16_sums=True)).plan
    assert bare.stat().st_size != pytest.approx(other.stat().st_size, rel=0.01), "profiles show in the size"


def test_a_graph_that_tensorrt_cannot_parse_is_an_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"no graph")
    with pytest.raises(RuntimeError):
        run("build_engine.py", tmp_path / "no.onnx", tmp_path / "no.plan")


def test_the_engine_is_run_as_the_helper_runs_it(
    exported: Checkpoint, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a fake GPU, which is stricter than a real one with addresses, sizes and profiles."""
    build_engine(exported, "fp16", chat_profiles(exported))
    plan, gpu = plan_path(exported, "fp16"), FakeCuda()
    info = read_info(plan)
    modes = tensorrt_rtx.TensorIOMode

    def deserialize(raw: bytes) -> Any:
        assert raw == plan.read_bytes()
        tensors = info.tensors
        return SimpleNamespace(
            num_io_tensors=len(tensors),
            get_tensor_name=lambda index: tensors[index].name,
            get_tensor_mode=lambda name: modes.INPUT if name in gpu_context.inputs else modes.OUTPUT,
            create_execution_context=lambda: gpu_context,
        )

    gpu_context = FakeContext(gpu, info, onnx_path(exported, "fp16"))
    monkeypatch.setattr(cuda.bindings, "runtime", gpu)
    monkeypatch.setattr(tensorrt_rtx, "Runtime", lambda log: SimpleNamespace(deserialize_cuda_engine=deserialize))
    for question in QUESTIONS:
        assert run("run_engine.py", exported.directory, plan, question).strip() == helpers_answer(exported, question)
    assert not gpu.blocks, "everything is freed"


@pytest.mark.gpu
def test_an_engine_on_the_gpu_answers_like_onnx_runtime(exported: Checkpoint, run: Run, tmp_path: Path) -> None:
    plan = tmp_path / "bare.plan"
    run("build_engine.py", onnx_path(exported, "fp16"), plan)
    for question in QUESTIONS:
        assert run("run_engine.py", exported.directory, plan, question).strip() == helpers_answer(exported, question)
