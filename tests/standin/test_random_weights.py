"""Random checkpoints: upstream's layout, numerically like a trained model, the same numbers in both formats."""

import json
from pathlib import Path

import pytest
import torch
from support.checkpoints import make_random

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint, shares_vocabulary
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.checkpoints.working_copy import MARKER
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.inputs.examples import example_inputs
from glmtrt_helpers.inputs.prompts import chat_prompt
from glmtrt_helpers.sessions.pytorch import TorchSession
from glmtrt_helpers.standin import build, conversations, random_weights, train

SMALL = {
    "pieces": 1400, "vocab_size": 2048, "num_layers": 3, "hidden_size": 128, "num_attention_heads": 2,
    "inner_hidden_size": 512, "max_sequence_length": 256,
}  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_weights, "SIZES", {"small": SMALL})
    monkeypatch.setattr(random_weights, "_CHUNK", 1000)  # so that tensors are drawn in several pieces


def state(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(directory)
    return loading.read_tensors(checkpoint, list(checkpoint.tensors), torch.float16)


@pytest.mark.usefixtures("small")
def test_both_formats_hold_the_same_in_upstreams_files(tmp_path: Path) -> None:
    reported: list[tuple[int, int]] = []
    first = random_weights.write_random(
        tmp_path / "a", "small", progress=lambda done, total: reported.append((done, total))
    )
    second = random_weights.write_random(tmp_path / "b", "small", weights="bin")
    other = random_weights.write_random(tmp_path / "c", "small", seed=1)
    one, two, three = state(first), state(second), state(other)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    matrix = "transformer.layers.1.mlp.dense_h_to_4h.weight"
    assert not torch.equal(one[matrix], three[matrix])
    assert len(list(first.glob("model-0000?-of-00008.safetensors"))) == 8
    assert len(list(second.glob("pytorch_model-0000?-of-00008.bin"))) == 8
    index = json.loads((second / "pytorch_model.bin.index.json").read_text())
    assert index["metadata"]["total_size"] == reported[-1][0] == reported[-1][1]
    assert index["weight_map"].keys() == build.stored_shapes(json.loads((first / "config.json").read_text())).keys()
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.usefixtures("small")
def test_the_weights_are_random_and_the_logits_finite(tmp_path: Path) -> None:
    directory = random_weights.write_random(tmp_path / "a", "small")
    checkpoint = open_checkpoint(directory)
    assert checkpoint.is_random and shares_vocabulary(checkpoint)
    weights = state(directory)
    assert torch.equal(weights["lm_head.weight"], weights["transformer.word_embeddings.weight"])
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            assert tensor.float().mean().abs() < 0.01 and 1 < tensor.float().std() * tensor.shape[1] ** 0.5 < 3, name
            assert len(tensor.unique()) > 500, name  # no chunk drawn twice, none left out
            halves = tensor.reshape(-1)[:2000].float()
            assert not torch.equal(halves[:1000], halves[1000:]), name
    session = TorchSession(loading.load_model(checkpoint, torch.float16))
    logits = torch.as_tensor(session.run(example_inputs(checkpoint, 2, 9, 0, torch.float16))["logits"]).float()
    assert torch.isfinite(logits).all() and logits.abs().max() < 100
    best = logits.topk(2).values
    assert logits.std() > 0.5 and (best[..., 0] - best[..., 1]).median() > 0.01


@pytest.mark.usefixtures("small")
def test_its_tokenizer_encodes_chinese(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(random_weights.write_random(tmp_path / "a", "small"))
    tokenizer = load_tokenizer(checkpoint)
    ids = chat_prompt(tokenizer, "你好")
    assert ids[-2:] == [1401, 1404] and tokenizer.decode(ids[:-2]) == "你好"


def test_the_real_size_is_upstreams() -> None:
    fields = dict(random_weights.SIZES["6b"])
    config = build.make_config(fields.pop("pieces"), **fields)
    shapes = build.stored_shapes(config)
    assert config["gmask_token_id"] == 130001 and config["bos_token_id"] == 130004
    assert shapes["lm_head.weight"] == (130528, 4096) and len(shapes) == 368
    total = sum(torch.Size(shape).numel() for name, shape in shapes.items() if "inv_freq" not in name)
    assert total == 6_707_929_088  # stored parameters of the public checkpoint
    parts = build.split(shapes, 8)
    assert [name for part in parts for name in part] == list(shapes) and all(parts)


@pytest.mark.usefixtures("small")
def test_unknown_sizes_and_formats_and_a_full_disk_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WorkbookError, match="no size '7b'"):
        random_weights.write_random(tmp_path / "a", "7b")
    with pytest.raises(WorkbookError, match="no format 'gguf'"):
        random_weights.write_random(tmp_path / "a", "small", weights="gguf")
    monkeypatch.setattr(random_weights, "_SMALL_FILES", 10**18)
    with pytest.raises(WorkbookError, match=r"needs .* GB and has"):
        random_weights.write_random(tmp_path / "a", "small")
    assert not (tmp_path / "a").exists()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("other", ["notes.txt", "model.fp16.onnx", MARKER, "another model", "a file"])
def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, other: str) -> None:
    directory = tmp_path / "a"
    if other == "a file":
        directory.write_text("mine")
    elif other == "another model":
        make_random(directory)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {"_name_or_path": "THUDM/chatglm-6b"}))
    else:
        random_weights.write_random(directory, "small")
        (directory / other).write_text("mine")
    before = files(tmp_path)
    for write in (lambda: random_weights.write_random(directory, "small"), lambda: train.build_standin(directory)):
        with pytest.raises(WorkbookError, match="give a new folder"):
            write()
    assert files(tmp_path) == before


@pytest.mark.usefixtures("small")
def test_a_former_standin_stands_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = random_weights.write_random(tmp_path / "a", "small", weights="bin")
    before = files(directory)

    def interrupted(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        random_weights.write_random(directory, "small", seed=1, progress=interrupted)
    assert files(directory) == before
    random_weights.write_random(directory, "small", seed=1)
    assert files(directory) == files(random_weights.write_random(tmp_path / "b", "small", seed=1))

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    before = files(directory)
    monkeypatch.setattr(train, "_fit", stop)
    with pytest.raises(KeyboardInterrupt):
        train.build_standin(directory, conversations.load_corpus()[:4], pieces=300)
    assert files(directory) == before
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WorkbookError, match="give a new folder"):
        random_weights.write_random(Path(), "small")
