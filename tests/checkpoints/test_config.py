"""config.json: other models, bad fields and fields that contradict each other are refused, each in one sentence."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import SHARD, refusal, to_bin

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint, unread_note
from glmtrt_helpers.checkpoints.config import read_config
from glmtrt_helpers.checkpoints.shards import to_safetensors

SECOND = SHARD.replace("00001", "00002", 1)


def change(directory: Path, changes: dict[str, object]) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model_type": "llama"}, "'llama'"),
        ({"multi_query_attention": True}, "ChatGLM2"),
        ({"image_length": 32}, "VisualGLM"),
        ({"quantization_bit": 3}, "quantization_bit 3"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised by awq"),
        ({"pre_seq_len": 128}, "pre_seq_len 128"),
        ({"position_encoding_2d": False}, "position_encoding_2d"),
        ({"num_layers": None}, "$.num_layers"),
        ({"num_layers": 0}, "$.num_layers"),
        ({"num_layers": 2.0}, "$.num_layers"),
        ({"num_layers": True}, "$.num_layers"),
        ({"num_layers": 10**30}, "num_layers"),
        ({"vocab_size": "1760"}, "$.vocab_size"),
        ({"max_sequence_length": -1}, "$.max_sequence_length"),
        ({"layernorm_epsilon": 0}, "$.layernorm_epsilon"),
        ({"inner_hidden_size": []}, "$.inner_hidden_size"),
        ({"num_layers": 3}, "transformer.layers.2.attention.query_key_value.weight"),
        ({"num_layers": 1}, "of a layer that config.json does not have"),
        ({"hidden_size": 128}, "has shape"),
        ({"vocab_size": 4096}, "has shape"),
        ({"num_attention_heads": 8}, "rotary_emb.inv_freq"),
        ({"num_attention_heads": 2}, "rotary_emb.inv_freq"),
        ({"num_attention_heads": 3}, "num_attention_heads 3"),
        ({"num_attention_heads": 64}, "num_attention_heads 64"),
        ({"eos_token_id": 2}, "eos_token_id is 2"),
        ({"eos_token_id": None}, "$.eos_token_id"),
        ({"eos_token_id": [5]}, "$.eos_token_id"),
        ({"eos_token_id": -1}, "$.eos_token_id"),
        ({"gmask_token_id": 0}, "gmask_token_id is 0"),
        ({"mask_token_id": 1}, "mask_token_id is 1"),
        ({"bos_token_id": "x"}, "$.bos_token_id"),
        ({"bos_token_id": 3}, "eos_token_id is"),
        ({"pad_token_id": 10**6}, "beyond vocab_size"),
    ],
)
def test_refuses_other_models_and_bad_fields(tiny_random: Path, changes: dict[str, object], says: str) -> None:
    change(tiny_random, changes)
    assert says in refusal(tiny_random)


def test_a_configuration_of_march_2023_is_completed(tiny_random: Path) -> None:
    path = tiny_random / "config.json"
    config = json.loads(path.read_text())
    kept = {
        key: value for key, value in config.items() if key in ("bos_token_id", "eos_token_id") or "token" not in key
    }
    path.write_text(json.dumps(kept))
    assert {key: read_config(path)[key] for key in config} == config


def rewrite(directory: Path, shard: str, rename: dict[str, str | None], **more: torch.Tensor) -> None:
    """Save a shard again with tensors renamed, dropped (None) or added, and the index to match."""
    state = load_file(directory / shard)
    kept = {rename.get(name, name): tensor for name, tensor in state.items()}
    state = {str(name): tensor for name, tensor in kept.items() if name is not None} | more
    save_file(state, directory / shard)
    index = directory / "model.safetensors.index.json"
    others = {name: file for name, file in json.loads(index.read_text())["weight_map"].items() if file != shard}
    index.write_text(json.dumps({"weight_map": others | dict.fromkeys(state, shard)}))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("base_model.model.transformer.layers.0.attention.query_key_value.lora_A.weight", "LoRA"),
        ("transformer.layers.0.attention.dense.weight_scale", "but that weight is not quantised"),
        ("transformer.layers.2.input_layernorm.weight", "of a layer that config.json does not have"),
    ],
)
def test_tensors_that_make_it_another_model_are_refused(tiny_random: Path, name: str, says: str) -> None:
    rewrite(tiny_random, SECOND, {}, **{name: torch.zeros(2)})
    message = refusal(tiny_random)
    assert says in message and name in message and SECOND in message


def test_what_nothing_reads_is_said(tiny_random: Path) -> None:
    assert unread_note(open_checkpoint(tiny_random)) == ""
    rewrite(
        tiny_random, SECOND, {}, **{"transformer.prefix_encoder.embedding.weight": torch.zeros(2), "x": torch.ones(1)}
    )
    note = unread_note(open_checkpoint(tiny_random))
    assert "'transformer.prefix_encoder.embedding.weight' and 1 more" in note
    (tiny_random / "adapter_config.json").write_text("{}")
    assert "adapter, which is not applied" in unread_note(open_checkpoint(tiny_random))


@pytest.mark.parametrize("as_bin", [False, True])
def test_an_lm_head_that_is_not_stored_is_the_embedding(tiny_random: Path, as_bin: bool) -> None:
    rewrite(tiny_random, SECOND, {"lm_head.weight": None})
    if as_bin:
        to_bin(tiny_random)
    model = loading.load_model(open_checkpoint(tiny_random), torch.float16)
    assert torch.equal(model.lm_head.weight, model.transformer.word_embeddings.weight)
    if as_bin:
        to_safetensors(tiny_random)
        assert (
            "lm_head.weight" not in json.loads((tiny_random / "model.safetensors.index.json").read_text())["weight_map"]
        )
        again = loading.load_model(open_checkpoint(tiny_random), torch.float16)
        assert torch.equal(again.lm_head.weight, model.lm_head.weight)
