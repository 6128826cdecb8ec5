"""Notebook 00's helpers: opening, refusing, loading, and the working copy."""

import hashlib
import json
import struct
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glmtrt_helpers.checkpoints import loading, remote_code, shards, working_copy
from glmtrt_helpers.checkpoints.checkpoint import BACKUP_NAME, CODE_NAME, open_checkpoint
from glmtrt_helpers.checkpoints.working_copy import make_working_copy
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.inputs.names import forward_kwargs

SHARD = "model-00001-of-00002.safetensors"


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(directory: Path) -> str:
    """The one clear sentence that open_checkpoint raises."""
    with pytest.raises(WorkbookError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


def to_bin(directory: Path) -> None:
    """Turn a safetensors checkpoint into `.bin` shards as the download of 2023 has them."""
    weight_map = {}
    for number, file in enumerate(sorted(directory.glob("*.safetensors")), 1):
        name = f"pytorch_model-{number:05}-of-00002.bin"
        state = load_file(file)
        torch.save(state, directory / name)
        weight_map |= dict.fromkeys(state, name)
        file.unlink()
    (directory / "model.safetensors.index.json").unlink()
    (directory / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_open_reads_sizes_and_offsets(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    assert (checkpoint.num_layers, checkpoint.hidden_size, checkpoint.num_heads, checkpoint.head_size) == (2, 64, 4, 16)
    stored = checkpoint.tensors["transformer.layers.1.mlp.dense_4h_to_h.bias"]
    with stored.file.open("rb") as stream:
        stream.seek(stored.offset or 0)
        raw = torch.frombuffer(bytearray(stream.read(stored.nbytes)), dtype=torch.float16)
    loaded = load_file(stored.file)["transformer.layers.1.mlp.dense_4h_to_h.bias"]
    assert torch.equal(raw, loaded)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"multi_query_attention": True}, "ChatGLM2"),
        ({"image_length": 32}, "VisualGLM"),
        ({"quantization_bit": 4}, "quantization_bit 4"),
        ({"pre_seq_len": 128}, "pre_seq_len 128"),
        ({"num_layers": None}, "'num_layers'"),
        ({"position_encoding_2d": False}, "position_encoding_2d"),
        ({"num_layers": 3}, "transformer.layers.2.attention.query_key_value.weight"),
        ({"hidden_size": 128}, "has shape"),
    ],
)
def test_refuses_configuration(tiny_random: Path, changes: dict[str, object], says: str) -> None:
    edit_config(tiny_random, **changes)
    assert says in refusal(tiny_random)


@pytest.mark.parametrize("name", ["config.json", "modeling_chatglm.py", SHARD])
def test_names_the_missing_file(tiny_random: Path, name: str) -> None:
    (tiny_random / name).unlink()
    assert str(tiny_random / name) in refusal(tiny_random)


def test_refuses_what_is_no_directory(tmp_path: Path) -> None:
    assert "not a directory" in refusal(tmp_path / "absent")


def test_refuses_absent_weights(tiny_random: Path) -> None:
    for file in tiny_random.glob("model*"):
        if file.suffix != ".py":
            file.unlink()
    assert "holds no weights" in refusal(tiny_random)


@pytest.mark.parametrize("keep", [4, 100, -1000])
def test_refuses_truncated_shard(tiny_random: Path, keep: int) -> None:
    shard = tiny_random / SHARD
    shard.write_bytes(shard.read_bytes()[:keep])
    message = refusal(tiny_random)
    assert SHARD in message and "truncated" in message


def test_refuses_damaged_header(tiny_random: Path) -> None:
    shard = tiny_random / SHARD
    raw = bytearray(shard.read_bytes())
    raw[8] ^= 0xFF  # the opening brace of the JSON header
    shard.write_bytes(raw)
    assert SHARD in refusal(tiny_random)


def test_refuses_header_whose_shape_and_bytes_disagree(tiny_random: Path) -> None:
    shard = tiny_random / SHARD
    raw = shard.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    first = next(name for name in header if name != "__metadata__")
    header[first]["shape"][0] += 1
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    assert "damaged header" in refusal(tiny_random)


def test_refuses_index_that_leaves_its_folder_or_names_an_absent_tensor(tiny_random: Path) -> None:
    index = tiny_random / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    moved = dict(content["weight_map"], **{"lm_head.weight": SHARD})
    index.write_text(json.dumps({"weight_map": moved}))
    assert "does not hold 'lm_head.weight'" in refusal(tiny_random)
    index.write_text(json.dumps({"weight_map": dict(moved, **{"lm_head.weight": "../x.safetensors"})}))
    assert "outside its folder" in refusal(tiny_random)
    index.write_text("{")
    assert "not a shard index" in refusal(tiny_random)


def test_bin_and_symbolic_links_load_the_same_model(tiny_random: Path, tmp_path: Path) -> None:
    wanted = loading.load_model(open_checkpoint(tiny_random)).state_dict()
    to_bin(tiny_random)
    cache = tmp_path / "hub"  # a hub cache keeps blobs apart and lays out symbolic links
    cache.mkdir()
    for file in tiny_random.iterdir():
        (cache / file.name).symlink_to(file)
    checkpoint = open_checkpoint(cache)
    assert not checkpoint.is_safetensors
    loaded = loading.load_model(checkpoint).state_dict()
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_bin_is_read_weights_only(tiny_random: Path) -> None:
    to_bin(tiny_random)
    bomb = tiny_random / "pytorch_model-00001-of-00002.bin"

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return exec, ("raise SystemExit('pickled code ran')",)

    torch.save({"lm_head.weight": Bomb()}, bomb)
    assert bomb.name in refusal(tiny_random)


def test_truncated_bin_is_refused(tiny_random: Path) -> None:
    to_bin(tiny_random)
    shard = tiny_random / "pytorch_model-00002-of-00002.bin"
    shard.write_bytes(shard.read_bytes()[:-5000])
    assert shard.name in refusal(tiny_random)


def test_load_announces_the_code_and_its_hash(tiny_random: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(tiny_random)
    checkpoint.code.write_text(checkpoint.code.read_text() + "\n# a revision of its own\n")
    loading.load_model(checkpoint, meta=True)
    sha256 = hashlib.sha256(checkpoint.code.read_bytes()).hexdigest()
    said = capsys.readouterr().err
    assert str(checkpoint.code) in said and sha256[:16] in said


def test_loading_leaves_no_bytecode(tiny_random: Path) -> None:
    before = sorted(path.name for path in tiny_random.iterdir())
    loading.load_model(open_checkpoint(tiny_random))
    assert sorted(path.name for path in tiny_random.iterdir()) == before


def test_inv_freq_is_computed_not_read(tiny_random: Path) -> None:
    name = "transformer.layers.0.attention.rotary_emb.inv_freq"
    shard = open_checkpoint(tiny_random).tensors[name].file
    state = load_file(shard)
    state[name] = torch.full_like(state[name], 7.0)
    save_file(state, shard)
    model = loading.load_model(open_checkpoint(tiny_random))
    expected = torch.tensor([10000 ** (-2 * j / 8) for j in range(4)]).half().float()
    assert torch.equal(model.get_buffer(name), expected)


def test_dtype_layers_and_meta(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    half = loading.load_model(checkpoint.first_layers(1), torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16} and len(half.transformer.layers) == 1
    assert not half.training
    meta = loading.load_model(checkpoint, meta=True)
    assert all(p.is_meta for p in meta.parameters())
    assert not any(b.is_meta for b in meta.buffers())


def test_code_that_does_not_fit_is_refused(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    checkpoint.code.write_text("import no_such_module_of_2023\n")
    with pytest.raises(WorkbookError, match="no_such_module_of_2023"):
        loading.load_model(checkpoint)
    checkpoint.code.write_text("class ChatGLMConfig: pass\n")
    with pytest.raises(WorkbookError, match="ChatGLMForConditionalGeneration"):
        loading.load_model(checkpoint)


def test_fork_with_a_reversed_mask_is_refused_by_name(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    source = checkpoint.code.read_text()
    changed = source.replace(
        "attention_mask=None, past_key_values=None",
        "attention_mask=None, full_attention_mask=None, past_key_values=None",
        1,
    )
    assert changed != source
    checkpoint.code.write_text(changed)
    with pytest.raises(WorkbookError, match="full_attention_mask"):
        loading.load_model(checkpoint)


def test_the_first_upload_runs_in_fp16_only_and_says_so(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    source = checkpoint.code.read_text()
    changed = source.replace(
        "F.softmax(attention_scores, dim=-1).to(dtype)", "F.softmax(attention_scores, dim=-1).half()"
    )
    assert changed != source
    checkpoint.code.write_text(changed)
    loading.load_model(checkpoint, torch.float16)
    with pytest.raises(WorkbookError, match=r"\.half\(\)"):
        loading.load_model(checkpoint, torch.float32)


def test_fork_that_imports_its_siblings_without_a_dot(tiny_random: Path) -> None:
    checkpoint = open_checkpoint(tiny_random)
    source = checkpoint.code.read_text()
    changed = source.replace("from .configuration_chatglm import", "from configuration_chatglm import")
    assert changed != source
    checkpoint.code.write_text(changed)
    before = set(sys.path), set(sys.modules)
    _, applied = remote_code.build_model(checkpoint.directory, checkpoint.code, checkpoint.config, torch.float32)
    assert "absolute imports" in [mend.name for mend in applied]
    assert set(sys.path) == before[0] and "configuration_chatglm" not in sys.modules


def test_fork_that_synchronizes_runs_without_a_gpu(tiny_random: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint = open_checkpoint(tiny_random)
    source = checkpoint.code.read_text()
    call = "        hidden_states = inputs_embeds.transpose(0, 1)"
    assert call in source
    checkpoint.code.write_text(source.replace(call, "        torch.cuda.synchronize()\n" + call))
    _, applied = remote_code.build_model(checkpoint.directory, checkpoint.code, checkpoint.config, torch.float32)
    assert "cuda.synchronize" in [mend.name for mend in applied]
    model = loading.load_model(checkpoint)
    flat = example_inputs(checkpoint, 1, 3, 0)
    with torch.no_grad():
        assert model(**forward_kwargs(flat))[0].shape == (1, 3, checkpoint.vocab_size)


def test_working_copy_copies_links_and_keeps_patches(tiny_random: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working_copy, "LINK_BYTES", 50_000)
    copy = make_working_copy(tiny_random)
    assert copy == tiny_random.parent / "run" / tiny_random.name
    assert (copy / SHARD).samefile(tiny_random / SHARD)
    assert not (copy / "config.json").samefile(tiny_random / "config.json")
    assert make_working_copy(copy) == copy  # a copy of the copy is itself

    code, backup = copy / CODE_NAME, copy / BACKUP_NAME
    backup.write_bytes(code.read_bytes())
    code.write_text("# patched\n")
    make_working_copy(tiny_random)
    assert code.read_text() == "# patched\n"
    assert open_checkpoint(copy).pristine_code == backup
    (tiny_random / CODE_NAME).write_text("# a newer revision\n")
    make_working_copy(tiny_random)
    assert code.read_text() == "# a newer revision\n" and not backup.exists()


def test_working_copy_resolves_symbolic_links(
    tiny_random: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working_copy, "LINK_BYTES", 50_000)
    cache = tmp_path / "hub" / "chatglm"
    cache.mkdir(parents=True)
    for file in tiny_random.iterdir():
        (cache / file.name).symlink_to(file)
    copy = make_working_copy(cache)
    assert not (copy / SHARD).is_symlink() and (copy / SHARD).samefile(tiny_random / SHARD)


def test_header_of_an_empty_shard(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({}, file)
    assert shards.read_header(file) == {}
