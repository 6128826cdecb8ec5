"""Checkpoints of 8 and 4 bits: written, opened, exported, run; the published layouts; and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import to_bin
from support.exporting import editing

from glmtrt_helpers.checkpoints import loading, packing
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.packing import Packing
from glmtrt_helpers.checkpoints.shards import StoredTensor
from glmtrt_helpers.checkpoints.working_copy import make_working_copy
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.engines.memory_prediction import engine_weights
from glmtrt_helpers.export import exporting
from glmtrt_helpers.graphs.reference import CASES, run_tensors
from glmtrt_helpers.graphs.verification import verify
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.inputs.positions_and_mask import prefill
from glmtrt_helpers.patches import patching
from glmtrt_helpers.quantize import calibrating, writing
from glmtrt_helpers.quantize.gptq import gptq
from glmtrt_helpers.quantize.rounding import round_to_nearest
from glmtrt_helpers.quantize.writing import quantize_checkpoint
from glmtrt_helpers.sessions.onnxruntime import OrtSession

DENSE = "transformer.layers.0.attention.dense.weight"
SCALE = packing.scale_name(DENSE)


def stretched(scale: np.ndarray, group: int) -> np.ndarray:
    """The scale of each weight, for (n, k) integers."""
    return (np.repeat(scale.T, group, axis=1) if group else scale[:, None]).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_survive_packing(bits: int) -> None:
    values = np.random.default_rng(0).integers(-7, 8, (6, 10)).astype(np.int8)
    packed = packing.pack(values, bits)
    assert packed.dtype == np.uint8 and packed.shape == (10, 6 * bits // 8)
    assert np.array_equal(packing.unpack(packed, Packing(bits)), values)
    if bits == 4:  # the first of a pair in the low four bits, by the rules of ONNX
        assert packed[3, 1] == (int(values[2, 3]) & 15) | (int(values[3, 3]) & 15) << 4


@pytest.mark.parametrize("group", [0, 32])
def test_rounding_is_the_formula(group: int) -> None:
    matrix = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).half()
    values, scale = round_to_nearest(matrix, 4, group)
    for row in range(5):
        for first in range(0, 64, group or 64):
            part = matrix[row, first : first + (group or 64)].float().numpy()
            own = np.float32(scale[first // group, row] if group else scale[row])
            assert own == pytest.approx(np.abs(part).max() / 7, rel=1e-3)
            assert np.array_equal(values[row, first : first + len(part)], np.clip(np.round(part / own), -7, 7))


@pytest.mark.parametrize("group", [0, 32])
def test_gptq_is_greedy_least_squares(group: int) -> None:
    """Each column is rounded, and the later ones solve the least squares that are left, by a solver at every step."""
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(4, 160, generator=generator)
    inputs = torch.randn(300, 160, generator=generator) @ torch.randn(160, 160, generator=generator) / 12
    hessian = (inputs.T @ inputs).double()
    values, scale = gptq(matrix, hessian.float(), 4, group)
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(160, dtype=torch.double)
    left, integers = matrix.double(), torch.from_numpy(values.astype(np.float64))
    each = torch.from_numpy(np.broadcast_to(stretched(scale, group), values.shape).astype(np.float64))
    for column in range(160):
        wanted = (left[:, column] / each[:, column]).clamp(-7, 7)
        assert (wanted - integers[:, column]).abs().max() < 0.51, "the nearest, but for ties"
        error = left[:, column] - integers[:, column] * each[:, column]
        rest = damped[column + 1 :, column + 1 :]
        left[:, column + 1 :] += torch.outer(error, torch.linalg.solve(rest, damped[column + 1 :, column]))

    def cost(made: tuple[np.ndarray, np.ndarray]) -> float:
        return float((((matrix.numpy() - made[0] * stretched(made[1], group)) @ inputs.T.numpy()) ** 2).sum())

    assert cost((values, scale)) < 0.8 * cost(round_to_nearest(matrix, 4, group))


@pytest.fixture(params=[(8, 0), (4, 32)], ids=["int8", "int4"])
def quantized(tiny_random: Path, request: pytest.FixtureRequest) -> Checkpoint:
    return open_checkpoint(quantize_checkpoint(tiny_random, *request.param))


def test_what_is_written_is_the_rounded_checkpoint(tiny_random: Path, quantized: Checkpoint) -> None:
    before = open_checkpoint(tiny_random)
    names = [name for name in before.tensors if not name.endswith("inv_freq")]
    old, new = (loading.read_tensors(each, names, torch.float32) for each in (before, quantized))
    for name in names:
        packed = quantized.packed.get(name)
        if packed is None:
            assert torch.equal(old[name], new[name]), name
            continue
        values, scale = round_to_nearest(old[name], packed.bits, packed.group)
        assert np.array_equal(new[name].numpy(), values * stretched(scale, packed.group)), name
        assert (old[name] - new[name]).abs().max() <= 1.1 * old[name].abs().max() / (2**packed.bits - 2), name
    assert len(quantized.packed) == 4 * before.num_layers + 1 and quantized.packed["lm_head.weight"].bits == 8
    assert quantized.weight_bytes < before.weight_bytes


@pytest.fixture
def exported(quantized: Checkpoint) -> Checkpoint:
    patching.patch_checkpoint(quantized.directory)
    exporting.export_model(quantized)
    return quantized


@pytest.mark.slow
def test_the_graph_computes_it_and_onnx_runtime_keeps_it_packed(exported: Checkpoint, tmp_path: Path) -> None:
    import onnxruntime

    path = exporting.onnx_path(exported, "fp16")
    assert onnx.load(path, load_external_data=False).opset_import[0].version == 21
    found = verify(exported, "fp16")
    assert found.ok, found.problems
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "4")
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node]
    assert nodes.count("MatMulNBits") == len(exported.packed) and "DequantizeLinear" not in nodes
    # As a chat runs it: activations are rounded to 8 bits, so it is near, and no nearer.
    flat = example_inputs(exported, 2, 5, 3, dtype=torch.float16)
    plain, packed = (run_tensors(OrtSession(path, optimize=optimize), flat) for optimize in (False, True))
    for name, right in plain.items():
        assert (packed[name].float() - right.float()).abs().max() < 0.05 * right.float().abs().max(), name


@pytest.mark.slow
def test_verify_sees_wrong_scales_and_nibbles(exported: Checkpoint) -> None:
    path, cases = exporting.onnx_path(exported, "fp16"), [case for case in CASES if case.name == "prompt"]
    stored = load_file(exported.tensors[DENSE].file)
    scale, weight = stored[SCALE].numpy(), stored[DENSE].numpy()
    doubled = scale.copy()
    doubled[..., : scale.shape[-1] // 2] *= 2
    faults = {
        "doubled": (SCALE, doubled),
        "off by one": (DENSE, weight + 1),
    }
    if exported.packed[DENSE].bits == 4:
        faults["nibbles exchanged"] = (DENSE, (weight >> 4) | (weight << 4))
        faults["off by one"] = (DENSE, ((weight & 15) + 1 & 15) | ((weight >> 4) + 1 & 15) << 4)
    for what, (name, content) in faults.items():
        damaged = path.with_name("model.damaged.fp16.onnx")
        damaged.write_bytes(path.read_bytes())
        with editing(damaged) as model:
            tensor = next(each for each in model.graph.initializer if each.name == name)
            del tensor.external_data[:]
            tensor.data_location = onnx.TensorProto.DEFAULT
            tensor.raw_data = content.tobytes()
        assert not verify(exported, "fp16", cases, damaged).ok, what


def publish(source: Path, bits: int, *, embedding: bool = False) -> dict[str, torch.Tensor]:
    """Make a checkpoint one as published, by the formulas. Returns the weights that it stands for, in fp32.

    embedding: packed as well, and lm_head is the embedding, stored once.
    """
    right = {}
    for file in sorted(source.glob("*.safetensors")):
        state = load_file(file)
        if embedding:
            state.pop("lm_head.weight", None)
        for name in list(state):
            matrix = state[name].float()
            packed = name.startswith("transformer.layers.") or (embedding and "word_embeddings" in name)
            if matrix.dim() != 2 or not packed:
                right[name] = matrix
                continue
            limit = 2 ** (bits - 1) - 1
            scale = (matrix.abs().amax(dim=1) / limit).half()
            values = (matrix / scale.float()[:, None]).round().clamp(-limit, limit).to(torch.int8)
            right[name] = values.float() * scale.float()[:, None]
            state[f"{name}_scale"] = scale
            state[name] = values if bits == 8 else (values[:, 0::2] << 4) | (values[:, 1::2] & 15)
        save_file(state, file)
    weights = {name: file.name for file in source.glob("*.safetensors") for name in load_file(file)}
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "quantization_bit": bits}))
    right.setdefault("lm_head.weight", right["transformer.word_embeddings.weight"])
    return right


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "embedding"), [(8, False), (4, False), (4, True)])
def test_published_files_open_and_export_as_they_are(tiny_random: Path, bits: int, embedding: bool) -> None:
    right = publish(tiny_random, bits, embedding=embedding)
    to_bin(tiny_random)
    checkpoint = open_checkpoint(tiny_random)
    names = [name for name in right if not name.endswith("inv_freq")]
    assert checkpoint.packed[DENSE] == Packing(bits, 0, True)
    read = loading.read_tensors(checkpoint, names, torch.float32)
    assert all(torch.equal(read[name], right[name]) for name in names)
    patching.patch_checkpoint(tiny_random)
    exporting.export_model(checkpoint)
    converted = open_checkpoint(tiny_random)
    assert converted.is_safetensors and converted.packed[DENSE] == Packing(bits)
    again = loading.read_tensors(converted, names, torch.float16)
    assert all(torch.equal(again[name], right[name].half()) for name in names)
    assert verify(converted, "fp16", CASES[:3]).ok


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({SCALE: torch.ones(3).half()}, "have one fp16 scale a row"),
        ({SCALE: None}, "is stored nowhere"),
        ({SCALE: torch.ones(64)}, "have one fp16 scale a row"),
        ({DENSE: torch.zeros(64, 31, dtype=torch.int8)}, "which packs no matrix of"),
        ({DENSE: torch.zeros(64, 64, dtype=torch.int8)}, "is packed in 8 bits, and config.json has quantization_bit 4"),
    ],
)
def test_what_does_not_fit_is_one_sentence(
    tiny_random: Path, change: dict[str, torch.Tensor | None], says: str
) -> None:
    publish(tiny_random, 4)
    (file,) = [file for file in tiny_random.glob("*.safetensors") if DENSE in load_file(file)]
    state = {name: tensor for name, tensor in {**load_file(file), **change}.items() if tensor is not None}
    save_file(state, file)
    index = tiny_random / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {n: f for n, f in weights.items() if f != file.name or n in state}}))
    with pytest.raises(WorkbookError, match=says) as refused:
        open_checkpoint(tiny_random)
    assert "dense.weight" in str(refused.value) and "\n" not in str(refused.value)


def test_a_stopped_run_goes_on_where_it_was(tiny_random: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, written = writing.shards.write_shard, list[object]()

    def stop_after_one(*given: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(given[0])
        real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(writing.shards, "write_shard", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny_random, 4)
    target = writing.quantized_path(tiny_random, 4)
    with pytest.raises(WorkbookError):
        open_checkpoint(target)
    monkeypatch.setattr(writing.shards, "write_shard", lambda *given: (written.append(given[0]), real(*given)))
    quantize_checkpoint(tiny_random, 4)
    assert len(written) == len(set(written)) == open_checkpoint(target).num_layers + 1
    written.clear()
    monkeypatch.setattr(writing.shards, "write_shard", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny_random, 4, 64)
    with pytest.raises(WorkbookError):  # half of it has other groups
        open_checkpoint(target)
    monkeypatch.setattr(writing.shards, "write_shard", real)
    quantize_checkpoint(tiny_random, 4, 64)
    assert {each.group for each in open_checkpoint(target).packed.values()} == {0, 64}, "nothing of the old is kept"


def test_refusals(tiny_random: Path) -> None:
    for arguments, says in (
        ((5,), "to 8 or 4 bits, not 5"),
        ((4, 16), "a group has 32, 64, 128 weights, not 16"),
        ((4, 128), "whose rows are not made of groups of 128"),
    ):
        with pytest.raises(WorkbookError, match=says):
            quantize_checkpoint(tiny_random, *arguments)
    with pytest.raises(WorkbookError, match="is quantised already"):
        quantize_checkpoint(quantize_checkpoint(tiny_random, 8), 4)
    file = open_checkpoint(tiny_random).tensors[DENSE].file
    state = load_file(file)
    state[DENSE][3, 5] = float("nan")
    save_file(state, file)
    with pytest.raises(WorkbookError, match=f"'{DENSE}' cannot be quantised, row 3 has a weight that is not finite"):
        quantize_checkpoint(tiny_random, 4)


def test_an_odd_number_of_columns_is_said() -> None:
    weight = StoredTensor(Path("shard"), "x", "I8", (4, 2), 0, 8)
    with pytest.raises(WorkbookError, match="and 5 columns, an odd number, cannot be packed two a byte"):
        packing.packings({"x": weight}, {"x": (4, 5)})


def conversations(checkpoint: Checkpoint, count: int, length: int) -> list[list[int]]:
    """Random ones: a question, [gMASK], <sop> and an answer; the first are shorter, so that they are padded."""
    generator = np.random.default_rng(0)
    ends = [int(checkpoint.config[key]) for key in ("gmask_token_id", "bos_token_id")]
    lengths = generator.integers(5, length, count)
    return [
        [*generator.integers(10, 200, n).tolist(), *ends, *generator.integers(10, 200, n).tolist()] for n in lengths
    ]


@pytest.mark.slow
def test_gptq_of_a_checkpoint_goes_on_where_it_was_and_beats_rounding(
    tiny_random: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = open_checkpoint(tiny_random)
    sequences = conversations(before, 40, 20)
    call = {name: torch.from_numpy(array) for name, array in prefill(before, sequences[:8]).items()}

    def last_scores(checkpoint: Checkpoint) -> torch.Tensor:
        with torch.inference_mode():
            return loading.load_model(checkpoint)(**call).logits[:, -4:]

    right = last_scores(before)
    rounded = last_scores(open_checkpoint(quantize_checkpoint(tiny_random, 4, 64)))
    real, written = writing.shards.write_shard, list[object]()

    def stop_after_one(*given: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(given[0])
        real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(writing.shards, "write_shard", stop_after_one)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(tiny_random, 4, 64, sequences=sequences)
    monkeypatch.setattr(writing.shards, "write_shard", lambda *given: (written.append(given[0]), real(*given)))
    target = quantize_checkpoint(tiny_random, 4, 64, sequences=sequences)
    assert len(written) == len(set(written)) == before.num_layers + 1
    resumed = open_checkpoint(target)
    weights = loading.read_tensors(resumed, list(resumed.packed), torch.float32)
    calibrated = last_scores(resumed)
    assert (calibrated - right).pow(2).mean() < 0.9 * (rounded - right).pow(2).mean()
    shutil.rmtree(target)
    at_once = open_checkpoint(quantize_checkpoint(tiny_random, 4, 64, sequences=sequences))
    again = loading.read_tensors(at_once, list(resumed.packed), torch.float32)
    for name, weight in weights.items():  # a tie may fall either way
        assert (again[name] != weight).float().mean() < 0.02, name


def test_padding_is_not_calibrated_with(tiny_random: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the first matrix is multiplied with in two conversations is what it is in each of them alone."""
    checkpoint = open_checkpoint(tiny_random)
    short, long = sorted(conversations(checkpoint, 5, 20), key=len)[:: len(conversations(checkpoint, 5, 20)) - 1]
    assert len(short) < len(long)

    def first_hessian(*sequences: list[int]) -> torch.Tensor:
        seen: list[torch.Tensor] = []

        def record(matrix: torch.Tensor, hessian: torch.Tensor, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
            seen.append(hessian.clone())
            return round_to_nearest(matrix, bits, group)

        monkeypatch.setattr(calibrating, "gptq", record)
        calibrating.calibrate(checkpoint, sequences, 8, 0, lambda number: None, lambda number, made: None)
        return seen[0]

    both = first_hessian(short, long)
    torch.testing.assert_close(both, first_hessian(short) + first_hessian(long), rtol=1e-3, atol=1e-2)


def test_gptq_refuses_what_is_not_finite_or_too_long(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    with pytest.raises(WorkbookError, match="has 1024 positions, and a conversation to calibrate with has 1402 tokens"):
        quantize_checkpoint(tiny_random, 4, sequences=[[5] * 1400 + conversations(checkpoint, 1, 6)[0][-2:]])
    file = checkpoint.tensors[DENSE].file
    state = load_file(file)
    state[DENSE][3, 5] = float("inf")
    save_file(state, file)
    with pytest.raises(WorkbookError, match=f"'{DENSE}' cannot be quantised, row 3 has a weight that is not finite"):
        quantize_checkpoint(tiny_random, 4, sequences=conversations(checkpoint, 4, 6))


def test_a_folder_of_that_name_that_is_something_else_is_left_alone(tiny_random: Path) -> None:
    """A published checkpoint may be called NAME-int4, and so its working copy."""
    target = writing.quantized_path(tiny_random, 4)
    published = shutil.copytree(tiny_random, tiny_random.parent.parent / target.name)
    assert make_working_copy(published, target.parent) == target
    held = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(WorkbookError, match="holds something that `glmtrt quantize` did not write: move it away"):
        quantize_checkpoint(tiny_random, 4)
    assert held == {path.name: path.read_bytes() for path in target.iterdir()}
    shutil.rmtree(target)
    assert quantize_checkpoint(tiny_random, 4) == target
    held = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(WorkbookError, match="is what `glmtrt quantize` wrote, not a copy of"):
        make_working_copy(published, target.parent)
    assert held == {path.name: path.read_bytes() for path in target.iterdir()}
    assert make_working_copy(target) == target, "it is a working copy of its own"


def test_an_engines_weights_count_as_they_are_stored(quantized: Checkpoint) -> None:
    inside = sum(tensor.nbytes for name, tensor in quantized.tensors.items() if not name.endswith("inv_freq"))
    assert engine_weights(quantized, "fp16") == inside
