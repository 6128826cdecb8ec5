"""Notebook 03's helper: the graph, its weights in the shards, its numbers, what it refuses, and a killed export."""

import gc
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from support.checkpoints import to_bin

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.export import exporting
from glmtrt_helpers.graphs.reference import run_tensors
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.inputs.names import input_names, output_names
from glmtrt_helpers.patches import patching
from glmtrt_helpers.sessions.onnxruntime import OrtSession
from glmtrt_helpers.sessions.pytorch import TorchSession

SHAPES = [(1, 1, 0), (1, 7, 0), (4, 3, 0), (1, 1, 1), (4, 1, 600), (2, 6, 40)]


@pytest.fixture(scope="session")
def exported(_random_master: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A patched copy of the random checkpoint with model.fp16.onnx and model.fp32.onnx; shared, only read."""
    directory = Path(shutil.copytree(_random_master, tmp_path_factory.mktemp("exported") / "chatglm_random"))
    patching.patch_checkpoint(directory)
    for dtype in loading.DTYPES:
        exporting.export_model(open_checkpoint(directory), dtype)
    return directory


def graph(path: Path) -> onnx.ModelProto:
    return onnx.load(path, load_external_data=False)


def external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


@pytest.mark.parametrize("dtype", loading.DTYPES)
def test_every_weight_is_an_address_in_a_shard_and_nothing_is_copied(exported: Path, dtype: str) -> None:
    checkpoint = open_checkpoint(exported)
    model = graph(exported / f"model.{dtype}.onnx")
    initializers = {tensor.name: tensor for tensor in model.graph.initializer}
    for name, stored in checkpoint.tensors.items():
        if "inv_freq" in name:
            continue
        address = external(initializers[name])
        assert address["location"] == stored.file.name and tuple(initializers[name].dims) == stored.shape
        assert (int(address["offset"]), int(address["length"])) == (stored.offset, stored.nbytes)
        assert initializers[name].data_type == onnx.TensorProto.FLOAT16
    inside = [tensor for tensor in model.graph.initializer if not tensor.external_data]
    tables = {tuple(tensor.dims) for tensor in inside if len(tensor.dims) == 2}
    assert tables == {(checkpoint.max_length, checkpoint.head_size // 2)}
    assert sum(len(tensor.raw_data) for tensor in inside if len(tensor.dims) == 2) < 5 * 1024 * 8 * 4
    assert (exported / f"model.{dtype}.onnx").stat().st_size < 300_000


def test_tables_are_what_pytorch_computes_in_that_dtype(exported: Path) -> None:
    """To the bit, for PyTorch computed both, here; late positions too, where fp16 angles are far from fp32 ones."""
    checkpoint = open_checkpoint(exported)
    for dtype, torch_dtype in loading.DTYPES.items():
        model = loading.load_model(checkpoint, torch_dtype, code=checkpoint.pristine_code)
        rotary = model.transformer.layers[0].attention.rotary_emb
        cos, sin = rotary(torch.zeros(1, dtype=torch_dtype), seq_len=checkpoint.max_length)
        found = [
            onnx.numpy_helper.to_array(tensor)
            for tensor in graph(exported / f"model.{dtype}.onnx").graph.initializer
            if len(tensor.dims) == 2 and not tensor.external_data
        ]
        assert len(found) == 2
        for table in (cos, sin):
            assert any(np.array_equal(table[:, 0].numpy(), array) for array in found), dtype


def test_names_and_free_dimensions(exported: Path) -> None:
    model = graph(exported / "model.fp16.onnx").graph
    shape = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*model.input, *model.output)
    }
    assert list(shape) == input_names(2) + output_names(2)
    assert shape["input_ids"] == ["batch", "sequence"] and shape["position_ids"] == ["batch", 2, "sequence"]
    assert shape["attention_mask"] == ["batch", 1, "sequence", "total"]
    assert shape["past_key_values.1.value"] == ["past", "batch", 4, 16]
    assert shape["present.1.key"] == ["total", "batch", 4, 16] and shape["logits"] == ["batch", "sequence", 480]


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("dtype", loading.DTYPES)
def test_numbers_at_shapes_never_exported(exported: Path, dtype: str, optimize: bool) -> None:
    checkpoint = open_checkpoint(exported)
    torch_dtype = loading.DTYPES[dtype]
    session = OrtSession(exported / f"model.{dtype}.onnx", optimize=optimize)
    reference = TorchSession(loading.load_model(checkpoint, torch_dtype, code=checkpoint.pristine_code))
    for shape in SHAPES:
        flat = example_inputs(checkpoint, *shape, dtype=torch_dtype, padding=[0, *[1] * (shape[0] - 1)])
        got, wanted = run_tensors(session, flat), run_tensors(reference, flat)
        for name, tensor in wanted.items():
            error = (got[name].float() - tensor.float()).abs().max().item()
            assert error <= (1e-5 if dtype == "fp32" else 6e-3) * max(1.0, tensor.abs().max().item()), (shape, name)


def test_tensorrt_rtx_parses_and_builds_it_without_a_gpu(exported: Path) -> None:
    tensorrt = pytest.importorskip("tensorrt_rtx")
    builder = tensorrt.Builder(tensorrt.Logger(tensorrt.Logger.ERROR))
    network = builder.create_network()
    parser = tensorrt.OnnxParser(network, tensorrt.Logger(tensorrt.Logger.ERROR))
    assert parser.parse_from_file(str(exported / "model.fp16.onnx"))
    config = builder.create_builder_config()
    for sequence, past in (((1, 8, 64), (0, 0, 0)), ((1, 1, 1), (1, 32, 128))):
        profile = builder.create_optimization_profile()
        for index in range(network.num_inputs):
            tensor = network.get_input(index)
            sizes = []
            for s, p in zip(sequence, past, strict=True):
                total = {"input_ids": (1, s), "position_ids": (1, 2, s), "attention_mask": (1, 1, s, s + p)}
                sizes.append(total.get(tensor.name, (p, 1, 4, 16)))
            profile.set_shape(tensor.name, *sizes)
        config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


@pytest.mark.parametrize("opset", [19, 23])
def test_later_opsets_give_the_same_numbers(exported: Path, opset: int) -> None:
    checkpoint = open_checkpoint(exported)
    report = exporting.export_model(checkpoint, "fp32", opset=opset)
    assert report.path.name == f"model.fp32.dynamo{opset}.onnx"
    assert graph(report.path).opset_import[0].version == opset
    flat = example_inputs(checkpoint, 3, 4, 9)
    got = torch.from_numpy(OrtSession(report.path).run(flat)["logits"])
    wanted = torch.from_numpy(OrtSession(exported / "model.fp32.onnx").run(flat)["logits"])
    assert torch.allclose(got, wanted, atol=1e-5)


def test_the_exporter_of_2023_gives_the_same_numbers(exported: Path) -> None:
    checkpoint = open_checkpoint(exported)
    report = exporting.export_model(checkpoint, "fp32", exporter="torchscript", opset=17)
    flat = example_inputs(checkpoint, 3, 4, 9)
    got = torch.from_numpy(OrtSession(report.path).run(flat)["logits"])
    wanted = torch.from_numpy(OrtSession(exported / "model.fp32.onnx").run(flat)["logits"])
    assert torch.allclose(got, wanted, atol=1e-5)
    assert report.path.stat().st_size < 600_000


def test_exporting_twice_gives_the_same_bytes_without_a_machines_paths(exported: Path) -> None:
    path = exported / "model.fp16.onnx"
    before = path.read_bytes()
    exporting.export_model(open_checkpoint(exported), "fp16")
    assert path.read_bytes() == before
    assert str(exported.parent).encode() not in before and b"site-packages" not in before
    assert b"transformer.layers.1.attention" in before  # a node still says which layer it came from


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"dtype": "int8"}, "fp16 or fp32"),
        ({"exporter": "tf2onnx"}, "dynamo or torchscript"),
        ({"opset": 17}, "18 to 24"),
        ({"exporter": "torchscript", "opset": 21}, "17 to 20"),
    ],
)
def test_refuses_what_it_cannot_do(exported: Path, request_: dict[str, object], says: str) -> None:
    with pytest.raises(WorkbookError, match=says):
        exporting.export_model(open_checkpoint(exported), **request_)  # type: ignore[arg-type]


def test_a_source_the_exporter_cannot_follow_is_one_sentence(tiny_random: Path) -> None:
    """A fork that looks at a value while it runs: refused with the reason, and nothing is written."""
    patching.patch_checkpoint(tiny_random)
    checkpoint = open_checkpoint(tiny_random)
    source = checkpoint.code.read_text()
    line = "        hidden_states = inputs_embeds.transpose(0, 1)"
    assert line in source
    checkpoint.code.write_text(source.replace(line, "        print(input_ids.sum().item() > 3 and 1 or 2)\n" + line))
    usual = gc.get_threshold()
    with pytest.raises(
        WorkbookError, match=r"dynamo exporter cannot follow this source \(GuardOnDataDependent"
    ) as caught:
        exporting.export_model(checkpoint, "fp32")
    assert gc.get_threshold() == usual
    assert "\n" not in str(caught.value) and not list(tiny_random.glob("*.onnx"))


def test_refuses_an_unpatched_source_by_the_traps_name(tiny_random: Path) -> None:
    with pytest.raises(WorkbookError, match=r"rotary_flatten.*02_patch_rotary_flatten"):
        exporting.export_model(open_checkpoint(tiny_random))
    assert not list(tiny_random.glob("*.onnx"))


def test_refuses_symbolic_links_and_names_the_working_copy(tiny_random: Path, tmp_path: Path) -> None:
    patching.patch_checkpoint(tiny_random)
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in tiny_random.iterdir():
        (linked / file.name).symlink_to(file)
    with pytest.raises(WorkbookError, match=r"symbolic link.*glmtrt copy"):
        exporting.export_model(open_checkpoint(linked))


def test_bin_shards_are_streamed_into_safetensors(tiny_random: Path) -> None:
    before = open_checkpoint(tiny_random)
    wanted = loading.read_tensors(before, list(before.tensors), torch.float16)
    to_bin(tiny_random)
    patching.patch_checkpoint(tiny_random)
    exporting.export_model(open_checkpoint(tiny_random), "fp16")
    after = open_checkpoint(tiny_random)
    assert after.is_safetensors and after.tensors.keys() == wanted.keys()
    got = loading.read_tensors(after, list(wanted), torch.float16)
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    OrtSession(tiny_random / "model.fp16.onnx").run(example_inputs(after, 1, 2, 3, torch.float16))


def test_killed_midway_loses_nothing_and_a_rerun_succeeds(exported: Path, tmp_path: Path) -> None:
    """SIGKILL with half of the temporary file written: the old model stands, the next run sweeps up."""
    directory = Path(shutil.copytree(exported, tmp_path / "killed"))
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
