"""Sessions and greedy decoding on a random model; the trained one is tried in test_standin and test_cli."""

from pathlib import Path

import pytest
import torch

from glmtrt_helpers import checkpoints, inputs, runtime
from glmtrt_helpers.errors import WorkbookError


def test_greedy_equals_one_forward_over_the_whole_text(_random_master: Path) -> None:
    """Cached decoding gives the tokens that the model gives when it reads prompt and answer at once."""
    checkpoint = checkpoints.open_checkpoint(_random_master)
    session = runtime.TorchSession(checkpoints.load_model(checkpoint))
    prompt = checkpoints.load_tokenizer(checkpoint).encode("the good dog")
    seen: list[int] = []
    answer = runtime.greedy(session, checkpoint, prompt, max_length=len(prompt) + 12, on_token=seen.append)
    assert answer == seen and len(answer) == 12
    logits = session.run(inputs.prompt_inputs(checkpoint, [prompt + answer]))["logits"][0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_greedy_stops_at_eop_and_at_the_limit(_random_master: Path) -> None:
    checkpoint = checkpoints.open_checkpoint(_random_master)
    eop = checkpoint.config["eos_token_id"]

    class Scripted:
        dtype = torch.float32
        script = iter([7, 8, eop, 9])

        def run(self, flat: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            logits = torch.zeros(1, flat["input_ids"].shape[1], checkpoint.vocab_size)
            logits[0, -1, next(self.script)] = 1.0
            return {"logits": logits}

    prompt = checkpoints.load_tokenizer(checkpoint).encode("a")
    assert runtime.greedy(Scripted(), checkpoint, prompt) == [7, 8]
    with pytest.raises(WorkbookError, match="the limit is 4"):
        runtime.greedy(Scripted(), checkpoint, prompt, max_length=4)


def test_missing_and_broken_onnx_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WorkbookError, match="03_export_onnx"):
        runtime.OrtSession(tmp_path / "model.fp16.onnx")
    (tmp_path / "model.fp16.onnx").write_bytes(b"garbage")
    with pytest.raises(WorkbookError, match="does not load"):
        runtime.OrtSession(tmp_path / "model.fp16.onnx")
