"""The shipped checkpoint, random checkpoints with the stand-in's remote code, and ways to change one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sentencepiece import sentencepiece_model_pb2

from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.standin import build

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = ROOT / "models" / "chatglm_tiny"
SHARD = "model-00001-of-00002.safetensors"
FORWARD = "        hidden_states = inputs_embeds.transpose(0, 1)"  # a line of the remote code's forward


def small_tokenizer() -> sentencepiece_model_pb2.ModelProto:
    """A sentencepiece model of ASCII letters and a few Chinese characters, in upstream's order of pieces."""
    proto = sentencepiece_model_pb2.ModelProto()
    kind = sentencepiece_model_pb2.ModelProto.SentencePiece
    proto.trainer_spec.model_type = sentencepiece_model_pb2.TrainerSpec.UNIGRAM
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    proto.pieces.add(piece="<unk>", score=0, type=kind.UNKNOWN)
    for piece in ("<s>", "</s>", "<pad>"):
        proto.pieces.add(piece=piece, score=0, type=kind.CONTROL)
    proto.pieces.add(piece="<n>", score=0, type=kind.USER_DEFINED)
    for rank, piece in enumerate(["▁", "你好", *map(chr, range(33, 127)), *"你好的问答：，。", "the", "▁the"]):
        proto.pieces.add(piece=piece, score=-1.0 - 0.01 * rank, type=kind.NORMAL)
    return proto


def make_random(directory: Path, *, seed: int = 0, **sizes: int) -> Path:
    """Write a random checkpoint; sizes override the small defaults."""
    tokenizer = small_tokenizer()
    defaults = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "inner_hidden_size": 256,
        "max_sequence_length": 1024,
    }
    config = build.make_config(len(tokenizer.pieces), **(defaults | sizes))
    build.write_checkpoint(directory, config, build.random_weights(config, seed), tokenizer)
    return directory


def refusal(directory: Path) -> str:
    """The one sentence of the error that open_checkpoint raises."""
    with pytest.raises(WorkbookError) as caught:
        open_checkpoint(directory)
    message = str(caught.value)
    assert "\n" not in message
    return message


def replace_once(file: Path, before: str, after: str) -> None:
    """Change one place of a source."""
    source = file.read_text()
    assert source.count(before) == 1
    file.write_text(source.replace(before, after))


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
