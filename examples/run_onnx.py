"""Answer a question with ONNX Runtime alone: python run_onnx.py CHECKPOINT MODEL.onnx QUESTION

The graph is that of export_onnx.py or of `glmtrt export`, in fp16. Of the checkpoint it reads config.json and
ice_text.model.
"""

import json
import os
import sys
from pathlib import Path

import numpy as np
from sentencepiece import SentencePieceProcessor

os.environ["ORT_DISABLE_TELEMETRY"] = "1"  # since 1.31 its import starts an uploader otherwise
import onnxruntime


def open_onnx(onnx_path):
    """A function from the inputs of a call to its outputs, both by name."""
    onnxruntime.set_default_logger_severity(3)  # errors; its warnings tell of nodes that it does not fold
    session = onnxruntime.InferenceSession(onnx_path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def answer(directory, run, question):
    config = json.loads((Path(directory) / "config.json").read_text())
    tokenizer = SentencePieceProcessor(str(Path(directory) / "ice_text.model"))
    cache = [f"{layer}.{part}" for layer in range(config["num_layers"]) for part in ("key", "value")]
    heads = config["num_attention_heads"]
    # Prefill: the whole prompt at once, on an empty cache. [gMASK] and <sop> end it.
    ids = [*tokenizer.encode(question), config["gmask_token_id"], config["bos_token_id"]]
    gmask = len(ids) - 2
    positions = [[*range(gmask + 1), gmask], [0] * (gmask + 1) + [1]]
    mask = np.zeros((1, 1, len(ids), len(ids)), bool)
    mask[..., :-1, -1] = True  # True hides: the prompt does not see <sop>
    # Decode: one token at a time. What came out as present goes in as past.
    empty = np.zeros((0, 1, heads, config["hidden_size"] // heads), np.float16)
    past = {f"past_key_values.{name}": empty for name in cache}
    new, tokens = ids, []
    while len(tokens) < 200:
        step = {"input_ids": np.array([new]), "position_ids": np.array([positions]), "attention_mask": mask}
        results = run(step | past)
        new = [int(results["logits"][0, -1].argmax())]
        if new == [config["eos_token_id"]]:
            break
        tokens += new
        past = {f"past_key_values.{name}": results[f"present.{name}"] for name in cache}
        positions, mask = [[gmask], [len(tokens) + 1]], np.zeros((1, 1, 1, len(ids) + len(tokens)), bool)
    return tokenizer.decode(tokens)


if __name__ == "__main__":
    print(answer(sys.argv[1], open_onnx(sys.argv[2]), sys.argv[3]))
