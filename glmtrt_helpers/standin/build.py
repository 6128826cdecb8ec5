"""Write a checkpoint directory in upstream's layout: configuration, remote code, tokenizer, sharded weights."""

import json
import math
import re
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from sentencepiece import sentencepiece_model_pb2

from glmtrt_helpers.checkpoints.config import expected_shapes
from glmtrt_helpers.checkpoints.remote_code import inv_freq
from glmtrt_helpers.checkpoints.tokenizer import SPECIAL_TOKENS, complete_model
from glmtrt_helpers.core import records
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.core.files import is_temporary, remove_stale, temporary_path

TEMPLATE = Path(__file__).parent / "template"
NAME_PREFIX = "glmtrt-workbook/"  # of `_name_or_path` in the configuration of every checkpoint that is written here
_FILES = re.compile(
    r"(configuration|modeling|tokenization)_chatglm\.py|quantization\.py|ice_text\.model|(tokenizer_)?config\.json"
    r"|questions\.json|model-\d{5}-of-\d{5}\.safetensors|pytorch_model-\d{5}-of-\d{5}\.bin|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)


def make_config(pieces: int, **sizes: int) -> dict[str, Any]:
    """A `config.json` with upstream's fields. pieces: of the sentencepiece model, without special tokens and bytes.

    sizes: num_layers, hidden_size, num_attention_heads, inner_hidden_size, max_sequence_length.
    """
    complete = pieces + len(SPECIAL_TOKENS) + 80 + 256
    ids = {token: pieces + index for index, token in enumerate(SPECIAL_TOKENS)}
    return {
        "_name_or_path": f"{NAME_PREFIX}chatglm-standin",
        "architectures": ["ChatGLMModel"],
        "auto_map": {
            "AutoConfig": "configuration_chatglm.ChatGLMConfig",
            "AutoModel": "modeling_chatglm.ChatGLMForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "modeling_chatglm.ChatGLMForConditionalGeneration",
        },
        "bos_token_id": ids["<sop>"],
        "eos_token_id": ids["<eop>"],
        "gmask_token_id": ids["[gMASK]"],
        "mask_token_id": ids["[MASK]"],
        "pad_token_id": 3,
        "layernorm_epsilon": 1e-05,
        "model_type": "chatglm",
        "position_encoding_2d": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": -(-complete // 32) * 32,
        **sizes,
    }


def random_weights(config: Mapping[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """fp16 weights by state-dict name: normal matrices (std 0.05), LayerNorm weights near 1, small biases."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in expected_shapes(config).items():
        noise = torch.randn(shape, generator=generator) * (0.05 if len(shape) == 2 else 0.02)
        weights[name] = (noise + 1.0 if "layernorm.weight" in name else noise).half()
    return weights


@contextmanager
def new_checkpoint(directory: Path) -> Iterator[Path]:
    """Yield a folder inside `directory` to write a checkpoint to; its files take their places when the block ends.

    A former stand-in is replaced, and stands as it was if the block fails. Raises WorkbookError for a folder that holds
    anything else.
    """
    directory = directory.resolve()
    existed = directory.exists()
    _check_replaceable(directory)
    staging = temporary_path(directory / "standin")
    remove_stale(directory / "standin")
    staging.mkdir(parents=True)
    try:
        yield staging
        _move(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not existed and not any(directory.iterdir()):
            directory.rmdir()


def _check_replaceable(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise WorkbookError(f"{directory} is a file: give a new folder for the checkpoint.")
    present = [path.name for path in directory.iterdir() if not is_temporary(path)]
    try:
        name = str(records.read(directory / "config.json", dict[str, Any], "").get("_name_or_path"))
    except (FileNotFoundError, WorkbookError):
        name = ""
    others = [each for each in present if not _FILES.fullmatch(each)]
    if present and (others or not name.startswith(NAME_PREFIX)):
        raise WorkbookError(
            f"{directory} holds {min(others) if others else 'a checkpoint'}, which `glmtrt standin` did not write: "
            "give a new folder, or empty this one."
        )


def _move(staging: Path, directory: Path) -> None:
    """Replace the files of a former checkpoint. Its indexes go first: without one a half-replaced one is refused."""
    new = sorted(staging.iterdir(), key=lambda path: path.name.endswith(".index.json"))
    old = [path for path in directory.iterdir() if _FILES.fullmatch(path.name) and path.name != "config.json"]
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for path in sorted(old, key=lambda path: not path.name.endswith(".index.json")):
            path.unlink()
        for path in new:
            path.replace(directory / path.name)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def write_checkpoint(
    directory: Path,
    config: Mapping[str, Any],
    weights: Mapping[str, torch.Tensor],
    tokenizer: sentencepiece_model_pb2.ModelProto,
    num_shards: int = 2,
) -> None:
    """Write all files of a checkpoint into `directory`; weights must be fp16, inv_freq is added.

    tokenizer: plain pieces only; special tokens, white space and bytes are appended here, in place.
    """
    write_files(directory, config, tokenizer)
    _write_shards(directory, _with_inv_freq(config, weights), num_shards)


def write_files(directory: Path, config: Mapping[str, Any], tokenizer: sentencepiece_model_pb2.ModelProto) -> None:
    """Write all files of a checkpoint except its weights."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in TEMPLATE.glob("*.py"):
        shutil.copyfile(file, directory / file.name)
    complete_model(tokenizer)
    (directory / "ice_text.model").write_bytes(tokenizer.SerializeToString())
    _write_json(directory / "config.json", config)
    _write_json(
        directory / "tokenizer_config.json",
        {
            "name_or_path": config["_name_or_path"],
            "bos_token": "<sop>",
            "eos_token": "<eop>",
            "gmask_token": "[gMASK]",
            "mask_token": "[MASK]",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "padding_side": "left",
            "do_lower_case": False,
            "auto_map": {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]},
            "tokenizer_class": "ChatGLMTokenizer",
        },
    )


def write_questions(directory: Path, questions: Sequence[str]) -> None:
    """Write `questions.json`: what a stand-in can be asked, for those who chat with it."""
    (directory / "questions.json").write_text(
        json.dumps(questions, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def stored_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every stored tensor: the weights, and inv_freq of every layer."""
    rotary = config["hidden_size"] // config["num_attention_heads"] // 2
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in expected_shapes(config).items():
        shapes[name] = shape
        if name.endswith("query_key_value.weight"):
            shapes[name.replace("query_key_value.weight", "rotary_emb.inv_freq")] = (rotary // 2,)
    return shapes


def _with_inv_freq(config: Mapping[str, Any], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    stored = {name: tensor.contiguous() for name, tensor in weights.items()}
    extra = {name: inv_freq(2 * shape[0]) for name, shape in stored_shapes(config).items() if name not in stored}
    return stored | extra


def split(shapes: Mapping[str, Sequence[int]], num_shards: int) -> list[list[str]]:
    """The tensor names of each shard: in order, in shards of about equal size."""
    total = sum(math.prod(shape) for shape in shapes.values())
    parts: list[list[str]] = [[] for _ in range(num_shards)]
    before = 0
    for name, shape in shapes.items():
        middle = before + math.prod(shape) // 2
        parts[min(num_shards - 1, middle * num_shards // total)].append(name)
        before += math.prod(shape)
    return parts


def _write_shards(directory: Path, weights: Mapping[str, torch.Tensor], num_shards: int) -> None:
    weight_map: dict[str, str] = {}
    for number, names in enumerate(split({name: t.shape for name, t in weights.items()}, num_shards), 1):
        file = f"model-{number:05}-of-{num_shards:05}.safetensors"
        save_file({name: weights[name] for name in names}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(directory / "model.safetensors.index.json", index)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
