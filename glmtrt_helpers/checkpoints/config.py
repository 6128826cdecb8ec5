"""What `config.json` says: which family of models it is, and the shape of every weight."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glmtrt_helpers.core.errors import WorkbookError

RANDOM_KEY = "glmtrt_random"  # in the config.json of a checkpoint of random weights


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a ChatGLM-6B, completed where it is an old one; raises WorkbookError for any other model."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WorkbookError(f"{path} is missing: this folder is not a checkpoint, or its download stopped.") from None
    except ValueError as error:
        raise WorkbookError(f"{path} is not JSON ({error}): download it again.") from None
    _check_family(path, config)
    for key in ("num_layers", "hidden_size", "num_attention_heads", "vocab_size"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise WorkbookError(f"{path} has no usable {key!r} ({config.get(key)!r}): download it again.")
    # Configurations of March 2023 name <sop> and <eop> only; the order of the special tokens never changed.
    sop = config.setdefault("bos_token_id", 150004)
    for key, value in (("mask", sop - 4), ("gmask", sop - 3), ("eos", sop + 1), ("pad", 3)):
        config.setdefault(f"{key}_token_id", value)
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
    if config.get("quantization_bit"):
        raise WorkbookError(
            f"{path} has quantization_bit {config['quantization_bit']}: its int weights need CUDA kernels of their own "
            "that no exporter can follow; take the fp16 checkpoint, THUDM/chatglm-6b."
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
