"""What `config.json` says: which family of models it is, and the shape of every weight."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from glmtrt_helpers.core import records
from glmtrt_helpers.core.errors import WorkbookError

_Id = Annotated[int, msgspec.Meta(ge=0, le=2**24)]
RANDOM_KEY = "glmtrt_random"  # in the config.json of a checkpoint of random weights
QUANTIZED_KEY = "glmtrt_quantization"  # in that of a checkpoint that `glmtrt quantize` wrote


class _Config(msgspec.Struct):
    """The fields that are computed with. The ids of special tokens have the order that they have in the tokenizer."""

    num_layers: Annotated[int, msgspec.Meta(ge=1, le=1000)]
    hidden_size: Annotated[int, msgspec.Meta(ge=4, le=2**17)]
    num_attention_heads: Annotated[int, msgspec.Meta(ge=1, le=2**12)]
    vocab_size: Annotated[int, msgspec.Meta(ge=8, le=2**24)]
    bos_token_id: _Id
    mask_token_id: _Id
    gmask_token_id: _Id
    eos_token_id: _Id
    pad_token_id: _Id
    inner_hidden_size: Annotated[int, msgspec.Meta(ge=1, le=2**20)] | None = None
    max_sequence_length: Annotated[int, msgspec.Meta(ge=4, le=2**20)] = 2048
    layernorm_epsilon: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 1e-5

    def __post_init__(self) -> None:
        if self.hidden_size % (4 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size {self.hidden_size} does not make num_attention_heads {self.num_attention_heads} heads of "
                "a multiple of 4, which the two rotary halves need"
            )
        for name, distance in (("eos", 1), ("gmask", -3), ("mask", -4)):
            given, expected = getattr(self, f"{name}_token_id"), self.bos_token_id + distance
            if given != expected:
                raise ValueError(
                    f"{name}_token_id is {given}, and beside bos_token_id {self.bos_token_id} the tokenizer has "
                    f"{expected}"
                )
        if max(self.eos_token_id, self.pad_token_id) >= self.vocab_size:
            raise ValueError(f"a token id lies beyond vocab_size {self.vocab_size}")


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a ChatGLM-6B, completed where it is an old one; raises WorkbookError for any other model."""
    again = "download it again"
    try:
        config = records.read(path, dict[str, Any], again)
    except FileNotFoundError:
        raise WorkbookError(f"{path} is missing: this folder is not a checkpoint, or its download stopped.") from None
    _check_family(path, config)
    # Configurations of March 2023 name <sop> and <eop> only; the order of the special tokens never changed.
    sop = config.setdefault("bos_token_id", 150004)
    if isinstance(sop, int):
        for key, value in (("mask", sop - 4), ("gmask", sop - 3), ("eos", sop + 1), ("pad", 3)):
            config.setdefault(f"{key}_token_id", value)
    try:
        records.convert(config, _Config)
    except ValueError as error:
        raise WorkbookError(f"{path} {error}: {again}.") from None
    return config


def _check_family(path: Path, config: dict[str, Any]) -> None:
    """The later ChatGLM families share the model_type; their configuration gives them away."""
    if config.get("model_type") != "chatglm":
        raise WorkbookError(
            f"{path} describes a {config.get('model_type')!r} model: this workbook reads ChatGLM-6B of 2023, 'chatglm'."
        )
    if any(key in config for key in ("multi_query_attention", "padded_vocab_size", "kv_channels")):
        raise WorkbookError(
            f"{path} describes ChatGLM2, ChatGLM3 or GLM-4 (found: rotary, multi-query attention): this workbook reads "
            "the first generation only, THUDM/chatglm-6b."
        )
    if any(key in config for key in ("vision_config", "image_length", "eva_config", "qformer_config")):
        raise WorkbookError(
            f"{path} describes VisualGLM, which takes images: this workbook reads the text model, THUDM/chatglm-6b."
        )
    if config.get("quantization_bit") not in (None, 0, 4, 8):
        raise WorkbookError(
            f"{path} has quantization_bit {config['quantization_bit']!r}: weights of 8 or 4 bits are read, or take the "
            "fp16 checkpoint, THUDM/chatglm-6b."
        )
    if method := config.get("quantization_config"):
        name = method.get("quant_method", "another method") if isinstance(method, dict) else "another method"
        raise WorkbookError(
            f"{path} describes weights quantised by {name}, which are not read: take the fp16 checkpoint, "
            "THUDM/chatglm-6b, and quantise it with `glmtrt quantize`."
        )
    if config.get("pre_seq_len"):
        raise WorkbookError(
            f"{path} has pre_seq_len {config['pre_seq_len']} (P-tuning v2): its prefix changes every layer's past, "
            "which this workbook does not export; merge a LoRA instead, or remove pre_seq_len to use the base model."
        )
    if not config.get("position_encoding_2d", True):
        raise WorkbookError(
            f"{path} turns position_encoding_2d off: ChatGLM-6B has two rows of positions, set it to true."
        )


def expected_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shape of every weight by state-dict name, from the configuration (inv_freq is computed, not stored)."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    inner = config.get("inner_hidden_size") or 4 * hidden
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (vocab, hidden)}
    for i in range(config["num_layers"]):
        layer = f"transformer.layers.{i}."
        for module, out_features, in_features in (
            ("attention.query_key_value", 3 * hidden, hidden),
            ("attention.dense", hidden, hidden),
            ("mlp.dense_h_to_4h", inner, hidden),
            ("mlp.dense_4h_to_h", hidden, inner),
        ):
            shapes[layer + module + ".weight"] = (out_features, in_features)
            shapes[layer + module + ".bias"] = (out_features,)
        for module in ("input_layernorm", "post_attention_layernorm"):
            shapes[layer + module + ".weight"] = shapes[layer + module + ".bias"] = (hidden,)
    shapes["transformer.final_layernorm.weight"] = shapes["transformer.final_layernorm.bias"] = (hidden,)
    shapes["lm_head.weight"] = (vocab, hidden)
    return shapes
