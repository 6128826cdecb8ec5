"""config.json: other models and bad fields are refused, each in one sentence."""

import json
from pathlib import Path

import pytest
from support.checkpoints import refusal


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
def test_refuses_other_models_and_bad_fields(tiny_random: Path, changes: dict[str, object], says: str) -> None:
    path = tiny_random / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert says in refusal(tiny_random)
