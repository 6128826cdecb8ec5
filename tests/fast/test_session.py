"""The session over the parts: what is hidden, which weights go where, that a chat cannot tell it from the classical."""

from pathlib import Path

import numpy as np
import pytest
import torch

from glmtrt_helpers.checkpoints import loading
from glmtrt_helpers.checkpoints.checkpoint import Checkpoint, open_checkpoint
from glmtrt_helpers.checkpoints.shards import StoredTensor
from glmtrt_helpers.checkpoints.tokenizer import load_tokenizer
from glmtrt_helpers.checkpoints.working_copy import make_working_copy
from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.fast import backends as fast_backends
from glmtrt_helpers.fast import session as fast_session
from glmtrt_helpers.fast.decoder import export_fast
from glmtrt_helpers.inputs import positions_and_mask
from glmtrt_helpers.sessions.base import Limits
from glmtrt_helpers.sessions.decode_loop import generate
from glmtrt_helpers.sessions.pytorch import TorchSession


@pytest.fixture(scope="module")
def checkpoint(_random_master: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    opened = open_checkpoint(make_working_copy(_random_master, tmp_path_factory.mktemp("run")))
    export_fast(opened, "fp32")
    return opened


def test_weights_of_a_layer_and_of_the_one_before() -> None:
    names = ["stream", "leave.mlp.dense_4h_to_h.bias", "enter.attention.query_key_value.weight", "lm_head.weight"]
    assert fast_session.weight_names(names, 3) == {
        "leave.mlp.dense_4h_to_h.bias": "transformer.layers.2.mlp.dense_4h_to_h.bias",
        "enter.attention.query_key_value.weight": "transformer.layers.3.attention.query_key_value.weight",
        "lm_head.weight": "lm_head.weight",
    }


@pytest.mark.parametrize("stored", ["F16", "BF16", "F32"])
def test_weights_are_read_as_they_are_stored(checkpoint: Checkpoint, tmp_path: Path, stored: str) -> None:
    kinds = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
    tensor = torch.randn(3, 5).to(kinds[stored])
    (tmp_path / "shard").write_bytes(b"head" * 3 + tensor.view(torch.uint8).numpy().tobytes())
    entry = StoredTensor(tmp_path / "shard", "weight", stored, (3, 5), 12, tensor.nbytes)
    odd = Checkpoint(tmp_path, checkpoint.config, {"weight": entry})
    for dtype in ("f2", "f4"):
        read = fast_session.read_weight(odd, "weight", np.dtype(dtype))
        assert read.dtype == dtype and np.array_equal(read, tensor.float().numpy().astype(dtype))


def test_a_mask_says_what_is_padding_and_what_sees_what(checkpoint: Checkpoint) -> None:
    tokenizer = load_tokenizer(checkpoint)
    prompts = [tokenizer.encode("a"), tokenizer.encode("the good dog")]
    call = positions_and_mask.prefill(checkpoint, prompts)
    length = call["input_ids"].shape[1]
    padding = [length - len(prompts[0]), 0]
    assert padding[0] > 0 and prompts[0][-1] == checkpoint.config["bos_token_id"]
    skip, context = fast_session.read_mask(call, 0)
    assert skip.tolist() == padding and context.tolist() == [length - 1] * 2, "all before <sop> see one another"
    skip, context = fast_session.read_mask(positions_and_mask.decode(call, np.array([7, 8])), length)
    assert skip.tolist() == padding and context.tolist() == [length + 1] * 2
    # Behind <sop> each sees what came before it; what padding sees means nothing.
    longer = positions_and_mask.prefill(checkpoint, [[*prompt, 7, 8, 9] for prompt in prompts])
    longer["attention_mask"][0, 0, 0] = False
    assert [part.tolist() for part in fast_session.read_mask(longer, 0)] == [padding, [length - 1] * 2]
    for row, columns in ((1, [2]), (length, [3]), (length, [length + 1]), (length, [3, length + 1])):
        wrong = {name: array.copy() for name, array in longer.items()}
        wrong["attention_mask"][1, 0, row, columns] ^= True
        with pytest.raises(WorkbookError, match=r"takes masks of a chat: padding .* take another backend"):
            fast_session.read_mask(wrong, 0)
    hole = positions_and_mask.decode(call, np.array([7, 8]))
    hole["attention_mask"][1, 0, 0, 1] = True
    with pytest.raises(WorkbookError, match="takes masks of a chat"):
        fast_session.read_mask(hole, length)
    with pytest.raises(WorkbookError, match="tokens, where 2 lie in the cache and 1 are new"):
        fast_session.read_mask(hole, 2)
    both = {"attention_mask": np.zeros((1, 1, 2, 5), np.bool_)}
    with pytest.raises(WorkbookError, match="takes masks of a chat"):
        fast_session.read_mask(both, 3)  # two new ones on a past that see each other


def test_other_padding_than_the_cache_has(checkpoint: Checkpoint) -> None:
    session = fast_backends.open_session(checkpoint, "ort", "fp32")
    tokenizer = load_tokenizer(checkpoint)
    call = positions_and_mask.prefill(checkpoint, [tokenizer.encode("a"), tokenizer.encode("the good dog")])
    session.step(call)
    after = positions_and_mask.decode(call, np.array([7, 8]))
    after["attention_mask"][0, 0, 0] = False
    with pytest.raises(WorkbookError, match="the cache holds other padding than the call's mask hides"):
        session.step(after)


def test_a_long_batch_is_the_classical_one(checkpoint: Checkpoint) -> None:
    """Left-padded prompts of 120 and 60 tokens and 28 tokens behind them."""
    tokenizer = load_tokenizer(checkpoint)
    prompts = [tokenizer.encode("the good dog " * count) for count in (11, 4)]
    assert 100 < len(prompts[0]) < 128 < len(prompts[0]) + 28
    wanted = TorchSession(loading.load_model(checkpoint))
    got = fast_backends.open_session(checkpoint, "ort", "fp32")
    length = len(prompts[0]) + 28
    assert list(generate(got, checkpoint, prompts, max_length=length)) == list(
        generate(wanted, checkpoint, prompts, max_length=length)
    )
    assert isinstance(got, fast_session.FastSession) and got.past == length - 1
    got.reset()
    assert got.past == 0
    # A second talk does not see the rows of the first.
    call = positions_and_mask.prefill(checkpoint, [prompts[1]])
    wanted.reset()
    assert np.allclose(got.step(call), wanted.step(call), atol=1e-4)


def test_a_cache_that_is_full_or_of_other_rows(checkpoint: Checkpoint) -> None:
    session = fast_backends.open_session(checkpoint, "ort", "fp32")
    tokenizer = load_tokenizer(checkpoint)
    call = positions_and_mask.prefill(checkpoint, [tokenizer.encode("a")])
    session.step(call)
    with pytest.raises(WorkbookError, match="the cache holds 1 rows, the call has 2"):
        session.step(positions_and_mask.prefill(checkpoint, [tokenizer.encode("a")] * 2))
    session.reset()
    session.limits = Limits(total=len(call["input_ids"][0]))
    session.step(call)
    with pytest.raises(WorkbookError, match=r"\d tokens in the cache and 1 new ones are more than the \d"):
        session.step(positions_and_mask.decode(call, np.array([7])))


def test_what_is_missing_is_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        WorkbookError, match=r"model.fp16.fast.first.onnx is missing: .*`glmtrt export .*chatglm_random --fast`"
    ):
        fast_backends.open_session(checkpoint, "ort", "fp16")
    with pytest.raises(WorkbookError, match=r"model.fp32.fast.first.plan is missing.* --dtype fp32 --fast`"):
        fast_backends.open_session(checkpoint, "tensorrt", "fp32")
    with pytest.raises(WorkbookError, match="the fast decoder does not run on torch"):
        fast_backends.open_session(checkpoint, "torch", "fp32")
    assert set(fast_backends.unavailable(checkpoint)) == {"torch", "ort", "tensorrt"}
    assert fast_backends.best_backend(checkpoint, "fp32")[0] == "ort"
    assert not fast_session.part_path(checkpoint, "fp16", "first").exists()
