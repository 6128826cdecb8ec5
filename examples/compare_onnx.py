"""Compare an ONNX file with PyTorch on random inputs: python compare_onnx.py CHECKPOINT MODEL.onnx

The shapes are others than the exported example's. Error: the largest difference of any output, as a part of its largest
value. In fp16 some 1e-3 is rounding, and 1e-2 after a long past, where the angles of the rotary embedding are rounded;
in fp32 it is 1e-5. A wrong graph gives 1e-1 and more.
"""

import sys

import numpy as np
import torch
from export_onnx import load
from run_onnx import open_onnx


def compare(model, run, batch, sequence, past):
    """The error of every output of a graph, by name. model: PyTorch's, in fp32. run: as of open_onnx."""
    layers, heads, random = range(model.config.num_layers), model.config.num_attention_heads, np.random.default_rng(0)
    names = [f"{layer}.{part}" for layer in layers for part in ("key", "value")]
    shape = past, batch, heads, model.config.hidden_size // heads
    cache = [random.standard_normal(shape).astype(np.float16) for _ in names]
    step = {
        "input_ids": random.integers(6, 1000, (batch, sequence)),
        "position_ids": np.stack([np.arange(past, past + sequence), np.zeros(sequence, int)])[None].repeat(batch, 0),
        "attention_mask": np.triu(np.ones((batch, 1, sequence, past + sequence), bool), past + 1),
    }
    results = run(step | {f"past_key_values.{name}": array for name, array in zip(names, cache, strict=True)})
    pairs = [[torch.from_numpy(array).float() for array in cache[2 * layer : 2 * layer + 2]] for layer in layers]
    with torch.inference_mode():
        inputs = {name: torch.from_numpy(array) for name, array in step.items()}
        logits, presents = model(**inputs, past_key_values=pairs, use_cache=True)[:2]
    outputs = [logits, *(tensor for layer in presents for tensor in layer)]
    expected = dict(zip(["logits", *(f"present.{name}" for name in names)], outputs, strict=True))
    return {n: float(abs(results[n] - e.numpy()).max() / e.abs().max()) for n, e in expected.items()}


if __name__ == "__main__":
    model, run = load(sys.argv[1]).float(), open_onnx(sys.argv[2])
    for shape in ((1, 9, 0), (3, 4, 7), (1, 1, 100)):
        errors = compare(model, run, *shape)
        worst = max(errors, key=errors.get)
        print(f"batch {shape[0]}, sequence {shape[1]}, past {shape[2]}: {errors[worst]:.1e} at {worst}")
