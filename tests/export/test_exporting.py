"""The exported file: its inputs and outputs, its numbers, what is refused, and an export that is killed."""

import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.checkpoints import to_bin

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.working_copy import make_working_copy
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.onnx_file import load_graph
from glmtrt_helpers.export import exporting
from glmtrt_helpers.graphs.reference import run_tensors
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.patches import patching
from glmtrt_helpers.sessions.onnxruntime import OrtSession
from glmtrt_helpers.sessions.pytorch import TorchSession

SHAPES = [(1, 1, 0), (1, 7, 0), (4, 3, 0), (1, 1, 1), (4, 1, 600), (2, 6, 40)]  # batch, sequence, past


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("dtype", loading.DTYPES)
def test_numbers_are_pytorchs_at_shapes_never_exported(exported: Checkpoint, dtype: str, optimize: bool) -> None:
    torch_dtype = loading.DTYPES[dtype]
    session = OrtSession(exporting.onnx_path(exported, dtype), optimize=optimize)
    reference = TorchSession(loading.load_model(exported, torch_dtype, code=exported.pristine_code))
    for shape in SHAPES:
        flat = example_inputs(exported, *shape, dtype=torch_dtype, padding=[0, *[1] * (shape[0] - 1)])
        actual, expected = run_tensors(session, flat), run_tensors(reference, flat)
        for name, tensor in expected.items():
            error = (actual[name].float() - tensor.float()).abs().max().item()
            assert error <= (1e-5 if dtype == "fp32" else 6e-3) * max(1.0, tensor.abs().max().item()), (shape, name)


@pytest.mark.slow
@pytest.mark.parametrize(("exporter", "opset"), [("dynamo", 19), ("dynamo", 23), ("torchscript", 17)])
def test_other_opsets_and_the_exporter_of_2023_give_the_same_numbers(
    exported: Checkpoint, exporter: str, opset: int
) -> None:
    report = exporting.export_model(exported, "fp32", exporter=exporter, opset=opset)
    assert report.path.name == f"model.fp32.{exporter}{opset}.onnx" and (report.exporter, report.opset) == (
        exporter,
        opset,
    )
    model = load_graph(report.path)
    assert [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")] == [opset]
    assert report.path.stat().st_size == report.file_bytes < 600_000  # the weights are not in it
    flat = example_inputs(exported, 3, 4, 9)
    actual = torch.from_numpy(OrtSession(report.path).run(flat)["logits"])
    expected = torch.from_numpy(OrtSession(exporting.onnx_path(exported, "fp32")).run(flat)["logits"])
    assert torch.allclose(actual, expected, atol=1e-5)


@pytest.mark.slow
def test_exporting_twice_gives_the_same_bytes_and_a_report_that_counts_them(exported: Checkpoint) -> None:
    path = exporting.onnx_path(exported, "fp16")
    before = path.read_bytes()
    phases: list[str] = []
    report = exporting.export_model(exported, "fp16", progress=phases.append)
    assert path.read_bytes() == before and phases == [
        "tracing 2 layers with dynamo",
        "simplifying the graph",
        "writing model.fp16.onnx",
    ]
    stored = [tensor for name, tensor in exported.tensors.items() if "inv_freq" not in name]
    assert (report.path, report.exporter, report.opset) == (path, "dynamo", 18)
    assert report.file_bytes == len(before) and report.referred_bytes == sum(tensor.nbytes for tensor in stored)
    assert sum(report.nodes.values()) == len(load_graph(path).graph.node) and report.nodes["Softmax"] == 2


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"dtype": "int8"}, "fp16 or fp32"),
        ({"exporter": "tf2onnx"}, "dynamo or torchscript"),
        ({"opset": 17}, "18 to 24"),
        ({"exporter": "torchscript", "opset": 21}, "17 to 20"),
    ],
)
def test_refuses_what_it_cannot_do(exported: Checkpoint, request_: dict[str, object], says: str) -> None:
    with pytest.raises(WorkbookError, match=says):
        exporting.export_model(exported, **request_)  # type: ignore[arg-type]


def test_a_source_the_exporter_cannot_follow_is_one_sentence(tiny_random: Path) -> None:
    """A fork that looks at a value while it runs: refused with the reason, and nothing is written."""
    patching.patch_checkpoint(tiny_random)
    checkpoint = open_checkpoint(tiny_random)
    source = checkpoint.code.read_text()
    line = "        hidden_states = inputs_embeds.transpose(0, 1)"
    assert line in source
    checkpoint.code.write_text(source.replace(line, "        print(input_ids.sum().item() > 3 and 1 or 2)\n" + line))
    threshold = gc.get_threshold()
    with pytest.raises(
        WorkbookError, match=r"dynamo exporter cannot follow this source \(GuardOnDataDependent"
    ) as caught:
        exporting.export_model(checkpoint, "fp32")
    assert gc.get_threshold() == threshold
    assert "\n" not in str(caught.value) and not list(tiny_random.glob("*.onnx"))


@pytest.mark.slow
def test_a_source_whose_trace_loses_an_input_is_refused(tiny_random: Path) -> None:
    """A fork that does not mask at all: traced without complaint, and attention_mask is not read."""
    patching.patch_checkpoint(tiny_random)
    checkpoint = open_checkpoint(tiny_random)
    source = checkpoint.code.read_text()
    line = "attention_scores.masked_fill_(attention_mask"
    assert source.count(line) == 1
    checkpoint.code.write_text(
        source.replace(line, "attention_scores.masked_fill_(attention_scores != attention_scores")
    )
    with pytest.raises(WorkbookError, match="lost the input attention_mask: check the patches"):
        exporting.export_model(checkpoint, "fp32")
    assert not list(tiny_random.glob("*.onnx"))


def test_refuses_an_unpatched_source_by_the_blockers_name(tiny_random: Path) -> None:
    with pytest.raises(WorkbookError, match=r"export blocker rotary_flatten: make a working copy with `glmtrt copy"):
        exporting.export_model(open_checkpoint(tiny_random))
    copy = make_working_copy(tiny_random)
    with pytest.raises(WorkbookError, match=r"export blocker rotary_flatten: run notebook 02_patch_rotary_flatten or"):
        exporting.export_model(open_checkpoint(copy))
    assert not list(tiny_random.glob("*.onnx"))


def test_refuses_symbolic_links_and_names_the_working_copy(tiny_random: Path, tmp_path: Path) -> None:
    patching.patch_checkpoint(tiny_random)
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in tiny_random.iterdir():
        (linked / file.name).symlink_to(file)
    with pytest.raises(WorkbookError, match=r"symbolic link.*glmtrt copy"):
        exporting.export_model(open_checkpoint(linked))


@pytest.mark.slow
def test_bin_shards_are_streamed_into_safetensors(tiny_random: Path) -> None:
    before = open_checkpoint(tiny_random)
    expected = loading.read_tensors(before, list(before.tensors), torch.float16)
    to_bin(tiny_random)
    patching.patch_checkpoint(tiny_random)
    exporting.export_model(open_checkpoint(tiny_random), "fp16")
    after = open_checkpoint(tiny_random)
    assert after.is_safetensors and after.tensors.keys() == expected.keys()
    actual = loading.read_tensors(after, list(expected), torch.float16)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    OrtSession(tiny_random / "model.fp16.onnx").run(example_inputs(after, 1, 2, 3, torch.float16))


@pytest.mark.slow
def test_killed_midway_loses_nothing_and_a_rerun_succeeds(exported: Checkpoint, tmp_path: Path) -> None:
    """SIGKILL with half of the temporary file written: the old model stands, the next run removes the half."""
    directory = Path(shutil.copytree(exported.directory, tmp_path / "killed"))
    path = directory / "model.fp16.onnx"
    before = path.read_bytes()
    program = (
        "import sys, time, pathlib\n"
        "from glmtrt_helpers import checkpoints, export\n"
        "write = pathlib.Path.write_bytes\n"
        "def slow(self, data):\n"
        "    write(self, data[: len(data) // 2]); print('half', flush=True); time.sleep(60)\n"
        "pathlib.Path.write_bytes = slow\n"
        f"export.export_model(checkpoints.open_checkpoint({str(directory)!r}), 'fp16')\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None and process.stdout.readline() == b"half\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    left = list(directory.glob(".model.fp16.onnx.*.tmp"))
    assert len(left) == 1 and left[0].stat().st_size < len(before)
    assert path.read_bytes() == before
    OrtSession(path)
    exporting.export_model(open_checkpoint(directory), "fp16")
    assert path.read_bytes() == before and not list(directory.glob(".*.tmp"))
