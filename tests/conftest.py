"""Fixtures: small random checkpoints with the stand-in's remote code, and the shipped checkpoint's working copy."""

import shutil
from pathlib import Path

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2

from glmtrt_helpers import checkpoints, packages
from glmtrt_helpers.standin import build

ROOT = Path(__file__).parent.parent
TINY = ROOT / "models" / "chatglm_tiny"

torch.set_num_threads(1)  # models this small run fastest on one thread


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


@pytest.fixture(scope="session")
def _random_master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random(tmp_path_factory.mktemp("master") / "chatglm_random")


@pytest.fixture
def tiny_random(_random_master: Path, tmp_path: Path) -> Path:
    """A private, unpatched random checkpoint: 2 layers, hidden 64, 4 heads, 1024 positions, 2 shards."""
    return Path(shutil.copytree(_random_master, tmp_path / "chatglm_random"))


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working copy of the shipped, trained checkpoint, shared by tests that only read it. Unpatched."""
    return checkpoints.working_copy(TINY, tmp_path_factory.mktemp("run"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The browser comes last: by then the notebooks have run. Tests that need a GPU say so where there is none."""
    items.sort(key=lambda item: item.path.name == "test_browser.py")
    if not packages.gpus():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and its driver"))
