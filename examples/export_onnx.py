"""Export ChatGLM-6B to ONNX with PyTorch alone: python export_onnx.py CHECKPOINT OUTPUT.onnx

The checkpoint's modeling_chatglm.py must be free of export blockers: notebook 02 tells which there are, `glmtrt patch`
removes them. It takes 4 bytes of memory a weight, and writes all weights once more, to OUTPUT.onnx.data.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoConfig
from transformers.dynamic_module_utils import get_class_from_dynamic_module


def load(directory):
    """The model in fp16. AutoModel.from_pretrained expects of a class what this one, of 2023, does not have."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=True, return_dict=False)
    model = get_class_from_dynamic_module(config.auto_map["AutoModel"], directory)(config).half().eval()
    shards = map(load_file, Path(directory).glob("*.safetensors"))
    model.load_state_dict({name: tensor for shard in shards for name, tensor in shard.items()})
    return model


def export_onnx(model, onnx_path):
    layers, heads = range(model.config.num_layers), model.config.num_attention_heads
    shape = 3, 2, heads, model.config.hidden_size // heads  # past, batch, heads, size of a head
    # Only shapes matter. A size of 1 would become a constant; a tensor given twice would be mixed up with itself.
    example = {
        "input_ids": torch.zeros(2, 5, dtype=torch.int64),
        "position_ids": torch.zeros(2, 2, 5, dtype=torch.int64),
        "attention_mask": torch.zeros(2, 1, 5, 3 + 5, dtype=torch.bool),
        "past_key_values": [[torch.zeros(shape, dtype=model.dtype) for _ in "kv"] for _ in layers],
    }
    batch, sequence, past = map(torch.export.Dim, ("batch", "sequence", "past"))
    dynamic = {
        "input_ids": {0: batch, 1: sequence},
        "position_ids": {0: batch, 2: sequence},
        "attention_mask": {0: batch, 2: sequence, 3: torch.export.Dim.DYNAMIC},  # past + sequence
        "past_key_values": [[{0: past, 1: batch} for _ in "kv"] for _ in layers],
    }
    cache = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    names = [*list(example)[:3], *(f"past_key_values.{name}" for name in cache)]
    results = ["logits", *(f"present.{name}" for name in cache)]
    options = {"input_names": names, "output_names": results, "dynamic_shapes": dynamic, "verbose": False}
    torch.onnx.export(model, kwargs=example, f=onnx_path, dynamo=True, external_data=True, **options)


if __name__ == "__main__":
    export_onnx(load(sys.argv[1]), sys.argv[2])
