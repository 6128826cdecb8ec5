"""The PyTorch yardstick of the bench computes what the checkpoint's own code computes."""

from pathlib import Path

import torch

from glmtrt_helpers.bench.static_decoder import StaticDecoder
from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import open_checkpoint
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.sessions.pytorch import TorchSession


def test_logits_of_a_padded_prompt_and_the_steps_behind_it(_random_master: Path) -> None:
    checkpoint = open_checkpoint(_random_master)
    decoder = StaticDecoder.load(checkpoint, torch.float32)
    wanted = TorchSession(loading.load_model(checkpoint))
    tokenizer = load_tokenizer(checkpoint)
    call = positions_and_mask.prefill(checkpoint, [tokenizer.encode("the good dog"), tokenizer.encode("a")])
    cache, past = decoder.empty_cache(2, 40), 0
    for _ in range(5):
        given = {name: torch.from_numpy(array) for name, array in call.items()}
        with torch.inference_mode():
            token, logits = decoder.step(*given.values(), cache, past)  # type: ignore[arg-type]
        right = torch.from_numpy(wanted.step(call))
        assert torch.allclose(logits[:, :], right, atol=1e-4) and token.flatten().tolist() == right.argmax(-1).tolist()
        past += call["input_ids"].shape[1]
        call = positions_and_mask.decode(call, token.flatten().numpy())
    one = positions_and_mask.prefill(checkpoint, [tokenizer.encode("a")])
    wanted.reset()
    wanted.step(one)
    cache = decoder.empty_cache(1, 40)
    with torch.inference_mode():
        decoder.step(*(torch.from_numpy(array) for array in one.values()), cache, 0)  # type: ignore[arg-type]
        after = positions_and_mask.decode(one, one["input_ids"][:, -1])
        ids, positions = (torch.from_numpy(after[name]) for name in ("input_ids", "position_ids"))
        _, logits = decoder.step(ids, positions, None, cache, one["input_ids"].shape[1])
    assert torch.allclose(logits, torch.from_numpy(wanted.step(after)), atol=1e-4)
